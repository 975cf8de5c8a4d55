"""The objectives as options: a dataclass each, with the closed-form gradient that the fused loss uses.

Legend: N answer tokens, B buckets (shared tokens, and the rest where there is one). q: student, p: teacher,
p_t: TAID's target, over the B buckets.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Inputs(NamedTuple):
    """What a loss reads beside the logits: TAID's t, the bucket of each label, the temperature of both logits."""

    t: float | None = None
    labels_N: Tensor | None = None
    temperature: float = 1.0


class Fused(NamedTuple):
    """An objective at N positions.

    loss_N, kl_N, ce_N: the loss, its KL, and its cross-entropy form (KL plus the target's entropy), in nats.
    gradient_NB: d loss / d student logits.
    temperature_gradient_N: d (T^2 loss) / d T, of a learned temperature.
    """

    loss_N: Tensor
    kl_N: Tensor
    ce_N: Tensor
    gradient_NB: Tensor
    temperature_gradient_N: Tensor | None = None


@dataclass(frozen=True)
class Objective(ABC):
    """What the student's distribution is held against, position by position.

    Args:
        temperature: T divides both models' logits, and the loss is multiplied by T^2.
        ce_weight: share c of the cross-entropy on the label: (1 - c) objective + c cross-entropy.
    """

    name: ClassVar[str]
    uses_teacher: ClassVar[bool] = True
    uses_labels: ClassVar[bool] = False

    temperature: float = 1.0
    ce_weight: float = 0.0

    def __post_init__(self):
        if not self.temperature > 0.0:
            raise ValueError(f"temperature must be positive, not {self.temperature}")
        if not 0.0 <= self.ce_weight <= 1.0:
            raise ValueError(f"ce_weight must be between 0 and 1, not {self.ce_weight}")

    @staticmethod
    def named(name: str, **options: Any) -> Objective:
        """The objective of that name (a key of ``OBJECTIVES``), with ``options`` as its fields.

        Raises:
            ValueError: an unknown name, or an option that the objective does not have; the message lists those it has.
        """
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
        known = [field.name for field in dataclasses.fields(OBJECTIVES[name]) if field.init]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"objective {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}"
            )
        return OBJECTIVES[name](**options)

    def target_in_logits(self, t: float | None) -> float | None:
        """How far the target's logits are from the student's to the teacher's, where the loss is a KL to them."""
        return None

    @abstractmethod
    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        """Values and gradient over fp32 logits; the teacher's buffer may be overwritten, the student's not."""


@dataclass(frozen=True)
class SFT(Objective):
    """Cross-entropy on the labels, over all of the student's tokens: no teacher."""

    name: ClassVar[str] = "sft"
    uses_teacher: ClassVar[bool] = False
    temperature: float = dataclasses.field(default=1.0, init=False)
    ce_weight: float = dataclasses.field(default=0.0, init=False)

    def fused(self, student_NB: Tensor, teacher_NB: Any, inputs: Inputs) -> Fused:
        if inputs.labels_N is None:
            raise TypeError("sft needs labels_N")
        at_N1 = inputs.labels_N[:, None]
        log_q_NB = student_NB.log_softmax(-1)
        loss_N = -log_q_NB.gather(-1, at_N1)[:, 0]
        gradient_NB = log_q_NB.exp_().scatter_add_(-1, at_N1, torch.full_like(at_N1, -1, dtype=log_q_NB.dtype))
        return Fused(loss_N, loss_N, loss_N, gradient_NB)


@dataclass(frozen=True)
class FKL(Objective):
    """Forward KL, KL(p || q)."""

    name: ClassVar[str] = "fkl"

    def target_in_logits(self, t: float | None) -> float | None:
        return 1.0

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        return _kl_to_logits(student_NB, teacher_NB)


@dataclass(frozen=True)
class RKL(Objective):
    """Reverse KL, KL(q || p)."""

    name: ClassVar[str] = "rkl"

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        log_q_NB, log_p_NB = student_NB.log_softmax(-1), teacher_NB.log_softmax(-1)
        q_NB = log_q_NB.exp()
        ce_N = -_dot(q_NB, log_p_NB)
        u_NB = log_q_NB.sub_(log_p_NB).mul_(q_NB)
        loss_N = u_NB.sum(-1)
        return Fused(loss_N, loss_N, ce_N, _centred(u_NB, q_NB))


