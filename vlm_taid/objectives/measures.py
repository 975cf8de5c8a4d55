"""What a language head gives at held-out positions: surprise, KL to a teacher, equal first choices; no gradient.

Legend: N positions, n rows of a chunk, H student width, G teacher width, V rows of a head, B buckets: the shared
tokens, with the rest where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .head import Head
from .linear import MEMORY, rows_at_a_time
from .products import fp32_results, logits
from .signals import HiddenSignal, check


@dataclass(frozen=True)
class Measures:
    """One value a position, fp32.

    nll_N, teacher_nll_N: minus the log-probability of the next token, in nats, over all rows of the model's own head.
    kl_N: KL(teacher || student) in nats, as the objective ``fkl`` has it.
    same_top_N: 1 where both models' most probable shared token is the same, else 0; 0 too where one of them holds the
        rest bucket for more probable.
    """

    nll_N: Tensor
    teacher_nll_N: Tensor | None = None
    kl_N: Tensor | None = None
    same_top_N: Tensor | None = None


@torch.no_grad()
def measure(
    hidden_NH: Tensor,
    head: Head,
    labels_N: Tensor,
    teacher: HiddenSignal | None = None,
    teacher_labels_N: Tensor | None = None,
    *,
    memory: float = MEMORY,
) -> Measures:
    """Measures N positions from hidden states, without their logits ever being in memory at once.

    Args:
        hidden_NH: the model's hidden states at the predicting positions.
        head: its head; with a teacher, its columns name the shared vocabulary.
        labels_N: the model's ids of the next tokens.
        teacher: its hidden states [N, G] at the same positions, and its head over the same shared vocabulary.
        teacher_labels_N: the teacher's ids of the next tokens; None: they are the model's.
        memory: MiB for what is kept of a chunk of rows.

    Raises:
        ValueError: the two heads' columns differ in number, or only one has a rest.
    """
    if teacher is not None:
        check(teacher, head)
    theirs_N = labels_N if teacher_labels_N is None else teacher_labels_N
    widest = max(head.weight.shape[0], 0 if teacher is None else teacher.head.weight.shape[0])
    chunk = rows_at_a_time(widest, memory, streamed=False)
    values_XN = hidden_NH.new_zeros(4, hidden_NH.shape[0], dtype=torch.float32)
    with torch.autocast(hidden_NH.device.type, enabled=False), fp32_results(head.weight):
        for start in range(0, hidden_NH.shape[0], chunk):
            at = slice(start, start + chunk)
            values_XN[0, at], log_q_nB = _own(hidden_NH[at], head, labels_N[at])
            if teacher is None:
                continue
            values_XN[1, at], log_p_nB = _own(teacher.hidden_NG[at], teacher.head, theirs_N[at])
            log_p_nB = log_p_nB.log_softmax(-1)  # the target is over the buckets alone
            top_n = log_q_nB.argmax(-1)
            values_XN[3, at] = ((top_n == log_p_nB.argmax(-1)) & (top_n < head.width)).float()
            values_XN[2, at] = torch.linalg.vecdot(log_p_nB.exp(), log_p_nB - log_q_nB)
    if teacher is None:
        return Measures(values_XN[0])
    return Measures(*values_XN)


def _own(hidden_nH: Tensor, head: Head, labels_n: Tensor) -> tuple[Tensor, Tensor]:
    """Minus the labels' log-probabilities [n], and the buckets' [n, B], all normalised over the head's V rows."""
    log_nV = head.curve(logits(hidden_nH, head.weight, head.bias, None))
    log_nV -= log_nV.logsumexp(-1, keepdim=True)
    nll_n = -log_nV.gather(-1, labels_n[:, None])[:, 0]
    log_nB = log_nV if head.columns is None else log_nV[:, head.columns]
    if head.rest is not None and head.has_rest:
        log_nB = torch.cat([log_nB, log_nV[:, head.rest].logsumexp(-1, keepdim=True)], -1)
    return nll_n, log_nB
