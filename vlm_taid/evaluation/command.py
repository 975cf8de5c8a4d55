"""`vlm-taid eval run` and `eval tasks`: from the command line's words to an evaluation and its files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from vlm_taid.errors import InputError
from vlm_taid.evaluation.card import add_scores
from vlm_taid.evaluation.generation import generation_options
from vlm_taid.evaluation.groups import groups
from vlm_taid.evaluation.judge import Judge
from vlm_taid.evaluation.models import load, model_args_text, model_arguments
from vlm_taid.evaluation.results import Results
from vlm_taid.evaluation.runner import evaluate
from vlm_taid.evaluation.scoring import scoring
from vlm_taid.evaluation.tasks import Task, TaskFile, known_tasks
from vlm_taid.ranks import process_group


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


def run_command(
    model: str,
    data: dict[str, str] | str | None = None,
    tasks: Sequence[str] | str | None = None,
    include_path: str | None = None,
    metric: str | None = None,
    flavor: Literal["official", "lmms", "vlmevalkit"] | None = None,
    prompt_style: Literal["lmms", "vlmevalkit", "none"] | None = None,
    model_args: dict[str, str] | str | None = None,
    processor: str | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "auto",
    attn_implementation: str | None = None,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    gen_kwargs: dict[str, str] | str | None = None,
    prompt: str | None = None,
    columns: dict[str, str] | str | None = None,
    image_root: str | None = None,
    num_workers: int = 1,
    on_error: Literal["stop", "record"] = "stop",
    judge_url: str | None = None,
    judge_model: str | None = None,
    shuffle_images: bool = False,
    seed: int = 0,
    output_path: str | None = None,
    log_samples: bool = True,
    resume: bool = False,
    trust_remote_code: bool = False,
) -> Results:
    """Answers the questions of benchmarks or files with a model, scores the answers and writes the results.

    Works in one process and under torchrun or the deepspeed launcher, where each rank takes a share of the rows.

    Args:
        model: Model folder or hub name.
        data: Files of questions, as NAME=FILE, several with commas between. A benchmark's name gives its data another
            place; other names are files with columns image, question, answer or answers.
        tasks: Benchmarks (vlm-taid eval tasks lists them), groups, or names of --data; all of --data if not given.
        include_path: A task file of one's own (YAML), or a folder of them.
        metric: How answers are scored, in place of the task's metric; a file of one's own has exact_match, or
            vqa_accuracy if its first row has ten references.
        flavor: Whose convention the metrics follow, where a benchmark has several.
        prompt_style: Whose prompts are used: lmms, vlmevalkit or none; the flavor's, else the benchmark's first.
        model_args: How the model is loaded, as dtype=bfloat16,peft=ADAPTERS: also attn_implementation, processor,
            revision, trust_remote_code.
        processor: Where the processor lies, if not with the model.
        batch_size: Rows in a batch, for each process.
        device: Torch device, or auto for the GPU if there is one.
        dtype: float32, bfloat16, float16, or auto for the saved type on a GPU and float32 on a CPU.
        attn_implementation: Attention of transformers (sdpa, eager, flash_attention_2, ...), or the model's own.
        limit: Only the first so many rows of each task; marked in the results.
        max_new_tokens: Longest answer, in tokens, in place of the task's; 16 for a file of one's own.
        gen_kwargs: How answers are generated, in place of the tasks' own: max_new_tokens=32,num_beams=3, also
            repetition_penalty and until; never by sampling.
        prompt: How the question is phrased, with {question} in it, in place of the prompt style.
        columns: Names of the file's columns, as question=q,answers=a.
        image_root: The folder that image paths start from; the file's own if not given.
        num_workers: Processes that read and prepare rows beside the model.
        on_error: stop at a row that cannot be read, answered or judged; or record it, and score the others.
        judge_url: An OpenAI-compatible server that scores what rules cannot, as http://localhost:8000/v1.
        judge_model: The judge's name at that server.
        shuffle_images: Give each question the picture of another row, to see how much the answers use it.
        seed: Seed of that shuffling.
        output_path: Folder for results, samples and summary; nothing is written if not given. If the model is a folder
            of vlm-taid distill, the scores go into its model card too, unless it was evaluated with limit,
            shuffle_images or adapters.
        log_samples: Write a line for each answer, which the report and eval score need.
        resume: Go on with a run into the same output_path that was killed.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The results, which are also printed and written on rank 0.

    Raises:
        InputError: something given cannot be used; see `load` and `evaluate`.
    """
    if resume and output_path is None:
        raise InputError("--resume needs the --output_path of the run to go on with")
    loading = _together(
        model_arguments(parse_pairs(model_args or {}, "model_args")),
        "model_args",
        processor=processor,
        dtype=None if dtype == "auto" else dtype,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code or None,
    )
    words = parse_pairs(gen_kwargs or {}, "gen_kwargs")
    generation = _together(generation_options(words, "--gen_kwargs"), "gen_kwargs", max_new_tokens=max_new_tokens)
    chosen = chosen_tasks(
        tasks,
        parse_pairs(data or {}, "data"),
        include_path,
        flavor=flavor,
        prompt_style=prompt_style,
        prompt=prompt,
        metric=metric,
        max_new_tokens=generation.pop("max_new_tokens", None),
        generation=generation,
        columns=parse_pairs(columns or {}, "columns"),
        image_root=image_root,
    )
    judge = make_judge(judge_url, judge_model, output_path)
    with process_group() as first:
        loaded, loaded_processor = load(model, device=device, **loading)
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
            on_error=on_error,
            judge=judge,
            output_path=output_path,
            resume=resume,
        )
        results.data["config"] |= {
            "model_args": model_args_text(model, loading),
            "gen_kwargs": words or None,
        }
        if first:
            console = Console()
            console.print(results.table())
            if output_path is not None:
                console.print(f"results: {results.save(output_path, log_samples=log_samples)}", soft_wrap=True)
                if "peft" not in loading and (card := add_scores(model, results)) is not None:
                    console.print(f"scores: {card}", soft_wrap=True)
        return results


def _together(words: dict[str, Any], option: str, **options: Any) -> dict[str, Any]:
    """The words of an option and the options that mean the same; InputError names what is given by both."""
    given = {key: value for key, value in options.items() if value is not None}
    if twice := sorted(set(words) & set(given)):
        raise InputError(f"--{option} {twice[0]}={words[twice[0]]} and --{twice[0]}: give one of the two")
    return words | given


def chosen_tasks(
    names: Sequence[str] | str | None, data: Mapping[str, str], include_path: str | None = None, **options: Any
) -> list[Task]:
    """The tasks of a command line.

    Args:
        names: benchmarks, groups, or names of ``data``; all of ``data`` if None.
        data: files by task.
        include_path: more task files.
        **options: of `TaskFile.build`.

    Raises:
        InputError: nothing is chosen, or a name is none of these.
    """
    wanted = list(data) if not names else names.split(",") if isinstance(names, str) else list(names)
    if not wanted:
        raise InputError("nothing to run: give --tasks (vlm-taid eval tasks lists them) or --data NAME=FILE")
    known = known_tasks(include_path)
    found: dict[str, Task] = {}
    for name in wanted:
        for member in groups()[name].tasks if name in groups() else [name]:
            if member not in known and member not in data:
                near = difflib.get_close_matches(member, [*known, *groups(), *data], n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise InputError(f"task {member!r} is no benchmark and has no file; give --data {member}=FILE{hint}")
            found[member] = known.get(member, TaskFile(member)).build(data.get(member), **options)
    return list(found.values())


def make_judge(url: str | None, model: str | None, output_path: str | None) -> Judge | None:
    """The judge of a command line, with its replies kept in the output folder; None if no URL is given."""
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise InputError("a judge needs both --judge_url and --judge_model")
    return Judge(url, model, None if output_path is None else Path(output_path) / "judge.jsonl")


def tasks_command(include_path: str | None = None) -> None:
    """Lists the benchmarks: metrics by flavor, the default first, the columns needed, and whether a judge is.

    Args:
        include_path: A task file of one's own (YAML), or a folder of them, to be listed too.

    Raises:
        InputError: a task file cannot be read.
    """
    table = Table("task", "what it is, its metric by flavor, its columns", "judge", show_lines=True)
    table.columns[0].no_wrap = True
    for name, task in sorted(known_tasks(include_path).items()):
        metrics = ", ".join(f"{flavor}: {metric}" for flavor, metric in task.flavors.items())
        judge = {None: "", "grade": "needed", "extract": "for some"}[scoring(task.metric or "exact_match").judge]
        table.add_row(name, f"{task.description}\n{metrics}\ncolumns: {', '.join(task.needs)}", judge)
    console = Console()
    console.print(table)
    for name, group in groups().items():
        console.print(f"{name}: the average of {', '.join(group.benchmarks)}")
