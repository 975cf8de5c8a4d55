"""A model that was fitted to coloured squares answers every question about them through the command."""

import json
from pathlib import Path

import pytest

from tests import squares
from vlm_taid.cli import main
from vlm_taid.evaluation import Results


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return squares.fitted(tmp_path_factory.mktemp("squares"))


def test_every_answer_is_right_and_needs_the_picture(fitted, tmp_path, capfd):
    model, data = fitted
    command = ["eval", "run", "--model", model, "--data", f"squares={data}", "--metric", "exact_match"]
    command += ["--num_workers", "0", "--output_path"]
    assert main([*command, str(tmp_path / "own")]) == 0
    results = Results.load(tmp_path / "own")
    assert results.score("squares").value == 1.0 and results.score("squares").count == 12
    assert main([*command, str(tmp_path / "wrong"), "--shuffle_images", "true"]) == 0
    assert Results.load(tmp_path / "wrong").score("squares").value < 0.75


def test_scores_can_fail(fitted, tmp_path):
    model, data = fitted
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows[3]["answer"] = "purple"
    other = data.replace("squares.jsonl", "one_is_wrong.jsonl")
    Path(other).write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["eval", "run", "--model", model, "--data", f"squares={other}", "--metric", "exact_match"]
    assert main([*command, "--num_workers", "0", "--output_path", str(tmp_path)]) == 0
    assert Results.load(tmp_path).score("squares").value == pytest.approx(11 / 12)
