"""Scores of answers that are on disk: samples of a run, predictions by question id, or VLMEvalKit's tables."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from vlm_taid.errors import InputError
from vlm_taid.evaluation.columns import is_empty, renamed
from vlm_taid.evaluation.command import make_judge, parse_pairs
from vlm_taid.evaluation.judge import Judge, judged
from vlm_taid.evaluation.results import Score, read_samples, scored
from vlm_taid.evaluation.scoring import scoring, summary
from vlm_taid.evaluation.tasks import Task, TaskFile, known_tasks

IDS = ("id", "question_id", "questionId", "pid", "index")
Line = dict[str, Any]


def score_command(
    predictions: str,
    metric: str | None = None,
    task: str | None = None,
    data: str | None = None,
    include_path: str | None = None,
    flavor: Literal["official", "lmms", "vlmevalkit"] | None = None,
    columns: dict[str, str] | str | None = None,
    on_error: Literal["stop", "record"] = "stop",
    judge_url: str | None = None,
    judge_model: str | None = None,
) -> Score:
    """Scores saved answers anew, without a model.

    Args:
        predictions: A samples_*.jsonl of eval run; or a .tsv, .csv or .xlsx with the columns of the questions and
            prediction, as VLMEvalKit writes it; or a .json list of question_id and answer, which needs --data.
        metric: How answers are scored, in place of the task's metric; a samples file knows its own.
        task: A benchmark, whose metric and columns are taken (vlm-taid eval tasks lists them).
        data: The file of questions, for predictions that are question ids and answers alone.
        include_path: A task file of one's own (YAML), or a folder of them.
        flavor: Whose convention the metric follows, where a benchmark has several.
        columns: Names of the data file's columns, as question=q,answers=a.
        on_error: stop at an answer that cannot be judged; or record it, and score the others.
        judge_url: An OpenAI-compatible server that scores what rules cannot, as http://localhost:8000/v1.
        judge_model: The judge's name at that server.

    Returns:
        The score, which is also printed, in percent, with the other numbers of the metric.

    Raises:
        InputError: a file cannot be read, holds no answers, a row has no reference, or the metric is not known.
    """
    path = Path(predictions)
    known = known_tasks(include_path)
    names = parse_pairs(columns or {}, "columns")
    if task is not None and task not in known:
        raise InputError(f"task {task!r} is no benchmark; there are {', '.join(sorted(known))}")
    if task is None and flavor is not None:
        raise InputError("--flavor is a benchmark's: give --task too")
    described = TaskFile("predictions") if task is None else known[task]
    chosen = described.build(data or predictions, flavor=flavor, metric=metric, columns=names)
    if path.suffix == ".jsonl" and data is None:
        lines, chosen_metric = read_samples(path), chosen.metric or metric_of(path)
    else:
        lines = by_id(path, chosen) if data is not None else table_lines(path, chosen)
        chosen_metric = chosen.with_metric().metric if data is not None or task else metric
    if chosen_metric is None:
        raise InputError(f"{predictions}: by which metric? Give --task or --metric")
    judge = make_judge(judge_url, judge_model, str(path.parent))
    lines = rescored(lines, chosen_metric, predictions, judge, on_error)
    numbers, found = summary(lines, chosen_metric), scoring(chosen_metric)
    result = Score(numbers[f"{found.key},none"], numbers[f"{found.key}_stderr,none"], numbers["sample_len"])
    console = Console()
    console.print(f"{chosen_metric}@{found.flavor}: {result} of {result.count} rows", soft_wrap=True)
    for name, value in numbers.items():
        if not name.startswith(found.key) and value:
            console.print(f"  {name.removesuffix(',none')}: {value:g}")
    return result


def rescored(
    lines: Sequence[Mapping[str, Any]], metric: str, origin: str, judge: Judge | None, on_error: Any
) -> list[Line]:
    """The lines with their scores by a metric, and by a judge if there is one; rows with errors stay what they are.

    Raises:
        InputError: a line has no answer or no reference, or the judge fails.
    """
    result: list[Line] = []
    for number, line in enumerate(lines, 1):
        if line.get("error") is not None:
            result.append(dict(line))
            continue
        try:
            answer, doc, target = line["filtered_resps"][0], line["doc"], line["target"]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(f"{origin}:{number}: no filtered_resps, doc or target: is it a samples file?") from error
        if not target:
            raise InputError(f"{origin}:{number}: no reference answer to score against")
        result.append({**line, **scored(answer, doc, target, metric)})
    return result if judge is None else judged(result, metric, judge, on_error)


def metric_of(samples: Path) -> str | None:
    """The metric of a samples file, from the results file beside it; None if there is none."""
    for results in samples.parent.glob("results_*.json"):
        stamp = results.stem.removeprefix("results_")
        if samples.stem.endswith(f"_{stamp}"):
            configs = json.loads(results.read_text(encoding="utf-8"))["configs"]
            task = samples.stem.removeprefix("samples_").removesuffix(f"_{stamp}")
            return configs[task]["metric"] if task in configs else None
    return None


def table_lines(path: Path, task: Task) -> list[Line]:
    """Lines from a table that has the questions' columns and ``prediction``; an empty answer is an empty answer.

    Raises:
        InputError: no such file, no rows, or no column of answers; BadRow: a row without a reference.
    """
    rows = _table(path)
    if not rows or "prediction" not in rows[0]:
        found = ", ".join(rows[0]) if rows else "none"
        raise InputError(f"{path}: expected rows with a column prediction; the columns are {found}")
    lines = []
    for index, row in enumerate(rows):
        answer = "" if is_empty(row["prediction"]) else str(row["prediction"])
        named = renamed({key: value for key, value in row.items() if key not in ("prediction", "image")}, task.aliases)
        lines.append(_line(index, named, answer, task, f"{path}:{index + 1}"))
    return lines


def _table(path: Path) -> list[dict[str, Any]]:
    try:
        if path.suffix == ".xlsx":
            import pandas  # with openpyxl, which reads these files

            return pandas.read_excel(path, dtype=str, keep_default_na=False).to_dict("records")  # pyright: ignore
        if path.suffix in (".tsv", ".csv"):
            csv.field_size_limit(2**31 - 1)  # pictures as base64
            with path.open(encoding="utf-8-sig", newline="") as file:
                return list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def by_id(path: Path, task: Task) -> list[Line]:
    """Lines from question ids and answers, and the task's own file of questions.

    Raises:
        InputError: a question without an answer, or an answer without a question.
    """
    entries = read_samples(path) if path.suffix == ".jsonl" else _table(path)
    answers: dict[str, str] = {}
    for entry in entries if isinstance(entries, list) else []:
        key = next((entry[column] for column in IDS if column in entry), None)
        answer = entry.get("answer", entry.get("prediction"))
        if key is None or answer is None:
            raise InputError(f"{path}: expected entries of question_id and answer, got {json.dumps(entry)[:80]}")
        answers[str(key)] = "" if is_empty(answer) else str(answer)
    rows, lines = task.rows(), []
    for index in range(len(rows)):
        name, _, row = rows.columns(index)
        key = next((str(row[column]) for column in IDS if not is_empty(row.get(column))), None)
        if key is None or key not in answers:
            raise InputError(f"{path}: no answer to question {key} ({name})")
        lines.append(_line(index, row, answers.pop(key), task, name))
    if answers:
        raise InputError(f"{path}: {len(answers)} answers have no question in {task.source.path}: {min(answers)}, ...")
    return lines


def _line(index: int, row: Mapping[str, Any], answer: str, task: Task, name: str) -> Line:
    category = row.get(task.category)
    return {
        "doc_id": index,
        "doc": dict(row),
        "target": task.references(row, name),
        "filtered_resps": [answer.strip()],
        "category": None if category is None else str(category),
    }
