"""Tasks: a file of questions, how they are phrased and how answers are scored; from YAML files, own or shipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from vlm_taid.data.sources import SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.evaluation.columns import references_of
from vlm_taid.evaluation.generation import Generation, generation_options
from vlm_taid.evaluation.prompts import Prompt, prompt_of
from vlm_taid.evaluation.rows import PictureTable, Rows
from vlm_taid.evaluation.scoring import default_metric, scoring

SHIPPED = Path(__file__).with_name("benchmarks")
PLAIN = Prompt("{question}", "{question}\n{options}")  # the style none: nothing is asked for


@dataclass
class Task:
    """One file of questions and how its answers are scored.

    Args:
        name: the task's name in the results.
        source: the file, with the columns of any of the benchmarks; ``source.prompt`` phrases the question.
        metric: a name of `vlm_taid.evaluation.scoring.SCORINGS`; None: vqa_accuracy if the first row has ten
            references, else exact_match.
        max_new_tokens: the longest answer, in tokens.
        generation: further arguments of `Generation`.
        category: the column that groups rows for a score each; rows without it have none.
        prompt: how questions are phrased, in place of ``source.prompt``.
        prompt_style: whose prompt that is; written into the results.
        aliases: our column names to those that may stand in their place.
        pictures: another table with the pictures.
    """

    name: str
    source: SourceOptions
    metric: str | None = None
    max_new_tokens: int = 16
    category: str = "category"
    prompt: Prompt | None = None
    prompt_style: str = "own"
    aliases: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pictures: PictureTable | None = None
    generation: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.metric is not None:
            scoring(self.metric)
        try:
            self.generated()
        except InputError as error:
            raise InputError(f"task {self.name}: {error}") from None

    def generated(self) -> Generation:
        """How its answers are generated; InputError if a number is out of its range."""
        return Generation(self.max_new_tokens, **self.generation)

    def rows(self) -> Rows:
        """The task's rows; InputError if the file cannot be read or holds none."""
        return Rows(self.source, self.prompt, self.aliases, self.pictures)

    def with_metric(self) -> Task:
        """The task with its default metric filled in, for which the first row is read; itself if it has one.

        Raises:
            InputError: the file cannot be read, or the first row has no reference.
        """
        if self.metric is not None:
            return self
        name, _, row = self.rows().columns(0)
        return replace(self, metric=default_metric(references_of(row, name)))

    def references(self, row: Mapping[str, Any], name: str) -> list[str]:
        """A row's right answers; BadRow if there are none."""
        return references_of(row, name, choice=self.metric is not None and scoring(self.metric).choice)

    def config(self) -> dict[str, Any]:
        """What of the task goes into the results' ``configs``."""
        assert self.metric is not None, "with_metric comes first"
        shown = self.prompt or Prompt(self.source.prompt or "{question}")
        return {
            "metric": self.metric,
            "flavor": scoring(self.metric).flavor,
            "prompt": {key: text for key, text in asdict(shown).items() if text is not None},
            "prompt_style": self.prompt_style,
            "dataset": asdict(self.source),
            "columns": {ours: list(theirs) for ours, theirs in self.aliases.items()},
            "pictures": None if self.pictures is None else asdict(self.pictures),
            "generation_kwargs": {"max_new_tokens": self.max_new_tokens, "do_sample": False, **self.generation},
        }

    @staticmethod
    def described(name: str, config: Mapping[str, Any], path: str | None = None) -> Task:
        """The task that a results file describes under ``configs``.

        Args:
            name: the task's.
            config: of `config`.
            path: where its file lies now, pictures with it; None: where it lay then.
        """
        source, pictures = SourceOptions(**config["dataset"]), config.get("pictures")
        if path is not None:
            source, pictures = _moved(source, path), None
        elif pictures is not None:
            pictures = PictureTable(**{**pictures, "source": SourceOptions(**pictures["source"])})
        generation = generation_options(config["generation_kwargs"], f"{name}: generation_kwargs")
        return Task(
            name,
            source,
            config["metric"],
            generation.pop("max_new_tokens"),
            prompt=prompt_of(config["prompt"], name),
            prompt_style=config["prompt_style"],
            aliases=config.get("columns", {}),
            pictures=pictures,
            generation=generation,
        )


