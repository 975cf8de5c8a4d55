"""From answers to a task's numbers: how each answer is read and scored, and what is counted over all of them.

The definitions are those of `vlm_taid.evaluation.metrics`; here they meet the rows' columns. A line is a line of a
samples file; nothing else is needed, so that saved answers give the numbers of the run that wrote them.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlm_taid.errors import InputError
from vlm_taid.evaluation.columns import choices_of, options_of, right_letter
from vlm_taid.evaluation.metrics import METRICS, choice, score, yesno

Row = Mapping[str, Any]
Line = Mapping[str, Any]
Read = tuple[Any, float | None]  # what was understood (None: nothing), and the score (None: a judge must say)
Totals = dict[str, float | None]
FORMULAS = {"HME100k", "Handwritten Mathematical Expression Recognition"}


@dataclass(frozen=True)
class Scoring:
    """A task's metric: one answer's score, and the task's numbers.

    Args:
        read: (answer, row, references) -> what was understood and the score.
        flavor: whose convention it is; written into the results.
        key: the name of the score in the files, as the harnesses call it.
        totals: lines -> more numbers, one of them called ``main`` if it, and not the mean, is the task's score.
        choice: rows with options are multiple choice: the reference is the right letter.
        judge: what a judge must do where ``read`` gives no score: grade the answer, or extract its final answer.
        columns: what it reads of a row beside the question's and the answer's columns.
    """

    read: Callable[[str, Row, Sequence[str]], Read]
    flavor: str
    key: str = "accuracy"
    totals: Callable[[Sequence[Line]], Totals] | None = None
    choice: bool = False
    judge: Literal["grade", "extract"] | None = None
    columns: tuple[str, ...] = ()


def _text(name: str) -> Scoring:
    found = METRICS[name]
    key = "exact_match" if "vqa_accuracy" in name or "exact_match" in name else name

    def read(answer: str, row: Row, references: Sequence[str]) -> Read:
        return found.normalize(answer.strip()) or None, score(name, answer, references)

    return Scoring(read, found.flavor, key)


def _ocrbench(flavor: str) -> Scoring:
    def read(answer: str, row: Row, references: Sequence[str]) -> Read:
        formula = bool({str(row.get(column)) for column in ("dataset", "question_type", "category")} & FORMULAS)
        return answer or None, score("ocrbench", answer, references, hme=formula, flavor=flavor)

    return Scoring(read, "lmms-0.7.3" if flavor == "lmms" else flavor, columns=("question_type",))


def _choice(letter_of: Callable[[str, dict[str, str]], str | None], flavor: str, **more: Any) -> Scoring:
    """Multiple choice: a letter is read and compared. Z, a refusal, is understood and wrong."""

    def read(answer: str, row: Row, references: Sequence[str]) -> Read:
        letter = letter_of(answer, choices_of(row))
        return letter, float(letter == references[0])

    return Scoring(read, flavor, choice=True, **more)


def _whole(name: Literal["scienceqa", "ai2d"]) -> Scoring:
    def read(answer: str, row: Row, references: Sequence[str]) -> Read:
        return answer or None, float(score(name, answer, [{"answer": references[0]}]))

    return Scoring(read, "lmms-0.7.3", "exact_match", choice=True)


def _mmmu(flavor: str) -> Scoring:
    def read(answer: str, row: Row, references: Sequence[str]) -> Read:
        options = options_of(row)
        if options:
            letter = (choice.mmmu_mcq if flavor == "lmms" else choice.mcq_vlmevalkit)(answer, options)
            return letter, float(letter == references[0])
        if flavor == "lmms":
            return answer or None, float(choice.mmmu_open(answer, references))
        # VLMEvalKit makes a choice of an open question: the answer, or anything else
        letter = choice.mcq_vlmevalkit(answer, {"A": references[0], "B": "Other Answers"})
        return letter, float(letter == "A")

    return Scoring(read, "lmms-0.7.3" if flavor == "lmms" else flavor, choice=True)


def values_of(lines: Sequence[Line], key: str) -> list[float]:
    """The scores of the lines that have one."""
    return [line[key] for line in lines if line.get(key) is not None]


def _circular(lines: Sequence[Line]) -> Totals:
    """A question counts if all its rotations (index, index + 1,000,000, ...) are right."""
    questions: dict[int, list[bool]] = {}
    for line in lines:
        index = str(line["doc"].get("index"))
        if not index.isdecimal():
            raise InputError(
                f"row {line['doc_id'] + 1}: column index is {index!r}, expected a whole number: the rotations of one "
                "question have the same index but for millions"
            )
        questions.setdefault(int(index) % 1_000_000, []).append(line["accuracy"] == 1)
    right = [float(all(rotations)) for rotations in questions.values()]
    return {
        "main": statistics.fmean(right),
        "main_stderr": stderr(right),
        "vanilla": statistics.fmean(line["accuracy"] for line in lines),
        "questions": len(right),
    }


def stderr(values: Sequence[float]) -> float | None:
    """The standard error of a mean; None for one value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _mmstar_lmms(lines: Sequence[Line]) -> Totals:
    groups = [line["doc"].get("l2_category", line["category"]) for line in lines]
    return {"main": score("mmstar_average", [line["accuracy"] for line in lines], groups, flavor="lmms")}


