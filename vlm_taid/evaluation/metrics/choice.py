"""Multiple choice: which option an answer means, and what each benchmark counts. No option is ever drawn at random."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vlm_taid.errors import InputError
from vlm_taid.evaluation.metrics.text import edit_distance, normalize_gqa

Options = Mapping[str, Any]
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_PHRASES = (
    "answer is", "answer:", "answer :", "the answer is", "the correct answer is", "correct answer is", "option is",
    "correct option is", "the correct option is", "choice is", "correct choice is", "the correct choice is",
    "i choose", "i select", "i pick",
)  # fmt: skip


def mcq_vlmevalkit(answer: str, options: Options) -> str | None:
    """VLMEvalKit's exact matching: by the letter near the end, by "answer is **X**", or by one option's text.

    Args:
        answer: the model's text.
        options: texts by letter.

    Returns:
        A letter; ``Z`` for a refusal; None if the answer names no option or several.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", answer).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and words.index(letters[0]) > len(words) - 5:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    if named := re.search(r"(?:correct )?answer is \*\*([A-D])\*\*", answer, re.IGNORECASE):
        return named[1].upper()
    texts = {letter: str(text).lower() for letter, text in options.items()}
    if len(answer) > 2 * sum(map(len, texts.values())):
        return None
    contained = [letter for letter, text in texts.items() if text in answer.lower()]
    return contained[0] if len(contained) == 1 else None


def mcq_lmms(answer: str, options: Options) -> str | None:
    """lmms-eval 0.7.3's static reading: marks around letters by priority, the latest among equals; no option texts.

    Written after a description of that code and not compared with it: the phrases before a letter may differ.

    Returns:
        A letter, or None if none occurs.
    """
    for mark in ",.!?;:'\"":
        answer = answer.strip(mark)
    padded = f" {answer.strip()} "
    found: list[tuple[int, int, str]] = []
    for letter in options:
        for priority, form in (
            (6, f"({letter})"),
            (5, f"{letter}."),
            (4, f"{letter}:"),
            (3, f"{letter})"),
            (2, f"{letter} "),
        ):
            if (at := padded.rfind(form)) >= 0:
                found.append((priority, at, letter))
        if re.match(rf"{re.escape(letter)}(?![A-Za-z0-9])", padded.strip()):  # "BIRD" and "Answer" start with none
            found.append((10, 0, letter))
        if padded.strip().endswith(letter):
            found.append((9, len(padded), letter))
    for phrase in _PHRASES:
        if (at := padded.lower().rfind(phrase)) >= 0:
            after = at + len(phrase)
            first = next((i for i in range(after, len(padded)) if padded[i] in options), None)
            if first is not None:
                found.append((7, first, padded[first]))
    if not found:
        found = [(0, padded.rfind(letter), letter) for letter in options if letter in padded]
    return max(found)[2] if found else None


def mmmu_mcq(answer: str, options: Options) -> str | None:
    """MMMU's official parser (Yue et al. 2024), except that an answer it cannot read is None: it draws one."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    padded = f" {answer} "
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        letters = [letter for letter in options if form.format(letter) in padded]
        if letters:  # the latest; of equals the first, as argmax does
            return max(letters, key=lambda letter: padded.rfind(place.format(letter)))
    if len(padded.split()) <= 5:
        return None
    low = padded.lower()
    letters = [letter for letter, text in options.items() if str(text).lower() in low]
    return max(letters, key=lambda letter: low.rfind(str(options[letter]).lower()), default=None)


def _open_value(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def _open_values(answer: str) -> list[str | float]:
    """The parts of an answer that may be the solution, and every number in it."""
    sentences = re.split(r"\.\s(?=[A-Z])|\n", answer.strip().strip(".").lower())
    marks = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]
    parts = []
    for number, sentence in enumerate(sentences):
        known = [*marks, "="] if number == len(sentences) - 1 else marks
        tails = [sentence.split(mark)[-1].strip() for mark in known if mark in sentence]
        tail = min(tails, key=len, default="")
        if tail and tail not in tuple(":,.!?;'"):
            parts.append(tail)
    parts = parts or [answer.strip().strip(".").lower()]
    numbers = [
        number
        for part in parts
        for pattern in (
            r"-?\b\d{1,3}(?:,\d{3})+\b",
            r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
            r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])",
        )
        for number in re.findall(pattern, part)
    ]
    return [value for part in [*parts, *numbers] for value in _open_value(part)]


def mmmu_open(answer: str, references: Sequence[str]) -> int:
    """MMMU's open questions: a reference text contained in a part of the answer, or an equal number (2 decimals)."""
    wanted = [value for reference in references for value in _open_value(str(reference))]
    for value in _open_values(answer):
        if not isinstance(value, str):
            if value in wanted:
                return 1
        elif any(isinstance(text, str) and text in value for text in wanted):
            return 1
    return 0


