"""Evaluation inside training: the student answers a small file of questions every so many steps."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback

from .errors import InputError
from .evaluation import Results, Task, evaluate
from .evaluation.tasks import TaskFile
from .rollout import generating
from .trainable import without_adapters
from .trainer import DistillationTrainer


@dataclass
class EvaluationOptions:
    """Questions that the student answers during training; their scores stand in the logs and in metrics.jsonl."""

    data: dict[str, str]
    """Files of questions, as {name: file}, with the columns of vlm-taid eval run."""
    every: int = 500
    """Optimizer steps between two evaluations; the last step is always one."""
    limit: int | None = 200
    """Only the first so many rows of each file; None: all."""
    metric: str | None = None
    """How answers are scored, as in vlm-taid eval run (default: by the file's references)."""
    prompt: str | None = None
    """How the question is phrased, with {question} in it (default: the question alone)."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of the files' columns, as {question: q, answers: a}."""
    batch_size: int = 8
    """Rows in a batch, for each process."""
    max_new_tokens: int = 16
    """The longest answer, in tokens."""

    def tasks(self) -> list[Task]:
        """One a file.

        Raises:
            InputError: no file, a number below 1, or an unknown metric.
        """
        if not self.data:
            raise InputError("evaluation.data is empty: give {name: file}")
        for key in ("every", "limit", "batch_size", "max_new_tokens"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise InputError(f"evaluation.{key} is {value}, at least 1 is needed")
        options: Any = {key: getattr(self, key) for key in ("metric", "prompt", "columns", "max_new_tokens")}
        return [TaskFile(name).build(path, **options) for name, path in self.data.items()]


class EvaluationCallback(TrainerCallback):
    """Evaluates on all ranks, each its share of the rows; training goes on bit for bit as without it.

    Under ZeRO-3 the weights are gathered for the time of the evaluation, as they are for samples of the student.

    Args:
        options: EvaluationOptions.
        trainer: whose student answers, and who logs.

    Raises:
        InputError: a file cannot be read, or its first row not be asked or scored.
    """

    def __init__(self, options: EvaluationOptions, trainer: DistillationTrainer):
        self.options, self.trainer, self.tasks = options, trainer, options.tasks()
        for task in self.tasks:  # a wrong path or column is found before the run, not at its first evaluation
            rows = task.rows()
            name, _, first = rows.columns(0)
            task.references(first, name)
            rows[0]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.options.every == 0 or state.global_step >= state.max_steps:
            began = time.perf_counter()
            should_log = control.should_log
            self.trainer.log(scores(self._results()))
            control.should_log = should_log  # a log clears it, and the step's own line would be lost
            self.trainer.not_training(time.perf_counter() - began)

    def _results(self) -> Results:
        wrapped: Any = self.trainer.model_wrapped
        student = without_adapters(self.trainer.accelerator.unwrap_model(wrapped))
        device = next(student.parameters()).device
        modes = [(module, module.training) for module in student.modules()]  # towers may be in eval mode
        try:
            with generating(wrapped), torch.random.fork_rng([device] if device.type == "cuda" else []):
                results = evaluate(
                    student,
                    self.trainer.collator.student.processor,
                    self.tasks,
                    batch_size=self.options.batch_size,
                    limit=self.options.limit,
                    num_workers=0,
                    progress=False,
                    on_error="record",  # one rank alone must not leave the others waiting
                )
        finally:
            for module, training in modes:
                module.training = training
        for name, lines in results.samples.items():
            for line in lines:
                if line.get("error") is not None:
                    raise InputError(f"evaluation.data: {name}, row {line['doc_id'] + 1}: {line['error']}")
        return results


def scores(results: Results) -> dict[str, float]:
    """``eval_<task>_<metric>`` and its ``..._stderr``, as shares of 1."""
    logs = {}
    for name in results.data["results"]:
        found = results.score(name)
        key = f"eval_{name}_{results.metric(name)}"
        for ending, value in (("", found.value), ("_stderr", found.stderr)):
            if value is not None:
                logs[key + ending] = value
    return logs
