"""What an evaluation found: scores, and one line for each answer, in the files that harnesses' tools read.

The keys are those of lm-eval and lmms-eval. All that differs between two equal runs stands under ``run``.
"""

from __future__ import annotations

import datetime
import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table

from vlm_taid.errors import InputError
from vlm_taid.evaluation.groups import group_summaries
from vlm_taid.evaluation.readers import Row, json_line, text_sha256
from vlm_taid.evaluation.scoring import scoring, stderr, summary
from vlm_taid.evaluation.tasks import Task


@dataclass(frozen=True)
class Score:
    """A score, printed in percent unless it is no share of 1.

    Args:
        value: None where there is none yet: a judge has rows to score, or a part that the sum needs is missing.
        stderr: of a mean: sample standard deviation / sqrt(count); None for one value.
        count: the rows that were scored.
        percent: whether the value is between 0 and 1, and printed in percent.
    """

    value: float | None
    stderr: float | None
    count: int
    percent: bool = True

    @staticmethod
    def mean(values: Sequence[float]) -> Score:
        """The mean of at least one value."""
        return Score(statistics.fmean(values), stderr(values), len(values))

    def __str__(self) -> str:
        """In percent: ``97.3 ± 0.2``; other numbers with four digits: ``6.481 ± 0.12``; a dash for None."""
        if self.value is None:
            return "–"
        shown = [self.value, *([] if self.stderr is None else [self.stderr])]
        if self.percent:
            return " ± ".join(f"{100 * value:.1f}" for value in shown)
        return " ± ".join(f"{value:.{digits}g}" for value, digits in zip(shown, (4, 2), strict=False))


def sample_line(row: Row, answer: str, task: Task) -> dict[str, Any]:
    """The line of one answer in a samples file.

    Args:
        row: the question.
        answer: the model's text; scored after strip.
        task: names the metric.
    """
    assert task.metric is not None, "Task.with_metric comes first"
    arguments = [row.prompt, task.config()["generation_kwargs"]]
    if row.error is not None:
        empty = {"doc": {}, "target": [], "resps": [[""]], "filtered_resps": [""], "parsed": None, "category": None}
        return {
            "doc_id": row.doc_id,
            **empty,
            "arguments": arguments,
            scoring(task.metric).key: None,
            "error": row.error,
        }
    answer, doc = answer.strip(), json.loads(json_line(row.doc))  # as a reader of the file will see it
    line = {
        "doc_id": row.doc_id,
        "doc": doc,
        "target": row.references,
        "arguments": arguments,
        "resps": [[answer]],
        "filtered_resps": [answer],
        **scored(answer, doc, row.references, task.metric),
        "category": row.category,
        "doc_hash": text_sha256(json_line(row.doc)),
        "prompt_hash": text_sha256(row.prompt),
    }
    return line if row.image_from is None else line | {"image_from": row.image_from}


def scored(answer: str, doc: Mapping[str, Any], references: Sequence[str], metric: str) -> dict[str, Any]:
    """What a metric adds to a line: ``parsed`` and the score under its key (None: a judge must say)."""
    found = scoring(metric)
    parsed, value = found.read(answer, doc, references)
    return {"parsed": parsed, found.key: value}


def versions() -> dict[str, str]:
    """The date (UTC) and the versions that a run's record holds."""
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    packages = {"vlm_taid": "vlm-taid", "torch": "torch", "transformers": "transformers"}
    found = {}
    for key, package in packages.items():
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[key] = "not installed"
    return {"date": date} | found


def _sanitized(model_name: str) -> str:
    return re.sub(r"[^\w.-]+", "__", model_name).strip("_") or "model"


def folder_of(output_path: str | Path, model_name: str) -> Path:
    """Where a model's files lie under an output folder."""
    return Path(output_path) / _sanitized(model_name)


