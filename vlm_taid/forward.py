"""PairedForward: the forward passes of student and teacher, up to the fused loss where their language heads meet.

Legend: N answer tokens, H student width, C shared vocabulary, R tokens of one vocabulary alone.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from .objectives import (
    Head,
    LearnedTemperature,
    LinearDistillationOutput,
    Objective,
    as_slice,
    chunk_rows,
    linear_distillation,
    redirected,
    weight_and_bias,
)
from .streams import PairedBatch, PairedCollator
from .teachers import CachedTeacher, LiveTeacher, SeveralTeachers, prove_packing
from .teachers.live import hidden_at
from .trainable import without_adapters


class PairedForward:
    """Runs both models on a batch, in training and in evaluation.

    Args:
        accelerator: whose wrapper (DDP, DeepSpeed, FSDP) the student is in.
        collator: made the batches.
        teacher: told here which of its columns are shared; None for ``sft``.
        temperature: CTKD's learned temperature; None for other objectives.
        memory: MiB for the logits that the fused loss holds at a time.
        diagnose: compute the diagnostics too, in training.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        collator: PairedCollator,
        teacher: LiveTeacher | SeveralTeachers | CachedTeacher | None,
        *,
        temperature: LearnedTemperature | None,
        memory: float,
        diagnose: bool,
    ):
        self.accelerator, self.collator, self.teacher = accelerator, collator, teacher
        self.temperature, self.memory, self.diagnose = temperature, memory, diagnose
        self.columns: Tensor | slice | None = None  # the student's, of the shared vocabulary
        self.rest: Tensor | None = None  # the student's, in one bucket
        self.head: Head | None = None  # proven at the first forward, inside the wrapper
        self.told = False  # how many answer tokens' logits are in memory at a time, in training
        if teacher is not None and (shared := collator.vocabulary) is not None:
            device = accelerator.device
            self.columns = as_slice(shared.student_columns_C.to(device))
            theirs = as_slice(shared.teacher_columns_C.to(device))
            if shared.student_rest_R is None or shared.teacher_rest_R is None:
                teacher.share(theirs)
            else:
                self.rest = shared.student_rest_R.to(device)
                teacher.share(theirs, shared.teacher_rest_R.to(device))

    def __call__(
        self, model: Any, batch: PairedBatch, objective: Objective, t: float | None, *, scale: float = 1.0
    ) -> LinearDistillationOutput:
        """The losses of a batch's answer tokens [N], on its device.

        Args:
            model: the student in its wrapper.
            batch: on the student's device.
            objective: what the student is held against.
            t: TAID's.
            scale: what ``loss_N`` and its gradient are multiplied by.
        """
        outer: Any = self.accelerator.unwrap_model(model)
        student = without_adapters(outer)
        target, gathered = None, nullcontext
        if self.head is None and self.collator.options.packing and self.teacher is not None:
            self.teacher.prove_packing(self.collator.teacher or self.collator.student)
        if self.teacher is not None and objective.uses_teacher:
            target = self.teacher.signal(batch)
            gathered = self.teacher.gathered

        module: Any = student.get_output_embeddings()

        # plain tuples of tensors leave the wrappers: their backward hooks see nothing else
        def at_the_head(hidden_NH: Tensor) -> tuple[Tensor | None, ...]:
            weight, bias = weight_and_bias(module)  # whole here
            assert self.head is not None and weight is not None
            head = replace(self.head, weight=weight, bias=bias)
            training = torch.is_grad_enabled()
            temperature = self.temperature.value if objective.name == "ctkd" and self.temperature else None
            call: Any = {"t": t, "temperature": temperature, "memory": self.memory}
            if training and not self.told:
                self.told, (rows, first) = True, chunk_rows(head, target, objective, **call)
                free = f", and the first {first} in the memory of the head's gradient" if first else ""
                self.accelerator.print(f"at most {rows} answer tokens' logits at a time{free}")
            call |= {"labels_N": batch["labels_N"], "diagnose": training and self.diagnose}
            call["weights_N"] = torch.full((len(hidden_NH),), scale, dtype=torch.float32, device=hidden_NH.device)
            with gathered():  # no longer than it takes: beside a student's forward, its head is large
                output = linear_distillation(hidden_NH, head, target, objective, **call)
            return tuple(vars(output).values())

        def forward() -> tuple[Tensor | None, ...]:
            if self.head is None:
                self.head = replace(Head.of(student, self.columns), rest=self.rest)
                if self.collator.options.packing:
                    prove_packing(student, self.collator.student, hidden_at)
            hidden_NH = hidden_at(student, batch["student"], batch["student_rows_N"])
            return redirected(module, module, at_the_head, hidden_NH)

        with self.accelerator.autocast():
            return LinearDistillationOutput(*redirected(model, outer, forward))
