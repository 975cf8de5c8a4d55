"""Scores during training: they are the saved model's, and training does not notice them."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from tests import runs, squares
from vlm_taid.cli import main
from vlm_taid.data import SourceOptions
from vlm_taid.errors import InputError
from vlm_taid.evaluation import Task, evaluate, load
from vlm_taid.recipe import Recipe

KEY = "eval_squares_exact_match"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model that answers 11 of the 12 rows right, for one row's answer is wrong."""
    model, data = squares.fitted(tmp_path_factory.mktemp("squares"))
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    rows[5]["answer"] = "purple"
    other = Path(data).with_name("one_is_wrong.jsonl")
    other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, data, str(other)


def recipe(path, fitted, evaluation, **training):
    file = runs.recipe_file(path, fitted[0], None, fitted[1], name="sft", **{"max_steps": 4, **training})
    content = yaml.safe_load(file.read_text())
    content["student"]["tower_mode"] = "train"
    if evaluation is not None:
        content["evaluation"] = {"data": {"squares": fitted[2]}, "metric": "exact_match", **evaluation}
    file.write_text(yaml.safe_dump(content))
    return file


def test_training_is_the_same_bit_for_bit_and_the_last_score_is_the_saved_model_s(fitted, tmp_path, capsys):
    """With dropout in the tower, so that a draw too many would show."""
    dropped = tmp_path / "student"
    model, processor = load(fitted[0])
    model.config.vision_config.attention_dropout = 0.5
    model.save_pretrained(dropped)
    processor.save_pretrained(dropped)
    fitted = (str(dropped), *fitted[1:])
    without = runs.here(recipe(tmp_path / "without.yaml", fitted, None))
    file = recipe(tmp_path / "with.yaml", fitted, {"every": 3, "batch_size": 5})
    run = runs.here(file)
    assert all(torch.equal(value, runs.weights(without)[name]) for name, value in runs.weights(run).items())
    assert runs.metrics(run, "loss") == runs.metrics(without, "loss")
    found = runs.metrics(run, "step", KEY, f"{KEY}_stderr")
    assert [step for step, *_ in found] == [3, 4]
    task = Task("squares", SourceOptions(fitted[2], "vqa"), metric="exact_match")
    saved = evaluate(*load(str(run)), [task], num_workers=0, progress=False).score("squares")
    assert found[-1][1:] == (saved.value, saved.stderr)
    assert runs.metrics(run, "step", "loss") and not runs.metrics(without, KEY)
    # other questions do not make it another run
    assert main(["distill", "--config", str(file), "--evaluation.every", "1"]) == 0
    assert "is complete" in capsys.readouterr().out


@pytest.mark.slow
def test_two_ranks_under_zero_3_give_one_rank_s_score(fitted, tmp_path):
    small = {"learning_rate": 1e-9, "max_steps": 2}
    (one,) = runs.metrics(runs.here(recipe(tmp_path / "one.yaml", fitted, {"every": 5}, **small)), KEY)
    assert one == (pytest.approx(11 / 12),)
    config = runs.deepspeed_config(3)
    file = recipe(tmp_path / "two.yaml", fitted, {"every": 5}, deepspeed=config, **small)
    assert runs.metrics(runs.launched(file, "deepspeed"), KEY) == [one]


def test_what_cannot_be_evaluated_is_named(fitted, tmp_path, capsys):
    broken = Path(fitted[1]).with_name("broken.jsonl")
    broken.write_text(Path(fitted[1]).read_text().replace("square7.png", "gone.png"))
    file = recipe(tmp_path / "broken.yaml", fitted, {"data": {"squares": str(broken)}, "every": 2})
    assert main(["distill", "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert "squares, row 8" in message and "gone.png" in message
    gone = recipe(tmp_path / "gone.yaml", fitted, {"data": {"squares": "gone.jsonl"}, "every": 2})
    assert main(["distill", "--config", str(gone)]) == 2
    captured = capsys.readouterr()
    assert "gone.jsonl" in captured.err and "'loss'" not in captured.out + captured.err  # before the first step
    for evaluation, training, expected in (
        ({"every": 0}, {}, "evaluation.every is 0"),
        ({"data": {}}, {}, "evaluation.data is empty"),
        ({"metric": "rogue"}, {}, "rogue"),
        ({}, {"fsdp": "full_shard"}, "under FSDP"),
    ):
        with pytest.raises(InputError, match=expected):
            Recipe.load(recipe(tmp_path / "bad.yaml", fitted, evaluation, **training))
