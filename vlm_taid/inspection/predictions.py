"""What the two models predict at each pair, and how far apart they are, through the loss that training uses.

Legend: N positions, V rows of a head, C shared tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..objectives import FKL, Head, linear_distillation
from ..recipe import Recipe
from ..streams import PairedBatch, PairedCollator, StreamEncoder
from ..students import load_student
from ..teachers import LiveTeacher
from ..teachers.live import hidden_at
from .rows import Prediction

TOP = 5


class Models:
    """The recipe's two models, loaded to predict in this process.

    Raises:
        InputError: a model cannot be loaded, or its head is too small for its tokenizer.
    """

    def __init__(self, recipe: Recipe, collator: PairedCollator):
        assert recipe.teacher is not None and collator.teacher is not None and collator.vocabulary is not None
        self.collator, shared = collator, collator.vocabulary
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        assert device is not None
        self.device = device
        self.student: Any = load_student(recipe.student).to(device).eval()  # pyright: ignore[reportArgumentType]
        self.teacher = LiveTeacher(replace(recipe.teacher, zero_stage=0), device)
        rest_R, teacher_rest_R = (
            None if rest is None else rest.to(device) for rest in (shared.student_rest_R, shared.teacher_rest_R)
        )
        self.head = replace(Head.of(self.student, shared.student_columns_C.to(device)), rest=rest_R)
        shared.check_fits(len(self.head.weight), self.teacher.head_rows)
        self.teacher.head = replace(self.teacher.head, columns=shared.teacher_columns_C.to(device), rest=teacher_rest_R)

    @torch.no_grad()
    def predict(self, batch: PairedBatch) -> list[Prediction]:
        """One prediction for each pair of a batch of one row."""
        batch = batch.to(self.device)
        signal = self.teacher.signal(batch)
        hidden_NH = hidden_at(self.student, batch["student"], batch["student_rows_N"])
        kl_N = linear_distillation(hidden_NH, self.head, signal, FKL()).kl_N
        tops = []
        for hidden, head, encoder in (
            (hidden_NH, self.head, self.collator.student),
            (signal.hidden_NG, signal.head, self.collator.teacher),
        ):
            assert encoder is not None
            tops.append(_top(replace(head, columns=None, rest=None)(hidden), encoder))
        labels = [self.collator.student.token_bytes.text(i) for i in batch["labels_N"].tolist()]
        return [Prediction(*values) for values in zip(labels, *tops, kl_N.tolist(), strict=True)]


def _top(logits_NV: torch.Tensor, encoder: StreamEncoder) -> list[list[tuple[str, float]]]:
    """The TOP most probable tokens of the whole head at each position."""
    values_NK, ids_NK = logits_NV.softmax(-1).topk(min(TOP, logits_NV.shape[-1]), -1)
    return [
        [(encoder.token_bytes.text(i), p) for i, p in zip(ids, values, strict=True)]
        for ids, values in zip(ids_NK.tolist(), values_NK.tolist(), strict=True)
    ]
