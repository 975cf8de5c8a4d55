"""The page's figures: curves of runs, and how often each model answers as the reference does."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlm_taid.evaluation.comparison import Comparison
from vlm_taid.evaluation.results import Score
from vlm_taid.report.runs import Run

COLORS = ("#3b82f6", "#ea7317", "#10a37f", "#a855f7", "#e0457b", "#8a8f98")  # readable on white and on near-black
INK = "#010203"  # stands for the page's text colour in a figure, and is replaced by it
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "vlm_taid",  # equal figures are equal texts
}


def figures(runs: Sequence[Run]) -> str:
    """The runs' curves, those that they log."""
    objectives = ", ".join(f"{run.name}: {run.objective}" for run in runs if run.objective)
    losses = "Per supervised token" + (f", of each run's own objective ({objectives})." if objectives else ".")
    drawn = [
        ("Loss", losses, "loss", {"smooth": True}),
        (
            "Interpolation t",
            "t = 0 trains towards the student's own prediction, t = 1 towards the teacher's. "
            "The closed form knows the step alone; with the published alpha and beta t stays close to it.",
            "t",
            {"dashed": "t_closed_form"},
        ),
        ("KL divergence", "Of the student from what its objective aims at, nats per token.", "kl", {"smooth": True}),
        (
            "Top-1 agreement",
            "The share of the answers' tokens at which student and teacher hold the same token for the most probable.",
            "top1_agreement",
            {"smooth": True},
        ),
        ("Held-out loss", "Per supervised token; of TAID runs the KL to the teacher.", "eval_loss", {}),
        ("Held-out top-1 agreement", "Of the answers' tokens, with the teacher.", "eval_top1_agreement", {}),
        *((key.removeprefix("eval_"), "During training, on held-out rows.", key, {}) for key in _scores(runs)),
        ("Gradient norm", "Before clipping.", "grad_norm", {"smooth": True}),
        ("Learning rate", "Of the first parameter group.", "learning_rate", {}),
        ("Throughput", "Supervised tokens a second, all ranks.", "answer_tokens_per_second", {"smooth": True}),
        ("Peak memory", "So far, in GiB, of the rank with the most.", "peak_memory_gib", {"zero": True}),
        ("Paired share", "Of the answers' tokens, where the models have streams of their own.", "paired_share", {}),
    ]
    return "".join(_figure(name, caption, _curves(runs, key, name, **how)) for name, caption, key, how in drawn)


def _scores(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.scores))


def _figure(name: str, caption: str, svg: str | None) -> str:
    if svg is None:
        return ""
    return f"<figure>{svg}<figcaption><b>{escape(name)}.</b> {escape(caption)}</figcaption></figure>"


def _smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """A running mean over about this share of the curve, centred, shorter at the ends."""
    half = int(len(values) * share / 2)
    windows = [values[max(0, index - half) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _svg(figure: Figure, label: str) -> str:
    """A figure as an SVG element with a text for those who do not see it; its ink takes the page's text colour."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _axes(height: float = 3.0) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=INK, alpha=0.12, linewidth=0.6)
    return figure, axes


@matplotlib.rc_context(STYLE)
def _curves(
    runs: Sequence[Run], key: str, name: str, *, dashed: str | None = None, smooth: bool = False, zero: bool = False
) -> str | None:
    """The runs' curves of one logged number, or None if no run logs it."""
    figure, axes = _axes()
    said = []
    for index, run in enumerate(runs):
        steps, values = run.curve(key)
        if not steps:
            continue
        color = COLORS[index % len(COLORS)]
        said.append(f"{run.name} from {values[0]:.3g} at step {steps[0]:g} to {values[-1]:.3g} at step {steps[-1]:g}")
        if smooth and len(values) > 60:
            axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.3)
            values = _smooth(values)
        axes.plot(steps, values, color=color, linewidth=1.8, label=run.name, marker="o" if len(steps) == 1 else None)
        if dashed and run.curve(dashed)[0]:
            label = f"{run.name}, closed form"
            axes.plot(*run.curve(dashed), color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label=label)
    if not said:
        return None
    if zero:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("optimizer step")
    axes.margins(x=0.01)
    axes.legend(frameon=False)
    return _svg(figure, f"{name}: {'; '.join(said)}")


@matplotlib.rc_context(STYLE)
def agreement_figure(comparison: Comparison) -> str:
    """How often each model gives the reference model's answer, by task and category, with standard errors."""
    models = [label for label in comparison.plain if label != comparison.reference]
    rows: list[tuple[str, dict[str, Score]]] = []
    for task in comparison.plain[comparison.reference]:
        reference = comparison.answers(comparison.reference, task)
        groups = [None, *sorted({line["category"] for line in reference if line["category"] is not None})]
        for group in groups:
            found = {label: comparison.agreement_with_reference(label, task, group) for label in models}
            scores = {label: score for label, score in found.items() if score is not None}
            if scores:
                rows.append((task if group is None else f"{task}: {group}", scores))
    if not rows:
        return ""
    figure, axes = _axes(0.9 + 0.22 * len(rows) * (1 + len(models)))
    height, said = 0.8 / len(models), []
    for index, label in enumerate(models):
        found = [(place, scores[label]) for place, (_, scores) in enumerate(rows) if label in scores]
        places = [place + (index - (len(models) - 1) / 2) * height for place, _ in found]
        shares = [100 * (score.value or 0.0) for _, score in found]
        errors = [100 * (score.stderr or 0.0) for _, score in found]
        style = {"fmt": "o", "color": COLORS[index % len(COLORS)], "capsize": 3, "markersize": 5}
        axes.errorbar(shares, places, xerr=errors, label=label, **style)
        said += [f"{label}, {rows[place][0]}: {score} %" for place, score in found]
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("% of the questions, with the standard error")
    figure.legend(frameon=False, loc="outside upper left", ncols=3)
    caption = f"Answers that equal those of {comparison.reference}, right or wrong, after strip and lower case."
    return _figure("Agreement", caption, _svg(figure, "Agreement: " + "; ".join(said)))
