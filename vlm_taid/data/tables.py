"""Tables: one source of rows, loaded, or cut into shards that are read from their beginnings.

`datasets` loads and memory-maps everything. JSON files go through it as lines of text and are parsed when a row is
read, because its own JSON reader makes one type of each column: "007" may become 7 and "2020-01-01" a date.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc  # its functions are made at import, where pyright does not see them
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.constants import HF_HUB_CACHE

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


class Origin:
    """Where a source's rows come from: its place (``path``; no such file or folder: a hub id), and how a raw row is
    read.

    Raises:
        InputError: the options contradict each other, or the place cannot be one.
    """

    def __init__(self, options: SourceOptions):
        _check_options(options)
        self.options = options
        path = Path(options.path).expanduser()
        self.columns: dict[str, str] = {}
        self.class_labels: dict[str, datasets.ClassLabel] = {}
        self.label, self.folder = f"{options.path}[{options.split}]", path
        if path.is_file():
            if options.split != "train" or options.name:
                raise InputError(f"{path} is one file: it has no split or configuration to choose, leave both out")
        elif not path.is_dir():
            _check_hub_id(options.path)
            self.label = f"{options.path}/{options.name}[{options.split}]" if options.name else self.label
            self.folder = Path(HF_HUB_CACHE)
        elif not is_saved(path) and (metadata := _metadata_file(path, options.split)):
            self.columns = {"image": "file_name", "images": "file_names"}
            path = metadata
        if path.is_file():
            self.label, self.folder = str(path), path.parent
        if options.image_root is not None:
            self.folder = Path(options.image_root).expanduser()
            if not self.folder.is_dir():
                raise InputError(f"{options.path}: the image_root {options.image_root} is no folder")
        self.path, self.is_json = path, path.is_file() and path.suffix in (".jsonl", ".json")

    def row_name(self, row: int) -> str:
        """The name of a row (counted from 0) in messages."""
        return f"{self.label}:{row + 1}"

    def conversation(
        self, row: int, read: Callable[[], dict[str, Any]], allow_urls: bool, need_answer: bool, index: int | None
    ) -> Conversation:
        """A row by what ``read`` gives of it. BadRow: it cannot be used."""
        options = self.options
        context = RowContext(self.row_name(row), self.folder, allow_urls, need_answer, options.prompt)
        return replace(FORMATS[options.format](read(), context), index=index)

    def renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        """A row's columns under the format's names."""
        named = {ours: values[theirs] for ours, theirs in self.columns.items() if theirs in values}
        taken = {self.columns[ours] for ours in named}
        return {name: value for name, value in values.items() if name not in taken} | named

    def parsed(self, row: int, values: dict[str, Any]) -> dict[str, Any]:
        """A raw row's columns: a line of JSON is read, class numbers become names. BadRow: broken JSON."""
        if not self.is_json:
            for column, feature in self.class_labels.items():
                if values[column] is not None:
                    values[column] = feature.int2str(values[column])
            return values
        try:
            values = json.loads(values["text"])
        except ValueError as error:
            raise BadRow(self.row_name(row), f"is no JSON ({error}); a .jsonl file has one object a line") from None
        if not isinstance(values, dict):
            raise BadRow(self.row_name(row), f"must be a JSON object, got {type(values).__name__}")
        return values


class Table(Origin):
    """One loaded source. ``table`` has the rows, or for JSON one column ``text`` with a row's JSON each."""

    def __init__(self, options: SourceOptions):
        super().__init__(options)
        try:
            self.table = _load(self.path, options)
        except Exception as error:
            raise cannot_be_loaded(self, error) from error
        self.class_labels = {} if self.is_json else class_labels(self.table.features)
        for ours, theirs in options.columns.items():
            self._check_column(theirs, f"columns: {{{ours}: {theirs}}}")
        self.columns |= options.columns

    def read(self, row: int) -> dict[str, Any]:
        """The row's columns under the format's names. BadRow: broken JSON."""
        return self.renamed(self.parsed(row, self.table[row]))

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
                keep &= self._matches(column, listed(wanted))
            rows = np.flatnonzero(keep)
        if not len(rows):
            of = f"none of the {len(self.table)} rows passes the filter {self.options.filter}"
            raise InputError(f"{self.label}: {of if self.options.filter else 'there is no row'}")
        return rows[: self.options.limit]

    def _passes(self, row: int, text: str) -> bool:
        try:
            values = self.parsed(row, {"text": text})
        except BadRow:
            return True  # not dropped in silence: it is reported when it is read
        return all(values.get(column) in listed(wanted) for column, wanted in self.options.filter.items())

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
                    names |= dict.fromkeys(self.parsed(row, {"text": text.as_py()}))
                if column in names:
                    return
        else:
            names = dict.fromkeys(self.table.column_names)
        if column not in names:
            raise InputError(f"{self.label}: `{option}` names no column; the columns are {', '.join(names)}")


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


