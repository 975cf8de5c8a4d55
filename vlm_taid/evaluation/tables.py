"""`vlm-taid eval compare`: models in rows, tasks in columns, averages; and how each differs from the reference."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vlm_taid.errors import InputError
from vlm_taid.evaluation.comparison import Comparison, compare, discordant, paired_test
from vlm_taid.evaluation.groups import group_summaries
from vlm_taid.evaluation.results import Score

Rows = tuple[list[str], list[list[str]]]


def compare_command(
    evaluations: Sequence[str],
    format: Literal["md", "csv", "latex"] = "md",
    reference: str | None = None,
    output: str | None = None,
) -> str:
    """Prints the table of several models, and how each differs from the reference on the same questions.

    Args:
        evaluations: Results files or folders of eval run, each may be given as LABEL=PATH.
        format: md, csv or latex.
        reference: The label of the model that the others are compared with; the first one if not given.
        output: A file for the table, which is printed too.

    Returns:
        The text.

    Raises:
        InputError: nothing there, or two evaluations of a task are not of the same questions.
    """
    comparison = compare(evaluations, reference)
    write = {"md": _markdown, "csv": _csv, "latex": _latex}[format]
    parts = [write(*scores_table(comparison))]
    head, rows = differences_table(comparison)
    if rows:
        title = f"Differences from {comparison.reference}, row by row"
        parts.append({"md": f"{title}:\n", "csv": "", "latex": f"% {title}\n"}[format] + write(head, rows))
    text = "\n".join(parts)
    print(text)
    if output is not None:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text + "\n", encoding="utf-8")
    return text


def scores_table(comparison: Comparison) -> Rows:
    """Head and rows: each model's scores in percent, groups with a rule of their own, and the plain mean of the tasks.

    An average is a dash while one of its scores is missing.
    """
    by_label = {
        label: {task: results.score(task) for task, results in tasks.items()}
        for label, tasks in comparison.plain.items()
    }
    summaries = {
        label: group_summaries({task: score.value for task, score in scores.items()})
        for label, scores in by_label.items()
    }
    groups = list(dict.fromkeys(name for found in summaries.values() for name in found))
    tasks = comparison.tasks
    head = ["model", *tasks, *groups, *(["average"] if len(tasks) > 1 else [])]
    rows = []
    for label, scores in by_label.items():
        cells = [str(scores.get(task, Score(None, None, 0))) for task in tasks]
        for name in groups:
            average = summaries[label].get(name, {}).get("average")
            cells.append("–" if average is None else f"{average:.1f}")
        if len(tasks) > 1:
            values = [scores[task].value for task in tasks if task in scores]
            known = [value for value in values if value is not None]
            cells.append(f"{100 * statistics.fmean(known):.1f}" if len(known) == len(tasks) else "–")
        rows.append([label, *cells])
    return head, rows


def paired_difference(values_a: Sequence[float], values_b: Sequence[float]) -> Score:
    """The mean of b - a over the same questions, and its standard error: that of the differences."""
    return Score.mean([b - a for a, b in zip(values_a, values_b, strict=True)])


def differences_table(comparison: Comparison) -> Rows:
    """Head and rows: for each other model and task the paired difference, who alone is right how often, McNemar's p.

    p is the exact two-sided one where scores are 0 or 1, else a dash. Rows that either could not answer are left out.

    Raises:
        InputError: two evaluations are not of the same questions.
    """
    head = ["model", "task", "rows", "difference", f"only {comparison.reference} right", "only this right", "McNemar p"]
    rows = []
    for label, tasks in comparison.plain.items():
        for task, results in tasks.items():
            base = comparison.plain[comparison.reference].get(task)
            if (
                label == comparison.reference
                or base is None
                or not (base.samples.get(task) and results.samples.get(task))
            ):
                continue
            key = results.key(task)
            if results.metric(task) != base.metric(task):
                metrics = f"{results.metric(task)} and {base.metric(task)}"
                raise InputError(f"{task}: {label} and {comparison.reference} have different metrics, {metrics}")
            if [a["doc_id"] for a in base.samples[task]] != [b["doc_id"] for b in results.samples[task]]:
                raise InputError(f"{task}: {label} and {comparison.reference} did not answer the same questions")
            pairs = zip(base.samples[task], results.samples[task], strict=True)
            scores = [(a[key], b[key]) for a, b in pairs if a[key] is not None and b[key] is not None]
            if not scores:
                continue
            values_a, values_b = ([pair[side] for pair in scores] for side in (0, 1))
            difference = paired_difference(values_a, values_b)
            cells = ["–", "–", "–"]
            if {*values_a, *values_b} <= {0, 1}:
                only_a, only_b = discordant([a == 1 for a in values_a], [b == 1 for b in values_b])
                cells = [str(only_a), str(only_b), f"{paired_test(only_a, only_b):.2g}"]
            sign = "+" if difference.value is not None and difference.value > 0 else ""
            rows.append([label, task, str(len(scores)), f"{sign}{difference}", *cells])
    return head, rows


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _csv(head: list[str], rows: list[list[str]]) -> str:
    """Numbers alone: a standard error has a column of its own."""
    split = [index for index in range(len(head)) if any(" ± " in row[index] for row in rows)]

    def wide(row: list[str], is_head: bool) -> list[str]:
        cells: list[str] = []
        for index, cell in enumerate(row):
            value, _, error = cell.partition(" ± ")
            cells += [value.replace("–", ""), f"{cell} stderr" if is_head else error] if index in split else [value]
        return cells

    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([wide(head, True), *(wide(row, False) for row in rows)])
    return text.getvalue()


def _latex(head: list[str], rows: list[list[str]]) -> str:
    def cell(text: str) -> str:
        value, plus_minus, error = text.partition(" ± ")
        if plus_minus:
            return f"${value}_{{\\pm {error}}}$"
        for mark in "&%#_$":
            text = text.replace(mark, f"\\{mark}")
        return text.replace("–", "--")

    lines = [" & ".join(map(cell, row)) + r" \\" for row in (head, *rows)]
    body = [lines[0], r"\midrule", *lines[1:]]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    return "\n".join([begin, r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])
