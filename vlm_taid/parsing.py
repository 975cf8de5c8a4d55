"""The parser of every command: jsonargparse, with messages that name the nearest key."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from jsonargparse._loaders_dumpers import get_yaml_default_loader

from .errors import InputError

set_parsing_settings(docstring_parse_attribute_docstrings=True)
for _letter in "yYnNoO":  # in a recipe, "save_strategy: no" is a word, as in YAML 1.2, and not False
    _resolvers = get_yaml_default_loader().yaml_implicit_resolvers
    _resolvers[_letter] = [item for item in _resolvers.get(_letter, []) if item[0] != "tag:yaml.org,2002:bool"]


class Parser(ArgumentParser):
    """An ArgumentParser that takes no abbreviations and raises InputError."""

    def __init__(self, **options: Any):
        super().__init__(**{"exit_on_error": False, "allow_abbrev": False, **options})

    def parse(self, arguments: Sequence[str]) -> tuple[Namespace, Any]:
        """The parsed values, and the same with classes made of them.

        Raises:
            InputError: an unknown key (the nearest is named), or a value of the wrong type.
        """
        try:
            parsed = self.parse_args(list(arguments))
            return parsed, self.instantiate_classes(parsed)
        except Exception as error:  # jsonargparse raises its own and argparse's errors
            raise InputError(self._explained(str(error).strip(), arguments)) from error

    def _explained(self, message: str, arguments: Sequence[str]) -> str:
        known = sorted(action.dest for action in self._actions)
        group = re.search(r"Group '([\w.]+)'", message)
        prefix = f"{group[1]}." if group else ""
        unknown = [prefix + key for key in re.findall(r"option '([\w.]+)'", message)]
        unknown += [argument.split("=")[0].removeprefix("--") for argument in arguments if argument.startswith("--")]
        for key in unknown:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            if key not in known and near and near[0] not in message:
                return f"{message} (nearest known key: {near[0]})"
        return message


def with_recipe(command: str, description: str) -> argparse.ArgumentParser:
    """The parser of a command's own options, for its ``parse_known_args``; what is left is the recipe's."""
    return argparse.ArgumentParser(
        prog=f"vlm-taid {command}",
        description=f"{description} All keys of a recipe may follow, as in vlm-taid distill.",
        usage=f"vlm-taid {command} --config RECIPE.yaml [--section.key VALUE ...] [options]",
        allow_abbrev=False,
    )