@dataclass(frozen=True)
class JS(Objective):
    """GKD's divergence: w KL(p || m) + (1 - w) KL(q || m), with m = w p + (1 - w) q."""

    name: ClassVar[str] = "js"
    weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        _check_share("weight", self.weight)

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        return _js(student_NB, teacher_NB, self.weight)


@dataclass(frozen=True)
class TVD(Objective):
    """Total variation distance: half the sum of |p - q|."""

    name: ClassVar[str] = "tvd"

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        kl_N, ce_N, q_NB, p_NB, _ = _forward(student_NB, teacher_NB)
        gap_NB = q_NB - p_NB
        loss_N = 0.5 * gap_NB.abs().sum(-1)
        return Fused(loss_N, kl_N, ce_N, _centred(gap_NB.sign_().mul_(0.5).mul_(q_NB), q_NB))


@dataclass(frozen=True)
class SkewFKL(Objective):
    """DistiLLM's skew forward KL: KL(p || w p + (1 - w) q)."""

    name: ClassVar[str] = "sfkl"
    weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        _check_share("weight", self.weight)

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        kl_N, ce_N, q_NB, p_NB, gap_NB = _forward(student_NB, teacher_NB)
        ratio_NB = _log_to_mixture(gap_NB.neg_(), 1.0 - self.weight)
        loss_N = _dot(p_NB, ratio_NB)
        u_NB = ratio_NB.exp_().mul_(q_NB).mul_(self.weight - 1.0)
        return Fused(loss_N, kl_N, ce_N, _centred(u_NB, q_NB))


@dataclass(frozen=True)
class SkewRKL(Objective):
    """DistiLLM's skew reverse KL: KL(q || (1 - w) p + w q)."""

    name: ClassVar[str] = "srkl"
    weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        _check_share("weight", self.weight)

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        kl_N, ce_N, q_NB, _, gap_NB = _forward(student_NB, teacher_NB)
        ratio_NB = _log_to_mixture(gap_NB, 1.0 - self.weight)
        loss_N = _dot(q_NB, ratio_NB)
        u_NB = ratio_NB.sub_(ratio_NB.exp(), alpha=self.weight).mul_(q_NB)
        return Fused(loss_N, kl_N, ce_N, _centred(u_NB, q_NB))


@dataclass(frozen=True)
class AKL(Objective):
    """Adaptive KL: forward and reverse KL, weighted by how far the models differ in the teacher's head and tail.

    The head is the fewest teacher's tokens whose mass reaches ``mu``. The weights, the sums of |p - q| over head and
    tail divided by their sum, carry no gradient (arXiv 2404.02657).
    """

    name: ClassVar[str] = "akl"
    mu: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        _check_share("mu", self.mu)

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        log_q_NB, log_p_NB = student_NB.log_softmax(-1), teacher_NB.log_softmax(-1)
        q_NB, p_NB = log_q_NB.exp(), log_p_NB.exp()
        ce_N = -_dot(p_NB, log_q_NB)
        ratio_NB = log_q_NB.sub_(log_p_NB)
        fkl_N, rkl_N = -_dot(p_NB, ratio_NB), _dot(q_NB, ratio_NB)
        in_head_NB = teacher_head(p_NB, self.mu)
        gap_NB = (p_NB - q_NB).abs_()
        head_N, all_N = (gap_NB * in_head_NB).sum(-1), gap_NB.sum(-1)
        share_N = torch.where(all_N > 0, head_N / all_N.clamp_min(TINY), 0.5)  # equal models: no gap, no gradient
        u_NB = ratio_NB.mul_(q_NB).mul_((1.0 - share_N)[:, None]).sub_(p_NB.mul_(share_N[:, None]))
        return Fused(share_N * fkl_N + (1.0 - share_N) * rkl_N, fkl_N, ce_N, _centred(u_NB, q_NB))