def is_saved(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def _metadata_file(folder: Path, split: str) -> Path | None:
    """The file that describes a folder of pictures, or the split's folder in it."""
    roots = (folder / split, folder) if split == "train" else (folder / split,)
    candidates = [root / f"metadata{kind}" for root in roots for kind in _FILE_KINDS]
    return next((file for file in candidates if file.is_file()), None)


def _load(path: Path, options: SourceOptions) -> datasets.Dataset:
    if path.is_file():
        table = load_file(path)
    elif path.is_dir() and is_saved(path):
        table = datasets.load_from_disk(str(path))
        if isinstance(table, datasets.DatasetDict):
            if options.split not in table:
                raise InputError(f"it has no split {options.split!r}, but {', '.join(map(str, table))}")
            table = table[options.split]
    else:
        table = datasets.load_dataset(str(path), options.name, split=options.split)
    assert isinstance(table, datasets.Dataset)
    info = table.info.copy()
    info.features = datasets.Features({column: undecoded(feature) for column, feature in table.features.items()})
    return datasets.Dataset(table.data, info=info, split=table.split)  # Dataset.cast would copy every picture


def cannot_be_loaded(origin: Origin, error: Exception) -> InputError:
    """The error to raise where `datasets` fails."""
    cause = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
    if origin.path.is_file() and not origin.path.stat().st_size:
        return InputError(f"{origin.label}: the file is empty")
    where = "" if origin.path.exists() else " It is no file or folder here, so it was looked for on the hub."
    return InputError(f"{origin.label} cannot be loaded: {str(cause).rstrip('.')}.{where}")


def class_labels(features: Any) -> dict[str, datasets.ClassLabel]:
    """The columns that are numbers of classes with names."""
    return {column: feature for column, feature in (features or {}).items() if isinstance(feature, datasets.ClassLabel)}


def load_file(path: Path, streaming: bool = False) -> Any:
    """A file's rows by `datasets`; those of JSON as texts."""
    # Square brackets and stars in a name are letters here, but a pattern to datasets.
    files = {"train": re.sub(r"([*?[])", r"[\1]", str(path.resolve()))}
    if path.suffix == ".parquet":
        return datasets.load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    if path.suffix in (".csv", ".tsv"):
        separator = "\t" if path.suffix == ".tsv" else ","
        with path.open(encoding="utf-8-sig", newline="") as lines:
            header = next(csv.reader(lines, delimiter=separator), [])
        # All columns are texts, as they stand: pandas would make "01" a 1 and "None" nothing.
        texts = datasets.Features({column: datasets.Value("string") for column in header})
        return datasets.load_dataset(
            "csv", data_files=files, split="train", streaming=streaming,
            sep=separator, features=texts, keep_default_na=False,
        )  # fmt: skip
    if path.suffix not in (".jsonl", ".json"):
        raise InputError(f"its kind is unknown, expected {', '.join(_FILE_KINDS)}")
    with path.open(encoding="utf-8-sig") as content:
        is_array = path.suffix == ".json" and content.read(1024).lstrip().startswith("[")
    if is_array:
        if streaming:
            raise InputError("a JSON array cannot be read row by row: write one object a line (.jsonl)")
        stamp = {"path": str(path.resolve()), "modified": path.stat().st_mtime_ns}  # a changed file is read anew
        return datasets.Dataset.from_generator(_array_elements, gen_kwargs=stamp)
    return datasets.load_dataset("text", data_files=files, split="train", encoding="utf-8-sig", streaming=streaming)


def _array_elements(path: str, modified: int) -> Iterator[dict[str, str]]:
    with open(path, encoding="utf-8-sig") as content:
        for element in json.load(content):
            yield {"text": json.dumps(element)}


def undecoded(feature: Any) -> Any:
    """The feature with its images left as bytes and paths, so that our checks see the files."""
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List | datasets.LargeList):
        return type(feature)(undecoded(feature.feature))
    if isinstance(feature, dict):
        return {key: undecoded(value) for key, value in feature.items()}
    return feature


def _arrow(table: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return table.select_columns([column]).with_format("arrow")[:][column]


def listed(wanted: Any) -> list[Any]:
    return list(wanted) if isinstance(wanted, list | tuple) else [wanted]
