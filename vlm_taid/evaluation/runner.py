"""Runs a model over tasks: greedy answers, sharded over ranks, scored.

Legend of shapes: B rows, A new tokens.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel

from vlm_taid.errors import InputError
from vlm_taid.evaluation.readers import PromptBatches, Task
from vlm_taid.evaluation.results import Results, sample_line, versions


def stop_tokens(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Token ids that end an answer: the generation config's, and the tokenizer's end of text."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None})


def _generation_config(tokenizer: Any, stops: list[int], max_new_tokens: int) -> GenerationConfig:
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stops[0]
    # Greedy whatever the model's own generation config says: what is None here would be filled in from there.
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        eos_token_id=stops,
        pad_token_id=pad,
    )


def _generate(
    model: PreTrainedModel, tokenizer: Any, inputs: Any, config: GenerationConfig, stops: set[int]
) -> list[tuple[str, int]]:
    """The rows' answers and how many tokens each took, the end of turn included."""
    inputs = inputs.to(model.device)
    for name, tensor in inputs.items():
        if torch.is_floating_point(tensor):
            inputs[name] = tensor.to(model.dtype)
    ids_BA = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]  # pyright: ignore
    answers = []
    for ids_A in ids_BA.tolist():
        end = next((position for position, token in enumerate(ids_A) if token in stops), len(ids_A))
        text = tokenizer.decode(ids_A[:end], skip_special_tokens=True)
        answers.append((text, min(end + 1, len(ids_A))))
    return answers


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

    Raises:
        InputError: no chat template, no end of turn, no rows, a row without references, a bad picture, tasks of the
            same name, a batch size or limit below 1.
    """
    if not getattr(processor, "chat_template", None):
        raise InputError(f"model {model_name}: its processor has no chat template to phrase the questions with")
    if len({task.name for task in tasks}) < len(tasks):
        raise InputError("two tasks have the same name")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise InputError(f"batch_size ({batch_size}) and limit ({limit}) must be at least 1")
    tokenizer = getattr(processor, "tokenizer", processor)
    stops = stop_tokens(model, tokenizer)
    if not stops:
        raise InputError(f"model {model_name}: neither its generation config nor its tokenizer names an end of turn")
    rank, world_size = _world()
    was_training, threads = model.training, torch.get_num_threads()
    model.eval()
    if model.device.type == "cpu":
        # A thread that must share its core with a worker holds up all others: on 2 cores it cost a factor of 2.
        torch.set_num_threads(max(1, threads - num_workers))
    started, tokens, samples, originals = time.perf_counter(), 0, {}, {}
    try:
        for task in tasks:
            rows = task.rows()
            count = originals[task.name] = len(rows)
            doc_ids = range(min(count, limit or count))[rank::world_size]
            batches = PromptBatches(task, rows, doc_ids, processor, batch_size, seed if shuffle_images else None)
            config = _generation_config(tokenizer, stops, task.max_new_tokens)
            lines: list[dict[str, Any]] = []
            silent = rank > 0 or not progress
            bar = tqdm(total=len(doc_ids), desc=task.name, unit="row", disable=silent, mininterval=0.5)
            loader = DataLoader(batches, batch_size=None, num_workers=num_workers, worker_init_fn=_quiet_tokenizers)
            with bar:
                for item in loader:
                    if isinstance(item, InputError):
                        raise item
                    batch, inputs = item
                    answers = _generate(model, tokenizer, inputs, config, set(stops))
                    for row, (answer, length) in zip(batch, answers, strict=True):
                        lines.append(sample_line(row, answer, task))
                        tokens += length
                    bar.update(len(batch))
            samples[task.name] = sorted(_gather(lines, world_size), key=lambda line: line["doc_id"])
    finally:
        torch.set_num_threads(threads)
        model.train(was_training)
    tokens = sum(_gather([tokens], world_size))
    seconds = time.perf_counter() - started
    return Results.of(
        {task.name: task for task in tasks},
        samples,
        originals,
        model_name=model_name or getattr(model, "name_or_path", "") or type(model).__name__,
        config={
            "batch_size": batch_size,
            "device": str(model.device),
            "limit": limit,
            "seed": seed,
            "dtype": str(model.dtype).removeprefix("torch."),
            "num_params": sum(parameter.numel() for parameter in model.parameters()),
            "shuffle_images": shuffle_images,
            "world_size": world_size,
        },
        chat_template=processor.chat_template,
        run=versions() | {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)},
    )
