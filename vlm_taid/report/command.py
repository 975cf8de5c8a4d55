"""`vlm-taid report`: the page after a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

import yaml

from vlm_taid.errors import InputError
from vlm_taid.evaluation.command import parse_pairs
from vlm_taid.evaluation.comparison import Comparison, compare
from vlm_taid.evaluation.gallery import Gallery, gallery
from vlm_taid.evaluation.tables import differences_table
from vlm_taid.report.cards import details, grid
from vlm_taid.report.curves import agreement_figure, figures
from vlm_taid.report.page import page
from vlm_taid.report.probabilities import readers
from vlm_taid.report.runs import Run

MAX_BYTES = 3_000_000
PICTURE_SIDES = (320, 192, 128, 64)  # pixels; the next one is tried when the page gets too large


def report(
    runs: Sequence[str | Path],
    output: str | Path,
    evaluations: Sequence[str | Path] = (),
    *,
    reference: str | None = None,
    data: str | Path | None = None,
    models: Sequence[str] = (),
    pictures: int = 24,
    title: str = "Distillation report",
) -> Path:
    """Writes one HTML page of at most 3 MB about runs and evaluations; it needs no network and no other file.

    Args:
        runs: folders that `vlm-taid distill` wrote; may be none if there are evaluations.
        output: the HTML file.
        evaluations: results files or folders of `vlm-taid eval run` and `eval lm`, each may be given as LABEL=PATH.
        reference: the label of the model that the others are compared with, the teacher; the first evaluation if None.
        data: the held-out file, if it no longer lies where the evaluations read it; of several as TASK=FILE, with
            commas between.
        models: model folders as LABEL=PATH, with labels of the evaluations: they are loaded and asked, token by token,
            how probable each answer of a held-out row that is shown is to them.
        pictures: how many held-out rows to show for each task.
        title: the page's title.

    Returns:
        The HTML file.

    Raises:
        InputError: nothing to report, or a file is missing or broken, or a model cannot be loaded.
    """
    if not runs and not evaluations:
        raise InputError("nothing to report: give runs, evaluations or both")
    read = [Run.read(Path(run)) for run in runs]
    comparison = compare(evaluations, reference) if evaluations else None
    asked = _named(models, [] if comparison is None else [*comparison.plain])
    sections = [] if comparison is None else [_scores(comparison)]
    if read:
        sections += ["<h2>Training</h2>", _runs_table(read), "<h2>Curves</h2>"]
        sections.append(f'<div class="figures">{figures(read)}</div>')
    shown: list[Gallery] = []
    if comparison is not None and pictures:
        tasks = [task for task, results in comparison.plain[comparison.reference].items() if results.is_answered(task)]
        one = data is None or "=" not in str(data) or Path(data).exists()
        files = dict.fromkeys(tasks, data) if one else parse_pairs(str(data), "data")
        shown = [found for task in tasks if (found := gallery(comparison, task, pictures, files.get(task))).cards]
    asking = readers(asked)
    opened = json.dumps([details(card, asking) for one in shown for card in one.cards], ensure_ascii=False)
    subtitle = " · ".join([run.name for run in read] or list(comparison.plain if comparison else []))
    for side in PICTURE_SIDES:
        cards = [grid(one, comparison, side) for one in shown] if comparison else []
        text = page(title, subtitle, "".join(sections + cards), opened if shown else "")
        if len(text.encode()) <= MAX_BYTES:
            break
    else:
        raise InputError(
            f"the page would be larger than {MAX_BYTES:,} bytes; show fewer pictures than {pictures} or fewer runs"
        )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(text, encoding="utf-8")
    return output


def _named(models: Sequence[str], labels: Sequence[str]) -> dict[str, str]:
    """Paths by label; InputError if one is no LABEL=PATH, or no evaluation has the label."""
    named = {}
    for item in models:
        label, separator, path = item.partition("=")
        if not separator or label not in labels:
            raise InputError(
                f"--models {item}: expected LABEL=PATH with a label of the evaluations: {', '.join(labels)}"
            )
        named[label] = path
    return named


def _scores(comparison: Comparison) -> str:
    """The table of results, how the models differ row by row, and how often they agree."""
    note = "On held-out rows, with standard errors: shares in percent"
    if any(not measure.higher for measure in comparison.measures):
        note += ", KL in nats a token; ↓ less is better"
    note += "."
    if comparison.shuffled:
        note += " Wrong picture: each question with another row's picture, to see how much the answers need it."
    agreement = agreement_figure(comparison).replace("<figure>", '<figure class="alone">', 1)
    paired, differences = "", differences_table(comparison, leave_out=True)
    if differences[1]:
        note_p = (
            "p: exact sign test over the rows on which one is better (McNemar's for right and wrong answers). "
            "Evaluations of other rows are left out."
        )
        paired = (
            f"<h3>Differences from {escape(comparison.reference)}, row by row</h3><p>{note_p}</p>{_table(*differences)}"
        )
    names, models = comparison.table()
    head, *lines = zip(names, *models, strict=True)  # a column each model: they are few, and the page may be narrow
    return f"<h2>Scores</h2><p>{note}</p>{_table(head, lines)}{paired}{agreement}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    words = [any(cell[:1].isalpha() for cell in column) for column in zip(*rows, strict=True)] or [True] * len(head)

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="word"' if word else "" for word in words)
        return "".join(f"<{tag}{kind}>{escape(cell)}</{tag[:2]}>" for kind, cell in zip(kinds, cells, strict=True))

    cells = line(head, 'th scope="col"')
    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _runs_table(runs: Sequence[Run]) -> str:
    """What was run, a line each, and the recipes to be unfolded."""
    head = ["run", "objective", "steps", "last loss", "last t", "answer tokens a second", "peak memory, GiB"]
    rows = []
    for run in runs:
        last = [curve[1][-1] if curve[1] else None for curve in (run.curve("loss"), run.curve("t"))]
        speeds = sorted(run.curve("answer_tokens_per_second")[1])
        numbers = [f"{last[0]:.4g}" if last[0] is not None else "–", f"{last[1]:.3f}" if last[1] is not None else "–"]
        steps = str(run.metrics[-1]["step"]) if run.metrics else "0"
        peaks = run.curve("peak_memory_gib")[1]
        numbers += [f"{speeds[len(speeds) // 2]:.0f}" if speeds else "–", f"{max(peaks):.2f}" if peaks else "–"]
        rows.append([run.name, run.objective or "–", steps, *numbers])
    recipes = "".join(
        f"<details><summary>Recipe of {escape(run.name)}</summary>"
        f"<pre>{escape(yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True))}</pre></details>"
        for run in runs
        if run.recipe
    )
    return _table(head, rows) + recipes