@dataclass(frozen=True)
class TaskFile:
    """A task as a YAML file describes it: without the choices that a run makes (data, flavour, prompt style).

    With a name alone it is the task of any file of questions.

    Args:
        task: its name.
        flavors: metric names by flavour; the first one is the default. None: the references decide.
        prompts: by style; the first one is the default, and that of the flavour goes before it. None: the question.
        description: a sentence.
        dataset: path, split and name; data_files in place of a path of parquet, json or csv; None: must be given.
        columns: our column names to the names that may stand in their place.
        category: our column that groups rows.
        max_new_tokens: the longest answer.
        pictures: another table with the pictures, as ``dataset``, and its ``key``, ``image`` and ``row_key``.
        generation: further arguments of `Generation`.
    """

    task: str
    flavors: dict[str, str] = field(default_factory=dict)
    prompts: dict[str, Prompt] = field(default_factory=dict)
    description: str = ""
    dataset: dict[str, Any] | None = None
    columns: dict[str, list[str]] = field(default_factory=dict)
    category: str = "category"
    max_new_tokens: int = 16
    pictures: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def metric(self) -> str | None:
        """The default flavour's metric."""
        return next(iter(self.flavors.values()), None)

    @property
    def needs(self) -> list[str]:
        """Our names of the columns that a file must have for its metric; the options may stand in the question."""
        found = scoring(self.metric or "exact_match")
        picture = "image" if self.pictures is None else self.pictures.get("row_key", "imageId")
        return [picture, "question", *(["options"] if found.choice else []), "answer", *found.columns]

    def build(
        self,
        path: str | None = None,
        *,
        flavor: str | None = None,
        prompt_style: str | None = None,
        prompt: str | None = None,
        metric: str | None = None,
        max_new_tokens: int | None = None,
        generation: Mapping[str, Any] | None = None,
        columns: Mapping[str, str] | None = None,
        image_root: str | None = None,
    ) -> Task:
        """The task to run.

        Args:
            path: the file or folder of questions; the task's own data set if None.
            flavor: one of the task's; the first one if None.
            prompt_style: one of the task's; else the flavour's if there is one, else the first.
            prompt: a prompt of one's own in place of the styles.
            metric: a metric in place of the flavour's.
            max_new_tokens: in place of the task's.
            generation: further arguments of `Generation`, over the task's.
            columns: column names of the file, as in a recipe.
            image_root: the folder that image paths start from.

        Raises:
            InputError: no such flavour or style, or no data is known.
        """
        if flavor is not None and flavor not in self.flavors:
            known = ", ".join(self.flavors) or "none: give --metric"
            raise InputError(f"task {self.task} has no flavor {flavor}; it has {known}")
        styles = self.prompts | {"none": self.prompts.get("none", PLAIN)}
        style = prompt_style or (flavor if flavor in self.prompts else next(iter(styles)))
        if style not in styles:
            raise InputError(f"task {self.task} has no prompt style {style}; it has {', '.join(styles)}")
        return Task(
            self.task,
            _source(self.task, self.dataset, path, dict(columns or {}), image_root),
            metric or (self.metric if flavor is None else self.flavors[flavor]),
            self.max_new_tokens if max_new_tokens is None else max_new_tokens,
            self.category,
            Prompt(prompt) if prompt is not None else styles[style],
            "own" if prompt is not None else style,
            self.columns,
            # a file of one's own has its pictures beside the questions
            None if self.pictures is None or path is not None else _picture_table(self.task, self.pictures),
            {**self.generation, **(generation or {})},
        )


def _source(
    name: str, dataset: Mapping[str, Any] | None, path: str | None, columns: dict[str, str], image_root: str | None
) -> SourceOptions:
    known = dict(dataset or {})
    if path is None and not known:
        raise InputError(f"task {name} has no data; give --data {name}=FILE")
    if path is not None and Path(path).is_file():
        known = {}  # a file has no split
    known.pop("load_from_disk", None)  # seen by its files
    if known.get("path") in ("parquet", "json", "csv", "text") and "data_files" in known:
        known = {"path": known["data_files"]}
    unknown = set(known) - {"path", "split", "name", "filter"}
    if unknown:
        raise InputError(f"task {name}: dataset has the unknown key {min(unknown)}; known: path, split, name, filter")
    return SourceOptions(
        **{**known, "path": path or known["path"]}, format="vqa", columns=columns, image_root=image_root
    )


def _moved(source: SourceOptions, path: str) -> SourceOptions:
    """The source at another place; a file has no split."""
    if Path(path).is_file():
        return replace(source, path=path, split=SourceOptions.split, name=None)
    return replace(source, path=path)


def _picture_table(name: str, known: Mapping[str, Any]) -> PictureTable:
    keys = {key: known[key] for key in ("key", "image", "row_key") if key in known}
    rest = {key: value for key, value in known.items() if key not in keys}
    return PictureTable(_source(name, rest, None, {}, None), **keys)


def read_task(path: str | Path) -> TaskFile:
    """Reads a task's YAML file; InputError names the file and the faulty key."""
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(values, dict) or "task" not in values:
        raise InputError(f"{path}: a task file has the key `task`, its name")
    known = {"task", "description", "dataset", "pictures", "columns", "category", "generation", "metric", "flavors",
             "prompt", "prompts"}  # fmt: skip
    if unknown := set(values) - known:
        raise InputError(f"{path}: unknown key {min(unknown)!r}; known: {', '.join(sorted(known))}")
    flavors = values.get("flavors") or {"own": values.get("metric", "exact_match")}
    for metric in flavors.values():
        scoring(metric)
    prompts = values.get("prompts") or {"own": values.get("prompt", "{question}")}
    generation = generation_options(values.get("generation", {}), f"{path}: generation")
    return TaskFile(
        values["task"],
        flavors,
        {style: prompt_of(prompt, f"{path}: prompts: {style}") for style, prompt in prompts.items()},
        values.get("description", ""),
        values.get("dataset"),
        {
            ours: [theirs] if isinstance(theirs, str) else list(theirs)
            for ours, theirs in values.get("columns", {}).items()
        },
        values.get("category", "category"),
        generation.pop("max_new_tokens", 16),
        values.get("pictures"),
        generation,
    )


@cache
def shipped_tasks() -> dict[str, TaskFile]:
    """The benchmarks that come with the package, by name."""
    return {task.task: task for task in map(read_task, sorted(SHIPPED.glob("*.yaml")))}


def known_tasks(include_path: str | None = None) -> dict[str, TaskFile]:
    """The shipped tasks and those of a folder or a file, which go before shipped ones of the same name."""
    if include_path is None:
        return dict(shipped_tasks())
    folder = Path(include_path)
    files = [folder] if folder.is_file() else sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")])
    if not files:
        raise InputError(f"--include_path {include_path}: no YAML file there")
    return shipped_tasks() | {task.task: task for task in map(read_task, files)}
