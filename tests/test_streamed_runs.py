"""Streamed, packed and accumulated runs: killed or stopped at any moment they end as if they had not been."""

import json
import os
import random
import signal

import pytest
import torch

from tests import families, runs
from vlm_taid.checkpoints import newest_whole
from vlm_taid.errors import InputError
from vlm_taid.recipe import Recipe
from vlm_taid.trainer import DistillationTrainer

STATE = ("step", "loss", "t", "momentum", "epoch", "answer_tokens")
MORE = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Two sources by weight, in shards; a student with dropout, so that the random state counts."""
    folder = tmp_path_factory.mktemp("streamed")
    student = families.llama(folder / "student", seed=1, width=16, attention_dropout=0.2)
    teacher = families.llama(folder / "teacher")
    for name in ("many", "few"):
        for shard in range(3):
            rows = 20 if name == "many" else 7
            families.vqa_rows(folder / name, rows=rows, images=False, name=f"{shard}.jsonl")

    def made(name, **more):
        path = runs.recipe_file(folder / f"{name}.yaml", student, teacher, "unused", **(MORE | more))
        sources = [{"path": str(folder / "many"), "weight": 2}, {"path": str(folder / "few"), "weight": 1}]
        train = [source | {"format": "vqa"} for source in sources]
        loaded = Recipe.load(
            path,
            ["--data.train", json.dumps(train), "--data.streaming", "true", "--data.packing", "true",
             "--data.max_length", "100"],
        )  # fmt: skip
        loaded.save(path)
        return path

    return made


def equal(run, reference):
    ours, theirs = runs.weights(run), runs.weights(reference)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert runs.metrics(run, *STATE) == runs.metrics(reference, *STATE)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_goes_on_at_the_exact_row(recipe, workers):
    more = {"max_steps": 15, "dataloader_num_workers": workers, "save_total_limit": 10}
    whole = runs.here(recipe(f"whole{workers}", **more))
    theirs = runs.weights(whole)
    for at in (4, 12):
        again = runs.here(recipe(f"from{workers}_{at}", **more, resume=str(whole / f"checkpoint-{at}")))
        ours = runs.weights(again)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
        assert runs.metrics(again, *STATE) == runs.metrics(whole, *STATE)[at:]
    with pytest.raises(InputError, match="data workers"):
        changed = more | {"dataloader_num_workers": 3, "resume": str(whole / "checkpoint-4")}
        runs.here(recipe(f"other{workers}", **changed))


def test_sigterm_saves_at_the_exact_row(recipe, monkeypatch, capsys):
    more = {"max_steps": 9, "dataloader_num_workers": 1}
    reference, stopped = runs.here(recipe("not_stopped", **more)), recipe("stopped", **more)
    ends, handler = DistillationTrainer.end_of_step, signal.getsignal(signal.SIGTERM)

    def signalled(trainer):
        ends(trainer)
        if trainer.state.global_step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(DistillationTrainer, "end_of_step", signalled)
    try:
        run = runs.here(stopped)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert "stopped by SIGTERM after step 6: run the same command to go on" in capsys.readouterr().out
    assert newest_whole(run) == run / "checkpoint-6" and not (run / "complete.json").exists()
    monkeypatch.undo()
    equal(runs.here(stopped), reference)


@pytest.mark.slow
def test_killed_on_two_ranks(recipe):
    more = {"max_steps": 24, "dataloader_num_workers": 1}
    reference = runs.launched(recipe("whole", **more), "torchrun")
    killed = recipe("killed", **more)
    run, step = runs.output_of(killed), random.SystemRandom().randint(5, 19)
    reached = lambda: (run / "metrics.jsonl").is_file() and len(runs.metrics(run, "loss")) >= step  # noqa: E731
    runs.launched(killed, "torchrun", kill_when=reached)
    assert not (run / "complete.json").exists() and newest_whole(run) is not None
    runs.launched(killed, "torchrun")
    equal(run, reference)


def test_what_does_not_go_with_a_stream_is_said(recipe):
    path = recipe("refused", max_steps=2)
    for more, said in (
        (["--training.max_steps", "-1"], "set training.max_steps"),
        (
            ["--data.packing", "false", "--training.train_sampling_strategy", "group_by_length"],
            "reads rows",
        ),
        (["--teacher.cache", "somewhere"], "teacher.cache"),
    ):
        with pytest.raises(InputError, match=said):
            Recipe.load(path, more)
