"""What a model thinks of an answer, token by token: of its own, of another model's, of the reference.

Legend: N answer tokens, V rows of the model's head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlm_taid.data import Conversation, Part, Turn
from vlm_taid.errors import InputError
from vlm_taid.evaluation.models import load
from vlm_taid.objectives import Head
from vlm_taid.streams import StreamEncoder
from vlm_taid.teachers.live import hidden_at

TOP = 5


@dataclass(frozen=True)
class Token:
    """One token of an answer as one model writes it.

    Args:
        text: what it stands for.
        probability: the model's, after the question and the answer so far.
        top: the model's most probable tokens there with their probabilities, the likeliest first.
    """

    text: str
    probability: float
    top: list[tuple[str, float]]


class Reader:
    """A model that is asked how probable answers are.

    Args:
        model: its folder, or a hub name.

    Raises:
        InputError: it cannot be loaded, or its tokenizer has no offsets.
    """

    def __init__(self, model: str | Path):
        self.model, processor = load(str(model))
        self.encoder = StreamEncoder(processor)
        self.head = Head.of(self.model)

    @torch.no_grad()
    def read(self, question: Conversation, answers: Sequence[str]) -> list[list[Token]]:
        """Each answer's tokens, its end of turn the last of them.

        Args:
            question: a row that ends with its question.
            answers: texts that are not empty.

        Raises:
            BadRow: the row cannot be read, such as a picture for a model that takes none.
        """
        return [self._one(replace(question, turns=(*question.turns, Turn("assistant", (Part(a),))))) for a in answers]

    def _one(self, row: Conversation) -> list[Token]:
        encoded = self.encoder.encode_batch([row])
        if encoded.refused:
            raise encoded.refused[0]
        stream, device = encoded.streams[0], self.model.device
        last = stream.answers[-1]
        own = [*last.tokens, *([] if last.end_of_turn is None else [last.end_of_turn])]
        inputs: dict[str, Any] = {
            key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in encoded.inputs.items()
        }
        # the batch is one row, so its positions are those of the stream
        rows_N = torch.tensor(own, device=device) - 1
        log_NV = self.head(hidden_at(self.model, inputs, rows_N)).float().log_softmax(-1)
        ids_N = stream.input_ids_T[own].to(device)
        p_N = log_NV.gather(-1, ids_N[:, None])[:, 0].exp().tolist()
        values_NK, top_NK = log_NV.topk(min(TOP, log_NV.shape[-1]), -1)
        text = self.encoder.token_bytes.text
        return [
            Token(text(i), p, [(text(j), v) for j, v in zip(ids, values, strict=True)])
            for i, p, ids, values in zip(ids_N.tolist(), p_N, top_NK.tolist(), values_NK.exp().tolist(), strict=True)
        ]


def readers(models: Mapping[str, str]) -> dict[str, Reader]:
    """A Reader for each label; InputError says which model cannot be used."""
    found = {}
    for label, path in models.items():
        try:
            found[label] = Reader(path)
        except InputError as error:
            raise InputError(f"models {label}={path}: {error}") from error
    return found
