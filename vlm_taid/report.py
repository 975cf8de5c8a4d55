"""The page after a run: curves, scores and sample answers in one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure
from PIL import Image

from vlm_taid.errors import InputError
from vlm_taid.evaluation.comparison import Comparison, compare
from vlm_taid.evaluation.gallery import SYMBOLS, Card, Gallery, gallery

MAX_BYTES = 3_000_000
MAX_POINTS = 600  # of a curve; longer ones are averaged over equal stretches of steps
PICTURE_SIDES = (320, 192, 128, 64)  # pixels; the next one is tried when the page gets too large
COLORS = ("#3b82f6", "#ea7317", "#10a37f", "#a855f7", "#e0457b", "#8a8f98")  # readable on white and on near-black
INK = "#010203"  # stands for the page's text colour in a figure, and is replaced by it
CSS = """
:root { color-scheme: light dark; --page: #fff; --card: #f6f8fa; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --right: #1a7f37; --partly: #9a6700; --wrong: #cf222e; }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --card: #161b22; --ink: #e6edf3; --soft: #9198a1;
  --line: #30363d; --right: #3fb950; --partly: #d29922; --wrong: #f85149; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); } th:first-child, td:first-child { text-align: left; }
.run td { text-align: left; } .run th { text-align: left; }
details { margin-top: .75rem; } summary { cursor: pointer; color: var(--soft); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto;
  font-size: .8rem; line-height: 1.4; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
figure svg { display: block; width: 100%; height: auto; } figcaption { font-size: .85rem; color: var(--soft); }
figcaption b { color: var(--ink); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(168px, 1fr)); gap: .8rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; overflow: hidden;
  font-size: .82rem; }
.card img { display: block; width: 100%; aspect-ratio: 1; object-fit: contain; background: var(--page); }
.card img.small { image-rendering: pixelated; }
.card div { padding: .5rem .6rem .6rem; overflow-wrap: anywhere; } .card strong { display: block; line-height: 1.3; }
.card span { display: block; color: var(--soft); }
.card .right { color: var(--right); } .card .partly { color: var(--partly); } .card .wrong { color: var(--wrong); }
"""


@dataclass
class Run:
    """What a run's folder says of it.

    Args:
        name: the folder's name.
        recipe: the resolved recipe, or an empty dictionary.
        metrics: the logged steps that hold a loss, in order of steps.
    """

    name: str
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]

    @staticmethod
    def read(folder: Path) -> Run:
        """Reads ``metrics.jsonl`` and, if it is there, ``recipe.yaml``; InputError if they are missing or broken."""
        path, recipe_path = folder / "metrics.jsonl", folder / "recipe.yaml"
        if not path.is_file():
            raise InputError(f"{folder}: no metrics.jsonl; give the folder that `vlm-taid distill` wrote")
        by_step: dict[int, dict[str, Any]] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "loss" in row:
                    by_step[int(row["step"])] = row  # a resumed run logs some steps again: the later one counts
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path}:{number}: not a line of metrics: {error!r}") from error
        try:
            recipe = yaml.safe_load(recipe_path.read_text(encoding="utf-8")) if recipe_path.is_file() else {}
        except yaml.YAMLError as error:
            raise InputError(f"{recipe_path}: not YAML: {error}") from error
        return Run(folder.name, recipe or {}, [by_step[step] for step in sorted(by_step)])

    def curve(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and values of a logged number, averaged over equal stretches to at most MAX_POINTS points."""
        points = [(row["step"], row[key]) for row in self.metrics if isinstance(row.get(key), int | float)]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        stretch = -(-len(points) // MAX_POINTS) or 1
        groups = [points[start : start + stretch] for start in range(0, len(points), stretch)]
        steps, values = ([sum(p[axis] for p in group) / len(group) for group in groups] for axis in (0, 1))
        return steps, values

    @property
    def objective(self) -> str:
        """The objective's name, or an empty text."""
        objective = self.recipe.get("objective")
        return str(objective.get("name", "")) if isinstance(objective, dict) else str(objective or "")


def _smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """A running mean over about this share of the curve, centred, shorter at the ends."""
    half = int(len(values) * share / 2)
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _svg(figure: Figure) -> str:
    """A figure as an SVG element whose text and axes take the page's text colour."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vlm_taid"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")


def _curves(runs: Sequence[Run], key: str, *, dashed: str | None = None, smooth: bool = False) -> str | None:
    """The runs' curves of one logged number, or None if no run logs it."""
    with matplotlib.rc_context(
        {
            **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
            "font.family": "sans-serif",
            "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
            "font.size": 9,
        }
    ):
        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.add_subplot()
        for index, run in enumerate(runs):
            steps, values = run.curve(key)
            if not steps:
                continue
            color = COLORS[index % len(COLORS)]
            if smooth and len(values) > 60:
                axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
                values = _smooth(values)
            axes.plot(steps, values, color=color, linewidth=1.8, label=run.name)
            if dashed and run.curve(dashed)[0]:
                label = f"{run.name}, closed form"
                axes.plot(*run.curve(dashed), color=color, linewidth=1.2, linestyle=(0, (4, 3)), label=label)
        if not axes.lines:
            return None
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=INK, alpha=0.12, linewidth=0.6)
        axes.set_xlabel("optimizer step")
        axes.margins(x=0.01)
        axes.legend(frameon=False)
        return _svg(figure)


def _figures(runs: Sequence[Run]) -> str:
    objectives = ", ".join(f"{run.name} {run.objective}" for run in runs if run.objective)
    losses = "Per supervised token" + (f", of each run's own objective: {objectives}." if objectives else ".")
    drawn = [
        ("Loss", losses, _curves(runs, "loss", smooth=True)),
        (
            "Interpolation t",
            "t = 0 trains towards the student's own prediction, t = 1 towards the teacher's. "
            "The closed form knows the step alone; with the published alpha and beta t stays close to it.",
            _curves(runs, "t", dashed="t_closed_form"),
        ),
        (
            "KL divergence",
            "Of the student from what its objective aims at, per supervised token.",
            _curves(runs, "kl", smooth=True),
        ),
        ("Gradient norm", "Before clipping.", _curves(runs, "grad_norm", smooth=True)),
        ("Learning rate", "Of the first parameter group.", _curves(runs, "learning_rate")),
        (
            "Throughput",
            "Supervised tokens a second, all ranks.",
            _curves(runs, "answer_tokens_per_second", smooth=True),
        ),
    ]
    figures = [
        f"<figure>{svg}<figcaption><b>{name}.</b> {html.escape(caption)}</figcaption></figure>"
        for name, caption, svg in drawn
        if svg
    ]
    return f'<div class="figures">{"".join(figures)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    cells = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _runs_table(runs: Sequence[Run]) -> str:
    """What was run, a line each, and the recipes to be unfolded."""
    head = ["run", "objective", "steps", "last loss", "last t", "answer tokens a second"]
    rows = []
    for run in runs:
        last = [curve[1][-1] if curve[1] else None for curve in (run.curve("loss"), run.curve("t"))]
        speeds = sorted(run.curve("answer_tokens_per_second")[1])
        numbers = [f"{last[0]:.4g}" if last[0] is not None else "–", f"{last[1]:.3f}" if last[1] is not None else "–"]
        steps = str(run.metrics[-1]["step"]) if run.metrics else "0"
        rows.append(
            [run.name, run.objective or "–", steps, *numbers, f"{speeds[len(speeds) // 2]:.0f}" if speeds else "–"]
        )
    recipes = "".join(
        f"<details><summary>Recipe of {html.escape(run.name)}</summary>"
        f"<pre>{html.escape(yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True))}</pre></details>"
        for run in runs
        if run.recipe
    )
    return _table(head, rows) + recipes


def _picture(image: Image.Image, side: int) -> str:
    """A picture as a data URL: losslessly when it is small, else shrunk, as JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= 96:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image = image.copy()
        image.thumbnail((side, side))
        image.save(buffer, "JPEG", quality=80)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _card(card: Card, side: int) -> str:
    small = ' class="small"' if max(card.image.size) <= 96 else ""
    answers = "".join(
        f'<span class="{answer.verdict}">{SYMBOLS[answer.verdict]} {html.escape(answer.label)}: '
        f"{html.escape(answer.text or '(empty)')}</span>"
        for answer in card.answers
    )
    return (
        f'<div class="card"><img{small} src="{_picture(card.image, side)}" alt=""><div>'
        f"<strong>{html.escape(card.question)}</strong><span>reference: {html.escape(card.reference)}</span>{answers}"
        "</div></div>"
    )


def _gallery(shown: Gallery, comparison: Comparison, side: int) -> str:
    single = len(comparison.plain) == 1
    differ = "the answer is wrong" if single else f"a model does not answer as {comparison.reference} does"
    verdicts = {answer.verdict for card in shown.cards for answer in card.answers}
    legend = ", ".join(f"{symbol} {verdict}" for verdict, symbol in SYMBOLS.items() if verdict in verdicts)
    note = (
        f"Chosen to show differences, not at random: on {shown.differing:,} of {shown.rows:,} rows {differ}; "
        f"some of these come first, then some of the others. {legend}."
    )
    cards = "".join(_card(card, side) for card in shown.cards)
    heading = f"<h2>Held-out pictures: {html.escape(shown.task)}</h2><p>{html.escape(note)}</p>"
    return f'{heading}<div class="grid">{cards}</div>'


def report(
    runs: Sequence[str | Path],
    output: str | Path,
    evaluations: Sequence[str | Path] = (),
    *,
    reference: str | None = None,
    data: str | Path | None = None,
    pictures: int = 24,
    title: str = "Distillation report",
) -> Path:
    """Writes one HTML page of at most 3 MB about runs and evaluations; it needs no network and no other file.

    Args:
        runs: folders that `vlm-taid distill` wrote; may be none if there are evaluations.
        output: the HTML file.
        evaluations: results files or folders of `vlm-taid eval run`, each may be given as LABEL=PATH.
        reference: the label of the model that the others are compared with, the teacher; the first evaluation if None.
        data: the held-out file, if it no longer lies where the evaluations read it.
        pictures: how many held-out pictures to show for each task.
        title: the page's title.

    Returns:
        The HTML file.

    Raises:
        InputError: nothing to report, or a file is missing or broken.
    """
    if not runs and not evaluations:
        raise InputError("nothing to report: give runs, evaluations or both")
    read = [Run.read(Path(run)) for run in runs]
    sections = []
    comparison, galleries = None, []
    if evaluations:
        comparison = compare(evaluations, reference)
        note = "In percent, on held-out rows, with the standard error of the mean."
        if comparison.shuffled:
            note += " Wrong picture: each question with another row's picture, to see how much the answers need it."
        sections.append(f"<h2>Scores</h2><p>{note}</p>")
        sections.append(_table(*comparison.table()))
        if pictures:
            galleries = [gallery(comparison, task, pictures, data) for task in comparison.plain[comparison.reference]]
    if read:
        sections += ["<h2>Training</h2>", _runs_table(read), "<h2>Curves</h2>", _figures(read)]
    subtitle = " · ".join([run.name for run in read] or list(comparison.plain if comparison else []))
    for side in PICTURE_SIDES:
        shown = [_gallery(item, comparison, side) for item in galleries if item.cards] if comparison else []
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{CSS}</style></head><body><h1>{html.escape(title)}</h1><p>{html.escape(subtitle)}</p>"
            f"{''.join(sections + shown)}</body></html>\n"
        )
        if len(page.encode()) <= MAX_BYTES:
            break
    else:
        raise InputError(
            f"the page would be larger than {MAX_BYTES:,} bytes; show fewer pictures than {pictures} or fewer runs"
        )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8")
    return output
