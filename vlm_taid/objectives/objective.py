"""The objectives as options: a dataclass each, with the closed-form gradient that the fused loss uses.

Legend: N answer tokens, V shared vocabulary. q: student, p: teacher, p_t: TAID's target, over the V tokens.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Fused(NamedTuple):
    """An objective at N positions: its values and the part of its gradient that is not q.

    loss_N, kl_N, ce_N: the loss, its KL, and its cross-entropy form (KL plus the target's entropy), in nats.
    residual_NV: d loss / d logits - q, so that tokens outside the V enter the normaliser by q alone.
    """

    loss_N: Tensor
    kl_N: Tensor
    ce_N: Tensor
    residual_NV: Tensor


@dataclass(frozen=True)
class Objective(ABC):
    """What the student's distribution is held against, position by position."""

    name: ClassVar[str]
    uses_teacher: ClassVar[bool] = True

    @staticmethod
    def named(name: str, **options: Any) -> Objective:
        """The objective of that name.

        Raises:
            ValueError: an unknown name, or an option that the objective does not have; the message lists those it has.
        """
        if name not in OBJECTIVES:
            raise ValueError(f"unknown objective {name!r}; known: {', '.join(OBJECTIVES)}")
        known = [field.name for field in dataclasses.fields(OBJECTIVES[name])]
        if unknown := sorted(set(options) - set(known)):
            raise ValueError(
                f"objective {name!r} has no option {', '.join(unknown)}; it has: {', '.join(known) or 'none'}"
            )
        return OBJECTIVES[name](**options)

    @abstractmethod
    def fused(self, student_NV: Tensor, teacher_NV: Tensor | None, t: float | None, labels_N: Tensor | None) -> Fused:
        """Values and gradient over fp32 logits; the teacher's buffer may be overwritten, the student's not."""


@dataclass(frozen=True)
class SFT(Objective):
    """Cross-entropy on the labels, over all of the student's tokens: no teacher."""

    name: ClassVar[str] = "sft"
    uses_teacher: ClassVar[bool] = False

    def fused(self, student_NV: Tensor, teacher_NV: Any, t: Any, labels_N: Any) -> Fused:
        if labels_N is None:
            raise TypeError("sft needs labels_N")
        at_N1 = labels_N[:, None]
        loss_N = student_NV.logsumexp(-1) - student_NV.gather(-1, at_N1)[:, 0]
        residual_NV = torch.zeros_like(student_NV).scatter_(-1, at_N1, -1.0)
        return Fused(loss_N, loss_N, loss_N, residual_NV)


@dataclass(frozen=True)
class TAID(Objective):
    """KL(p_t || q) to the interpolated target; t comes from a TAIDSchedule."""

    name: ClassVar[str] = "taid"

    def fused(self, student_NV: Tensor, teacher_NV: Any, t: Any, labels_N: Any) -> Fused:
        if t is None:
            raise TypeError("taid needs t")
        # KL(p_t || q) = t E_pt[z_t - z_s] - log Z_m + log Z_s: exact zero where both models agree (taid.md, section 1)
        gap_NV = teacher_NV.sub_(student_NV)
        log_z_student_N = student_NV.logsumexp(-1)
        target_NV = torch.add(student_NV, gap_NV, alpha=t)
        log_z_target_N = target_NV.logsumexp(-1)
        target_NV.sub_(log_z_target_N[:, None]).exp_()
        kl_N = t * _dot(target_NV, gap_NV) - log_z_target_N + log_z_student_N
        ce_N = log_z_student_N - _dot(target_NV, student_NV)
        return Fused(kl_N, kl_N, ce_N, target_NV.neg_())


@dataclass(frozen=True)
class FKL(Objective):
    """Forward KL, KL(p || q): TAID's last step, t = 1."""

    name: ClassVar[str] = "fkl"

    def fused(self, student_NV: Tensor, teacher_NV: Any, t: Any, labels_N: Any) -> Fused:
        return TAID().fused(student_NV, teacher_NV, 1.0, labels_N)


@dataclass(frozen=True)
class RKL(Objective):
    """Reverse KL, KL(q || p)."""

    name: ClassVar[str] = "rkl"

    def fused(self, student_NV: Tensor, teacher_NV: Any, t: Any, labels_N: Any) -> Fused:
        log_q_NV = student_NV.log_softmax(-1)
        q_NV = log_q_NV.exp()
        log_p_NV = teacher_NV.log_softmax(-1)
        ce_N = -_dot(q_NV, log_p_NV)
        log_ratio_NV = log_q_NV.sub_(log_p_NV)
        kl_N = _dot(q_NV, log_ratio_NV)
        return Fused(kl_N, kl_N, ce_N, log_ratio_NV.sub_(kl_N[:, None]).sub_(1.0).mul_(q_NV))


OBJECTIVES: dict[str, type[Objective]] = {objective.name: objective for objective in (TAID, FKL, RKL, SFT)}


def _dot(a_NV: Tensor, b_NV: Tensor) -> Tensor:
    return torch.linalg.vecdot(a_NV, b_NV)
