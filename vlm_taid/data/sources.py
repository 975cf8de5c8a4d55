"""Sources: where rows come from, and the dataset that reads them one by one in the DataLoader's workers.

`datasets` loads and memory-maps everything. JSON files go through it as lines of text and are parsed when a row is
read, because its own JSON reader makes one type of each column: "007" may become 7 and "2020-01-01" a date.

A legend for the index arrays: R rows of the mixed dataset.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc  # its functions are made at import, where pyright does not see them
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_CACHE
from torch.utils.data import Dataset

from vlm_taid.data.conversation import Conversation
from vlm_taid.data.formats import FORMATS, FormatName, RowContext
from vlm_taid.errors import BadRow, InputError

_FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass
class SourceOptions:
    """One source of rows."""

    path: str
    """A hub id, a .jsonl, .json, .csv, .tsv or .parquet file, a save_to_disk folder, or images with a metadata file."""
    format: FormatName
    """What the columns mean: messages, llava, vqa, prompt_completion or text."""
    split: str = "train"
    """The split of a hub dataset or a folder."""
    name: str | None = None
    """The configuration of a hub dataset."""
    weight: float | None = None
    """This source's share of the mixture, relative to the others' weights; give all sources one or none."""
    columns: dict[str, str] = field(default_factory=dict)
    """Column names, the format's to the source's, such as {question: query}."""
    filter: dict[str, Any] = field(default_factory=dict)
    """Rows to keep: a column of the source to the value, or to a list of the values, that it must have."""
    prompt: str | None = None
    """How the vqa format phrases a question, such as "{question}\\nAnswer with one word."."""
    image_root: str | None = None
    """The folder that image paths start from and may not leave (default: the file's folder)."""
    limit: int | None = None
    """Read only so many rows, the first ones after the filter."""


@dataclass
class DataOptions:
    """What is trained on."""

    train: list[SourceOptions]
    """The sources to train on: one after the other, or mixed if they have weights."""
    validation: list[SourceOptions] = field(default_factory=list)
    """The sources on which the loss is measured during training."""
    max_length: int | None = None
    """The longest row in tokens, images included; a longer one is a bad row, never cut (default: no limit)."""
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
        _check_weights(sources)
        self.on_bad_row, self.allow_urls, self.need_answer = on_bad_row, allow_urls, need_answer
        self.sources = [_Source(options) for options in sources]
        self.source_R, self.row_R = _mix([source.kept_rows() for source in self.sources], sources, seed)

    def __len__(self) -> int:
        return len(self.row_R)

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
        options = source.options
        context = RowContext(source.row_name(row), source.folder, self.allow_urls, self.need_answer, options.prompt)
        try:
            return replace(FORMATS[options.format](source.read(row), context), index=index)
        except BadRow as error:
            if self.on_bad_row == "skip":
                return BadRow(error.row, error.reason)  # a new one: the caught one's traceback holds pictures
            raise


class _Source:
    """One loaded source. ``table`` has the rows, or for JSON one column ``text`` with a row's JSON each."""

    def __init__(self, options: SourceOptions):
        _check_options(options)
        self.options = options
        path = Path(options.path).expanduser()
        self.columns: dict[str, str] = {}
        self.label, self.folder = f"{options.path}[{options.split}]", path
        if path.is_file():
            if options.split != "train" or options.name:
                raise InputError(f"{path} is one file: it has no split or configuration to choose, leave both out")
        elif not path.is_dir():
            _check_hub_id(options.path)
            self.label = f"{options.path}/{options.name}[{options.split}]" if options.name else self.label
            self.folder = Path(HF_HUB_CACHE)
        elif not _is_saved(path) and (metadata := _metadata_file(path, options.split)):
            self.columns = {"image": "file_name", "images": "file_names"}
            path = metadata
        if path.is_file():
            self.label, self.folder = str(path), path.parent
        if options.image_root is not None:
            self.folder = Path(options.image_root).expanduser()
            if not self.folder.is_dir():
                raise InputError(f"{options.path}: the image_root {options.image_root} is no folder")
        self.is_json = path.is_file() and path.suffix in (".jsonl", ".json")
        try:
            self.table = _load(path, options)
        except Exception as error:
            cause = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
            where = "" if path.exists() else " It is no file or folder here, so it was looked for on the hub."
            raise InputError(f"{self.label} cannot be loaded: {str(cause).rstrip('.')}.{where}") from error

        self.class_labels = {}
        for column, feature in {} if self.is_json else self.table.features.items():
            if isinstance(feature, datasets.ClassLabel):
                self.class_labels[column] = feature
        for ours, theirs in options.columns.items():
            self._check_column(theirs, f"columns: {{{ours}: {theirs}}}")
        self.columns |= options.columns

    def row_name(self, row: int) -> str:
        """The name of a row (counted from 0) in messages."""
        return f"{self.label}:{row + 1}"

    def read(self, row: int) -> dict[str, Any]:
        """The row's columns under the format's names. BadRow: broken JSON."""
        values = self._raw(row)
        renamed = {ours: values[theirs] for ours, theirs in self.columns.items() if theirs in values}
        taken = {self.columns[ours] for ours in renamed}
        return {name: value for name, value in values.items() if name not in taken} | renamed

    def _raw(self, row: int) -> dict[str, Any]:
        values = self.table[row]
        if self.is_json:
            return self._parsed(row, values["text"])
        for column, feature in self.class_labels.items():
            if values[column] is not None:
                values[column] = feature.int2str(values[column])
        return values

    def _parsed(self, row: int, text: str) -> dict[str, Any]:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise BadRow(self.row_name(row), f"is no JSON ({error}); a .jsonl file has one object a line") from None
        if not isinstance(values, dict):
            raise BadRow(self.row_name(row), f"must be a JSON object, got {type(values).__name__}")
        return values

    def kept_rows(self) -> np.ndarray:
        """The rows after filter and limit. InputError: none is left, or the filter does not fit the columns."""
        for column in self.options.filter:
            self._check_column(column, f"filter: {{{column}: ...}}")
        if self.is_json:
            lines = _arrow(self.table, "text")
            rows = np.flatnonzero(pc.not_equal(pc.utf8_trim_whitespace(lines), ""))  # pyright: ignore
            if self.options.filter:
                rows = np.array([row for row in rows.tolist() if self._passes(row, lines[row].as_py())], dtype=np.int64)
        else:
            keep = np.ones(len(self.table), dtype=bool)
            for column, wanted in self.options.filter.items():
                keep &= self._matches(column, _listed(wanted))
            rows = np.flatnonzero(keep)
        if not len(rows):
            of = f"none of the {len(self.table)} rows passes the filter {self.options.filter}"
            raise InputError(f"{self.label}: {of if self.options.filter else 'there is no row'}")
        return rows[: self.options.limit]

    def _passes(self, row: int, text: str) -> bool:
        try:
            values = self._parsed(row, text)
        except BadRow:
            return True  # not dropped in silence: it is reported when it is read
        return all(values.get(column) in _listed(wanted) for column, wanted in self.options.filter.items())

    def _matches(self, column: str, wanted: list[Any]) -> np.ndarray:
        values = _arrow(self.table, column)
        try:
            if column in self.class_labels:
                wanted = [self.class_labels[column].str2int(str(value)) for value in wanted]
            elif pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                wanted = [value if value is None else str(value) for value in wanted]
            return pc.is_in(values, value_set=pa.array(wanted, type=values.type)).to_numpy()  # pyright: ignore
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise InputError(
                f"{self.label}: the filter of column {column!r} cannot be compared with it, its type is {values.type} "
                f"({error}): give values of that type"
            ) from None

    def _check_column(self, column: str, option: str) -> None:
        names: dict[str, None] = {}
        if self.is_json:  # rows need not have the same keys
            for row, text in enumerate(_arrow(self.table, "text")):
                with suppress(BadRow):
                    names |= dict.fromkeys(self._parsed(row, text.as_py()))
                if column in names:
                    return
        else:
            names = dict.fromkeys(self.table.column_names)
        if column not in names:
            raise InputError(f"{self.label}: `{option}` names no column; the columns are {', '.join(names)}")


def _check_weights(sources: Sequence[SourceOptions]) -> None:
    without = [source.path for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise InputError(f"data: give all sources a weight or none; these have none: {', '.join(without)}")
    for source in sources:
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise InputError(f"{source.path}: the weight is {source.weight}, expected a number above 0")


def _check_options(options: SourceOptions) -> None:
    if options.format not in FORMATS:
        raise InputError(f"{options.path}: unknown format {options.format!r}; expected {', '.join(FORMATS)}")
    if options.prompt is not None and options.format != "vqa":
        raise InputError(f"{options.path}: a prompt is for the format vqa, not for {options.format}: leave it out")
    if options.limit is not None and options.limit < 1:
        raise InputError(f"{options.path}: the limit is {options.limit}, at least 1 is needed")


def _check_hub_id(path: str) -> None:
    if not _HUB_ID.fullmatch(path) or path.startswith(".") or path.endswith(_FILE_KINDS):
        raise InputError(f"{path}: there is no such file or folder; correct the path (it starts from {Path.cwd()})")


def _is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _metadata_file(folder: Path, split: str) -> Path | None:
    """The file that describes a folder of pictures, or the split's folder in it."""
    roots = (folder / split, folder) if split == "train" else (folder / split,)
    candidates = [root / f"metadata{kind}" for root in roots for kind in _FILE_KINDS]
    return next((file for file in candidates if file.is_file()), None)


def _load(path: Path, options: SourceOptions) -> datasets.Dataset:
    if path.is_file():
        table = _load_file(path)
    elif path.is_dir() and _is_saved(path):
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            if options.split not in table:
                raise InputError(f"it has no split {options.split!r}, but {', '.join(map(str, table))}")
            table = table[options.split]
    else:
        table = datasets.load_dataset(str(path), options.name, split=options.split)
    assert isinstance(table, datasets.Dataset)
    info = table.info.copy()
    info.features = datasets.Features({column: _undecoded(feature) for column, feature in table.features.items()})
    return datasets.Dataset(table.data, info=info, split=table.split)  # Dataset.cast would copy every picture


def _load_file(path: Path) -> Any:
    # Square brackets and stars in a name are letters here, but a pattern to datasets.
    files = {"train": re.sub(r"([*?[])", r"[\1]", str(path.resolve()))}
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=files, split="train")
    if path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else ","
        with path.open(encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines, delimiter=separator), [])
        # All columns are texts, as they stand: pandas would make "01" a 1 and "None" nothing.
        texts = datasets.Features({column: datasets.Value("string") for column in header})
        return datasets.load_dataset(
            "csv", data_files=files, split="train", sep=separator, features=texts, keep_default_na=False
        )
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"its kind is unknown, expected {', '.join(_FILE_KINDS)}")
    with path.open(encoding="utf-8-sig") as content:
        is_array = path.suffix == ".json" and content.read(1024).lstrip().startswith("[")
    if is_array:
        stamp = {"path": str(path.resolve()), "modified": path.stat().st_mtime_ns}  # a changed file is read anew
        return datasets.Dataset.from_generator(_array_elements, gen_kwargs=stamp)
    return datasets.load_dataset("text", data_files=files, split="train", encoding="utf-8-sig")


def _array_elements(path: str, modified: int) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8-sig") as content:
        for element in json.load(content):
            yield {"text": json.dumps(element)}


def _undecoded(feature: Any) -> Any:
    """The feature with its images left as bytes and paths, so that our checks see the files."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(_undecoded(feature.feature))
    if isinstance(feature, dict):
        return {key: _undecoded(value) for key, value in feature.items()}
    return feature


def _arrow(table: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return table.select_columns([column]).with_format("arrow")[:][column]


def _listed(wanted: Any) -> list[Any]:
    return list(wanted) if isinstance(wanted, list | tuple) else [wanted]


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
