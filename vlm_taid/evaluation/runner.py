"""Runs a model over tasks: greedy answers, sharded over ranks, scored."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedModel

from vlm_taid.errors import InputError
from vlm_taid.evaluation.generation import Generation, generate, stop_tokens
from vlm_taid.evaluation.journal import Journal
from vlm_taid.evaluation.judge import Judge, judged
from vlm_taid.evaluation.readers import PromptBatches, Row
from vlm_taid.evaluation.results import Results, folder_of, sample_line, versions
from vlm_taid.evaluation.scoring import scoring
from vlm_taid.evaluation.tasks import Task


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _gather(value: list[Any], world_size: int) -> list[Any]:
    """The ranks' lists as one, on every rank."""
    if world_size == 1:
        return value
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, value)
    return [item for part in parts for item in part]


def _quiet_tokenizers(_worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive the fork, and it says so each time


class _Answerer:
    """Answers batches with a model; what fails is named, or recorded as the row's error."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any, stops: list[int], record: bool):
        self.model, self.tokenizer, self.stops, self.record = model, tokenizer, stops, record
        self.tokens = 0

    def answers(
        self, task: Task, batches: PromptBatches, rows: list[Row], inputs: Any, generation: Generation
    ) -> list[tuple[Row, str]]:
        """Rows with their answers; a row that failed comes with its error and an empty answer.

        Raises:
            InputError: the model failed, and errors are not recorded.
        """
        if inputs is None:
            return [(row, "") for row in rows]
        try:
            found = generate(self.model, self.tokenizer, inputs, generation, self.stops)
        except Exception as error:  # whatever a model's code raises
            reason = f"the model failed: {type(error).__name__}: {str(error).strip()[:500]}"
            if not self.record:
                places = ", ".join(str(row.doc_id + 1) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
                memory = "; a smaller --batch_size needs less memory" if "memory" in reason else ""
                raise InputError(f"task {task.name}, rows {places}: {reason}{memory}") from error
            if len(rows) == 1:
                return [(Row.failed(rows[0].doc_id, reason), "")]
            single = [batch for row in rows for batch in batches.window([row.doc_id])]
            return [pair for one, its in single for pair in self.answers(task, batches, one, its, generation)]
        self.tokens += sum(length for _, length in found)
        return [(row, answer) for row, (answer, _) in zip(rows, found, strict=True)]


@torch.no_grad()
def evaluate(
    model: PreTrainedModel,
    processor: Any,
    tasks: Sequence[Task],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    num_workers: int = 1,
    shuffle_images: bool = False,
    seed: int = 0,
    model_name: str | None = None,
    progress: bool = True,
    on_error: Literal["stop", "record"] = "stop",
    judge: Judge | None = None,
    output_path: str | Path | None = None,
    resume: bool = False,
) -> Results:
    """Answers every row of every task greedily, and scores the answers.

    The answers depend neither on the batch size nor on the order of the rows. Under torch.distributed every rank
    must call this; each takes its share of the rows and all return the same results.

    Args:
        model: a model that generates; it is put in eval mode and back.
        processor: its processor with a chat template, or its tokenizer if it is text-only.
        tasks: with different names.
        batch_size: rows in a batch, per rank.
        limit: only the first rows of each task.
        num_workers: processes that read and prepare rows beside the model; 0 for none.
        shuffle_images: give each question the picture of another row, to see how much the answers use it.
        seed: of that permutation.
        model_name: how the results call the model; its own folder's name if None.
        progress: show a bar on rank 0.
        on_error: stop at a row that cannot be read or answered, or record it: it is counted, and not in the score.
        judge: scores what rules cannot; without it those rows have no score, and neither has the task.
        output_path: where answers are kept while the run goes on; None: nowhere. The results are saved by their `save`.
        resume: go on with a run of the same model, data, prompts and lengths that was killed.

    Raises:
        InputError: no chat template, no end of turn, no rows, a row without references, a bad picture, a model that
            fails, a judge that does not answer, tasks of the same name, a batch size or limit below 1.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError(f"model {model_name}: its processor has no chat template to phrase the questions with")
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError("two tasks have the same name")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch_size ({batch_size}) and limit ({limit}) must be at least 1")
    tokenizer = getattr(processor, "tokenizer", processor)
    stops = stop_tokens(model, tokenizer)
    rank, world_size = _world()
    tasks = [task.with_metric() for task in tasks]
    name = model_name or getattr(model, "name_or_path", "") or type(model).__name__
    journal = None
    if output_path is not None:
        configs = {task.name: task.config() for task in tasks}
        decides = {"weights": _weights_mark(model), "template": processor.chat_template, "tasks": configs}
        decides |= {"limit": limit, "shuffle_seed": seed if shuffle_images else None}
        journal = Journal(folder_of(output_path, name), decides)
        if not resume and rank == 0:
            journal.remove(list(configs))
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    if model.device.type == "cpu":
        # A thread that must share its core with a worker holds up all others: on 2 cores it cost a factor of 2.
        torch.set_num_threads(max(1, threads - num_workers))
    started, samples, originals = time.perf_counter(), {}, {}
    answerer = _Answerer(model, tokenizer, stops, on_error == "record")
    try:
        for task in tasks:
            rows = task.rows()
            count = originals[task.name] = len(rows)
            done = {line["doc_id"]: line for line in journal.read(task.name)} if journal is not None and resume else {}
            _wait_for_all(world_size)  # nobody writes before all have read, or before the old files are gone
            every = range(min(count, limit or count))
            doc_ids = [doc_id for doc_id in every if doc_id not in done][rank::world_size]
            lines = [line for doc_id, line in done.items() if doc_id % world_size == rank]
            batches = PromptBatches(
                task, rows, doc_ids, processor, batch_size, seed if shuffle_images else None, on_error
            )
            generation = task.generated()
            if journal is not None:
                journal.start(task.name, rank, lines)
            silent = rank > 0 or not progress
            bar = tqdm(total=len(doc_ids), desc=task.name, unit="row", disable=silent, mininterval=0.5)
            # a loader draws a seed when it starts: with a generator of its own, none from the caller's
            loader = DataLoader(
                batches,
                batch_size=None,
                num_workers=num_workers,
                worker_init_fn=_quiet_tokenizers,
                generator=torch.Generator(),
            )
            with bar:
                for item in loader:
                    if isinstance(item, InputError):
                        raise item
                    batch, inputs = item
                    answers = answerer.answers(task, batches, batch, inputs, generation)
                    new = [sample_line(row, answer, task) for row, answer in answers]
                    if journal is not None:
                        journal.add(new)
                    lines += new
                    bar.update(len(new))
            if journal is not None:
                journal.close()
            gathered = sorted(_gather(lines, world_size), key=lambda line: line["doc_id"])
            samples[task.name] = _judged(gathered, task, judge, on_error, rank, world_size)
    finally:
        torch.set_num_threads(threads)
        model.train(was_training)
    tokens = sum(_gather([answerer.tokens], world_size))
    seconds = time.perf_counter() - started
    return Results.of(
        {task.name: task for task in tasks},
        samples,
        originals,
        model_name=name,
        config={
            "batch_size": batch_size,
            "device": str(model.device),
            "limit": limit,
            "seed": seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_params": sum(parameter.numel() for parameter in model.parameters()),
            "shuffle_images": shuffle_images,
            "world_size": world_size,
            "judge": None if judge is None else judge.model,
        },
        chat_template=processor.chat_template,
        run=versions() | {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)},
    )


def _weights_mark(model: PreTrainedModel) -> str:
    """A hash of a few values of every weight: another checkpoint in the same folder is another model."""
    digest = hashlib.sha256(str(model.dtype).encode())
    for name, parameter in model.named_parameters():
        values = parameter.detach().reshape(-1)[:4].float().cpu()
        digest.update(f"{name}{tuple(parameter.shape)}{values.tolist()}".encode())
    return digest.hexdigest()


def _wait_for_all(world_size: int) -> None:
    if world_size > 1:
        dist.barrier()


def _judged(
    lines: list[dict[str, Any]], task: Task, judge: Judge | None, on_error: Any, rank: int, world_size: int
) -> list[dict[str, Any]]:
    """The lines with the judge's scores, which rank 0 asks for and tells the others."""
    assert task.metric is not None
    if judge is None or scoring(task.metric).judge is None:
        return lines
    shared: list[Any] = [judged(lines, task.metric, judge, on_error) if rank == 0 else None]
    if world_size > 1:
        dist.broadcast_object_list(shared)
    return shared[0]
