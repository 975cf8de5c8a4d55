"""Rows as they come: shard by shard, row by row, split over readers, from any place on.

There is no shuffle buffer. The order is a function of the seed and of how many readers there are: shards at random in
each round over the data, rows as they stand in their shards, sources mixed by weight. So a place is a few numbers.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import datasets

from vlm_taid.data.conversation import Conversation
from vlm_taid.data.sources import check_weights
from vlm_taid.data.tables import Origin, SourceOptions, cannot_be_loaded, class_labels, is_saved, listed, load_file
from vlm_taid.errors import BadRow, InputError

SHARD_KINDS = (".jsonl", ".parquet", ".csv", ".tsv")
Place = list[Any]  # rows picked so far; of each source [round over its data, unit in it, row in the unit's shard]
_Read = tuple[Conversation | BadRow, list[int]]  # a row, and its source's place after it


class StreamedRows:
    """Rows of one or several sources, endlessly, for one of several readers.

    Each source's data are gone through in rounds. Sources without weights follow each other within a round; with
    weights the source of each row is drawn.

    Shards are divided among the readers; if their number is no multiple of the readers', each shard is read by
    several of them, which take its rows in turn.

    Args:
        sources: at least one.
        on_bad_row, allow_urls, seed: as in ConversationDataset.
        shuffled: shards come at random, each round in another order; else in the order of their names.

    Raises:
        InputError: a source cannot be read row by row.
    """

    def __init__(
        self,
        sources: Sequence[SourceOptions],
        *,
        on_bad_row: Literal["error", "skip"] = "error",
        allow_urls: bool = False,
        seed: int = 0,
        shuffled: bool = True,
    ):
        if not sources:
            raise InputError("there is no data source: give at least one")
        check_weights(sources)
        self.on_bad_row, self.allow_urls, self.seed, self.shuffled = on_bad_row, allow_urls, seed, shuffled
        self.sources = [_Shards(options) for options in sources]
        self.weights = [source.weight for source in sources if source.weight is not None]

    def read(
        self, reader: int, readers: int, place: Place | None = None
    ) -> Iterator[tuple[Conversation | BadRow, Place]]:
        """Rows of a reader, each with the place of the one after it.

        Args:
            reader, readers: which of how many; other readers get other rows.
            place: where to begin; None: at the beginning.

        Raises:
            BadRow: a row cannot be used and ``on_bad_row`` is ``error``.
            InputError: there is no row for this reader.
        """
        picked, places = (0, [[0, 0, 0] for _ in self.sources]) if place is None else (place[0], [*place[1]])
        endless = [self._endless(number, reader, readers, at) for number, at in enumerate(places)]
        concatenated = self._concatenated(reader, readers, [*places])
        while True:
            if self.weights:
                draw = random.Random(f"{self.seed} {reader} {picked}")
                number = draw.choices(range(len(self.sources)), self.weights)[0]
                row, places[number] = next(endless[number])
            else:
                row, number, places[number] = next(concatenated)
            picked += 1
            yield row, [picked, [*places]]

    def _endless(self, number: int, reader: int, readers: int, at: list[int]) -> Iterator[_Read]:
        """A source's rows, round after round, each with its place."""
        around, begun = at[0], any(at[1:])
        while True:
            for row in self._round(number, reader, readers, *at):
                begun = True
                yield row
            if not begun:
                raise self._no_row(self.sources[number].label, reader, readers)
            around, begun = around + 1, False
            at = [around, 0, 0]

    def _concatenated(
        self, reader: int, readers: int, places: Sequence[list[int]]
    ) -> Iterator[tuple[Conversation | BadRow, int, list[int]]]:
        """The sources' rows, one source after the other in each round, each with its source and place."""
        around = min(at[0] for at in places)
        begun = any(any(at) for at in places)
        while True:
            for number, at in enumerate(places):
                if at[0] > around:  # it has been gone through in this round
                    continue
                for row, after in self._round(number, reader, readers, *at):
                    begun = True
                    yield row, number, after
            if not begun:
                raise self._no_row(", ".join(source.label for source in self.sources), reader, readers)
            around, begun = around + 1, False
            places = [at if at[0] == around else [around, 0, 0] for at in places]

    def _no_row(self, label: str, reader: int, readers: int) -> InputError:
        return InputError(
            f"{label}: reader {reader + 1} of {readers} (ranks times data workers) finds no row: lower "
            "training.dataloader_num_workers, or set data.streaming: false"
        )

    def _round(self, number: int, reader: int, readers: int, around: int, unit: int, start: int) -> Iterator[_Read]:
        """What is left of a source's round from a place on."""
        source = self.sources[number]
        stripes = readers // math.gcd(readers, source.count)
        shards = list(range(source.count))
        if self.shuffled:
            random.Random(f"{self.seed} {number} {around}").shuffle(shards)
        # turned from shard to shard: rows that alternate in the files do not all go to one reader
        units = [(shard, (stripe + shard) % stripes) for shard in shards for stripe in range(stripes)][reader::readers]
        for at in range(unit, len(units)):
            shard, stripe = units[at]
            for row, values in source.rows(shard, start):
                if row % stripes == stripe and (one := self._row(source, shard, row, values)) is not None:
                    yield one, [around, at, row + 1]
            start = 0

    def _row(self, source: _Shards, shard: int, row: int, raw: dict[str, Any]) -> Conversation | BadRow | None:
        """A row; None: the filter leaves it out."""
        origin = source.origin(shard)
        if origin.is_json and not raw["text"].strip():
            return None
        try:
            values = origin.parsed(row, raw)
            if not all(_passes(origin, values, *one) for one in source.options.filter.items()):
                return None
            return origin.conversation(row, lambda: origin.renamed(values), self.allow_urls, True, None)
        except BadRow as error:
            if self.on_bad_row == "skip":
                return BadRow(error.row, error.reason)  # a new one: the caught one's traceback holds pictures
            raise


