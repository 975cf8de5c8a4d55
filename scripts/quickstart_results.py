"""The quickstart's last step: evaluates teacher and students, prints the table, writes report.html and summary.md."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from transformers.utils import logging

from vlm_taid.data import SourceOptions
from vlm_taid.evaluation import (
    Task,
    add_scores,
    agreements,
    blind_baseline,
    compare,
    discordant,
    evaluate,
    load,
    paired_test,
    save_grid,
)
from vlm_taid.report import report

TASK = "easy_vqa"


def evaluated(label: str, model: Path, data: Path, output: Path) -> None:
    """Answers all held-out questions, with their pictures and with others'; results that are newer are kept."""
    done = [file.stat().st_mtime for file in output.rglob("results_*.json")]
    if len(done) >= 2 and min(done) > max(file.stat().st_mtime for file in model.glob("*.safetensors")):
        print(f"{label}: {output} is used again")
        return
    loaded, processor = load(str(model))
    task = Task(TASK, SourceOptions(str(data), "vqa"), metric="exact_match", max_new_tokens=4)
    for shuffled in (False, True):
        print(f"{label}{', each question with another picture' if shuffled else ''}")
        results = evaluate(
            loaded, processor, [task], batch_size=256, num_workers=1, shuffle_images=shuffled, model_name=label
        )
        results.save(output)
        add_scores(model, results)


def blind(run: Path, output: Path) -> None:
    """The question-only baseline, saved like a model's results."""
    if any(output.rglob("results_*.json")):
        return
    rows = [
        [json.loads(line) for line in (run / "data" / name).read_text().splitlines()]
        for name in ("train.jsonl", "test.jsonl")
    ]
    blind_baseline(*rows, task=TASK).save(output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the quickstart's folder")
    run: Path = parser.parse_args().run
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    models = {"teacher": Path("data/quickstart/teacher"), "TAID student": run / "taid", "SFT student": run / "sft"}
    folders = {label: run / "evaluation" / path.name for label, path in models.items()}
    for label, path in models.items():
        evaluated(label, path, run / "data" / "test.jsonl", folders[label])
    folders["question alone"] = run / "evaluation" / "blind"
    blind(run, folders["question alone"])

    evaluations = [f"{label}={folder}" for label, folder in folders.items()]
    comparison = compare(evaluations, "teacher")
    samples = {label: comparison.plain[label][TASK].samples[TASK] for label in models}
    with_teacher = {label: agreements(samples[label], samples["teacher"]) for label in models}
    only_taid, only_sft = discordant(with_teacher["TAID student"], with_teacher["SFT student"])
    verdict = (
        f"On {only_taid} questions the TAID student alone gives the teacher's answer, on {only_sft} the SFT student "
        f"alone (exact McNemar test: p = {paired_test(only_taid, only_sft):.1e})."
    )
    console = Console()
    console.print(comparison.rich_table("easy-VQA, 9,673 held-out questions, percent (standard error)"))
    console.print(verdict)
    head, rows = comparison.table()
    lines = [head, ["---"] * len(head), *rows]
    (run / "summary.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{verdict}\n")
    save_grid(evaluations, run / "grid.png", reference="teacher")
    page = report(
        [run / "taid", run / "sft"],
        run / "report.html",
        evaluations,
        reference="teacher",
        models=[f"{label}={path}" for label, path in models.items()],
        title="Quickstart",
    )
    console.print(f"report: {page}", soft_wrap=True)


if __name__ == "__main__":
    main()
