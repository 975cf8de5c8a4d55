"""`vlm-taid eval compare`: models in rows, tasks in columns, averages; and how each differs from the reference."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vlm_taid.errors import InputError
from vlm_taid.evaluation.comparison import Comparison, answers_of, compare, paired_test
from vlm_taid.evaluation.groups import group_summaries
from vlm_taid.evaluation.measures import difference, measures

Rows = tuple[list[str], list[list[str]]]


def compare_command(
    evaluations: Sequence[str],
    format: Literal["md", "csv", "latex"] = "md",
    reference: str | None = None,
    output: str | None = None,
) -> str:
    """Prints the table of several models, and how each differs from the reference on the same questions.

    Args:
        evaluations: Results files or folders of eval run and eval lm, each may be given as LABEL=PATH.
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
    """Head and rows: each model's scores, groups with a rule of their own, and the plain mean of the benchmarks.

    In percent, but perplexities and KL; a metric of which less is better has an arrow. An average is a dash while one
    of its scores is missing; texts and lm-eval's tasks are in none.
    """
    columns = comparison.measures
    benchmarks = [measure for measure in columns if measure.main]
    values = {
        label: {
            measure.task: results.score(measure.task).value
            for measure in benchmarks
            if (results := answers_of(tasks, measure.task)) is not None
        }
        for label, tasks in comparison.plain.items()
    }
    summaries = {label: group_summaries(scores) for label, scores in values.items()}
    groups = list(dict.fromkeys(name for found in summaries.values() for name in found))
    averaged = len(benchmarks) > 1
    head = ["model", *(measure.heading for measure in columns), *groups, *(["average"] if averaged else [])]
    rows = []
    for label, scores in values.items():
        cells = [comparison.cell(label, measure) for measure in columns]
        for name in groups:
            average = summaries[label].get(name, {}).get("average")
            cells.append("–" if average is None else f"{average:.1f}")
        if averaged:
            known = [value for value in scores.values() if value is not None]
            cells.append(f"{100 * statistics.fmean(known):.1f}" if len(known) == len(benchmarks) else "–")
        rows.append([label, *cells])
    return head, rows


def differences_table(comparison: Comparison, *, leave_out: bool = False) -> Rows:
    """Head and rows: for each other model and metric the paired difference, who is better on how many rows, and p.

    p is the exact two-sided sign test's over the rows on which one is better: McNemar's where answers are right or
    wrong.

    Args:
        comparison: the evaluations.
        leave_out: leave out evaluations that are not of the reference's rows, in the place of an error.

    Raises:
        InputError: two evaluations are not of the same rows.
    """
    reference = comparison.reference
    head = ["model", "task", "rows", "difference", f"{reference} better on", "this better on", "p"]
    rows = []
    for label, tasks in comparison.plain.items():
        for measure in comparison.measures:
            base, results = comparison.plain[reference].get(measure.task), tasks.get(measure.task)
            if label == reference or base is None or results is None:
                continue
            if not all(measure in measures(one) for one in (base, results)):
                continue
            try:
                found = difference(base, results, measure, (reference, label))
            except InputError:
                if leave_out:
                    continue
                raise
            if found is None or found.score.value is None:
                continue
            sign = "+" if found.score.value > 0 else ""
            p = f"{paired_test(found.better_a, found.better_b):.2g}"
            counts = [str(found.better_a), str(found.better_b)]
            rows.append([label, measure.heading, str(found.score.count), f"{sign}{found.score}", *counts, p])
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
        return text.replace("–", "--").replace("↓", r"$\downarrow$")

    lines = [" & ".join(map(cell, row)) + r" \\" for row in (head, *rows)]
    body = [lines[0], r"\midrule", *lines[1:]]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}"
    return "\n".join([begin, r"\toprule", *body, r"\bottomrule", r"\end{tabular}"])
