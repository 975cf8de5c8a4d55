"""PairedBatch: a batch for both models, which moves between devices and processes with its sharing intact."""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import Tensor

from .blocks import BLOCKS, Place, received


class PairedBatch(dict):
    """A batch for both models: a dict.

    Keys:
        student, teacher: padded model inputs (``input_ids`` [B, T], ...); the same object when the two models read
            the same tensors; ``teacher`` is None without one, and where its signals are ``stored``.
        student_rows_N, teacher_rows_N: predicting positions as indices into [B * T].
        labels_N: the student's ids of the next tokens.
        stored: what ``PairedCollator.stored`` gave for the rows; an empty dict without one.
        row_of_N: each answer token's row, as its place in what the collator was given.
        num_rows: rows that the collator was given.
        rows: of each row that is in, its place in its dataset (``Conversation.index``).
        refused: messages of the rows left out.
        pairing: rows, sum of their content shares, first tokens unpaired, sum of identical-next shares (``Alignment``).
    """

    def to(self, device: Any, non_blocking: bool = False) -> PairedBatch:
        return self._each(Tensor, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PairedBatch:
        return self._each(Tensor, Tensor.pin_memory)

    def _each(self, kind: type, change: Callable[[Any], Any]) -> PairedBatch:
        """The batch with each value of a kind changed, once however often it is in it."""
        moved: dict[int, Any] = {}
        return PairedBatch({key: _moved(value, kind, change, moved) for key, value in self.items()})

    def _sent(self) -> tuple[Callable[..., PairedBatch], tuple[list[Tensor], dict[str, Any]]]:
        """What the receiving process calls, and with what."""
        tensors: list[Tensor] = []
        self._each(Tensor, tensors.append)
        blocks, places = BLOCKS.send(tensors)
        return _arrived, (blocks, dict(self._each(Tensor, lambda tensor: places[id(tensor)])))


def _moved(value: Any, kind: type, change: Callable[[Any], Any], moved: dict[int, Any]) -> Any:
    # no function within a function: one that calls itself would hold all tensors until the garbage collector comes
    if id(value) not in moved:
        if isinstance(value, kind):
            moved[id(value)] = change(value)
        elif isinstance(value, dict):
            moved[id(value)] = {key: _moved(item, kind, change, moved) for key, item in value.items()}
        else:
            moved[id(value)] = value
    return moved[id(value)]


def _arrived(blocks: list[Tensor], values: dict[str, Any]) -> PairedBatch:
    return PairedBatch(values)._each(Place, received(blocks))


ForkingPickler.register(PairedBatch, PairedBatch._sent)
