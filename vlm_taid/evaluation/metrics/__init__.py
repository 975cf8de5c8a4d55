"""How an answer is scored against its references.

Each metric follows one named flavour, since the public harnesses disagree on details that move scores by points.
The flavour goes into the results file. Nothing here draws at random: what cannot be read is wrong, or None.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vlm_taid.errors import InputError
from vlm_taid.evaluation.metrics import choice, yesno
from vlm_taid.evaluation.metrics.text import (
    CONTRACTIONS,
    METRICS,
    Metric,
    metric,
    normalize_exact,
    normalize_formula,
    normalize_gqa,
    normalize_textvqa,
    normalize_vqa,
    reference_texts,
)

__all__ = [
    "CONTRACTIONS",
    "METRICS",
    "NAMES",
    "Metric",
    "metric",
    "normalize_exact",
    "normalize_gqa",
    "normalize_textvqa",
    "normalize_vqa",
    "reference_texts",
    "score",
]

# What an answer means, no references needed.
_LABELS: dict[str, Callable[[str], str]] = {
    "yesno_vlmevalkit": yesno.yesno_vlmevalkit,
    "yesno_mme_lmms": yesno.yesno_mme_lmms,
}
# One answer and one description: the options, or the whole problem.
_ITEMS: dict[str, Callable[..., Any]] = {
    "mcq_vlmevalkit": choice.mcq_vlmevalkit,
    "mcq_lmms": choice.mcq_lmms,
    "mmmu_mcq": choice.mmmu_mcq,
    "scienceqa": choice.scienceqa,
    "ai2d": choice.ai2d,
    "mathvista_rule": choice.mathvista_rule,
    "mathvista_normalize": choice.mathvista_normalize,
}
# A list of answers and a list of descriptions.
_LISTS: dict[str, Callable[..., Any]] = {
    "pope_official": yesno.pope_official,
    "pope_vlmevalkit": yesno.pope_vlmevalkit,
    "pope_lmms": yesno.pope_lmms,
    "mme_vlmevalkit": yesno.mme_vlmevalkit,
    "mme_lmms": yesno.mme_lmms,
    "hallusionbench": yesno.hallusionbench,
    "mmbench_circular": choice.mmbench_circular,
    "mmstar_average": choice.mmstar_average,
}
_OPTIONS = {"ocrbench": {"hme", "flavor"}, "mathvista_rule": {"flavor"}, "mmstar_average": {"flavor"}}
NAMES = (*METRICS, "mmmu_open", *_LABELS, *_ITEMS, *_LISTS)


def score(name: str, prediction: Any, references: Any = None, **options: Any) -> Any:
    """Scores an answer, reads what it means, or scores a list of answers, by the metric's name.

    Args:
        name: one of `NAMES`. all VQA accuracies leave one annotator out, so one reference
            alone always gives 0; ``exact_match`` is this package's plain one: equal after strip and casefold.
        prediction: the model's answer; a list of them for POPE, MME, HallusionBench and the averages.
        references: texts (or VQAv2's ``{"answer": ...}``); for choices a list whose first element holds the options
            or the problem; for lists of answers a list as long. Never changed.
        **options: ``hme`` (formulas) of ocrbench; ``flavor`` of ocrbench, mathvista_rule and mmstar_average.

    Returns:
        A score between 0 and 1, a label, a letter or None, or a dictionary of scores.

    Raises:
        InputError: unknown metric or option, no references, or lists that are not equally long.
    """
    if name not in NAMES:
        raise InputError(f"unknown metric {name!r}; known: {', '.join(NAMES)}")
    for option in options:
        if option not in _OPTIONS.get(name, ()):
            raise InputError(f"metric {name!r} takes no option {option!r}")
    if name in _LABELS:
        return _LABELS[name](prediction)
    if name in _LISTS:
        return _score_list(name, prediction, references, options)
    if name in _ITEMS:
        if not references:
            raise InputError(f"metric {name!r}: no reference answer to score {prediction!r} against")
        item = references[0] if isinstance(references, Sequence) else references
        return _ITEMS[name](prediction, item, **options)
    texts = reference_texts(references)
    if not texts:
        raise InputError(f"metric {name!r}: no reference answer to score {prediction!r} against")
    if name == "mmmu_open":
        return choice.mmmu_open(prediction, texts)
    if name == "ocrbench" and options:
        return _ocrbench(prediction, texts, **options)
    return metric(name)(prediction.strip(), texts)


def _score_list(name: str, predictions: Sequence[Any], references: Any, options: dict[str, Any]) -> Any:
    if not predictions:
        raise InputError(f"metric {name!r}: there is no answer to score")
    needed = name != "mmbench_circular" and not (name == "mmstar_average" and options.get("flavor") != "lmms")
    if (needed or references) and len(references or ()) != len(predictions):
        raise InputError(f"metric {name!r}: {len(predictions)} answers, but {len(references or ())} references")
    return _LISTS[name](predictions, references, **options)


def _ocrbench(prediction: str, references: list[str], hme: bool = False, flavor: str = "vlmevalkit") -> float:
    if flavor not in ("vlmevalkit", "lmms"):
        raise InputError(f"ocrbench: flavor {flavor!r} is unknown; try vlmevalkit or lmms")
    if hme:
        formula = normalize_formula(prediction)
        return float(any(normalize_formula(reference) in formula for reference in references))
    if flavor == "lmms":  # full-width ASCII becomes plain ASCII
        narrow = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
        prediction, references = prediction.translate(narrow), [text.translate(narrow) for text in references]
    return METRICS["ocrbench"](prediction, references)