def _pope(flavor: Literal["official", "vlmevalkit", "lmms"]) -> Scoring:
    reader = {
        "official": yesno.yesno_pope,
        "vlmevalkit": lambda text: {"Unknown": None}.get(label := yesno.yesno_vlmevalkit(text), label.lower()),
        "lmms": lambda text: text.strip().lower() if text.strip().lower() in ("yes", "no") else None,
    }[flavor]

    def read(answer: str, row: Row, references: Sequence[str]) -> Read:
        label = reader(answer)
        return label, float(label == references[0].strip().lower())

    def numbers(lines: Sequence[Line]) -> dict[str, float]:
        answers = [line["filtered_resps"][0] for line in lines]
        return score(f"pope_{flavor}", answers, [line["target"][0] for line in lines])

    def totals(lines: Sequence[Line]) -> Totals:
        found: Totals = dict(numbers(lines))
        categories = dict.fromkeys(line["category"] for line in lines)
        f1 = [numbers([line for line in lines if line["category"] == category])["f1"] for category in categories]
        found["mean_f1"] = statistics.fmean(f1)  # over random, popular and adversarial, as papers give it
        return found | {"main": found[{"official": "mean_f1", "vlmevalkit": "f1", "lmms": "accuracy"}[flavor]]}

    return Scoring(read, "lmms-0.7.3" if flavor == "lmms" else flavor, "right", totals, columns=("category",))


def _picture(line: Line) -> str:
    """What tells pictures apart: the row's own name for it, else the picture's hash."""
    doc = line["doc"]
    return str(next((doc[key] for key in ("image_path", "question_id") if doc.get(key)), doc.get("image")))


def _mme(flavor: Literal["vlmevalkit", "lmms"]) -> Scoring:
    reader = {"vlmevalkit": yesno.yesno_vlmevalkit, "lmms": yesno.yesno_mme_lmms}[flavor]

    def read(answer: str, row: Row, references: Sequence[str]) -> Read:
        label = reader(answer).lower()
        return None if label in ("unknown", "other") else label, float(label == references[0].strip().lower())

    def totals(lines: Sequence[Line]) -> Totals:
        pictures: dict[tuple[str, str], int] = {}
        for line in lines:
            key = str(line["category"]), _picture(line)
            pictures[key] = pictures.get(key, 0) + 1
        # a limit, or a row that could not be read, may leave one of a picture's two questions
        whole = [line for line in lines if pictures[str(line["category"]), _picture(line)] > 1]
        found: Totals = {"unpaired": len(lines) - len(whole)}
        if whole:
            items = [
                {"category": line["category"], "image": _picture(line), "answer": line["target"][0]} for line in whole
            ]
            found |= score(f"mme_{flavor}", [line["filtered_resps"][0] for line in whole], items)
        parts = found.get("perception"), found.get("cognition")
        # of 2,800 points, so that the table's percent are the leaderboard's points / 28
        return found | {"main": None if parts[0] is None or parts[1] is None else (parts[0] + parts[1]) / 2800}

    return Scoring(
        read, "lmms-0.7.3" if flavor == "lmms" else flavor, "right", totals, columns=("category", "question_id")
    )


def _hallusion_ids(doc: Row) -> dict[str, Any]:
    """The set, figure and question; VLMEvalKit's files have them as fields 3, 4 and 5 of the index."""
    names = ("set_id", "figure_id", "question_id")
    if all(name in doc for name in names):
        return {name: doc[name] for name in names}
    fields = str(doc.get("index")).split("_")
    if len(fields) < 6:
        raise InputError(
            f"HallusionBench: a row has no {', '.join(names)}, and its index {doc.get('index')!r} no six parts"
        )
    return dict(zip(names, fields[3:6], strict=True))


def _yes_no(answer: str, row: Row, references: Sequence[str]) -> Read:
    label = yesno.yesno_vlmevalkit(answer).lower()
    right = references[0].strip().lower()
    return None if label == "unknown" else label, float(label == {"1": "yes", "0": "no"}.get(right, right))


