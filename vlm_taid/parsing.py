"""The parser of every command: jsonargparse, with messages that name the nearest key."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn, get_origin

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse._loaders_dumpers import get_yaml_default_loader
from jsonargparse._typehints import ActionTypeHint
from jsonargparse._util import NestedArg

from .errors import InputError

set_parsing_settings(docstring_parse_attribute_docstrings=True)
for _letter in "yYnNoO":  # in a recipe, "save_strategy: no" is a word, as in YAML 1.2, and not False
    _resolvers = get_yaml_default_loader().yaml_implicit_resolvers
    _resolvers[_letter] = [item for item in _resolvers.get(_letter, []) if item[0] != "tag:yaml.org,2002:bool"]

_check_type = ActionTypeHint._check_type


def _check_whole_lists(self, value, append=False, cfg=None, mode=None):
    """A list replaces the one before it; jsonargparse fills its entries from an earlier list of the same length."""
    if get_origin(self._typehint) is list and not append and not isinstance(value, NestedArg):
        cfg = None
    return _check_type(self, value, append, cfg, mode)


ActionTypeHint._check_type = _check_whole_lists


class Parser(ArgumentParser):
    """An ArgumentParser that takes no abbreviations and raises InputError."""

    def __init__(self, **options: Any):
        super().__init__(**{"exit_on_error": False, "allow_abbrev": False, **options})

    def parse(self, arguments: Sequence[str], others: Sequence[str] = ()) -> tuple[Namespace, Any]:
        """The parsed values, and the same with classes made of them.

        Args:
            arguments: the command line.
            others: options that stand beside this parser's, which an unknown key may have meant too.

        Raises:
            InputError: an unknown key (the nearest is named), or a value of the wrong type.
        """
        try:
            parsed = self.parse_args(list(arguments))
            return parsed, self.instantiate_classes(parsed)
        except Exception as error:  # jsonargparse raises its own and argparse's errors
            known = [*(action.dest for action in self._actions), *others]
            raise InputError(explained(str(error).strip(), arguments, known)) from error


class OwnOptions(argparse.ArgumentParser):
    """The options that a command has beside a recipe's keys."""

    def split(self, arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """The own options' values, and the arguments that are left for the recipe.

        Raises:
            InputError: an own option is missing (what stands in its place is named) or has a wrong value.
        """
        self._arguments = arguments
        return self.parse_known_args(arguments)

    @property
    def names(self) -> list[str]:
        return [action.dest for action in self._actions]

    def error(self, message: str) -> NoReturn:
        raise InputError(explained(message, self._arguments, self.names))


def explained(message: str, arguments: Sequence[str], known: Sequence[str]) -> str:
    """A parser's message, with the known key that is nearest to one of the arguments or to one that it names.

    Where one of a few words was expected, the message is the key, the words and what stood there; where an entry of a
    list was named by its number, what can be written instead.
    """
    for argument in arguments:
        entry = re.match(r"--([\w.]+?)(?:\.-?\d+|\[-?\d+\])((?:\.\w+)*)(?:=|$)", argument)
        if entry and entry[1] in known:
            key, rest = entry[1], entry[2]
            return (
                f"{argument.split('=')[0]}: {key} is a list, whose entries have no numbers on the command line. "
                f"--{key}{rest or '.KEY'} VALUE changes its last entry, --{key}+ '{{KEY: VALUE, ...}}' adds one, "
                f"--{key} '[{{KEY: VALUE, ...}}, ...]' replaces all; another entry is changed in the recipe's file"
            )
    words, keys = re.search(r"typing\.Literal\[(.*?)\]", message), re.findall(r'Parser key "([\w.]+)"', message)
    found = re.search(r"(?:Got|Given) value: (.*)", message)
    if words and keys and found:
        return f"{'.'.join(keys)}: one of {words[1]} was expected, found {found[1]}"
    group = re.search(r"Group '([\w.]+)'", message)
    prefix = f"{group[1]}." if group else ""
    unknown = [prefix + key for key in re.findall(r"option '([\w.]+)'", message)]
    unknown += [argument.split("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
    for key in unknown:
        near = difflib.get_close_matches(key, sorted(k for k in known if not k.endswith(".help")), n=1, cutoff=0.6)
        if key not in known and near and near[0] not in message:
            return f"{message} (nearest known key: {near[0]})"
    return message


def with_recipe(command: str, description: str) -> OwnOptions:
    """The parser of a command's own options."""
    return OwnOptions(
        prog=f"vlm-taid {command}",
        description=f"{description} All keys of a recipe may follow, as in vlm-taid distill.",
        usage=f"vlm-taid {command} --config RECIPE.yaml [--section.key VALUE ...] [options]",
        allow_abbrev=False,
    )
