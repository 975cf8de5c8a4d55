"""What `mkdocs build` does beside mkdocs: pages that are made from the sources, and formulas as MathML.

Nothing of the package is imported: griffe reads the sources, as for the API pages.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
BESIDE = {"benchmarks.md": "benchmarks/README.md"}  # pages of the site that lie beside their scripts
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
DOCS_TRAINING = "https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Puts the pages that the navigation does not name at the end of its guides."""
    assert config.nav is not None
    named = re.findall(r"[\w/]+\.md", str(config.nav))
    guides = next(entry["Guides"] for entry in config.nav if "Guides" in entry)
    guides += [page for page in sorted(p.name for p in Path(config.docs_dir).glob("*.md")) if page not in named]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made."""
    files.append(File.generated(config, "reference/recipe.md", content=recipe_page()))
    for page, source in BESIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links that leave docs/ go to the page of the same text, or are left as text."""
    up = "../" * page.file.src_uri.count("/")
    for name, source in BESIDE.items():
        markdown = markdown.replace(f"](../{source})", f"]({up}{name})")
    return re.sub(r"\[([^\]]*)\]\(\.\./(?:vlm_taid|data|configs|scripts|tests)/[^)]*\)", r"\1", markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers draw by themselves."""

    def drawn(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        formula = html.unescape(found[2]).strip()
        drawn = convert(formula, display=display)
        if "\\" in drawn:  # latex2mathml leaves commands that it does not know as text
            raise PluginError(f"not a formula that latex2mathml knows: {formula}")
        return drawn

    return FORMULA.sub(drawn, content)


# -- the recipe's page ---------------------------------------------------------------------------------------------


def recipe_page() -> str:
    """Every key of a recipe with its type, default and sentence, in Markdown; `training` has our own keys alone."""
    package = griffe.load("vlm_taid", search_paths=[ROOT], resolve_aliases=True, resolve_external=False)
    recipe = package["recipe.Recipe"]
    text = (
        "# The recipe\n\nA recipe is a YAML file of sections. Any key can be set on the command line over it: "
        "`--objective.t_start 0.2`. `vlm-taid distill --help` prints this list, `--print_config` a commented recipe.\n"
    )
    for key, section in recipe.members.items():
        if not isinstance(section, griffe.Attribute) or "property" in section.labels:
            continue
        options = options_in(section.annotation, recipe)
        text += f"\n## {key}\n"
        if key == "training":
            options = [package["trainer.DistillationArguments"]]
            text += f"\nThe keys of transformers' [TrainingArguments]({DOCS_TRAINING}), and these:\n"
        for one in options:
            text += table_of(key if key != "teachers" else "teachers[]", one)
    return text


def options_in(annotation: Any, scope: griffe.Object) -> list[griffe.Class]:
    """The options' dataclasses that a type names."""
    names = dict.fromkeys(re.findall(r"\b\w+(?:Options|Arguments)\b", str(annotation)))
    found = [scope.modules_collection[scope.resolve(name)] for name in names]
    return [one.final_target if isinstance(one, griffe.Alias) else one for one in found]  # pyright: ignore


def fields_of(options: griffe.Class) -> list[griffe.Attribute]:
    """The fields of a dataclass, those of its bases first, as dataclasses order them."""
    fields: dict[str, griffe.Attribute] = {}
    for one in [*reversed(options.mro()), options]:
        for name, member in one.members.items():
            if isinstance(member, griffe.Attribute) and "property" not in member.labels and member.annotation:
                fields[name] = member
    return list(fields.values())


def default_of(field: griffe.Attribute) -> tuple[str, str]:
    """A field's default as YAML writes it, and the sentence of its metadata."""
    value, sentence = ast.parse(str(field.value), mode="eval").body, ""
    if isinstance(value, ast.Call):  # field(default=..., default_factory=..., metadata={"help": ...})
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if "metadata" in given:
            sentence = ast.literal_eval(given["metadata"])["help"]
        value = given["default"] if "default" in given else given["default_factory"]
    text = ast.unparse(value.body if isinstance(value, ast.Lambda) else value)
    yaml = {"None": "null", "True": "true", "False": "false", "dict": "{}", "list": "[]"}
    return yaml.get(text, text.strip("'")), sentence


def type_of(field: griffe.Attribute) -> str:
    """A field's type; the words themselves where it is one of some words."""
    kind = str(field.annotation)
    scope = field.parent
    if kind.endswith("Name") and isinstance(scope, griffe.Class):  # FormatName, a name for a Literal
        kind = str(getattr(scope.modules_collection[scope.resolve(kind)], "value", kind))
    words = re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", kind)
    return (words[1] if words else kind).replace("'", "").replace('"', "").replace("|", "\\|").replace("[", "&#91;")


def table_of(prefix: str, options: griffe.Class) -> str:
    """A dataclass's sentence and its keys, and after them those of the dataclasses in it."""
    rows, inner = "", {}
    for field in fields_of(options):
        nested = options_in(field.annotation, field.parent)  # pyright: ignore[reportArgumentType]
        default, sentence = ("", "") if field.value is None else default_of(field)
        sentence = (field.docstring.value if field.docstring else sentence).replace("\n", " ").replace("|", "\\|")
        many = "[]" if str(field.annotation).startswith("list[") else ""
        for one in nested:
            inner.setdefault(one.path, (f"{prefix}.{field.name}{many}", one))
        shown = f"`{default}`" if default else "required"
        rows += f"| `{field.name}` | {type_of(field)} | {shown} | {sentence} |\n"
    about = options.docstring.value.split("\n\n")[0] if options.docstring else ""
    text = f"\n{about}\n\n| key | type | default | |\n|---|---|---|---|\n{rows}"
    return text + "".join(f"\n### {name}\n{table_of(name, one)}" for name, one in inner.values())
