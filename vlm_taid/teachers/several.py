"""Several live teachers that read the same stream; their signals are mixed in the loss."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..objectives import MixedSignal
from ..streams import StreamEncoder
from .live import LiveTeacher, TeacherOptions


@dataclass
class WeightedTeacherOptions(TeacherOptions):
    """One of several teachers."""

    weight: float = 1.0
    """Its weight in the mixture; the proportions count."""


class SeveralTeachers:
    """Live teachers with one tokenizer, chat template and processor, as one teacher.

    Args:
        options: one a teacher, with its weight.
        device: where teachers that are not sharded live.
        mix: what is mixed (``MixedSignal``).
    """

    def __init__(
        self,
        options: Sequence[WeightedTeacherOptions],
        device: torch.device,
        mix: Literal["logits", "probabilities"],
    ):
        self.teachers = [LiveTeacher(one, device) for one in options]
        self.weights = tuple(one.weight for one in options)
        self.mix: Literal["logits", "probabilities"] = mix

    @property
    def head_rows(self) -> int:
        """Rows of the smallest language head."""
        return min(teacher.head_rows for teacher in self.teachers)

    def share(self, columns: Tensor | slice, rest: Tensor | None = None) -> None:
        """Cuts every head to the teachers' ids of the shared vocabulary, and of the rest bucket if there is one."""
        for teacher in self.teachers:
            teacher.share(columns, rest)

    def signal(self, batch: Mapping[str, Any]) -> MixedSignal:
        """Every teacher's signal, weighted."""
        return MixedSignal(tuple(teacher.signal(batch) for teacher in self.teachers), self.weights, self.mix)

    def prove_packing(self, encoder: StreamEncoder) -> None:
        """Every teacher's."""
        for teacher in self.teachers:
            teacher.prove_packing(encoder)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Holds the whole heads on every rank while a loss is made; every rank must enter."""
        with ExitStack() as heads:
            for teacher in self.teachers:
                heads.enter_context(teacher.gathered())
            yield
