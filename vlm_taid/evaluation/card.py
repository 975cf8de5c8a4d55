"""Scores into a run's model card, in the form that the hub reads: the ``model-index`` of its front matter."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from vlm_taid.errors import InputError
from vlm_taid.evaluation.measures import Measure, measures
from vlm_taid.evaluation.results import Results

TAG = "vlm-taid"  # in a card's tags: the card was written by this package
BEGIN, END = "<!-- scores: written by vlm-taid eval run -->", "<!-- end of scores -->"
NOT_YET = f"{BEGIN}\n`vlm-taid eval run --model FOLDER --data NAME=FILE --output_path DIR` fills this in.\n{END}"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def hub_id(path: str) -> bool:
    """Whether a path can be the hub's ``owner/name``: it is of that form, and nothing lies there."""
    return _HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def add_scores(folder: str | Path, results: Results) -> Path | None:
    """Writes an evaluation's scores into the card of the model that was evaluated, over older ones of the same tasks.

    Args:
        folder: the model's folder.
        results: all rows, with their own pictures; scores of some rows, or with others' pictures, are no scores of
            the model. A task with rows that failed, or that wait for a judge, is left out.

    Returns:
        The card, or None where nothing was written: the folder has no card of this package, or there is no such score.

    Raises:
        InputError: the card's front matter is broken.
    """
    path = Path(folder) / "README.md"
    if results.data["config"].get("limit") or results.data["config"].get("shuffle_images") or not path.is_file():
        return None
    try:
        card: Any = ModelCard.load(path)
    except ValueError as error:
        raise InputError(f"{path}: its front matter cannot be read, so no scores can be written: {error}") from error
    if TAG not in (card.data.tags or []):
        return None
    kept = {(one.dataset_name, one.metric_type): one for one in card.data.eval_results or []}
    whole = [
        measure
        for measure in measures(results)
        if _is_whole(results.data["results"][measure.task]) and measure.of(results).value is not None
    ]
    if not whole:
        return None
    for measure in whole:
        one = _eval_result(results, measure, card.data.pipeline_tag or "image-text-to-text")
        kept[one.dataset_name, one.metric_type] = one
    card.data.eval_results = list(kept.values())
    card.data.model_name = card.data.model_name or path.resolve().parent.name
    table = f"{BEGIN}\n{_table(card.data.eval_results)}{END}"
    if BEGIN in card.text:
        card.text = re.sub(f"{BEGIN}.*?{END}", lambda _: table, card.text, count=1, flags=re.DOTALL)
    else:  # somebody took them out
        card.text = f"{card.text.rstrip()}\n\n## Scores\n\n{table}\n"
    card.save(path)
    return path


def _is_whole(found: dict[str, Any]) -> bool:
    return not found["n_errors"] and not found.get("n_unjudged")


def _eval_result(results: Results, measure: Measure, kind: str) -> EvalResult:
    score, config = measure.of(results), results.data["configs"][measure.task]
    assert score.value is not None, "a task that is not whole has no place in a card"
    source, name = config["dataset"], config["metric"] if measure.main else measure.metric
    path, scale = source["path"], 100 if score.percent else 1
    about: dict[str, Any] = {"rows": score.count}
    about |= {key: config[key] for key in ("prompt_style", "max_length", "stride") if key in config}
    if measure.teacher is not None:
        about["teacher"] = measure.teacher
    if score.stderr is not None:
        about["stderr"] = round(scale * score.stderr, 3)
    return EvalResult(
        task_type=kind,
        # a path of this machine says nothing elsewhere
        dataset_type=path if hub_id(path) else measure.task,
        dataset_name=measure.task,
        dataset_config=source.get("name"),
        dataset_split=source.get("split") if hub_id(path) else None,
        metric_type=name,
        metric_name=f"{name}, %" if score.percent else name,
        metric_config=config.get("flavor"),
        metric_value=round(scale * score.value, 3),
        metric_args=about,
    )


def _table(found: list[EvalResult]) -> str:
    lines = ["| task | metric | convention | score (shares in %) | rows |", "|---|---|---|---:|---:|"]
    for one in found:
        about, digits = one.metric_args or {}, 1 if str(one.metric_name).endswith("%") else 3
        error = f" ± {about['stderr']:.{digits}f}" if "stderr" in about else ""
        value, rows = f"{one.metric_value:.{digits}f}{error}", about.get("rows", "")
        lines.append(f"| {one.dataset_name} | {one.metric_type} | {one.metric_config or ''} | {value} | {rows} |")
    return "\n".join(lines) + "\n"