def _hallusion_totals(lines: Sequence[Line]) -> Totals:
    items = []
    for line in lines:
        doc = line["doc"]
        group = doc.get("subcategory", doc.get("l2-category", doc.get("l2_category")))
        items.append({"subcategory": group, "answer": line["target"][0], **_hallusion_ids(doc)})
    found = score("hallusionbench", [line["filtered_resps"][0] for line in lines], items)
    return found | {"main": statistics.fmean(found.values())}


def mathvista_problem(row: Row, references: Sequence[str]) -> dict[str, Any]:
    """The row as `metrics.mathvista_normalize` takes it: options as a list, the answer as the option's text."""
    options = options_of(row)
    answer = references[0]
    letter = right_letter(row, options, text_first=True) if options else None
    return {**row, "choices": list(options.values()), "answer": answer if letter is None else options[letter]}


def _mathvista(flavor: str) -> Scoring:
    def read(answer: str, row: Row, references: Sequence[str]) -> Read:
        for column in ("question_type", "answer_type"):
            if column not in row:
                raise InputError(f"MathVista: a row has no column {column}")
        value = score("mathvista_rule", answer, [mathvista_problem(row, references)], flavor=flavor)
        return answer or None, value

    whose, columns = "lmms-0.7.3" if flavor == "lmms" else flavor, ("question_type", "answer_type", "precision")
    return Scoring(read, whose, judge="extract", columns=columns)


def _graded(answer: str, row: Row, references: Sequence[str]) -> Read:
    return answer or None, None


SCORINGS: dict[str, Scoring] = {
    **{name: _text(name) for name in METRICS if name != "ocrbench"},
    "ocrbench": _ocrbench("vlmevalkit"),
    "ocrbench_lmms": _ocrbench("lmms"),
    "mcq_vlmevalkit": _choice(choice.mcq_vlmevalkit, "vlmevalkit"),
    "mcq_lmms": _choice(choice.mcq_lmms, "lmms-0.7.3"),
    "scienceqa": _whole("scienceqa"),
    "ai2d": _whole("ai2d"),
    "mmbench_circular": _choice(choice.mcq_vlmevalkit, "vlmevalkit", totals=_circular, columns=("index",)),
    "mmbench_circular_lmms": _choice(choice.mcq_lmms, "lmms-0.7.3", totals=_circular, columns=("index",)),
    "mmstar_lmms": _choice(choice.mcq_lmms, "lmms-0.7.3", totals=_mmstar_lmms, columns=("l2_category",)),
    "mmmu": _mmmu("vlmevalkit"),
    "mmmu_lmms": _mmmu("lmms"),
    "pope_official": _pope("official"),
    "pope_vlmevalkit": _pope("vlmevalkit"),
    "pope_lmms": _pope("lmms"),
    "mme_vlmevalkit": _mme("vlmevalkit"),
    "mme_lmms": _mme("lmms"),
    "hallusionbench": Scoring(
        _yes_no,
        "vlmevalkit",
        totals=_hallusion_totals,
        columns=("subcategory", "set_id", "figure_id", "question_id"),
    ),
    "mathvista": _mathvista("vlmevalkit"),
    "mathvista_lmms": _mathvista("lmms"),
    "yesno": Scoring(_yes_no, "vlmevalkit"),
    "judge": Scoring(_graded, "judge", "grade", judge="grade"),
}


def scoring(name: str) -> Scoring:
    """The task metric of that name; InputError names the known ones."""
    if name not in SCORINGS:
        raise InputError(f"unknown metric {name!r}; known: {', '.join(SCORINGS)}")
    return SCORINGS[name]


def default_metric(references: Sequence[str]) -> str:
    """``vqa_accuracy`` for ten references, which it was made for; else ``exact_match``: equal to one of them.

    VQA accuracy leaves one annotator out and asks for three others: with a single reference it is always 0.
    """
    return "vqa_accuracy" if len(references) >= 10 else "exact_match"


def summary(lines: Sequence[Line], metric: str) -> dict[str, Any]:
    """A task's numbers: the score and its standard error, more numbers of the metric, and what was counted.

    Every number divides by the rows that were scored. The score is None while a judge has rows to score.
    """
    found = scoring(metric)
    answered = [line for line in lines if "error" not in line]
    values = values_of(answered, found.key)
    unjudged = len(answered) - len(values)
    totals = found.totals(answered) if found.totals is not None and answered else {}
    main = statistics.fmean(values) if values and not unjudged else None
    error = stderr(values) if main is not None else None
    if "main" in totals:
        main, error = totals.pop("main"), totals.pop("main_stderr", None)
    counts = {
        "sample_len": len(answered),
        "n_unparsed": sum(line["parsed"] is None for line in answered),
        "n_errors": len(lines) - len(answered),
        "n_unjudged": unjudged,
    }
    numbers = {f"{name},none": value for name, value in totals.items()}
    return {f"{found.key},none": main, f"{found.key}_stderr,none": error, **numbers, **counts}
