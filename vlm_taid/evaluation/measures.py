"""The numbers of a results file, ours or lm-eval's, as tables show them; how two models differ in one, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from vlm_taid.errors import InputError
from vlm_taid.evaluation.results import Results, Score

OF_A_TEXT = ("byte_perplexity", "kl", "top1_agreement")
"""What tables show of `eval lm --data`; the other perplexities follow from the first for texts of the same tokens."""
SHARES = ("acc", "acc_norm", "acc_bytes", "exact_match", "f1", "top1_agreement")  # shown in percent
_PARTS = {  # of a line of a text: the sum, and what it is divided by
    "byte_perplexity": ("loglikelihood", "bytes"),
    "kl": ("kl", "tokens"),
    "top1_agreement": ("same_top", "tokens"),
}


@dataclass(frozen=True)
class Measure:
    """One number of a task.

    Args:
        task: its name.
        metric: the number's name, in the results and in the lines of the samples.
        higher: whether more is better.
        variant: lm-eval's filter.
        teacher: whom a text's KL and agreement are measured against.
        main: the task's only score, so that the task's name is enough.
    """

    task: str
    metric: str
    higher: bool = True
    variant: str = "none"
    teacher: str | None = None
    main: bool = False

    @property
    def name(self) -> str:
        """The metric, in words of a table; an arrow says that less is better."""
        of = {"kl": " to", "top1_agreement": " with"}.get(self.metric)
        who = f"{of} {self.teacher}" if of and self.teacher else ""
        variant = f" ({self.variant})" if self.variant != "none" else ""
        return f"{self.metric}{who}{variant}{'' if self.higher else ' ↓'}"

    @property
    def heading(self) -> str:
        """The column's name."""
        return self.task if self.main else f"{self.task}: {self.name}"

    def of(self, results: Results) -> Score:
        """The number, with its standard error where the file has one."""
        found = results.data["results"][self.task]
        value, error = (found.get(f"{self.metric}{end},{self.variant}") for end in ("", "_stderr"))
        error = error if isinstance(error, int | float) else None  # lm-eval: "N/A"
        return Score(value, error, found.get("sample_len", 0), percent=self.main or self.metric in SHARES)


def measures(results: Results) -> list[Measure]:
    """The numbers of a results file that tables show, in its order."""
    found = []
    for task, numbers in results.data["results"].items():
        if results.is_answered(task):
            found.append(Measure(task, results.key(task), main=True))
            continue
        better = results.data["higher_is_better"].get(task, {})
        teacher = results.data["configs"].get(task, {}).get("teacher")
        for key, value in numbers.items():
            metric, comma, variant = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            if results.is_text(task) and metric not in OF_A_TEXT:
                continue
            who = None if teacher is None or metric == "byte_perplexity" else Path(teacher).name
            found.append(Measure(task, metric, better.get(metric) is not False, variant, who))
    return found


class Part(NamedTuple):
    """A row's part in a number: the number is a function of the sum of ``value`` over that of ``weight``."""

    value: float
    weight: float

    @property
    def mean(self) -> float:
        return self.value / self.weight if self.weight else 0.0


@dataclass(frozen=True)
class Difference:
    """How b differs from a in one number, on the same rows.

    Args:
        score: b - a, with the standard error of the paired difference.
        better_a, better_b: rows on which one of them is better than the other.
    """

    score: Score
    better_a: int
    better_b: int


def rows_of(results: Results, measure: Measure) -> dict[int, dict[str, Any]]:
    """The lines of a measure's samples by row; empty where there are none."""
    lines = results.samples.get(measure.task, [])
    return {line["doc_id"]: line for line in lines if line.get("filter", "none") == measure.variant}


