"""What a run's folder says: its recipe, and its log."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vlm_taid.errors import InputError

MAX_POINTS = 600  # of a curve; longer ones are averaged over equal stretches of steps
# Of what is logged under eval_, what is the loss's, the speed's or a count.
NO_SCORES = (
    "_loss",
    "_cross_entropy",
    "_top1_agreement",
    "_answer_tokens",
    "_refused_rows",
    "_runtime",
    "_per_second",
    "_stderr",
    "_time",
)


@dataclass
class Run:
    """What a run's folder says of it.

    Args:
        name: the folder's name.
        recipe: the resolved recipe, or an empty dictionary.
        metrics: the logged steps that hold a loss, in order of steps.
        held_out: what was logged of held-out rows between them, in order of steps.
    """

    name: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    held_out: list[dict[str, Any]] = field(default_factory=list)

    @staticmethod
    def read(folder: Path) -> Run:
        """Reads ``metrics.jsonl`` and, if it is there, ``recipe.yaml``; InputError if they are missing or broken."""
        path, recipe_path = folder / "metrics.jsonl", folder / "recipe.yaml"
        if not path.is_file():
            raise InputError(f"{folder}: no metrics.jsonl; give the folder that `vlm-taid distill` wrote")
        by_step: dict[int, dict[str, Any]] = {}
        held_out: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "loss" in row:
                    by_step[int(row["step"])] = row  # a resumed run logs some steps again: the later one counts
                elif any(key.startswith("eval_") for key in row):
                    held_out.setdefault(int(row["step"]), {}).update(row)
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}:{number}: not a line of metrics: {error!r}") from error
        try:
            recipe = yaml.safe_load(recipe_path.read_text(encoding="utf-8")) if recipe_path.is_file() else {}
        except yaml.YAMLError as error:
            raise InputError(f"{recipe_path}: not YAML: {error}") from error
        training, between = ([rows[step] for step in sorted(rows)] for rows in (by_step, held_out))
        return Run(folder.name, recipe or {}, training, between)

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a logged number, averaged over equal stretches to at most MAX_POINTS points."""
        rows = self.held_out if key.startswith("eval_") else self.metrics
        points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        stretch = -(-len(points) // MAX_POINTS) or 1
        groups = [points[start : start + stretch] for start in range(0, len(points), stretch)]
        steps, values = ([sum(p[axis] for p in group) / len(group) for group in groups] for axis in (0, 1))
        return steps, values

    @property
    def objective(self) -> str:
        """The objective's name, or an empty text."""
        objective = self.recipe.get("objective")
        return str(objective.get("name", "")) if isinstance(objective, dict) else str(objective or "")

    @property
    def scores(self) -> list[str]:
        """Keys of the scores that evaluations during the run have logged: all of a task, nothing of loss and speed."""
        keys = dict.fromkeys(key for row in self.held_out for key in row if key.startswith("eval_"))
        return [key for key in keys if not key.endswith(NO_SCORES)]
