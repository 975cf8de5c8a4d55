"""The command line: ``vlm-taid COMMAND ...``, also ``python -m vlm_taid`` and any launcher's ``--module vlm_taid``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from .errors import InputError

USAGE = """vlm-taid COMMAND ...

  distill   --config RECIPE.yaml [--section.key VALUE ...]    train a student; --help lists every key
  eval run  --model PATH --data NAME=FILE ...                 score a model on VQA files
  report    RUN [RUN ...] --output report.html                curves, results and sample answers as one page

vlm-taid COMMAND --help tells the rest."""


def distill(arguments: list[str]) -> None:
    from .distillation import distill
    from .recipe import Recipe

    distill(Recipe.parse(arguments))


def evaluate(arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    from .evaluation import run_command

    auto_cli({"run": run_command}, args=arguments, prog="vlm-taid eval")


def report(arguments: list[str]) -> None:
    from jsonargparse import auto_cli

    from .report import report

    auto_cli(report, args=arguments, prog="vlm-taid report")


COMMANDS: dict[str, Callable[[list[str]], None]] = {"distill": distill, "eval": evaluate, "report": report}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, or 2 when something that was given cannot be used."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "LOCAL_RANK" in os.environ:  # the deepspeed launcher puts its argument before ours
        arguments = [a for a in arguments if not a.startswith(("--local_rank", "--local-rank"))]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    command, *rest = arguments
    if command not in COMMANDS:
        print(f"vlm-taid: no command {command!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        COMMANDS[command](rest)
    except InputError as error:
        # an error of a DataLoader worker comes with the worker's traceback in front
        message = str(error).rsplit("vlm_taid.errors.BadRow: ", 1)[-1].strip()
        print(f"vlm-taid {command}: {message}", file=sys.stderr)
        return 2
    return 0
