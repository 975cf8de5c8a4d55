"""TAID's moving target and the schedule of its interpolation (arXiv 2501.16937, section 3).

Legend: N answer tokens, V shared vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


def interpolated_logits(student_NV: Tensor, teacher_NV: Tensor, t: float) -> Tensor:
    """The target's logits ``(1 - t) z_s + t z_t``; the student's part carries no gradient. Shape [N, V]."""
    return torch.lerp(student_NV.detach(), teacher_NV.detach(), t)


@dataclass
class TAIDSchedule:
    """The interpolation t of TAID: a line from ``t_start`` to ``t_end``, or ahead of it as fast as the loss falls.

    ``update`` is called once an optimizer step with the token mean of the signal over all ranks and micro-batches.
    The state is plain numbers, so that it is saved exactly. ``signal`` and ``gain`` are ours; the paper has the KL
    in its formula, its published code the cross-entropy form, and neither has a gain.

    Args:
        t_start: interpolation at the first step (the paper: 0.4 for a Phi-3 teacher, 0.2 for Llama-2 and StableLM).
        t_end: interpolation at the last step.
        alpha: size of the adaptive step.
        beta: momentum of the signal's relative change.
        adaptive: False leaves the line alone.
        signal: what the adaptive term follows: the cross-entropy form of the loss (``ce``) or its KL (``kl``).
        gain: factor on the signal's relative change.

    Source: the paper's algorithm 1, in the order in which the authors' code runs it.
    """

    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    adaptive: bool = True
    signal: Literal["ce", "kl"] = "ce"
    gain: float = 1.0

    def __post_init__(self):
        if not 0.0 <= self.t_start <= self.t_end <= 1.0:
            raise ValueError(f"0 <= t_start <= t_end <= 1 expected, not t_start={self.t_start}, t_end={self.t_end}")
        self.t = self.t_start
        self.previous: float | None = None
        self.momentum = 0.0
        self.delta_t = 0.0
        self.skipped_updates = 0

    def line(self, step: int, num_steps: int) -> float:
        """The linear schedule after ``step`` of ``num_steps`` optimizer steps, from ``t_start`` to ``t_end``."""
        return self.t_start + (self.t_end - self.t_start) * step / max(num_steps, 1)

    def closed_form(self, step: int, num_steps: int) -> float:
        """What t is close to after ``step`` of ``num_steps`` optimizer steps, whatever the loss.

        That is so with the published alpha and beta, where the adaptive term is nearly open-loop.
        """
        if not self.adaptive:
            return self.line(step, num_steps)
        ahead = 1.0 - (1.0 - self.t_start) * math.exp(-self.alpha * step / 2.0)
        return min(self.t_end, max(self.line(step, num_steps), ahead))

    def update(self, signal: float, step: int, num_steps: int) -> float:
        """Moves t after an optimizer step; the loss of that step has used t as it stood before.

        Args:
            signal: token mean of the loss in nats, the same on every rank.
            step: optimizer steps done before this one, from 0.
            num_steps: optimizer steps of the whole run.

        Returns:
            The new t. A signal that is not finite moves nothing and is counted in ``skipped_updates``.
        """
        self.delta_t = 0.0
        if not self.adaptive:
            self.t = min(self.t_end, self.line(step, num_steps))
            return self.t
        if not math.isfinite(signal):
            self.skipped_updates += 1
            return self.t
        if self.previous is not None:
            change = self.gain * (self.previous - signal) / (self.previous + 1e-15)
            self.momentum = self.beta * self.momentum + (1.0 - self.beta) * change
            self.delta_t = self.alpha * _sigmoid(self.momentum) * (1.0 - self.t)
            self.t = min(self.t_end, max(self.line(step, num_steps), self.t + self.delta_t))
        self.previous = signal
        return self.t

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers: what ``load_state_dict`` needs to go on bit for bit."""
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("t", "previous", "momentum", "delta_t", "skipped_updates")


def _sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))
