"""Held-out pictures with question, reference and each model's answer: which to show, and how to draw them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_taid.data.conversation import Conversation
from vlm_taid.errors import InputError
from vlm_taid.evaluation.columns import options_of
from vlm_taid.evaluation.comparison import Comparison, compare
from vlm_taid.evaluation.metrics import normalize_exact
from vlm_taid.evaluation.readers import image_sha256
from vlm_taid.evaluation.tasks import Task

SYMBOLS = {"right": "✓", "partly": "◐", "wrong": "✗", "open": "–"}
AGREEING_SHARE = 4  # one picture of so many shows a question on which all models agree


@dataclass(frozen=True)
class Answer:
    """One model's answer to one question.

    Args:
        label: the model's.
        text: what it said; None where there is no answer.
        score: between 0 and 1; None where there is none: no answer, or a judge must see it.
        error: why there is no answer.
    """

    label: str
    text: str | None
    score: float | None
    error: str | None = None

    @staticmethod
    def of(label: str, line: Mapping[str, Any], key: str) -> Answer:
        """The answer in a line of a samples file, with its score under a key."""
        error = line.get("error")
        return Answer(label, None if error is not None else line["filtered_resps"][0], line[key], error)

    @property
    def said(self) -> str | None:
        """The text as answers are compared."""
        return None if self.text is None else normalize_exact(self.text)

    @property
    def verdict(self) -> str:
        """A key of SYMBOLS; open: there is no score."""
        if self.score is None:
            return "open"
        return "right" if self.score >= 1 else "wrong" if self.score <= 0 else "partly"

    @property
    def shown(self) -> str:
        """What a reader sees."""
        return f"no answer: {self.error}" if self.text is None else self.text or "(empty)"


@dataclass(frozen=True)
class Card:
    """One row of the grid.

    Args:
        row: the row itself, which ends with its question.
        question: as the file has it.
        options: of multiple choice, by letter.
        right: the right answers, each once, the most frequent first.
        answers: the models'.
        differs: a model's answer is not the reference model's (or, alone, is wrong).
    """

    row: Conversation
    question: str
    options: dict[str, str]
    right: list[str]
    answers: list[Answer]
    differs: bool

    @property
    def references(self) -> list[str]:
        """The right answers as they are shown: an option's letter with its text."""
        return [f"{text}. {self.options[text]}" if text in self.options else text for text in self.right]