def scienceqa(answer: str, item: Mapping[str, Any]) -> int:
    """lmms-eval's ScienceQA: the answer is the letter in any case, or starts with the capital letter and a stop.

    Args:
        answer: the model's text.
        item: ``choices`` and ``answer``, its letter or its index.
    """
    letter = _letter(item)
    answer = answer.strip()
    return int(answer.lower() == letter.lower() or answer.startswith(f"{letter}."))


def ai2d(answer: str, item: Mapping[str, Any]) -> int:
    """lmms-eval's AI2D: a leading "X.", else the whole text, compared as GQA's.

    Args:
        answer: the model's text.
        item: ``options`` and ``answer``, its letter or its index.
    """
    answer = answer.strip()
    leading = re.match(r"([A-Z])\.", answer)
    return int(normalize_gqa(leading[1] if leading else answer) == _letter(item).lower())


def _letter(item: Mapping[str, Any]) -> str:
    """The right letter, given as itself or as an index."""
    answer = str(item["answer"]).strip()
    return chr(ord("A") + int(answer)) if answer.isdecimal() else answer


def mmbench_circular(rotations: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]] | None = None) -> float:
    """MMBench (Liu et al. 2024): the share of questions of which every rotation is right.

    Args:
        rotations: for each question the letters given to its rotations (None: not read), or whether each is right.
        references: for each question the right letters; None or empty if ``rotations`` says whether each is right.
    """
    if not references:
        return statistics.fmean(all(item is True or item == 1 for item in items) for items in rotations)
    pairs = zip(rotations, references, strict=True)
    return statistics.fmean(list(given) == list(right) for given, right in pairs)


def mmstar_average(scores: Sequence[float], groups: Sequence[Any], *, flavor: str = "vlmevalkit") -> float:
    """MMStar's total: the plain mean (vlmevalkit), or the mean over the means of the l2 categories (lmms).

    Args:
        scores: 0 or 1 each.
        groups: each row's l2 category, or a dict with ``l2_category``.
        flavor: vlmevalkit or lmms.
    """
    if flavor not in ("vlmevalkit", "lmms"):
        raise InputError(f"mmstar_average: flavor {flavor!r} is unknown; try vlmevalkit or lmms")
    if flavor == "vlmevalkit":
        return statistics.fmean(scores)
    by_group: dict[Any, list[float]] = {}
    for value, group in zip(scores, groups, strict=True):
        by_group.setdefault(group["l2_category"] if isinstance(group, Mapping) else group, []).append(value)
    return statistics.fmean(map(statistics.fmean, by_group.values()))


def mathvista_normalize(extraction: str, problem: Mapping[str, Any]) -> str | None:
    """An extracted answer as MathVista compares it (Lu et al. 2024); None if it is no number where one is needed.

    Args:
        extraction: a letter, an option's text (the nearest by edit distance is taken), or a number.
        problem: ``question_type``, ``choices``, ``answer_type``, ``precision``.
    """
    extraction = str(extraction).strip()
    if problem["question_type"] == "multi_choice":
        choices = [str(choice) for choice in problem["choices"]]
        bracketed = re.findall(r"\(([a-zA-Z])\)", extraction)
        letter = bracketed[0].upper() if bracketed else extraction
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        if letter in letters:
            return choices[letters.index(letter)]
        return min(choices, key=lambda choice: edit_distance(letter, choice))
    try:
        if problem["answer_type"] == "integer":
            return str(int(float(extraction)))
        if problem["answer_type"] == "float":
            return str(round(float(extraction), int(problem["precision"])))
    except (ValueError, OverflowError):
        return None
    return extraction


def mathvista_rule(answer: str, problem: Mapping[str, Any], *, flavor: str = "vlmevalkit") -> float | None:
    """The part of MathVista that needs no judge.

    Args:
        answer: the model's text.
        problem: ``question_type``, ``answer_type``, ``choices``, ``precision`` and ``answer``, which for a choice is
            the option's text.
        flavor: vlmevalkit reads options as `mcq_vlmevalkit` and takes only numbers that are equal; lmms takes an
            option's whole text, or any number, rounded to the problem's precision.

    Returns:
        0 or 1; None where a judge must extract the answer.
    """
    if flavor not in ("vlmevalkit", "lmms"):
        raise InputError(f"mathvista_rule: flavor {flavor!r} is unknown; try vlmevalkit or lmms")
    right, kind = str(problem["answer"]), problem["answer_type"]
    if problem["question_type"] == "multi_choice":
        choices = [str(choice) for choice in problem["choices"]]
        if flavor == "lmms":
            return float(answer == right) if answer in choices else None
        options = {chr(ord("A") + index): choice for index, choice in enumerate(choices)}
        letter = mcq_vlmevalkit(answer, options)
        return None if letter is None else float(options.get(letter) == right)
    if kind not in ("integer", "float"):
        return None
    read = int if kind == "integer" else float
    try:
        value = read(answer)
        if flavor == "lmms":
            return float(mathvista_normalize(str(value), problem) == right.strip())
        return 1.0 if value == read(right) else None
    except ValueError:
        return None
