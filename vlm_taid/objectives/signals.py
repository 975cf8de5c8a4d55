"""What a teacher gives at the paired positions.

Legend: N answer tokens, n rows of a chunk, G teacher width, K corrected tokens, C shared vocabulary, B buckets: the
shared tokens, and the rest where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .head import Head
from .products import logits


@dataclass(frozen=True)
class Corrections:
    """What is added to a head's logits at some buckets of each position.

    Args:
        ids_NK: the buckets: indices into the shared vocabulary, in the order of the heads' ``columns``; a head's rest
            bucket is index C. Distinct within a row.
        added_NK: what is added there.
    """

    ids_NK: Tensor
    added_NK: Tensor


@dataclass(frozen=True)
class HiddenSignal:
    """A live teacher's signal; of a stored one, coefficients in the place of hidden states and a basis as the head.

    Args:
        hidden_NG: its last hidden states at the paired positions.
        head: its language head.
        corrections: of its logits; None for a live teacher.
    """

    hidden_NG: Tensor
    head: Head
    corrections: Corrections | None = None


@dataclass(frozen=True)
class MixedSignal:
    """Several teachers over one shared vocabulary.

    Args:
        signals: their signals.
        weights: one a signal, positive; their proportions count.
        mix: ``logits``: the target is proportional to the weighted geometric mean of the teachers' probabilities;
            ``probabilities``: their weighted mean.
    """

    signals: tuple[HiddenSignal, ...]
    weights: tuple[float, ...]
    mix: Literal["logits", "probabilities"] = "logits"

    def __post_init__(self):
        if len(self.signals) != len(self.weights) or not self.signals:
            raise ValueError(f"{len(self.signals)} teachers have {len(self.weights)} weights: give one to each")
        if min(self.weights) <= 0:
            raise ValueError(f"the teachers' weights must be positive, not {', '.join(map(str, self.weights))}")


TeacherSignal = HiddenSignal | MixedSignal


def check(signal: TeacherSignal, head: Head) -> None:
    """Refuses a signal that is not over the student head's shared vocabulary.

    Raises:
        ValueError: the numbers of columns differ, or only one head has a rest.
    """
    if isinstance(signal, MixedSignal):
        for one in signal.signals:
            check(one, head)
        return
    if head.width != signal.head.width:
        raise ValueError(
            f"the student's head has {head.width} columns in use and the teacher's {signal.head.width}: give both "
            "heads the columns of their SharedVocabulary"
        )
    if head.has_rest != signal.head.has_rest:
        raise ValueError("only one of the two heads has a rest: give it to both, or to none")


def teacher_logits(signal: TeacherSignal, at: slice) -> Tensor:
    """The teacher's logits [n, B] over the buckets at some positions, fp32, in a buffer of their own."""
    if isinstance(signal, HiddenSignal):
        logits_nB = bucket_logits(signal.hidden_NG[at], signal.head)
        if signal.corrections is not None:
            logits_nB.scatter_add_(-1, signal.corrections.ids_NK[at], signal.corrections.added_NK[at].float())
        return logits_nB
    total = sum(signal.weights)
    mixed_nB = None
    for one, weight in zip(signal.signals, signal.weights, strict=True):
        logp_nB = teacher_logits(one, at)
        logp_nB = logp_nB.sub_(logp_nB.logsumexp(-1, keepdim=True))
        part_nB = logp_nB.mul_(weight / total) if signal.mix == "logits" else logp_nB.exp_().mul_(weight / total)
        mixed_nB = part_nB if mixed_nB is None else mixed_nB.add_(part_nB)
    assert mixed_nB is not None
    # an underflowed probability becomes the smallest one, not log 0
    return mixed_nB if signal.mix == "logits" else mixed_nB.clamp_min_(torch.finfo(mixed_nB.dtype).tiny).log_()


def bucket_logits(hidden_nH: Tensor, head: Head) -> Tensor:
    """fp32 logits of a head's columns, and of its rest where it has one; rows of neither are not multiplied."""
    if not head.has_rest:
        return head.curve(logits(hidden_nH, head.weight, head.bias, head.columns))
    assert head.rest is not None
    out_nB = hidden_nH.new_empty(hidden_nH.shape[0], head.width + 1, dtype=torch.float32)
    rest_n = out_nB[:, -1].fill_(-torch.inf)
    tile = TILE
    for start in range(0, len(head.rest), tile):
        rest_nt = head.curve(logits(hidden_nH, head.weight, head.bias, head.rest[start : start + tile]))
        torch.logaddexp(rest_n, rest_nt.logsumexp(-1), out=rest_n)
    logits(hidden_nH, head.weight, head.bias, head.columns, out=out_nB[:, :-1])
    head.curve(out_nB[:, :-1])
    return out_nB


TILE = 16384  # rest rows at a time
