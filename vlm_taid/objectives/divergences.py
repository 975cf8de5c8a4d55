"""The objectives, dense and in fp32: what every faster path is held against.

Each function takes the logits of N supervised positions over the same V tokens and returns one value in nats a
position; autograd gives the gradient in the student's logits. Formulas: p = softmax(teacher), q = softmax(student).
Nothing carries gradient to the teacher but ``ctkd``'s temperature.

Legend: N answer tokens, V shared vocabulary (with buckets as further tokens).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
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


def js(student_NV: Tensor, teacher_NV: Tensor, *, weight: float = 0.1) -> Tensor:
    """w KL(p || m) + (1 - w) KL(q || m) with m = w p + (1 - w) q (GKD, arXiv 2306.13649)."""
    m_NV = _mixed(teacher_NV.detach(), student_NV, weight)
    return weight * kl(teacher_NV.detach(), m_NV) + (1.0 - weight) * kl(student_NV, m_NV)


def tvd(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Total variation distance: 0.5 sum |p - q|."""
    return 0.5 * (teacher_NV.detach().softmax(-1) - student_NV.softmax(-1)).abs().sum(-1)


def sfkl(student_NV: Tensor, teacher_NV: Tensor, *, weight: float = 0.1) -> Tensor:
    """Skew forward KL: KL(p || w p + (1 - w) q) (DistiLLM, arXiv 2402.03898)."""
    return kl(teacher_NV.detach(), _mixed(teacher_NV.detach(), student_NV, weight))


def srkl(student_NV: Tensor, teacher_NV: Tensor, *, weight: float = 0.1) -> Tensor:
    """Skew reverse KL: KL(q || (1 - w) p + w q) (DistiLLM, arXiv 2402.03898)."""
    return kl(student_NV, _mixed(teacher_NV.detach(), student_NV, 1.0 - weight))


def akl(student_NV: Tensor, teacher_NV: Tensor, *, mu: float = 0.5) -> Tensor:
    """(gap_head FKL + gap_tail RKL) / (gap_head + gap_tail); the gaps, sums of |p - q|, are constants.

    The head is the fewest teacher tokens whose mass reaches mu (arXiv 2404.02657).
    """
    p_NV, gap_NV = teacher_NV.detach().softmax(-1), _gap(student_NV, teacher_NV)
    order_NV = p_NV.argsort(dim=-1, descending=True, stable=True)
    sorted_NV = p_NV.gather(-1, order_NV)
    head_NV = torch.zeros_like(p_NV).scatter(-1, order_NV, (sorted_NV.cumsum(-1) - sorted_NV < mu).to(p_NV.dtype))
    head_N, tail_N = (gap_NV * head_NV).sum(-1), (gap_NV * (1.0 - head_NV)).sum(-1)
    share_N = torch.where(head_N + tail_N > 0, head_N / (head_N + tail_N), 0.5)
    return share_N * fkl(student_NV, teacher_NV) + (1.0 - share_N) * rkl(student_NV, teacher_NV)


def dkd(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    labels_N: Tensor,
    target_weight: float = 1.0,
    non_target_weight: float = 0.5,
) -> Tensor:
    """a KL of (target, not target) + b KL among the non-target tokens (arXiv 2203.08679)."""
    target_NV = F.one_hot(labels_N, student_NV.shape[-1]).bool()

    def parts(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
        others = logits_NV[~target_NV].reshape(len(labels_N), -1)
        return torch.stack([logits_NV[target_NV], others.logsumexp(-1)], -1), others

    (student_N2, student_others), (teacher_N2, teacher_others) = parts(student_NV), parts(teacher_NV.detach())
    return target_weight * kl(teacher_N2, student_N2) + non_target_weight * kl(teacher_others, student_others)


def ctkd(student_NV: Tensor, teacher_NV: Tensor, *, temperature: float | Tensor) -> Tensor:
    """Forward KL of both at temperature T, times T^2 (arXiv 2211.16231); T may want a gradient."""
    return temperature**2 * kl(teacher_NV.detach() / temperature, student_NV / temperature)


def taid(
    student_NV: Tensor,
    teacher_NV: Tensor,
    *,
    t: float,
    interpolation: Literal["logits", "probabilities"] = "logits",
    divergence: Literal["kl", "rkl", "js"] = "kl",
    weight: float = 0.1,
) -> Tensor:
    """KL(p_t || q) to the interpolated, detached target p_t (arXiv 2501.16937, equations 3 and 4).

    Ours: p_t interpolated in probabilities, and rkl or js (of ``weight``) in the place of the KL.
    """
    if interpolation == "logits":
        target_NV = interpolated_logits(student_NV, teacher_NV, t)
    else:
        target_NV = ((1.0 - t) * student_NV.detach().softmax(-1) + t * teacher_NV.detach().softmax(-1)).log()
    if divergence == "js":
        return js(student_NV, target_NV, weight=weight)
    return kl(target_NV, student_NV) if divergence == "kl" else kl(student_NV, target_NV)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function for function in (sft, fkl, rkl, js, tvd, sfkl, srkl, akl, dkd, ctkd, taid)
}


def per_token(
    name: str,
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor | None,
    *,
    t: float | None = None,
    labels_N: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    ce_weight: float = 0.0,
    **options,
) -> Tensor:
    """The named objective a position, dense, in fp32 (fp64 logits stay fp64).

    Args:
        name: a key of ``DIVERGENCES``.
        student_logits_NV: logits with gradient.
        teacher_logits_NV: logits over the same tokens; None for ``sft``.
        t: the interpolation, which ``taid`` reads.
        labels_N: token ids, which ``sft``, ``dkd`` and ``ce_weight`` read.
        temperature: T divides both logits, and the loss is multiplied by T^2.
        ce_weight: share of the cross-entropy on the labels, at temperature 1.

    Returns:
        [N], in nats.

    Raises:
        KeyError: an unknown name.
        TypeError: t or labels_N is missing where it is read, or an option is unknown.
    """
    student_NV, teacher_NV = _fp32(student_logits_NV), _fp32(teacher_logits_NV)
    reads = {"taid": ("t", t), "sft": ("labels_N", labels_N), "dkd": ("labels_N", labels_N)}
    if name in reads and reads[name][1] is not None:
        options |= dict([reads[name]])
    if name == "ctkd":
        loss_N = DIVERGENCES[name](student_NV, teacher_NV, temperature=temperature, **options)
    elif name == "sft":
        loss_N = DIVERGENCES[name](student_NV, teacher_NV, **options)
    else:
        loss_N = DIVERGENCES[name](student_NV / temperature, teacher_NV / temperature, **options) * temperature**2
    if ce_weight:
        if labels_N is None:
            raise TypeError("ce_weight needs labels_N")
        loss_N = (1.0 - ce_weight) * loss_N + ce_weight * sft(student_NV, None, labels_N=labels_N)
    return loss_N


def _mixed(a_NV: Tensor, b_NV: Tensor, weight: float) -> Tensor:
    """Logits of w softmax(a) + (1 - w) softmax(b)."""
    both = torch.stack([a_NV.log_softmax(-1), b_NV.log_softmax(-1)])
    shares = torch.tensor([weight, 1.0 - weight], dtype=both.dtype, device=both.device).log()
    return (both + shares[:, None, None]).logsumexp(0)


def _gap(student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    return (teacher_NV.softmax(-1) - student_NV.softmax(-1)).abs().detach()


def _fp32(logits: Tensor | None) -> Tensor:
    return logits if logits is None or logits.dtype.itemsize >= 4 else logits.float()  # pyright: ignore[reportReturnType]
