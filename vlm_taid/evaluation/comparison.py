"""Two evaluations side by side: how often they agree, whether a difference is chance, and the blind baseline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from vlm_taid.data.sources import SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.evaluation.columns import references_of
from vlm_taid.evaluation.measures import Measure, measures
from vlm_taid.evaluation.metrics import normalize_exact
from vlm_taid.evaluation.readers import Row
from vlm_taid.evaluation.results import Results, Score, sample_line, versions
from vlm_taid.evaluation.tasks import Task

Samples = Sequence[Mapping[str, Any]]


def agreements(samples_a: Samples, samples_b: Samples) -> list[bool]:
    """For each row, whether the two answers are equal after strip and casefold.

    Args:
        samples_a: the lines of a samples file.
        samples_b: those of another one, of the same task.

    Raises:
        InputError: the samples are not of the same questions in the same order.
    """
    questions_a, questions_b = ([sample["doc_id"] for sample in samples] for samples in (samples_a, samples_b))
    if questions_a != questions_b:
        raise InputError(
            f"two evaluations ({len(questions_a)} and {len(questions_b)} rows) are not of the same questions: "
            "run both on the same file with the same limit"
        )
    return [
        normalize_exact(a["filtered_resps"][0]) == normalize_exact(b["filtered_resps"][0])
        for a, b in zip(samples_a, samples_b, strict=True)
    ]


def agreement(samples_a: Samples, samples_b: Samples) -> Score:
    """The share of rows with equal answers, and its standard error; takes and raises what `agreements` does."""
    return Score.mean([float(equal) for equal in agreements(samples_a, samples_b)])


def discordant(flags_a: Sequence[bool], flags_b: Sequence[bool]) -> tuple[int, int]:
    """How many rows only a has, and how many only b: what `paired_test` takes."""
    pairs = Counter(zip(flags_a, flags_b, strict=True))
    return pairs[True, False], pairs[False, True]


def paired_test(better_a: int, better_b: int) -> float:
    """The exact two-sided p value of McNemar's test (1947).

    Args:
        better_a: rows where only a is right.
        better_b: rows where only b is right.

    Returns:
        How likely a split at least this uneven is when each discordant row falls either way with chance 1/2.
    """
    count, fewer = better_a + better_b, min(better_a, better_b)
    tail = ways = 1  # in whole numbers, so exact; ways = count choose rows
    for rows in range(1, fewer + 1):
        ways = ways * (count - rows + 1) // rows
        tail += ways
    return min(1.0, 2 * tail / 2**count)


@dataclass
class Comparison:
    """Evaluations of several models: by label, then task.

    Args:
        reference: the label of the model that the others are compared with: the teacher.
        plain: the evaluations as they are.
        shuffled: those in which each question got another row's picture.
    """

    reference: str
    plain: dict[str, dict[str, Results]]
    shuffled: dict[str, dict[str, Results]]

    @property
    def tasks(self) -> list[str]:
        """All tasks, in the order in which they were met."""
        return list(dict.fromkeys(task for tasks in self.plain.values() for task in tasks))

    @property
    def measures(self) -> list[Measure]:
        """All numbers, in the order in which they were met: a column each."""
        found = [
            measure
            for tasks in self.plain.values()
            for task, results in tasks.items()
            for measure in measures(results)
            if measure.task == task
        ]
        return sorted(dict.fromkeys(found), key=lambda measure: self.tasks.index(measure.task))

    def cell(self, label: str, measure: Measure) -> str:
        """A model's number, or a dash."""
        results = self.plain[label].get(measure.task)
        return "–" if results is None or measure not in measures(results) else str(measure.of(results))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows of the table of all models: parameters, scores, agreement with the reference.

        In percent, but perplexities and KL; a metric of which less is better has an arrow.
        """
        head, rows = ["model", "parameters"], [[label, self._parameters(label)] for label in self.plain]
        for measure in self.measures:
            prefix = f"{measure.task}: " if len(self.tasks) > 1 else ""
            columns = self._answer_columns(measure.task) if measure.main else {}
            columns = columns or {measure.name: [self.cell(label, measure) for label in self.plain]}
            for name, cells in columns.items():
                head.append(prefix + name)
                for row, cell in zip(rows, cells, strict=True):
                    row.append(cell)
        return head, rows

    def _answer_columns(self, task: str) -> dict[str, list[str]]:
        """Of questions that were asked: all, each category, with wrong pictures, agreement."""
        groups = dict.fromkeys(
            group
            for tasks in self.plain.values()
            if (results := answers_of(tasks, task)) is not None
            for group in results.data["categories"][task]
        )
        columns: dict[str, list[str]] = {"all": [self._score(self.plain, label, task) for label in self.plain]}
        for group in groups:
            columns[group] = [self._score(self.plain, label, task, group) for label in self.plain]
        if any(task in tasks for tasks in self.shuffled.values()):
            columns["wrong picture"] = [self._score(self.shuffled, label, task) for label in self.plain]
        if len(self.plain) > 1:
            columns[f"agrees with {self.reference}"] = [self._agreement(label, task) for label in self.plain]
        return columns

    def rich_table(self, title: str | None = None) -> Table:
        """The same table, to be printed with rich."""
        head, rows = self.table()
        table = Table(*head, title=title)
        for row in rows:
            table.add_row(*row)
        return table

    def _parameters(self, label: str) -> str:
        config = next(iter(self.plain[label].values())).data["config"]
        count = config.get("num_params", config.get("model_num_parameters"))  # lm-eval's name
        if not count:
            return "–"
        return f"{count / 1e6:.2f} M" if count < 1e9 else f"{count / 1e9:.2f} B"

    @staticmethod
    def _score(by_label: Mapping[str, dict[str, Results]], label: str, task: str, group: str | None = None) -> str:
        results = answers_of(by_label.get(label, {}), task)
        if results is None or (group is not None and group not in results.data["categories"][task]):
            return "–"
        return str(results.score(task, group))

    def _agreement(self, label: str, task: str) -> str:
        found = self.agreement_with_reference(label, task)
        return "–" if found is None else str(found)

    def agreement_with_reference(self, label: str, task: str, group: str | None = None) -> Score | None:
        """How often a model gives the reference's answer, on the rows of a category that both could answer; or None.

        Raises:
            InputError: they answered other rows.
        """
        mine, theirs = self.answers(label, task), self.answers(self.reference, task)
        if label == self.reference or not mine or not theirs:
            return None
        equal = [
            float(same)
            for same, a, b in zip(agreements(mine, theirs), mine, theirs, strict=True)
            if "error" not in a and "error" not in b and group in (None, b["category"])
        ]
        return Score.mean(equal) if equal else None

    def answers(self, label: str, task: str) -> Samples:
        """A model's lines of a task whose questions it was asked; empty without samples, and for texts."""
        results = answers_of(self.plain[label], task)
        return [] if results is None else results.samples.get(task, [])


