"""What the student is held against: the schedule of TAID, the objectives, and the fused loss over language heads."""

from .divergences import per_token
from .head import Head, as_slice, redirected
from .linear import HiddenSignal, LinearDistillationOutput, TeacherSignal, linear_distillation
from .objective import FKL, OBJECTIVES, RKL, SFT, TAID, Objective
from .taid import TAIDSchedule

__all__ = [
    "FKL",
    "OBJECTIVES",
    "RKL",
    "SFT",
    "TAID",
    "Head",
    "HiddenSignal",
    "LinearDistillationOutput",
    "Objective",
    "TAIDSchedule",
    "TeacherSignal",
    "as_slice",
    "linear_distillation",
    "per_token",
    "redirected",
]