@dataclass
class Results:
    """What an evaluation found.

    Args:
        data: the results file as a dictionary; the keys are lm-eval's and lmms-eval's.
        samples: by task, a line for each row, in the order of the rows.
    """

    data: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]

    @staticmethod
    def of(
        tasks: Mapping[str, Task],
        samples: Mapping[str, list[dict[str, Any]]],
        originals: Mapping[str, int],
        *,
        model_name: str,
        config: Mapping[str, Any],
        chat_template: Any,
        run: Mapping[str, Any],
    ) -> Results:
        """Sums samples up.

        Args:
            tasks: by name.
            samples: each task's lines, at least one.
            originals: how many rows each task's file has, whatever the limit.
            model_name: the model's folder or hub name.
            config: how it was run: batch_size, limit, ...
            chat_template: the template's text, or several by name, or None; its hash is kept.
            run: all that differs between equal runs.
        """
        results, categories, metrics = {}, {}, {}
        for name, task in tasks.items():
            assert task.metric is not None, "Task.with_metric comes first"
            metrics[name] = task.metric
            results[name] = {"alias": name} | summary(samples[name], task.metric)
            groups: dict[str, list[dict[str, Any]]] = {}
            for sample in samples[name]:
                if sample["category"] is not None:
                    groups.setdefault(sample["category"], []).append(sample)
            categories[name] = {key: summary(groups[key], task.metric) for key in sorted(groups)}
        keys = {name: scoring(metric).key for name, metric in metrics.items()}
        data = {
            "results": results,
            "categories": categories,
            "groups": group_summaries({name: results[name][f"{keys[name]},none"] for name in tasks}),
            "configs": {name: task.config() for name, task in tasks.items()},
            "versions": {name: 1 for name in tasks},
            "n-shot": {name: 0 for name in tasks},
            "higher_is_better": {name: {keys[name]: True} for name in tasks},
            "n-samples": {
                name: {"original": originals[name], "effective": results[name]["sample_len"]} for name in tasks
            },
            "config": {"model": "vlm_taid", "model_args": f"pretrained={model_name}", **config},
            "model_name": model_name,
            "model_name_sanitized": _sanitized(model_name),
            "chat_template_sha": text_sha256(json_line(chat_template)),
            "git_hash": None,
            "run": dict(run),
        }
        return Results(data, dict(samples))

    def is_answered(self, task: str) -> bool:
        """Whether the task is questions that `eval run` asked; else it is a text, or a task of lm-eval."""
        return task in self.data.get("categories", {})

    def is_text(self, task: str) -> bool:
        """Whether the task is a text that `eval lm --data` read."""
        return "stride" in self.data["configs"].get(task, {})

    def metric(self, task: str) -> str:
        """The name of the task's metric."""
        return self.data["configs"][task]["metric"]

    def key(self, task: str) -> str:
        """The name of the task's score in a line of its samples, and in the results."""
        return next(iter(self.data["higher_is_better"][task]))

    def score(self, task: str, category: str | None = None) -> Score:
        """A task's score, or that of one of its categories; KeyError if there is none."""
        found = self.data["results"][task] if category is None else self.data["categories"][task][category]
        name = self.key(task)
        return Score(found[f"{name},none"], found[f"{name}_stderr,none"], found["sample_len"])

    def label(self, task: str) -> str:
        """The task's name, marked if only its first rows were answered, if some failed, or if a judge must see some."""
        rows, counts, marks = self.data["n-samples"][task], self.data["results"][task], []
        answered = rows["effective"] + counts["n_errors"]
        if answered < rows["original"]:
            marks.append(f"first {answered} of {rows['original']} rows")
        if counts["n_errors"]:
            marks.append(f"{counts['n_errors']} rows with errors are not in the score")
        if counts.get("n_unjudged", 0):
            marks.append(f"{counts['n_unjudged']} rows wait for a judge")
        return f"{task} ({'; '.join(marks)})" if marks else task

    def lines(self) -> list[tuple[str, str, str, str, str]]:
        """(task, category or "all", metric, score in percent, rows), as texts, in order."""
        lines = [
            (self.label(task), category or "all", self.metric(task), str(found), str(found.count))
            for task in self.data["results"]
            for category in [None, *self.data["categories"][task]]
            for found in [self.score(task, category)]
        ]
        for name, group in self.data["groups"].items():
            missing = f"without {', '.join(group['missing'])}" if group["missing"] else "all"
            average = "–" if group["average"] is None else f"{group['average']:.1f}"
            lines.append((name, missing, "average", average, "–"))
        return lines

    def table(self) -> Table:
        """The scores in percent, to be printed with rich."""
        table = Table("task", "category", "metric", "score, %", "rows", title=self.title())
        for line in self.lines():
            table.add_row(*line)
        return table

    def title(self) -> str:
        """The model's name, and that its pictures were shuffled if they were."""
        shuffled = self.data["config"].get("shuffle_images", False)
        return self.data["model_name"] + (" (each question with another row's picture)" if shuffled else "")

    def markdown(self) -> str:
        """The scores in percent, as a Markdown table."""
        head = f"# {self.title()}\n\n| task | category | metric | score, % | rows |\n|---|---|---|---:|---:|\n"
        return head + "".join(f"| {' | '.join(line)} |\n" for line in self.lines())

    def save(self, output_path: str | Path, *, log_samples: bool = True) -> Path:
        """Writes ``results_<time>.json``, ``samples_<task>_<time>.jsonl`` and ``summary.md``.

        Args:
            output_path: a folder; the files go to a folder of the model's name inside.
            log_samples: write the samples too.

        Returns:
            The results file.
        """
        folder = folder_of(output_path, self.data["model_name"])
        folder.mkdir(parents=True, exist_ok=True)
        stamp = self.data["run"]["date"].replace(":", "-").removesuffix("+00-00")
        path = folder / f"results_{stamp}.json"
        if log_samples:
            for task, samples in self.samples.items():
                text = "".join(json_line(sample) + "\n" for sample in samples)
                (folder / f"samples_{task}_{stamp}.jsonl").write_text(text, encoding="utf-8")
        (folder / "summary.md").write_text(self.markdown(), encoding="utf-8")
        path.write_text(json.dumps(self.data, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
        for task in self.samples:  # the journal of the run has done its work
            for unfinished in folder.glob(f"unfinished_{task}_rank*.jsonl"):
                unfinished.unlink()
        return path

    @staticmethod
    def load(path: str | Path) -> Results:
        """Reads a results file, or the newest one under a folder, and the samples beside it if they are there.

        Raises:
            InputError: no results file there, or not one of ours.
        """
        path = Path(path)
        if path.is_dir():
            found = sorted(path.rglob("results_*.json"), key=lambda file: file.name)
            if not found:
                raise InputError(f"{path}: no results_*.json in it; run `vlm-taid eval run --output_path {path}` first")
            path = found[-1]
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            stamp = path.stem.removeprefix("results_")
            beside = {task: path.with_name(f"samples_{task}_{stamp}.jsonl") for task in data["results"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a results file of `vlm-taid eval`: {error!r}") from error
        return Results(data, {task: read_samples(file) for task, file in beside.items() if file.is_file()})


def read_samples(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a samples file; InputError names a line that is not JSON."""
    try:
        lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    samples = []
    for number, line in enumerate(lines, 1):
        try:
            samples.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path}:{number}: not a line of JSON: {error}") from error
    return samples