def answers_of(by_task: Mapping[str, Results], task: str) -> Results | None:
    """The results of a task whose questions were asked; None if there are none, or of a text."""
    results = by_task.get(task)
    return results if results is not None and results.is_answered(task) else None


def compare(evaluations: Sequence[str | Path], reference: str | None = None) -> Comparison:
    """Reads evaluations to be set side by side.

    Args:
        evaluations: results files, or folders whose newest results of each model are taken; each may be given as
            ``LABEL=PATH``, else the model's own name is its label. Results with shuffled pictures go beside the
            plain ones of the same label.
        reference: the label of the model to compare with; the first one if None.

    Raises:
        InputError: nothing there, or no evaluation of that label.
    """
    plain: dict[str, dict[str, Results]] = {}
    shuffled: dict[str, dict[str, Results]] = {}
    for item in map(str, evaluations):
        label, separator, path = item.partition("=")
        if not separator or Path(item).exists():
            label, path = "", item
        files = (
            sorted(Path(path).rglob("results_*.json"), key=lambda file: file.name) if Path(path).is_dir() else [path]
        )
        if not files:
            raise InputError(
                f"{path}: no results_*.json in it; give the --output_path of `vlm-taid eval run` or `eval lm`"
            )
        found = [Results.load(file) for file in files]  # the newest last
        if label and len(names := {results.data["model_name"] for results in found}) > 1:
            raise InputError(f"{item}: one label for several models: {', '.join(sorted(names))}")
        for results in found:
            side = shuffled if results.data["config"].get("shuffle_images") else plain
            by_task = side.setdefault(label or results.data["model_name"], {})
            by_task.update(dict.fromkeys(results.data["results"], results))
    if not plain:
        raise InputError("no evaluation to compare")
    reference = reference or next(iter(plain))
    if reference not in plain:
        raise InputError(f"no evaluation is labelled {reference!r}; there are {', '.join(plain)}")
    return Comparison(reference, plain, shuffled)


def blind_baseline(
    train_rows: Iterable[Mapping[str, Any]],
    test_rows: Iterable[Mapping[str, Any]],
    *,
    task: str = "blind",
    metric: str = "exact_match",
) -> Results:
    """What can be scored without looking: each question gets its most common training answer.

    A question that was never asked in training gets the most common answer of all. Of equally common answers the one
    seen first is taken. Questions count as the same after strip and casefold.

    Args:
        train_rows: with columns ``question`` and ``answer`` or ``answers`` (the first of them counts).
        test_rows: the same, and ``category`` if there is one; in the order of the file.
        task: what the results call the task: the name that the models' evaluation used.
        metric: as in the models' evaluation.

    Raises:
        InputError: there are no training rows, or a row has no reference.
    """
    by_question: dict[str, Counter[str]] = {}
    overall: Counter[str] = Counter()
    for index, row in enumerate(train_rows):
        answer = references_of(row, f"training row {index}")[0]
        by_question.setdefault(normalize_exact(str(row["question"])), Counter())[answer] += 1
        overall[answer] += 1
    if not overall:
        raise InputError("the blind baseline needs training rows, and there are none")
    described = Task(task, SourceOptions(path="questions without pictures", format="vqa"), metric)
    samples = []
    for index, row in enumerate(test_rows):
        counts = by_question.get(normalize_exact(str(row["question"])), overall)
        read = Row(
            doc_id=index,
            doc={"question": row["question"]},
            references=references_of(row, f"test row {index}"),
            category=row.get("category"),
            prompt=str(row["question"]),
            images=[],
        )
        samples.append(sample_line(read, counts.most_common(1)[0][0], described))
    return Results.of(
        {task: described},
        {task: samples},
        {task: len(samples)},
        model_name="blind baseline",
        config={"limit": None, "num_params": 0},
        chat_template=None,
        run=versions(),
    )