@dataclass(frozen=True)
class Gallery:
    """The chosen rows of a task, and how many of its rows differ."""

    task: str
    cards: list[Card]
    differing: int
    rows: int


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """At most count of them, evenly over the file."""
    return [indices[turn * len(indices) // count] for turn in range(count)] if len(indices) > count else [*indices]


def choose_rows(
    questions: Sequence[tuple[str, str]], differs: Sequence[Sequence[bool]], count: int, spread: int = 8
) -> list[int]:
    """Which rows to show: those where models differ first, then some where all agree.

    Each pattern of who differs gets an equal share, so that a rare one is seen too; within a pattern the rows are
    spread over the file. No picture is shown twice while there are others.

    Args:
        questions: for each row, its picture (a hash) and its question.
        differs: for each row, which models differ.
        count: how many rows.
        spread: how many times as many rows are looked at as are shown, to find other pictures.
    """
    patterns: dict[tuple[bool, ...], list[int]] = {}
    for index, flags in enumerate(differs):
        patterns.setdefault(tuple(flags), []).append(index)
    queues = {flags: _spread(rows, spread * count) for flags, rows in sorted(patterns.items())}
    agreeing = [row for flags, rows in queues.items() if not any(flags) for row in rows]
    differing_queues = [rows for flags, rows in queues.items() if any(flags)]
    longest = max(map(len, differing_queues), default=0)
    differing = [rows[turn] for turn in range(longest) for rows in differing_queues if turn < len(rows)]
    wanted = min(count // AGREEING_SHARE, len(agreeing))
    shown: set[str] = set()
    chosen = _new_first(differing, count - wanted, questions, shown)
    return chosen + _new_first(agreeing, count - len(chosen), questions, shown)


def _new_first(rows: list[int], count: int, questions: Sequence[tuple[str, str]], shown: set[str]) -> list[int]:
    """The first rows with pictures not yet shown, which are added to shown; others only if these are too few."""
    new = []
    for row in rows:
        if len(new) < count and questions[row][0] not in shown:
            shown.add(questions[row][0])
            new.append(row)
    asked = {questions[row] for row in new}
    for row in rows:
        if len(new) < count and questions[row] not in asked:
            asked.add(questions[row])
            new.append(row)
    return new


def gallery(comparison: Comparison, task: str, count: int = 24, data: str | Path | None = None) -> Gallery:
    """The pictures of a task that tell most about how the models differ.

    Args:
        comparison: evaluations with their samples.
        task: a task of the reference model.
        count: how many pictures.
        data: the task's file, if it no longer lies where the evaluation read it.

    Raises:
        InputError: no samples, models that answered different rows, or pictures that are not those evaluated.
    """
    models = {
        label: tasks[task].samples[task]
        for label, tasks in comparison.plain.items()
        # The blind baseline, which has no parameters, looks at no picture.
        if task in tasks and task in tasks[task].samples and tasks[task].data["config"]["num_params"]
    }
    if comparison.reference not in models:
        raise InputError(
            f"the evaluation of {comparison.reference} has no samples of {task}; run it with --log_samples"
        )
    results = comparison.plain[comparison.reference][task]
    reference = models[comparison.reference]
    if any([line["doc_id"] for line in lines] != [line["doc_id"] for line in reference] for lines in models.values()):
        raise InputError(f"the evaluations of {task} answered different rows; run them with the same file and limit")
    keys = {label: comparison.plain[label][task].key(task) for label in models}
    # a row is shown if one model answered it: that one's line has what stands in the file
    rows = [row for row in zip(*models.values(), strict=True) if any("error" not in line for line in row)]
    known = [next(line for line in row if "error" not in line) for row in rows]
    answers = [[Answer.of(label, line, keys[label]) for label, line in zip(models, row, strict=True)] for row in rows]
    own = list(models).index(comparison.reference)
    if len(models) > 1:
        differs = [[answer.said != row[own].said for answer in row] for row in answers]
    else:
        differs = [[(row[own].score or 0) < 1] for row in answers]
    questions = [("".join(line["doc"]["image"]), str(line["doc"].get("question", ""))) for line in known]
    described = Task.described(task, results.data["configs"][task], None if data is None else str(data))
    file, cards = described.rows(), []
    for index in choose_rows(questions, differs, count):
        line = known[index]
        row = file[line["doc_id"]]
        if [image_sha256(image) for image in row.images] != line["doc"]["image"]:
            raise InputError(f"{described.source.path}, row {line['doc_id'] + 1}: not the picture that was evaluated")
        options = options_of(line["doc"])
        right = [text for text, _ in Counter(line["target"]).most_common()]
        cards.append(Card(row, questions[index][1], options, right, answers[index], any(differs[index])))
    return Gallery(task, cards, sum(map(any, differs)), len(rows))


def save_grid(
    evaluations: Sequence[str | Path],
    output: str | Path,
    *,
    reference: str | None = None,
    task: str | None = None,
    count: int = 12,
    columns: int = 6,
    data: str | Path | None = None,
) -> Path:
    """Draws the grid of pictures alone, as a PNG.

    Args:
        evaluations: as in `compare`.
        output: the PNG.
        reference: the label of the model to compare with; the first one if None.
        task: the first one if None.
        count: how many pictures.
        columns: pictures in a row of the grid.
        data: the task's file, if it no longer lies where the evaluation read it.
    """
    from matplotlib.figure import Figure

    comparison = compare(evaluations, reference)
    cards = [card for card in gallery(comparison, task or comparison.tasks[0], count, data).cards if card.row.images]
    if not cards:
        raise InputError("no pictures to draw")
    colors = {"right": "#1a7f37", "partly": "#9a6700", "wrong": "#cf222e", "open": "#59636e"}
    lines = 4 + len(cards[0].answers)  # of text under a picture: question, reference, answers
    cell, line_height = 1.75, 0.17  # inches
    grid_rows = -(-len(cards) // columns)
    height = cell + lines * line_height
    figure = Figure(figsize=(columns * (cell + 0.15), grid_rows * height), dpi=120, facecolor="white")
    width, total = figure.get_size_inches()
    for position, card in enumerate(cards):
        left = (position % columns) * (cell + 0.15) + 0.075
        top = total - (position // columns) * height - 0.075
        axes = figure.add_axes((left / width, (top - cell) / total, cell / width, cell / total))
        image = card.row.images[0]
        axes.imshow(image, interpolation="nearest" if max(image.size) < 200 else "antialiased")
        axes.set_axis_off()
        question = textwrap.wrap(card.question, 26)[:2]
        texts = [(line, "#1f2328", "bold") for line in question] + [
            (f"reference: {card.references[0]}", "#59636e", "normal")
        ]
        texts += [
            (f"{SYMBOLS[answer.verdict]} {answer.label}: {answer.shown}", colors[answer.verdict], "normal")
            for answer in card.answers
        ]
        for number, (text, color, weight) in enumerate(texts):
            y = top - cell - (number + 0.8) * line_height
            figure.text(
                left / width,
                y / total,
                textwrap.shorten(text, 32, placeholder="…"),
                fontsize=7.2,
                color=color,
                weight=weight,
            )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)
    return output
