"""What a training log line says, summed between two of them."""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from .errors import InputError
from .objectives import LinearDistillationOutput, TAIDSchedule


@dataclass
class Window:
    """What is summed over all ranks between two logs.

    Args:
        tokens: answer tokens.
        kl: sum of their KL, in nats.
        rest: sum of the teacher's probability of the rest bucket.
        agreed: tokens at which both models' most probable token is the same.
        diagnostics: sums by name, where they are asked for.
        pairing: rows, content shares, first tokens unpaired, identical-next shares (``PairedBatch``).
        sampled_rows, sample_fallbacks: rows that the student was to answer, those that kept the data's answer.
        since: when it began, on the clock of ``time.perf_counter``.
    """

    tokens: float = 0.0
    kl: float = 0.0
    rest: float = 0.0
    agreed: float = 0.0
    diagnostics: Counter[str] = field(default_factory=Counter)
    pairing: list[float] = field(default_factory=lambda: [0.0] * 4)
    sampled_rows: float = 0.0
    sample_fallbacks: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add_pairing(self, pairing: list[float]) -> None:
        self.pairing = [a + b for a, b in zip(self.pairing, pairing, strict=True)]

    def means(self, *, teacher: bool, paired: bool, rest: bool, rollout: bool) -> dict[str, float]:
        """Token means, shares, and throughput until now.

        Args:
            teacher: there is one, so there are a KL and an agreement.
            paired: the models have streams of their own, which were paired.
            rest: their vocabularies differ, and what only one has is in a rest bucket.
            rollout: the student samples answers.
        """
        means = {}
        if teacher:
            means["kl"] = self.kl / max(self.tokens, 1.0)
            means["top1_agreement"] = self.agreed / max(self.tokens, 1.0)
        means |= {name: value / max(self.tokens, 1.0) for name, value in self.diagnostics.items()}
        if paired:
            rows, share, first_unpaired, identical = self.pairing
            means["paired_share"] = share / max(rows, 1.0)
            means["first_tokens_unpaired"] = first_unpaired
            means["identical_next_share"] = identical / max(rows, 1.0)
        if rest:
            means["teacher_rest_mass"] = self.rest / max(self.tokens, 1.0)
        if rollout:
            means |= {"sampled_rows": self.sampled_rows, "sample_fallbacks": self.sample_fallbacks}
        means["answer_tokens"] = self.tokens
        means["answer_tokens_per_second"] = self.tokens / max(time.perf_counter() - self.since, 1e-9)
        return means


def row_sums(output: LinearDistillationOutput, row_of_N: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Each held-out row's sums of loss, cross-entropy form, tokens and agreeing tokens, [B, 4], fp64."""
    one_N = torch.ones_like(output.loss_N)
    agreed_N = torch.zeros_like(one_N) if output.agreement_N is None else output.agreement_N
    values_N4 = torch.stack([output.loss_N, output.ce_N, one_N, agreed_N], -1).double()
    return values_N4.new_zeros(num_rows, 4).index_add_(0, row_of_N, values_N4)


def held_out_means(sums_4: torch.Tensor, prefix: str, *, teacher: bool) -> dict[str, float]:
    """Token means of the sums of all rows, under names that begin with a prefix; an agreement if there is a teacher."""
    loss, ce, tokens, agreed = sums_4.tolist()
    means = {"loss": loss / max(tokens, 1.0), "cross_entropy": ce / max(tokens, 1.0), "answer_tokens": tokens}
    if teacher:
        means["top1_agreement"] = agreed / max(tokens, 1.0)
    return {f"{prefix}_{name}": value for name, value in means.items()}


@dataclass
class RestWatch:
    """Holds the teacher's mean mass in the rest bucket against two limits, from a number of answer tokens on.

    What is in the rest, the student is not taught: it learns how much there is, not which tokens.
    """

    mass: float = 0.0
    tokens: float = 0.0
    warned: bool = False
    WARN, REFUSE, AFTER = 0.1, 0.5, 500

    def add(self, mass: float, tokens: float) -> str | None:
        """Counts an optimizer step, over all ranks.

        Returns:
            A warning, once, when over 10 % of the teacher's mass is in the rest.

        Raises:
            InputError: over half is.
        """
        self.mass, self.tokens = self.mass + mass, self.tokens + tokens
        mean = self.mass / max(self.tokens, 1.0)
        if self.tokens < self.AFTER or mean <= self.WARN:
            return None
        said = f"{mean:.0%} of the teacher's probability is on tokens that the student's tokenizer does not have"
        if mean > self.REFUSE:
            raise InputError(
                f"{said}: choose a student of the teacher's family, or one whose tokenizer is closer to it"
            )
        if self.warned:
            return None
        self.warned = True
        return f"warning: {said}; vlm-taid inspect shows which"


def peak_memory(device: torch.device) -> float:
    """The most memory that this process has held so far, in GiB.

    Args:
        device: on an accelerator, what torch's allocator gave out there at most; on a CPU the process's resident
            memory at its peak, without that of its DataLoader workers.
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)  # macOS counts bytes, Linux KiB


def schedule_values(schedule: TAIDSchedule, step: int, num_steps: int) -> dict[str, float]:
    """t, what it is close to in closed form, and what moved it, after ``step`` of ``num_steps``."""
    return {
        "t": schedule.t,
        "t_closed_form": schedule.closed_form(step, num_steps),
        "delta_t": schedule.delta_t,
        "momentum": schedule.momentum,
        "skipped_updates": schedule.skipped_updates,
    }
