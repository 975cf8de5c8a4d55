"""Batches of streamed rows, from the exact row on: where each data worker stands is a part of the checkpoint.

Legend: R rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import TrainingArguments

from .data import Conversation, StreamedRows
from .data.streaming import Place
from .errors import BadRow, InputError
from .streams import Pack, PairedBatch, PairedCollator, best_fit

WINDOW = 16  # packs' worth of rows that are packed together: held in a data worker with their pictures

# The place of the row where the packing goes on, and the packs that were given since: rows that wait in a packer are
# read again.
At = tuple[Place | None, int]


class StreamedBatches(IterableDataset):
    """PairedBatches of streamed rows, endlessly; each data worker of each rank reads rows of its own.

    Args:
        rows: where they come from.
        collator: makes the batches.
        batch_size: rows, or packs, of a batch.
        capacity: tokens of a pack; None: rows are not packed.
        rank, world: this process's, of how many.
        workers: data workers of a rank.
    """

    def __init__(
        self,
        rows: StreamedRows,
        collator: PairedCollator,
        batch_size: int,
        *,
        capacity: int | None = None,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ):
        self.rows, self.collator, self.batch_size, self.capacity = rows, collator, batch_size, capacity
        self.rank, self.world, self.workers = rank, world, max(workers, 1)
        self.at: list[At] = [(None, 0)] * self.workers
        self.turn = 0  # the worker whose batch is trained on next

    def __iter__(self) -> Iterator[PairedBatch]:
        info = get_worker_info()
        worker = ((0 if info is None else info.id) + self.turn) % self.workers  # a DataLoader begins with its first
        reader, readers = self.rank * self.workers + worker, self.world * self.workers
        kind = self._packs if self.capacity else self._rows
        items: Iterator[tuple[Any, At]] = kind(reader, readers, *self.at[worker])
        while True:
            some = list(islice(items, self.batch_size))
            batch = self.collator([item for item, _ in some])
            batch["read_until"] = (worker, some[-1][1])
            yield batch

    def _rows(
        self, reader: int, readers: int, place: Place | None, given: int
    ) -> Iterator[tuple[Conversation | BadRow, At]]:
        for row, after in self.rows.read(reader, readers, place):
            yield row, (after, 0)

    def _packs(self, reader: int, readers: int, place: Place | None, given: int) -> Iterator[tuple[Pack, At]]:
        assert self.capacity is not None
        rows = self.rows.read(reader, readers, place)
        while True:
            window, lengths_R, after = [], [], place
            while sum(lengths_R) < WINDOW * self.capacity and len(window) < 1024:
                row, after = next(rows)
                window.append(row)
                lengths_R.append(self.collator.tokens(row))
            packs = best_fit(lengths_R, self.capacity)
            for number, pack in enumerate(packs[given:], start=given + 1):
                yield [window[row] for row in pack], (place, number) if number < len(packs) else (after, 0)
            place, given = after, 0

    def loader(self, arguments: TrainingArguments) -> DataLoader:
        """Batches as they are: what is whose is decided already, and accelerate would divide it again."""
        return DataLoader(
            self,
            batch_size=None,
            num_workers=arguments.dataloader_num_workers,
            pin_memory=arguments.dataloader_pin_memory,
            prefetch_factor=arguments.dataloader_prefetch_factor,
            generator=torch.Generator(),  # else beginning anew would move training's random state
        )

    def trained(self, batch: PairedBatch) -> None:
        """Notes that a batch of this rank is done with; batches come in the order of the workers."""
        worker, self.at[worker] = batch["read_until"]
        self.turn = (worker + 1) % self.workers

    def save(self, checkpoint: Path) -> None:
        """Writes where this rank's workers stand."""
        state = {"world": self.world, "workers": self.workers, "turn": self.turn, "at": self.at}
        _file(checkpoint, self.rank).write_text(json.dumps(state))

    def load(self, checkpoint: Path) -> None:
        """Takes what ``save`` wrote.

        Raises:
            InputError: it was written by another number of ranks or workers, which read other rows.
        """
        file = _file(checkpoint, self.rank)
        state = json.loads(file.read_text()) if file.is_file() else {}
        then, now = [state.get("world"), state.get("workers")], [self.world, self.workers]
        if then != now:
            raise InputError(
                f"{checkpoint} was streamed to {then[0]} ranks of {then[1]} data workers, here are {now[0]} of "
                f"{now[1]}: rows are divided among them, so launch as many of both"
            )
        self.turn, self.at = state["turn"], [(place, given) for place, given in state["at"]]


def _file(checkpoint: Path, rank: int) -> Path:
    return checkpoint / f"stream_{rank}.json"
