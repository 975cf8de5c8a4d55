"""Sources: where rows come from, and the dataset that reads them one by one in the DataLoader's workers.

A legend for the index arrays: R rows of the mixed dataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from torch.utils.data import Dataset

from vlm_taid.data.conversation import Conversation
from vlm_taid.data.tables import SourceOptions, Table
from vlm_taid.errors import BadRow, InputError


@dataclass
class DataOptions:
    """What is trained on."""

    train: list[SourceOptions]
    """The sources to train on: one after the other, or mixed if they have weights."""
    validation: list[SourceOptions] = field(default_factory=list)
    """The sources on which the loss is measured during training."""
    max_length: int | None = None
    """The longest row in tokens, images included; a longer one is a bad row, never cut (default: no limit)."""
    packing: bool = False
    """Put several short rows into a sequence of max_length tokens; a batch then counts sequences, not rows."""
    answers: Literal["all", "last"] = "all"
    """Which answers of a conversation are learned; last: the earlier ones are context, as the template writes them."""
    min_paired_share: float = 0.5
    """The share of an answer's tokens that must pair between teacher and student; below it the row is bad."""
    pair: Literal["boundaries", "identical_tokens"] = "boundaries"
    """Two tokenizers: boundaries pairs wherever both have a token beginning; identical_tokens only equal tokens."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a row that cannot be used: stop, or skip it and count it."""
    allow_urls: bool = False
    """Fetch images that are given as http or https URLs."""
    streaming: bool = False
    """Read the training rows from files or the hub as they come, shard by shard, in place of loading them first."""


class ConversationDataset(Dataset["Conversation | BadRow"]):
    """Rows of one or several sources as Conversations, pictures opened, read when asked for.

    Several sources follow each other; with weights they are mixed row by row, at random by the seed, until every row
    of every source was taken at least once (rows of the smaller sources repeat). A row's name is ``path:number``, or
    ``hub/id[split]:number``, where the number counts from 1 and stays that of the whole file: the line of a JSONL
    file, else the row (a CSV header is none).

    Args:
        sources: at least one.
        on_bad_row: "error" raises a BadRow when a row is read that cannot be used; "skip" returns it instead, for
            the collator to count.
        allow_urls: fetch pictures given as URLs.
        seed: of the mixture.
        need_answer: True for training. False for evaluation: conversations end with the question, the answer is in
            ``fields["answers"]`` if there is one.

    Raises:
        InputError: a source does not exist or cannot be read, a column of the filter or the column map is not there,
            no row is left, or options contradict each other.
    """

    def __init__(
        self,
        sources: Sequence[SourceOptions],
        *,
        on_bad_row: Literal["error", "skip"] = "error",
        allow_urls: bool = False,
        seed: int = 0,
        need_answer: bool = True,
    ):
        if not sources:
            raise InputError("there is no data source: give at least one")
        check_weights(sources)
        self.on_bad_row, self.allow_urls, self.need_answer = on_bad_row, allow_urls, need_answer
        self.sources = [Table(options) for options in sources]
        self.source_R, self.row_R = _mix([source.kept_rows() for source in self.sources], sources, seed)

    def __len__(self) -> int:
        return len(self.row_R)

    def fingerprint(self) -> str:
        """A text that changes when the rows do."""
        tables = [source.table._fingerprint for source in self.sources]
        order = hashlib.sha256(self.source_R.tobytes() + self.row_R.tobytes()).hexdigest()
        return repr([tables, [source.options for source in self.sources], order])

    def row_names(self) -> list[str]:
        """The names of all rows, in order; a row that the mixture repeats has its name at each place."""
        names = zip(self.source_R.tolist(), self.row_R.tolist(), strict=True)
        return [self.sources[source].row_name(row) for source, row in names]

    def columns(self, index: int) -> tuple[str, Path, dict[str, Any]]:
        """A row's name, the folder that its pictures' paths start from, and its columns; nothing is checked or opened.

        Raises:
            BadRow: broken JSON.
        """
        source, row = self.sources[self.source_R[index]], int(self.row_R[index])
        return source.row_name(row), source.folder, source.read(row)

    def __getitem__(self, index: int) -> Conversation | BadRow:
        source, row = self.sources[self.source_R[index]], int(self.row_R[index])
        try:
            return source.conversation(row, lambda: source.read(row), self.allow_urls, self.need_answer, index)
        except BadRow as error:
            if self.on_bad_row == "skip":
                return BadRow(error.row, error.reason)  # a new one: the caught one's traceback holds pictures
            raise


def check_weights(sources: Sequence[SourceOptions]) -> None:
    without = [source.path for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise InputError(f"data: give all sources a weight or none; these have none: {', '.join(without)}")
    for source in sources:
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise InputError(f"{source.path}: the weight is {source.weight}, expected a number above 0")


def _mix(kept: list[np.ndarray], sources: Sequence[SourceOptions], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(source_R, row_R): which row of which source stands at each index."""
    tables = [
        datasets.Dataset.from_dict({"source": np.full(len(rows), number), "row": rows})
        for number, rows in enumerate(kept)
    ]
    weights = [source.weight for source in sources if source.weight is not None]
    if len(weights) > 1:
        shares = [weight / sum(weights) for weight in weights]
        mixed = datasets.interleave_datasets(tables, shares, seed=seed, stopping_strategy="all_exhausted")
    else:
        mixed = datasets.concatenate_datasets(tables)
    columns = mixed.with_format("numpy")[:]
    return columns["source"], columns["row"]
