"""`vlm-taid eval lm`: a model on held-out text, beside a teacher if one is given, or on lm-eval's tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from vlm_taid.errors import InputError
from vlm_taid.evaluation.card import add_scores
from vlm_taid.evaluation.command import parse_pairs
from vlm_taid.evaluation.harness import run_lm_eval
from vlm_taid.evaluation.language import LONGEST, Reader, read_documents, text_sums
from vlm_taid.evaluation.language_results import LOWER_IS_BETTER, TextResults, text_results, text_samples
from vlm_taid.evaluation.models import load, model_args_text, model_arguments
from vlm_taid.evaluation.results import Results, versions
from vlm_taid.ranks import process_group


def evaluate_text(
    student: Reader,
    files: Mapping[str, str],
    *,
    teacher: Reader | None = None,
    columns: Mapping[str, str] | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    progress: bool = True,
) -> TextResults:
    """Perplexity on held-out text, and KL and agreement with a teacher.

    Under torch.distributed every rank must call this; each takes its share of the windows and all return the same.

    Args:
        student: the model.
        files: names of the texts, with their files; see `read_documents`.
        teacher: a model of the same tokens.
        columns: see `read_documents`.
        max_length: tokens that a model reads at once; None: 2,048, or what the models' configs allow if that is less.
        stride: tokens between the beginnings of two windows; None: max_length.
        batch_size: windows in a batch, per rank.
        limit: only the first documents of each text.
        progress: show a bar on rank 0.

    Raises:
        InputError: see `read_documents` and `text_sums`; or the windows are longer than a model's config allows.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit ({limit}) must be at least 1")
    readers = [reader for reader in (student, teacher) if reader is not None]
    longest = min(reader.longest for reader in readers)
    length = max_length or min(LONGEST, longest)
    if length > longest:
        raise InputError(f"max_length is {length}, and a model's config allows {longest} positions: give at most that")
    settings = {"max_length": length, "stride": stride or length}
    began = time.perf_counter()
    results, samples, counts = {}, {}, {}
    for name, path in files.items():
        documents, original = read_documents(path, columns, limit)
        counts[name] = {"original": original, "effective": len(documents)}
        sums_D5 = text_sums(student, documents, teacher=teacher, batch_size=batch_size, progress=progress, **settings)
        found = {"alias": name} | text_results(sums_D5, documents, teacher=teacher is not None)
        results[name], samples[name] = found, text_samples(sums_D5, documents, teacher=teacher is not None)
    seconds = time.perf_counter() - began
    tokens = sum(found["n_tokens"] for found in results.values())
    names = [key.removesuffix(",none") for key in next(iter(results.values())) if key.endswith(",none")]
    names = [name for name in names if not name.endswith("_stderr")]
    better = {name: name.removeprefix("teacher_") not in LOWER_IS_BETTER for name in names}
    config = {
        "metric": "kl" if teacher is not None else "byte_perplexity",
        "teacher": None if teacher is None else teacher.name,
        **settings,
    }
    data = Results.of(
        {},
        {},
        {},
        model_name=student.name,
        config={
            "batch_size": batch_size,
            "device": str(student.model.device),
            "limit": limit,
            "dtype": str(student.model.dtype).removeprefix("torch."),
            "num_params": sum(parameter.numel() for parameter in student.model.parameters()),
        },
        chat_template=None,
        run=versions() | {"seconds": round(seconds, 3), "tokens_per_second": round(tokens / seconds, 1)},
    ).data
    data |= {
        "results": results,
        "configs": {name: config | {"dataset": {"path": path}} for name, path in files.items()},
        "versions": dict.fromkeys(files, 1),
        "n-shot": dict.fromkeys(files, 0),
        "higher_is_better": dict.fromkeys(files, better),
        "n-samples": counts,
    }
    return TextResults(data, samples)


def lm_command(
    model: str,
    data: dict[str, str] | str | None = None,
    tasks: str | None = None,
    teacher: str | None = None,
    columns: dict[str, str] | str | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    model_args: dict[str, str] | str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    limit: int | None = None,
    output_path: str | None = None,
    log_samples: bool = True,
    trust_remote_code: bool = False,
    lm_eval_flags: Sequence[str] = (),
) -> TextResults | None:
    """Measures a model on held-out text, or on the tasks of lm-eval.

    On text: perplexity and, with a teacher, the KL to it and top-1 agreement.
    Works in one process and under torchrun or the deepspeed launcher, where each rank takes a share of the text.

    Args:
        model: Model folder or hub name.
        data: Texts as NAME=FILE, several with commas between; a .txt file is one document, else a row's column text.
        tasks: Names of lm-eval's tasks instead of texts, with commas between; its own flags may follow after --.
        teacher: Model folder or hub name of a teacher with the same tokens.
        columns: Name of the files' column, as text=content.
        max_length: Tokens that a model reads at once; if not given 2,048, or what the models allow if that is less.
        stride: Tokens from one window to the next within a document; if not given max_length, so none is read twice.
        model_args: How the model alone is loaded, as in eval run; with --tasks they go to lm-eval as they are.
        batch_size: Windows in a batch, for each process.
        device: Torch device, or auto for the GPU if there is one.
        dtype: float32, bfloat16, float16, or auto for the saved type on a GPU and float32 on a CPU.
        limit: Only the first so many documents of each text; marked in the results.
        output_path: Folder for results, samples and summary; nothing is written if not given. If the model is a folder
            of vlm-taid distill, the scores on texts go into its model card too, unless limit is set.
        log_samples: Write a line for each document.
        trust_remote_code: Run Python code that comes with a model.
        lm_eval_flags: Further flags of lm-eval; on the command line, all that stands after --.

    Returns:
        The results on texts, which are also printed and written on rank 0; None of tasks: lm-eval writes its own.

    Raises:
        InputError: something given cannot be used; see `load`, `evaluate_text` and `run_lm_eval`.
    """
    files, words = parse_pairs(data or {}, "data"), parse_pairs(model_args or {}, "model_args")
    if bool(files) == bool(tasks):
        raise InputError("give one of the two: --data NAME=FILE for texts, or --tasks NAMES for tasks of lm-eval")
    if tasks:
        if teacher or columns or max_length or stride:
            raise InputError("--teacher, --columns, --max_length and --stride are read with --data alone")
        own = ["--model_args", ",".join(f"{key}={value}" for key, value in words.items())] if words else []
        run_lm_eval(
            model,
            tasks,
            [*own, *lm_eval_flags],
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            limit=limit,
            output_path=output_path,
            log_samples=log_samples,
            trust_remote_code=trust_remote_code,
        )
        return None
    if lm_eval_flags:
        raise InputError(f"{lm_eval_flags[0]} stands after --, which is read with --tasks alone")
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loading = options | model_arguments(words)
    with process_group() as first:
        student = Reader(*load(model, **loading), model)
        other = None if teacher is None else Reader(*load(teacher, **options), teacher)
        results = evaluate_text(
            student,
            files,
            teacher=other,
            columns=parse_pairs(columns or {}, "columns"),
            max_length=max_length,
            stride=stride,
            batch_size=batch_size,
            limit=limit,
        )
        results.data["config"]["model_args"] = model_args_text(model, words)
        if first:
            console = Console()
            console.print(results.table())
            if output_path is not None:
                console.print(f"results: {results.save(output_path, log_samples=log_samples)}", soft_wrap=True)
                if (card := add_scores(model, results)) is not None:
                    console.print(f"scores: {card}", soft_wrap=True)
        return results
