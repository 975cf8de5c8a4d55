"""`vlm-taid eval export`: a run's answers as another harness reads them, to be scored there."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from vlm_taid.errors import InputError
from vlm_taid.evaluation.columns import is_empty, options_of, right_letter
from vlm_taid.evaluation.results import read_samples

IDS = ("index", "question_id", "questionId", "pid", "id")
LONGEST_CELL = 32_767  # characters, of a spreadsheet
# What pandas reads as a missing value, and str() of that as "nan". With a blank in front it stays what it is.
MISSING = {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A",
           "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}  # fmt: skip


def export_command(samples: str, output: str, format: Literal["vlmevalkit"] = "vlmevalkit") -> Path:
    """Writes a run's answers as another harness reads them, so that they can be scored there.

    Args:
        samples: A samples_*.jsonl of eval run.
        output: The file to write, .tsv, or .xlsx with openpyxl installed; VLMEvalKit looks for MODEL_DATASET.xlsx.
        format: vlmevalkit, the columns of its prediction files.

    Returns:
        The file.

    Raises:
        InputError: the samples are none, a row has no answer, or the file cannot be written.
    """
    rows = vlmevalkit_rows(read_samples(samples), samples)
    path = Path(output)
    if path.suffix not in (".tsv", ".xlsx"):
        raise InputError(f"--output {output}: VLMEvalKit reads .tsv and .xlsx")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys([*(key for row in rows for key in row if key != "prediction"), "prediction"]))
    cells = [columns, *([row.get(column, "") for column in columns] for row in rows)]
    (_write_tsv if path.suffix == ".tsv" else _write_xlsx)(path, cells)
    Console().print(f"predictions: {path}, {len(rows)} rows", soft_wrap=True)
    return path


def vlmevalkit_rows(lines: Sequence[dict[str, Any]], origin: str) -> list[dict[str, str]]:
    """Lines of a samples file as rows of VLMEvalKit's prediction files, all values as texts.

    Rows that were read from its own TSV keep their columns. Others get its names: ``index`` (the row's number where
    the data has no name of its own for each row), options as ``A``, ``B``, ..., ``answer``, and for MathVista
    ``answer_option`` and what the hub has under ``metadata``. Pictures are left out, as there.

    Args:
        lines: of a samples file.
        origin: the file's name, for messages.

    Raises:
        InputError: a line is no line of a samples file, or its row has no answer.
    """
    for number, line in enumerate(lines, 1):
        if not {"doc", "target", "filtered_resps", "doc_id"} <= set(line):
            raise InputError(f"{origin}:{number}: no doc, target or filtered_resps: is it a samples file?")
        if "error" in line:
            raise InputError(f"{origin}:{number}: the row has no answer ({line['error']}): run it again")
    name = next((key for key in IDS if _names_rows(lines, key)), None)
    rows = []
    for line in lines:
        doc = {key: value for key, value in line["doc"].items() if key not in ("image", "images", "l2_category")}
        if isinstance(doc.get("metadata"), dict):  # MathVista's task, skills, ...
            doc = {**doc.pop("metadata"), **doc}
        options, target, answer = options_of(doc), line["target"], str(line["filtered_resps"][0])
        named = {
            "index": line["doc_id"] if name is None else doc[name],
            "question": doc.get("question"),
            **options,
            "answer": target[0] if len(target) == 1 else target,
            "answer_option": right_letter(doc, options, text_first=True) if target[0] not in options else None,
            "category": line["category"],
            "l2-category": line["doc"].get("l2_category"),
        }
        row = {key: str(value) for key, value in named.items() if not is_empty(value)}
        row |= {key: "" if value is None else str(value) for key, value in doc.items() if key not in row}
        rows.append({**row, "prediction": f" {answer}" if answer in MISSING else answer})
    return rows


def _names_rows(lines: Sequence[dict[str, Any]], key: str) -> bool:
    """Whether this column has a value in every row, and never the same."""
    values = [line["doc"].get(key) for line in lines]
    return not any(map(is_empty, values)) and len(set(map(str, values))) == len(values)


def _write_tsv(path: Path, cells: Sequence[Sequence[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(cells)


def _write_xlsx(path: Path, cells: Sequence[Sequence[str]]) -> None:
    try:
        from openpyxl import Workbook  # pyright: ignore[reportMissingModuleSource]
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE  # pyright: ignore[reportMissingModuleSource]
    except ImportError as error:
        raise InputError(f"--output {path}: .xlsx needs openpyxl; .tsv needs nothing") from error
    book = Workbook()
    sheet = book.active
    assert sheet is not None
    for number, row in enumerate(cells, 1):
        for column, text in enumerate(row, 1):
            if len(text) > LONGEST_CELL or ILLEGAL_CHARACTERS_RE.search(text):
                what = "control characters" if len(text) <= LONGEST_CELL else f"more than {LONGEST_CELL} characters"
                raise InputError(f"--output {path}: row {number - 1}, {cells[0][column - 1]}: {what}; write .tsv")
            if text:
                sheet.cell(number, column, text).data_type = "s"  # "=1+1" is an answer, no formula
    book.save(path)
