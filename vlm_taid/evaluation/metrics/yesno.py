"""Yes/no answers: how they are read, and POPE, MME and HallusionBench, which count them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlm_taid.errors import InputError
from vlm_taid.evaluation.metrics.text import fold_marks

PERCEPTION = ["OCR", "artwork", "celebrity", "color", "count", "existence", "landmark", "position", "posters", "scene"]
COGNITION = ["code_reasoning", "commonsense_reasoning", "numerical_calculation", "text_translation"]


def yesno_vlmevalkit(text: str) -> str:
    """``Yes`` or ``No`` if exactly one of the words occurs, else ``Unknown``."""
    words = set(re.sub(r"(?<!\d)\.(?!\d)", "", fold_marks(text.lower())).split())
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def yesno_mme_lmms(text: str) -> str:
    """``yes``, ``no`` or ``other``, from the first four characters: "Not sure" and "know" are no."""
    text = text.lower().strip().replace(".", "")
    if text in ("y", "n"):
        return {"y": "yes", "n": "no"}[text]
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def yesno_pope(text: str) -> str:
    """The official reading: of the first sentence, any of the words No, not, no is no, all else is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def _whole(text: str) -> str:
    text = text.strip().lower()
    return text if text in ("yes", "no") else "other"


def _pope(
    answers: Sequence[str], labels: Sequence[str], *, unknown_is_no: bool, labels_ratio: bool
) -> dict[str, float]:
    """Shares between 0 and 1, each 0 where its denominator is. Answers and labels are yes, no or something else."""
    pairs = list(zip(answers, labels, strict=True))
    positives = sum(answer == "yes" and label == "yes" for answer, label in pairs)
    false_positives = sum(answer == "yes" and label != "yes" for answer, label in pairs)
    misses = sum(label == "yes" and (answer == "no" or (unknown_is_no and answer != "yes")) for answer, label in pairs)
    precision = positives / (positives + false_positives) if positives + false_positives else 0.0
    recall = positives / (positives + misses) if positives + misses else 0.0
    counted = labels if labels_ratio else answers
    return {
        "accuracy": sum(answer == label for answer, label in pairs) / len(pairs),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
        "yes_ratio": sum(word == "yes" for word in counted) / len(counted),
    }


def pope_official(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """POPE (Li et al. 2023): accuracy, precision, recall, f1, and the share of answers that are yes."""
    labels = [label.strip().lower() for label in references]
    return _pope([yesno_pope(text) for text in predictions], labels, unknown_is_no=False, labels_ratio=False)


def pope_vlmevalkit(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """An answer that cannot be read is wrong, and on a yes item a miss."""
    labels = [label.strip().lower() for label in references]
    answers = [yesno_vlmevalkit(text).lower() for text in predictions]
    return _pope(answers, labels, unknown_is_no=True, labels_ratio=False)


def pope_lmms(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The whole answer must be yes or no; other answers are no misses; yes_ratio is that of the labels."""
    labels = [label.strip().lower() for label in references]
    return _pope([_whole(text) for text in predictions], labels, unknown_is_no=False, labels_ratio=True)


def _mme(
    predictions: Sequence[str], references: Sequence[Mapping[str, Any]], read: Callable[[str], str], exactly_two: bool
) -> dict[str, float | None]:
    images: dict[str, dict[Any, list[bool]]] = {}
    for text, item in zip(predictions, references, strict=True):
        right = read(text).lower() == str(item["answer"]).strip().lower()
        images.setdefault(item["category"], {}).setdefault(item["image"], []).append(right)
    scores: dict[str, float | None] = {}
    for category, groups in images.items():
        for image, group in groups.items():
            if len(group) < 2 or (exactly_two and len(group) > 2):
                raise InputError(f"MME: image {image!r} of {category} has {len(group)} questions, two are needed")
        answers = [right for group in groups.values() for right in group]
        both = [all(group[:2]) for group in groups.values()]
        scores[category] = 100 * statistics.fmean(answers) + 100 * statistics.fmean(both)
    for name, members in (("perception", PERCEPTION), ("cognition", COGNITION)):
        parts = [scores.get(category) for category in members]
        scores[name] = None if None in parts else sum(part for part in parts if part is not None)
    return scores


def mme_vlmevalkit(predictions: Sequence[str], references: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """MME (Fu et al. 2023) in points: each category (at most 200), perception (2000), cognition (800).

    Args:
        predictions: one answer each.
        references: dicts with ``category``, ``image`` and ``answer``; two questions an image.

    Returns:
        The points. A sum is None if one of its categories is missing.

    Raises:
        InputError: an image with fewer than two questions.
    """
    return _mme(predictions, references, yesno_vlmevalkit, exactly_two=False)


def mme_lmms(predictions: Sequence[str], references: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """As `mme_vlmevalkit`, but answers are read by `yesno_mme_lmms`, and every image must have exactly two."""
    return _mme(predictions, references, yesno_mme_lmms, exactly_two=True)


def hallusionbench(predictions: Sequence[str], references: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """HallusionBench (Guan et al. 2024): shares of questions, figures and question groups that are all right.

    Args:
        predictions: one answer each.
        references: dicts with ``subcategory``, ``set_id``, ``figure_id``, ``question_id``, and ``gt_answer`` or
            ``answer`` (yes and no, or 1 and 0).

    Returns:
        ``aAcc``, ``fAcc`` and ``qAcc`` between 0 and 1. The leaderboard's number is the mean of the three.
    """
    right, figures, questions = [], {}, {}
    for text, item in zip(predictions, references, strict=True):
        label = str(item.get("gt_answer", item.get("answer"))).strip().lower()
        right.append(yesno_vlmevalkit(text).lower() == {"1": "yes", "0": "no"}.get(label, label))
        group = item.get("subcategory", item.get("l2-category")), item["set_id"]
        figures.setdefault((*group, item["figure_id"]), []).append(right[-1])
        questions.setdefault((*group, item["question_id"]), []).append(right[-1])
    return {
        "aAcc": statistics.fmean(right),
        "fAcc": statistics.fmean(map(all, figures.values())),
        "qAcc": statistics.fmean(map(all, questions.values())),
    }
