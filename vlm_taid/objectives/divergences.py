"""The objectives, dense and in fp32: what every faster path is held against.

Each function takes the logits of N supervised positions over the same V tokens and returns one value in nats a
position; autograd gives the gradient in the student's logits. Formulas: p = softmax(teacher), q = softmax(student).

Legend: N answer tokens, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from .taid import interpolated_logits


def kl(target_logits_NV: Tensor, logits_NV: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)) a position, [N]."""
    return F.kl_div(logits_NV.log_softmax(-1), target_logits_NV.log_softmax(-1), reduction="none", log_target=True).sum(
        -1
    )


def sft(student_NV: Tensor, teacher_NV: Tensor | None, *, labels_N: Tensor) -> Tensor:
    """Cross-entropy on the labels."""
    return F.cross_entropy(student_NV, labels_N, reduction="none")


def fkl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Forward KL: KL(p || q)."""
    return kl(teacher_NV.detach(), student_NV)


def rkl(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Reverse KL: KL(q || p)."""
    return kl(student_NV, teacher_NV.detach())


def taid(student_NV: Tensor, teacher_NV: Tensor, *, t: float) -> Tensor:
    """KL(p_t || q) to the interpolated, detached target p_t (arXiv 2501.16937, equations 3 and 4)."""
    return kl(interpolated_logits(student_NV, teacher_NV, t), student_NV)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {"sft": sft, "fkl": fkl, "rkl": rkl, "taid": taid}


def per_token(
    name: str,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    *,
    t: float | None = None,
    labels_N: Tensor | None = None,
    **options,
) -> Tensor:
    """The named objective a position, dense, in fp32 (fp64 logits stay fp64).

    Args:
        name: a key of ``DIVERGENCES``.
        student_logits_NV: logits with gradient.
        teacher_logits_NV: logits over the same tokens; None for ``sft``.
        t: the interpolation, which ``taid`` reads.
        labels_N: token ids, which ``sft`` reads.

    Returns:
        [N], in nats.

    Raises:
        KeyError: an unknown name.
        TypeError: t or labels_N is missing where it is read, or an option is unknown.
    """
    reads = {"taid": ("t", t), "sft": ("labels_N", labels_N)}
    arguments = dict([reads[name]]) if name in reads and reads[name][1] is not None else {}
    return DIVERGENCES[name](_fp32(student_logits_NV), _fp32(teacher_logits_NV), **arguments, **options)


def _fp32(logits: Tensor | None) -> Tensor | None:
    return logits if logits is None or logits.dtype.itemsize >= 4 else logits.float()