@dataclass(frozen=True)
class DKD(Objective):
    """Decoupled distillation: a KL of (target, not target) + b KL among the non-target tokens (arXiv 2203.08679)."""

    name: ClassVar[str] = "dkd"
    uses_labels: ClassVar[bool] = True
    target_weight: float = 1.0
    non_target_weight: float = 0.5

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        if inputs.labels_N is None:
            raise TypeError("dkd needs labels_N")
        kl_N, ce_N = _forward(student_NB, teacher_NB)[:2]
        at_N1 = inputs.labels_N[:, None]
        log_q_N2, rest_q_NB = _split(student_NB, at_N1)
        log_p_N2, rest_p_NB = _split(teacher_NB, at_N1)
        target_N = _dot(log_p_N2.exp(), log_p_N2 - log_q_N2)
        p_NB, q_NB = rest_p_NB.exp(), rest_q_NB.exp()
        # the target's own column is log 0 in both
        gap_NB = rest_p_NB.sub_(rest_q_NB).scatter_(-1, at_N1, 0.0)
        others_N = _dot(p_NB, gap_NB)
        difference_N1 = self.target_weight * (log_q_N2[:, :1].exp() - log_p_N2[:, :1].exp())
        gradient_NB = q_NB * (self.non_target_weight - difference_N1) - self.non_target_weight * p_NB
        gradient_NB.scatter_(-1, at_N1, difference_N1)
        loss_N = self.target_weight * target_N + self.non_target_weight * others_N
        return Fused(loss_N, kl_N, ce_N, gradient_NB)


@dataclass(frozen=True)
class CTKD(Objective):
    """Forward KL at a learned temperature, which is trained against the student: see LearnedTemperature."""

    name: ClassVar[str] = "ctkd"
    temperature: float = dataclasses.field(default=1.0, init=False)

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        log_p_NB = teacher_NB.log_softmax(-1)
        p_NB, log_q_NB = log_p_NB.exp(), student_NB.log_softmax(-1)
        ce_N = -_dot(p_NB, log_q_NB)
        ratio_NB = log_p_NB - log_q_NB
        kl_N = _dot(p_NB, ratio_NB)
        gradient_NB = log_q_NB.exp_().sub_(p_NB)
        # d (T^2 KL) / dT, the logits being z / T: both models' logits shrink as T grows
        teacher_gradient_NB = ratio_NB.sub_(kl_N[:, None]).mul_(p_NB)
        shrinks_N = _dot(gradient_NB, student_NB) + _dot(teacher_gradient_NB, teacher_NB)
        slope_N = inputs.temperature * (2.0 * kl_N - shrinks_N)
        return Fused(kl_N, kl_N, ce_N, gradient_NB, slope_N)


@dataclass(frozen=True)
class TAID(Objective):
    """KL(p_t || q) to the interpolated target; t comes from a TAIDSchedule.

    Args:
        interpolation: ``logits``: the paper's; ``probabilities``: p_t = (1 - t) q + t p (ours).
        divergence: ``kl``: the paper's; ``rkl``: KL(q || p_t); ``js``: w KL(p_t || m) + (1 - w) KL(q || m),
            m = w p_t + (1 - w) q (both ours).
        weight: w of js.
    """

    name: ClassVar[str] = "taid"
    interpolation: str = "logits"
    divergence: str = "kl"
    weight: float = 0.1

    def __post_init__(self):
        super().__post_init__()
        _check_share("weight", self.weight)
        for option, known in (("interpolation", ("logits", "probabilities")), ("divergence", ("kl", "rkl", "js"))):
            if getattr(self, option) not in known:
                raise ValueError(f"{option} must be one of {', '.join(known)}, not {getattr(self, option)!r}")

    def target_in_logits(self, t: float | None) -> float | None:
        return t if self.divergence == "kl" and self.interpolation == "logits" else None

    def fused(self, student_NB: Tensor, teacher_NB: Tensor, inputs: Inputs) -> Fused:
        if inputs.t is None:
            raise TypeError("taid needs t")
        target_NB = interpolated(student_NB, teacher_NB, inputs.t, self.interpolation)
        if self.divergence == "kl":
            return _kl_to_logits(student_NB, target_NB)
        return (
            RKL().fused(student_NB, target_NB, inputs)
            if self.divergence == "rkl"
            else _js(student_NB, target_NB, self.weight)
        )


OBJECTIVES: dict[str, type[Objective]] = {
    objective.name: objective for objective in (TAID, FKL, RKL, JS, TVD, SkewFKL, SkewRKL, AKL, DKD, CTKD, SFT)
}
TINY = torch.finfo(torch.float32).tiny


