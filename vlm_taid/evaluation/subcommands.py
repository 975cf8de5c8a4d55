"""`vlm-taid eval NAME ...`: the commands, and their options from their signatures and docstrings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import signature
from itertools import pairwise

from vlm_taid.errors import InputError
from vlm_taid.evaluation.command import run_command, tasks_command
from vlm_taid.evaluation.export import export_command
from vlm_taid.evaluation.language_command import lm_command
from vlm_taid.evaluation.saved import score_command
from vlm_taid.evaluation.tables import compare_command
from vlm_taid.parsing import Parser

COMMANDS: dict[str, Callable[..., object]] = {
    "run": run_command,
    "score": score_command,
    "compare": compare_command,
    "export": export_command,
    "tasks": tasks_command,
    "lm": lm_command,
}


def eval_command(arguments: Sequence[str]) -> None:
    """``vlm-taid eval NAME ...``: a command of `COMMANDS`, its parameters as options, with dashes or underscores.

    Raises:
        InputError: no such command or option, or what the command raises.
    """
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        for known, command in COMMANDS.items():
            print(f"vlm-taid eval {known:<8} {(command.__doc__ or '').splitlines()[0]}")
        print("\nvlm-taid eval COMMAND --help lists a command's options.")
        return
    if name not in COMMANDS:
        raise InputError(
            f"eval has these commands: {', '.join(f'eval {known}' for known in COMMANDS)}; --help tells more"
        )
    command = COMMANDS[name]
    own, flags = list(arguments[1:]), {}
    if name == "lm" and "--" in own:  # what follows is lm-eval's
        own, flags = own[: own.index("--")], {"lm_eval_flags": own[own.index("--") + 1 :]}
    parser = Parser(prog=f"vlm-taid eval {name}", description=(command.__doc__ or "").split("\n")[0])
    if name == "compare":
        parser.add_argument("evaluations", nargs="+", help="results files or folders, each as PATH or LABEL=PATH")
    parser.add_function_arguments(command, as_positional=False, skip={"evaluations"})
    command(**vars(parser.parse(_words(command, own))[1]) | flags)


def _words(command: Callable[..., object], arguments: Sequence[str]) -> list[str]:
    """The arguments with underscores in the options' names, as lm-eval's are known, and ``true`` after a bare flag."""
    flags = {f"--{name}" for name, parameter in signature(command).parameters.items() if parameter.annotation == "bool"}
    words = []
    for argument, following in pairwise([*arguments, "--"]):
        option, separator, value = argument.partition("=")
        if argument.startswith("--"):
            argument = f"--{option[2:].replace('-', '_')}{separator}{value}"
        bare = argument in flags and following.startswith("--")
        words.append(f"{argument}=true" if bare else argument)
    return words
