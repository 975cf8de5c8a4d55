"""SharedVocabulary: which ids mean the same token in both models.

Legend: C shared tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from ..errors import InputError
from .encoder import StreamEncoder

MIN_SHARED = 0.5


class SharedVocabulary:
    """The tokens that both models know, as a column list for each model's head, in one order.

    Tokens are the same when their strings are, and the two end-of-turn tokens are the same by role. Sizes say
    nothing: rows of a head that no token names (padding) are in neither list.

    Args:
        student_tokenizer, teacher_tokenizer: tokenizers, processors, or the StreamEncoders of the two models; their
            chat templates tell the end-of-turn tokens.

    Attributes:
        student_columns_C, teacher_columns_C: ids of the shared tokens in each model.
        to_teacher: student's id -> teacher's id.
        end_of_turn: the pair of end-of-turn ids.

    Raises:
        InputError: under half of the smaller vocabulary is shared.
    """

    def __init__(self, student_tokenizer: Any, teacher_tokenizer: Any):
        student, teacher = _encoder(student_tokenizer), _encoder(teacher_tokenizer)
        student_ids, teacher_ids = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
        self.end_of_turn = end = (student.end_of_turn_id, teacher.end_of_turn_id)
        pairs = {i: teacher_ids[token] for token, i in student_ids.items() if token in teacher_ids}
        pairs = {mine: theirs for mine, theirs in pairs.items() if mine != end[0] and theirs != end[1]}
        self.to_teacher = dict(sorted({**pairs, end[0]: end[1]}.items()))
        if len(self) < MIN_SHARED * min(len(student_ids), len(teacher_ids)):
            raise InputError(
                f"the student's and the teacher's vocabularies share {len(self)} tokens of {len(student_ids)} and "
                f"{len(teacher_ids)}: distillation on logits needs models of one tokenizer; choose a student of the "
                "teacher's family"
            )
        self.student_columns_C = torch.tensor(list(self.to_teacher.keys()), dtype=torch.long)
        self.teacher_columns_C = torch.tensor(list(self.to_teacher.values()), dtype=torch.long)

    def __len__(self) -> int:
        return len(self.to_teacher)

    def check_fits(self, student_rows: int, teacher_rows: int) -> None:
        """Refuses a head with fewer rows than its tokenizer has tokens.

        Raises:
            InputError: naming the model whose head is too small.
        """
        for name, columns_C, rows in (
            ("student", self.student_columns_C, student_rows),
            ("teacher", self.teacher_columns_C, teacher_rows),
        ):
            if int(columns_C.max()) >= rows:
                raise InputError(
                    f"the {name}'s tokenizer has a token with id {int(columns_C.max())} and its language head only "
                    f"{rows} rows: the tokenizer does not belong to the model, or resize_token_embeddings is missing"
                )


def _encoder(tokenizer: Any) -> StreamEncoder:
    return tokenizer if isinstance(tokenizer, StreamEncoder) else StreamEncoder(tokenizer)
