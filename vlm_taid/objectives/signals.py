"""What a teacher gives at the paired positions.

Legend: N answer tokens, n rows of a chunk, G teacher width, K listed tokens, C shared vocabulary, B buckets: the
shared tokens, or the listed ones and their tail, each with the rest where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .head import Head
from .products import logits


@dataclass(frozen=True)
class HiddenSignal:
    """A live teacher's signal.

    Args:
        hidden_NG: its last hidden states at the paired positions.
        head: its language head.
    """

    hidden_NG: Tensor
    head: Head


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's K most probable tokens at each position, and the mass of all others: what a cache on disk holds.

    The objectives then work on K + 1 buckets: each listed token, and one tail that holds every other token of the
    shared vocabulary (and its rest). The student's logit of the tail is the logsumexp over those tokens, so its
    gradient reaches each of them by its share of the student's tail. TAID interpolates between the logits of buckets,
    the teacher's being its log-probabilities.

    Args:
        ids_NK: indices into the shared vocabulary, in the order of the heads' ``columns``; a head's rest bucket is
            index C. Distinct within a row.
        logp_NK: their log-probabilities over the shared vocabulary and its rest.
        tail_N: probability (not its logarithm) of all others.
    """

    ids_NK: Tensor
    logp_NK: Tensor
    tail_N: Tensor


@dataclass(frozen=True)
class MixedSignal:
    """Several live teachers over one shared vocabulary.

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


TeacherSignal = HiddenSignal | TopKSignal | MixedSignal


def check(signal: TeacherSignal, head: Head) -> None:
    """Refuses a signal that is not over the student head's shared vocabulary.

    Raises:
        ValueError: the numbers of columns differ, or only one head has a rest.
    """
    if isinstance(signal, MixedSignal):
        for one in signal.signals:
            check(one, head)
    elif isinstance(signal, HiddenSignal):
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
        return bucket_logits(signal.hidden_NG[at], signal.head)
    if isinstance(signal, TopKSignal):
        tail_n1 = signal.tail_N[at].float().clamp_min(torch.finfo(torch.float32).tiny).log()[:, None]
        return torch.cat([signal.logp_NK[at].float(), tail_n1], -1)
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
