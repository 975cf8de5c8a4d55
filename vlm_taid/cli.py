"""The command line: ``vlm-taid COMMAND ...``, also ``python -m vlm_taid`` and any launcher's ``--module vlm_taid``."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import InputError

USAGE = """vlm-taid COMMAND ...

  distill   --config RECIPE.yaml [--section.key VALUE ...]    train a student; --help lists every key
  cache     --config RECIPE.yaml --output DIR                 the teacher's distributions to disk, for teacher.cache
  inspect   --config RECIPE.yaml [--html FILE] [--models]     both token streams side by side, before a run
  plan      --config RECIPE.yaml --gpus N                     will it fit, and how long is a step; no weights needed
  eval run  --model PATH --tasks NAMES | --data NAME=FILE     score a model on benchmarks or on VQA files
  eval score --predictions FILE [--task NAME]                 score saved answers anew, without the model
  eval compare RESULTS ...                                    models in rows, tasks in columns, paired differences
  eval export --samples FILE --output FILE.tsv                answers in the columns of VLMEvalKit
  eval tasks                                                  the benchmarks that come with it
  eval lm   --model PATH --data NAME=FILE [--teacher PATH]    perplexity on held-out text, KL to a teacher
  eval lm   --model PATH --tasks arc_easy,... [-- FLAGS]      tasks of lm-eval, with its flags
  assemble  --vision timm/NAME --language PATH --output DIR   a new vision-language model from parts
  report    RUN [RUN ...] --output report.html                curves, results and sample answers as one page

vlm-taid COMMAND --help tells the rest."""


def distill(arguments: list[str]) -> None:
    from .distillation import distill
    from .recipe import Recipe

    distill(Recipe.parse(arguments))


def cache(arguments: list[str]) -> None:
    from .caching import EIGHTS, FOURS, K, cache
    from .parsing import with_recipe
    from .recipe import Recipe

    parser = with_recipe("cache", "Write the teacher's distributions at every answer token to disk.")
    parser.add_argument("--output", type=Path, required=True, help="the cache's folder; a part of it is gone on with")
    parser.add_argument("--k", type=int, default=K, help=f"tokens to correct at each position (default: {K})")
    parser.add_argument(
        "--coefficients", type=int, nargs=2, default=(EIGHTS, FOURS), metavar=("EIGHTS", "FOURS"),
        help=f"coefficients of all logits, of 8 and of 4 bits (default: {EIGHTS} {FOURS})",
    )  # fmt: skip
    parser.add_argument("--rows_per_shard", type=int, default=4096, help="rows of a file (default: 4096)")
    options, rest = parser.split(arguments)
    recipe, coefficients = Recipe.parse(rest, parser.names), tuple(options.coefficients)
    print(f"cache: {cache(recipe, options.output, options.k, options.rows_per_shard, coefficients)}")


def inspect(arguments: list[str]) -> int:
    from .inspection import inspect
    from .parsing import with_recipe
    from .recipe import Recipe

    parser = with_recipe("inspect", "Show rows as both models read them; exit 1 if one of them would be refused.")
    parser.add_argument("--rows", type=int, default=4, help="rows to show, evenly spread over the data (default: 4)")
    parser.add_argument("--html", type=Path, help="a page to write, in one file")
    parser.add_argument("--models", action="store_true", help="load the models: top-5 tokens and KL at each pair")
    options, rest = parser.split(arguments)
    rows = inspect(Recipe.parse(rest, parser.names), options.rows, options.html, options.models)
    return int(any(row.refused is not None for row in rows))


def plan(arguments: list[str]) -> None:
    from .footprint import Pictures
    from .parsing import with_recipe
    from .planning import Machine, plan
    from .recipe import Recipe

    parser = with_recipe(
        "plan", "Tell whether a recipe fits and how long a step takes, from the models' configs alone."
    )
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    for name, value, sentence in (
        ("gpu_memory", 80.0, "GB of one GPU"),
        ("reserve", 4.0, "GB of each GPU that are kept free"),
        ("gpu_tflops", 989.0, "peak TFLOP/s of one GPU (989: an H100 in bf16)"),
        ("utilisation", 0.4, "the share of that peak which a run reaches"),
        ("bandwidth", 50.0, "GB/s into one GPU from the others"),
    ):
        parser.add_argument(f"--{name}", type=float, default=value, help=f"{sentence} (default: {value:g})")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a row, images included (default: 2048)")
    parser.add_argument("--answer_share", type=float, default=1.0, help="supervised share of a row (default: 1)")
    parser.add_argument("--pictures", type=int, default=0, help="pictures of a row (default: 0, towers not counted)")
    parser.add_argument("--picture_size", default="448x448", help="their pixels, width x height (default: 448x448)")
    given, rest = parser.split(arguments)
    pictures = Pictures.of(given.pictures, given.picture_size)
    machine = Machine(given.gpus, given.gpu_memory, given.reserve, given.gpu_tflops, given.utilisation, given.bandwidth)
    print(plan(Recipe.parse(rest, parser.names), machine, given.length, given.answer_share, pictures))


def evaluate(arguments: list[str]) -> None:
    from .evaluation.subcommands import eval_command

    eval_command(arguments)


def assemble(arguments: list[str]) -> None:
    from .assembly import assemble_pretrained
    from .parsing import Parser

    parser = Parser(prog="vlm-taid assemble", description="Make a vision-language model from a tower and a decoder.")
    parser.add_function_arguments(assemble_pretrained, as_positional=False)
    print(f"assembled: {assemble_pretrained(**vars(parser.parse(arguments)[1]))}")


def report(arguments: list[str]) -> None:
    from .parsing import Parser
    from .report import report

    parser = Parser(prog="vlm-taid report", description="Write one HTML page about runs and evaluations.")
    parser.add_argument("runs", nargs="*", help="run folders")
    parser.add_argument("--evaluations", nargs="*", default=[], help="results of eval run, each as PATH or LABEL=PATH")
    parser.add_argument("--models", nargs="*", default=[], help="LABEL=MODEL: token probabilities of the answers shown")
    parser.add_function_arguments(report, as_positional=False, skip={"runs", "evaluations", "models"})
    print(f"report: {report(**vars(parser.parse(arguments)[1]))}")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "distill": distill,
    "cache": cache,
    "inspect": inspect,
    "assemble": assemble,
    "plan": plan,
    "eval": evaluate,
    "report": report,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 2 when something that was given cannot be used, 1 when ``inspect`` found a bad row."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "LOCAL_RANK" in os.environ:  # the deepspeed launcher puts its argument before ours
        arguments = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    # transformers imports peft, and peft bitsandbytes where it is installed, which then asks for a package "kernels"
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"vlm-taid: no command {command!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if "LOCAL_RANK" not in os.environ:
        return _called(command, rest)
    from .ranks import left_in_order

    return left_in_order(lambda: _called(command, rest))


def _called(command: str, arguments: list[str]) -> int:
    try:
        return COMMANDS[command](arguments) or 0
    except ImportError as error:  # an optimizer, a log back end or an attention that is not installed
        print(f"vlm-taid {command}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:  # no file of the user's, but a socket or a library
            raise
        print(f"vlm-taid {command}: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except InputError as error:
        # an error of a DataLoader worker comes with the worker's traceback in front
        message = str(error).rsplit("vlm_taid.errors.BadRow: ", 1)[-1].strip()
        print(f"vlm-taid {command}: {message}", file=sys.stderr)
        return 2