def interpolated(student_NB: Tensor, teacher_NB: Tensor, t: float, interpolation: str) -> Tensor:
    """Logits of TAID's target, in the teacher's buffer."""
    if interpolation == "probabilities":
        if t in (0.0, 1.0):  # log 0 would meet a finite logarithm
            return teacher_NB if t else teacher_NB.copy_(student_NB)
        teacher_NB.sub_(teacher_NB.logsumexp(-1, keepdim=True) - math.log(t))
        own_NB = student_NB - (student_NB.logsumexp(-1, keepdim=True) - math.log1p(-t))
        return torch.logaddexp(teacher_NB, own_NB, out=teacher_NB)
    return teacher_NB.sub_(student_NB).mul_(t).add_(student_NB)


def teacher_head(p_NB: Tensor, mu: float) -> Tensor:
    """Which tokens are among the fewest whose mass reaches ``mu``, as 0 and 1 in the tokens' own places."""
    sorted_NB, order_NB = p_NB.sort(dim=-1, descending=True, stable=True)
    before_NB = sorted_NB.cumsum(-1).sub_(sorted_NB)
    return sorted_NB.scatter_(-1, order_NB, before_NB.lt_(mu))  # every place is written


def _kl_to_logits(student_NB: Tensor, target_NB: Tensor) -> Fused:
    """KL(softmax(target) || q) and its gradient q - target; the target's buffer may be overwritten."""
    log_q_NB, log_p_NB = student_NB.log_softmax(-1), target_NB.log_softmax(-1)
    p_NB = torch.exp(log_p_NB, out=target_NB)
    ce_N = -_dot(p_NB, log_q_NB)
    kl_N = _dot(p_NB, log_p_NB.sub_(log_q_NB))
    return Fused(kl_N, kl_N, ce_N, log_q_NB.exp_().sub_(p_NB))


def _js(student_NB: Tensor, target_NB: Tensor, weight: float) -> Fused:
    kl_N, ce_N, q_NB, p_NB, gap_NB = _forward(student_NB, target_NB)
    loss_N = weight * _dot(p_NB, _log_to_mixture(-gap_NB, 1.0 - weight))
    u_NB = _log_to_mixture(gap_NB, weight).mul_(q_NB).mul_(1.0 - weight)
    return Fused(loss_N + u_NB.sum(-1), kl_N, ce_N, _centred(u_NB, q_NB))


def _forward(student_NB: Tensor, teacher_NB: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """KL(p || q) and its cross-entropy form; q, p and log(p / q)."""
    log_q_NB, log_p_NB = student_NB.log_softmax(-1), teacher_NB.log_softmax(-1)
    p_NB = log_p_NB.exp()
    ce_N = -_dot(p_NB, log_q_NB)
    gap_NB = log_p_NB.sub_(log_q_NB)
    return _dot(p_NB, gap_NB), ce_N, log_q_NB.exp_(), p_NB, gap_NB


def _centred(u_NB: Tensor, q_NB: Tensor) -> Tensor:
    """The gradient in the logits from u = q dL/dq: u - q sum(u), in place on u."""
    return u_NB.addcmul_(q_NB, u_NB.sum(-1, keepdim=True), value=-1.0)


def _log_to_mixture(gap_NB: Tensor, weight: float) -> Tensor:
    """log(a / ((1 - w) a + w b)) from log(b / a), in place: no cancellation where a and b agree.

    The bound keeps the exponential finite; beyond it a is under 1e-26 of b and weighs nothing.
    """
    return gap_NB.clamp_max_(60.0).expm1_().mul_(weight).log1p_().neg_()


def _split(logits_NB: Tensor, at_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of (target, not target), [N, 2], and those among the non-target tokens, [N, B]."""
    rest_NB = logits_NB.scatter(-1, at_N1, -torch.inf)
    log_rest_N1 = rest_NB.logsumexp(-1, keepdim=True)
    pair_N2 = torch.cat([logits_NB.gather(-1, at_N1), log_rest_N1], -1).log_softmax(-1)
    return pair_N2, rest_NB.sub_(log_rest_N1)


def _check_share(name: str, value: float) -> None:
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} must be between 0 and 1, not {value}")


def _dot(a_NB: Tensor, b_NB: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_NB, b_NB)
