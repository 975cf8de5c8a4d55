"""Our model inside lmms-eval, by its own command; skipped where lmms-eval is not installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from tests import squares
from vlm_taid.evaluation import run_command

pytest.importorskip("lmms_eval", reason="needs pip install 'vlm-taid[lmms-eval]'")

TASK = """task: NAME
dataset_path: parquet
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {max_new_tokens: 8, EXTRA}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def lmms_eval(folder, model, tasks, *more):
    """What its command prints; whatever goes wrong, it exits 0."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "vlm_taid", "--model_args", f"pretrained={model}"]
    command += ["--tasks", tasks, "--include_path", str(folder), "--batch_size", "5", "--log_samples"]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HOME": str(folder / "hub")}
    ran = subprocess.run(
        [*command, "--output_path", str(folder / "out"), *more], env=variables, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout + ran.stderr


def test_coloured_squares_score_one(tmp_path):
    model, data = squares.fitted(tmp_path / "squares")
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows = [row | {"image": str(Path(data).with_name(row["image"]))} for row in rows]
    wrong = [row | ({"answer": "purple"} if number == 5 else {}) for number, row in enumerate(rows)]
    for name, some, extra in (
        ("squares", rows, "do_sample: false, temperature: 0.7"),
        ("one_is_wrong", wrong, 'until: ["\\n\\n"]'),
        ("drawn", rows, "temperature: 0.7"),
    ):
        datasets.Dataset.from_list(some).cast_column("image", datasets.Image()).to_parquet(tmp_path / f"{name}.parquet")
        task = TASK.replace("NAME", name).replace("DATA", str(tmp_path / f"{name}.parquet")).replace("EXTRA", extra)
        (tmp_path / f"{name}.yaml").write_text(task)
    printed = lmms_eval(tmp_path, model, "squares,one_is_wrong")
    found = next((tmp_path / "out").rglob("*results.json"), None)
    assert found is not None, printed
    results = json.loads(found.read_text())["results"]
    assert results["squares"]["exact_match,none"] == 1.0
    assert results["one_is_wrong"]["exact_match,none"] == pytest.approx(11 / 12)
    (samples,) = (tmp_path / "out").rglob("*samples_squares.jsonl")
    theirs = [json.loads(line) for line in samples.read_text().splitlines()]
    ours = run_command(model, f"squares={data}", metric="exact_match", max_new_tokens=8, num_workers=0)
    by_id = {line["doc_id"]: line["filtered_resps"] for line in theirs}
    assert [by_id[line["doc_id"]] for line in ours.samples["squares"]] == [
        line["filtered_resps"][0] for line in ours.samples["squares"]
    ]
    printed = lmms_eval(tmp_path, model, "drawn")  # a failed run leaves no further results
    assert "task drawn: generation_kwargs: this asks for sampling" in printed
    assert len(list((tmp_path / "out").rglob("*results.json"))) == 1
