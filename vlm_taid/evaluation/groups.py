"""Groups of benchmarks with an average by a rule of their own: the Open VLM Leaderboard's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import yaml

from vlm_taid.evaluation.tasks import SHIPPED


@dataclass(frozen=True)
class Benchmark:
    """An entry of a group: the mean of its tasks, rounded to so many decimals before it enters (None: not)."""

    tasks: list[str]
    decimals: int | None = None


@dataclass(frozen=True)
class Group:
    """A group's benchmarks by name, and the decimals of its average."""

    name: str
    benchmarks: dict[str, Benchmark]
    decimals: int

    @property
    def tasks(self) -> list[str]:
        """All its tasks."""
        return [task for benchmark in self.benchmarks.values() for task in benchmark.tasks]

    def summary(self, scores: Mapping[str, float | None]) -> dict[str, Any]:
        """The average in percent, which is None while a benchmark is missing, and each benchmark in percent.

        Args:
            scores: shares of 1 by task; None, or left out, is missing.
        """
        values: dict[str, float] = {}
        for name, benchmark in self.benchmarks.items():
            found = [scores.get(task) for task in benchmark.tasks]
            known = [100 * score for score in found if score is not None]
            if len(known) == len(found):
                value = statistics.fmean(known)
                values[name] = value if benchmark.decimals is None else round(value, benchmark.decimals)
        missing = [name for name in self.benchmarks if name not in values]
        average = None if missing else round(statistics.fmean(values.values()), self.decimals)
        return {"average": average, "missing": missing, **values}


@cache
def groups() -> dict[str, Group]:
    """The shipped groups, by name."""
    found = {}
    for path in sorted((SHIPPED / "groups").glob("*.yaml")):
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        benchmarks = {name: Benchmark(**entry) for name, entry in values["benchmarks"].items()}
        found[values["group"]] = Group(values["group"], benchmarks, values["decimals"])
    return found


def group_summaries(scores: Mapping[str, float | None]) -> dict[str, dict[str, Any]]:
    """The summary of each group of which a task was scored."""
    return {name: group.summary(scores) for name, group in groups().items() if set(group.tasks) & set(scores)}
