"""`vlm-taid eval run`: from the command line's words to an evaluation and its files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from rich.console import Console

from vlm_taid.data.sources import SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.evaluation.metrics import score
from vlm_taid.evaluation.models import load
from vlm_taid.evaluation.readers import Task
from vlm_taid.evaluation.results import Results, Score, read_samples
from vlm_taid.evaluation.runner import evaluate


def parse_pairs(text: str | dict[str, str], option: str) -> dict[str, str]:
    """``a=x,b=y`` as a dictionary; a dictionary as it is; InputError names the option and the faulty piece."""
    if isinstance(text, dict):
        return dict(text)
    pairs: dict[str, str] = {}
    for piece in filter(None, (piece.strip() for piece in text.split(","))):
        name, separator, value = piece.partition("=")
        if not separator or not name or not value:
            raise InputError(f"--{option} {text}: {piece!r} is not NAME=VALUE")
        if name in pairs:
            raise InputError(f"--{option} {text}: {name!r} is given twice")
        pairs[name] = value
    return pairs


@contextmanager
def process_group() -> Iterator[bool]:
    """Joins the launcher's ranks if there are several and nobody has yet; says whether this is rank 0."""
    started = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized()
    if started:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield not dist.is_initialized() or dist.get_rank() == 0
    finally:
        if started:
            dist.destroy_process_group()


def run_command(
    model: str,
    data: dict[str, str] | str,
    tasks: Sequence[str] | str | None = None,
    metric: str = "vqa_accuracy",
    processor: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    limit: int | None = None,
    max_new_tokens: int = 16,
    prompt: str | None = None,
    columns: dict[str, str] | str | None = None,
    num_workers: int = 1,
    shuffle_images: bool = False,
    seed: int = 0,
    output_path: str | None = None,
    log_samples: bool = True,
    trust_remote_code: bool = False,
) -> Results:
    """Answers the questions of one or more files with a model, scores the answers and writes the results.

    Works in one process and under torchrun or the deepspeed launcher, where each rank takes a share of the rows.

    Args:
        model: Model folder or hub name.
        data: Files of questions, as NAME=FILE, several with commas between; columns image, question, answer or answers.
        tasks: Which of these names to run; all if not given.
        metric: How answers are scored: exact_match, vqa_accuracy, textvqa_accuracy, gqa_exact_match, anls,
            relaxed_accuracy, relaxed_accuracy_lm_eval or ocrbench.
        processor: Where the processor lies, if not with the model.
        batch_size: Rows in a batch, for each process.
        device: Torch device, or auto for the GPU if there is one.
        dtype: float32, bfloat16, float16, or auto for the saved type on a GPU and float32 on a CPU.
        limit: Only the first so many rows of each file; marked in the results.
        max_new_tokens: Longest answer, in tokens.
        prompt: How the question is phrased, with {question} in it; the question alone if not given.
        columns: Names of the file's columns, as question=q,answers=a.
        num_workers: Processes that read and prepare rows beside the model.
        shuffle_images: Give each question the picture of another row, to see how much the answers use it.
        seed: Seed of that shuffling.
        output_path: Folder for results, samples and summary; nothing is written if not given.
        log_samples: Write a line for each answer, which the report needs.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The results, which are also printed and written on rank 0.

    Raises:
        InputError: something given cannot be used; see `load` and `evaluate`.
    """
    files = parse_pairs(data, "data")
    names = list(files) if not tasks else tasks.split(",") if isinstance(tasks, str) else list(tasks)
    if not names:
        raise InputError("--data is empty; give NAME=FILE")
    unknown = [name for name in names if name not in files]
    if unknown:
        raise InputError(f"task {unknown[0]!r} has no file; give --data {unknown[0]}=FILE")
    chosen = [
        Task(
            name=name,
            source=SourceOptions(
                path=files[name], format="vqa", prompt=prompt, columns=parse_pairs(columns or {}, "columns")
            ),
            metric=metric,
            max_new_tokens=max_new_tokens,
        )
        for name in names
    ]
    with process_group() as first:
        loaded, loaded_processor = load(
            model, processor=processor, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        results = evaluate(
            loaded,
            loaded_processor,
            chosen,
            batch_size=batch_size,
            limit=limit,
            num_workers=num_workers,
            shuffle_images=shuffle_images,
            seed=seed,
            model_name=model,
        )
        if first:
            console = Console()
            console.print(results.table())
            if output_path is not None:
                console.print(f"results: {results.save(output_path, log_samples=log_samples)}", soft_wrap=True)
        return results


def score_command(predictions: str, metric: str) -> Score:
    """Scores the answers of a samples file anew, without a model.

    Args:
        predictions: A samples_*.jsonl of eval run.
        metric: How answers are scored, as for eval run.

    Returns:
        The mean, which is also printed, in percent.

    Raises:
        InputError: the file cannot be read, holds no answers, or a row has no reference.
    """
    samples = read_samples(predictions)
    try:
        values = [score(metric, sample["filtered_resps"][0], sample["target"]) for sample in samples]
    except (KeyError, IndexError, TypeError) as error:
        raise InputError(f"{predictions}: a line lacks filtered_resps or target: is it a samples file?") from error
    found = Score.mean(values)
    print(f"{metric}: {found} of {found.count} rows")
    return found
