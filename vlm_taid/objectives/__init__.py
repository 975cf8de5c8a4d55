"""What the student is held against: the schedule of TAID, the objectives, and the fused loss over language heads."""

from .diagnostics import diagnostic_names
from .divergences import per_token
from .head import Head, as_slice, redirected, weight_and_bias
from .linear import MEMORY, LinearDistillationOutput, chunk_rows, linear_distillation
from .measures import Measures, measure
from .objective import FKL, OBJECTIVES, Objective
from .signals import Corrections, HiddenSignal, MixedSignal, TeacherSignal
from .taid import TAIDSchedule
from .temperature import LearnedTemperature

__all__ = [
    "FKL",
    "MEMORY",
    "OBJECTIVES",
    "Corrections",
    "Head",
    "HiddenSignal",
    "LearnedTemperature",
    "LinearDistillationOutput",
    "Measures",
    "MixedSignal",
    "Objective",
    "TAIDSchedule",
    "TeacherSignal",
    "as_slice",
    "chunk_rows",
    "diagnostic_names",
    "linear_distillation",
    "measure",
    "per_token",
    "redirected",
    "weight_and_bias",
]