def _passes(origin: Origin, values: dict[str, Any], column: str, wanted: Any) -> bool:
    """Whether a row has what the filter wants; a text column is compared with texts."""
    if column not in values and not origin.is_json:  # rows of JSON need not have the same keys
        raise InputError(f"{origin.label}: `filter: {{{column}: ...}}` names no column; they are {', '.join(values)}")
    value = values.get(column)
    texts = isinstance(value, str) and not origin.is_json
    return value in [str(one) if texts else one for one in listed(wanted)]


class _Shards(Origin):
    """One source in shards: a file, a folder's files of one kind, or what `datasets` finds on the hub."""

    def __init__(self, options: SourceOptions):
        super().__init__(options)
        if options.limit is not None:
            raise InputError(f"{options.path}: a limit is for loaded data: set data.streaming: false, or leave it out")
        if self.path.is_dir() and is_saved(self.path):
            raise InputError(f"{options.path}: a save_to_disk folder is read from disk as it is: no data.streaming")
        self.files = [self.path] if self.path.is_file() else _shard_files(self.path)
        self.whole: Any = None
        try:
            if self.files:
                first = self._shard(0)
            else:
                self.whole = _undecoded(
                    datasets.load_dataset(str(self.path), options.name, split=options.split, streaming=True)
                )
                first = self.whole
        except Exception as error:
            raise cannot_be_loaded(self, error) from error
        self.count = len(self.files) or self.whole.num_shards
        self.class_labels = {} if self.files and self.files[0].suffix == ".jsonl" else class_labels(first.features)
        self.columns |= options.columns
        self.origin = cache(self._origin)

    def rows(self, shard: int, start: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """A shard's raw rows from one on, with their numbers."""
        # by batches, because row by row `datasets` divides a shard among data workers, as we have done already
        for batch in self._shard(shard).skip(start).iter(batch_size=64):
            for values in zip(*batch.values(), strict=True):
                yield start, dict(zip(batch, values, strict=True))
                start += 1

    def _shard(self, shard: int) -> Any:
        if self.files:
            return _undecoded(load_file(self.files[shard], streaming=True))
        return self.whole.shard(num_shards=self.whole.num_shards, index=shard)

    def _origin(self, shard: int) -> Origin:
        """What reads a shard's rows and names them."""
        one = object.__new__(Origin)
        one.__dict__ |= self.__dict__
        one.label = str(self.files[shard]) if self.files else f"{self.label} shard {shard + 1}"
        one.is_json = bool(self.files) and self.files[shard].suffix in (".jsonl", ".json")
        return one


def _undecoded(rows: Any) -> Any:
    """Pictures as bytes and paths, so that our checks see the files; a text file's columns are not known."""
    return rows if rows.features is None else rows.decode(False)


def _shard_files(folder: Path) -> list[Path]:
    """The files of a local folder of shards; none for what is left to `datasets`.

    Raises:
        InputError: they are of several kinds.
    """
    files = sorted(file for file in folder.iterdir() if file.suffix in SHARD_KINDS) if folder.is_dir() else []
    if len({file.suffix for file in files}) > 1:
        raise InputError(f"{folder}: shards of one kind are expected: {', '.join(file.name for file in files[:9])}")
    return files