def difference(a: Results, b: Results, measure: Measure, names: tuple[str, str]) -> Difference | None:
    """The paired difference b - a; None without samples of both, or where the number is none of its rows' sums.

    Rows that either could not answer are left out. The standard error is the linearised one, with rows as the units:
    for a mean that of the rows' differences, for a perplexity or a mean a token that of the ratio (Cochran, Sampling
    Techniques, 1977, 6.4).

    Raises:
        InputError: two evaluations are of other rows, or by another metric.
    """
    what = f"{measure.task}: {names[1]} and {names[0]}"
    settings = [_settings(results, measure) for results in (a, b)]
    if settings[0] != settings[1]:
        raise InputError(f"{what} cannot be compared: {settings[1]} and {settings[0]}")
    lines_a, lines_b = (rows_of(results, measure) for results in (a, b))
    if not lines_a or not lines_b:
        return None
    if lines_a.keys() != lines_b.keys() or any(_differ(lines_a[row], lines_b[row]) for row in lines_a):
        raise InputError(f"{what} did not answer the same questions: run both on the same file with the same limit")
    both = [(_part(lines_a[row], measure), _part(lines_b[row], measure)) for row in sorted(lines_a)]
    pairs = [(x, y) for x, y in both if x is not None and y is not None]
    if not pairs:
        return None
    (value_a, pulls_a), (value_b, pulls_b) = (_value([pair[side] for pair in pairs], measure) for side in (0, 1))
    if not measure.main and len(pairs) == len(both):
        for results, value in ((a, value_a), (b, value_b)):
            if not math.isclose(value, measure.of(results).value or 0.0, rel_tol=1e-4, abs_tol=1e-9):
                return None
    count = len(pairs)
    squares = math.fsum((y - x) ** 2 for x, y in zip(pulls_a, pulls_b, strict=True))
    stderr = math.sqrt(count / (count - 1) * squares) if count > 1 else None
    sign = 1 if measure.higher or _of_loglikelihood(measure.metric) else -1
    gaps = [sign * (y.mean - x.mean) for x, y in pairs]
    score = Score(value_b - value_a, stderr, count, percent=measure.of(b).percent)
    return Difference(score, sum(gap < 0 for gap in gaps), sum(gap > 0 for gap in gaps))


def _settings(results: Results, measure: Measure) -> str:
    """What must be equal, in words."""
    config = results.data["configs"].get(measure.task, {})
    if measure.main:
        return f"by the metric {config['metric']}"
    windows = [f"{key} {config[key]}" for key in ("max_length", "stride") if key in config]
    return "by " + ", ".join(windows or [measure.metric])


def _differ(line_a: Mapping[str, Any], line_b: Mapping[str, Any]) -> bool:
    """Whether two lines are known to be of different rows; a row that could not be read has no hash."""
    return "doc_hash" in line_a and "doc_hash" in line_b and line_a["doc_hash"] != line_b["doc_hash"]


def _of_loglikelihood(metric: str) -> bool:
    return metric.endswith("perplexity") or metric == "bits_per_byte"


def _part(line: Mapping[str, Any], measure: Measure) -> Part | None:
    """A row's part; None where it has none: it failed, a judge must see it, or the metric is no sum."""
    value, weight = line.get(measure.metric), 1.0
    if "loglikelihood" in line and measure.metric in _PARTS:
        value, weight = (line[key] for key in _PARTS[measure.metric])
    elif isinstance(value, Sequence) and _of_loglikelihood(measure.metric):  # lm-eval
        value, weight = value
    return Part(float(value), float(weight)) if isinstance(value, int | float) else None


def _value(parts: Sequence[Part], measure: Measure) -> tuple[float, list[float]]:
    """The number, and how much each row pulls it: the linearised deviations, which sum to 0."""
    total = math.fsum(part.weight for part in parts)
    mean = math.fsum(part.value for part in parts) / total
    make: Callable[[float], float] = float
    slope = 1.0
    if measure.metric == "bits_per_byte":
        make, slope = (lambda nats: -nats / math.log(2)), -1 / math.log(2)
    elif _of_loglikelihood(measure.metric):
        make, slope = (lambda nats: math.exp(min(-nats, 709.0))), -math.exp(min(-mean, 709.0))
    return make(mean), [slope * (part.value - mean * part.weight) / total for part in parts]
