"""Student and teacher each under their own ZeRO stage: the same weights and evaluation losses as one process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests import families, runs
from vlm_taid.pretrained import ModelOptions, load_model, load_processor

STEPS = {
    "max_steps": 5,
    "optim": "sgd",
    "learning_rate": 0.5,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "per_device_eval_batch_size": 2,
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tied LLaVA student with padded rows, a wider teacher, seven rows held out (an odd number for two ranks)."""
    folder = tmp_path_factory.mktemp("stages")
    student = families.llava(folder / "student", seed=1, width=16, pad=6, tie=True)
    teacher = families.llava(folder / "teacher", layers=3)
    data = families.vqa_rows(folder / "data", rows=16)
    held_out = families.vqa_rows(folder / "held_out", rows=7)

    def recipe(name, **more):
        path = runs.recipe_file(folder / f"{name}.yaml", student, teacher, data, **(STEPS | more))
        content = yaml.safe_load(path.read_text())
        content["data"]["validation"] = [{"path": held_out, "format": "vqa"}]
        path.write_text(yaml.safe_dump(content))
        return path

    return recipe, runs.here(recipe("one", per_device_train_batch_size=4)), student


@pytest.mark.parametrize("student_stage, teacher_stage", [(2, 0), (2, 3), (3, 0), (3, 3)])
def test_stages_equal_one_process(pair, student_stage, teacher_stage):
    recipe, reference, student = pair
    save = {"save_strategy": "steps", "save_steps": 5} if student_stage == 3 else {}
    path = recipe(
        f"z{student_stage}{teacher_stage}", per_device_train_batch_size=2, zero_stage=teacher_stage,
        deepspeed=runs.deepspeed_config(student_stage), **save,
    )  # fmt: skip
    run = runs.launched(path, "deepspeed")
    ours, theirs = (runs.metrics(r, "eval_loss", "eval_cross_entropy", "eval_answer_tokens") for r in (run, reference))
    assert len(ours) == len(theirs) == 3
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(expected, rel=1e-4)
    assert runs.update_off(run, reference, student) < 1e-4
    if student_stage == 3:
        converted_weights_are_the_saved_ones(run)


@pytest.mark.parametrize("launcher, stage", [(None, 0), ("deepspeed", 1), ("torchrun", 3)])
def test_the_best_checkpoint_is_kept_and_is_the_result(pair, launcher, stage):
    """The loss falls, so with greater_is_better the best model is the first one that was evaluated."""
    recipe, reference, _ = pair
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    saved = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    more = {"per_device_train_batch_size": 2, "deepspeed": runs.deepspeed_config(stage), "zero_stage": 3 * (stage == 3)}
    path = recipe(f"best{stage}", **best, **saved, **more if launcher else {"per_device_train_batch_size": 4})
    run = runs.launched(path, launcher) if launcher else runs.here(path)
    ours, theirs = (runs.metrics(r, "eval_loss") for r in (run, reference))
    assert ours[0] > ours[1] and ours[:2] == [pytest.approx(expected, rel=1e-4) for expected in theirs[:2]]
    assert (run / "checkpoint-2" / "complete.json").is_file()
    chosen, result = runs.loaded(run / "checkpoint-2"), runs.loaded(run)
    assert all(torch.equal(chosen[key], value) for key, value in result.items())


def test_two_ranks_hold_half_of_what_one_holds(pair):
    """Measured on both models, at the end of a step of one rank's run and of two ranks'."""
    recipe, _, _ = pair
    more = {"deepspeed": runs.deepspeed_config(3), "zero_stage": 3, "max_steps": 1, "eval_strategy": "no"}
    held = []
    for ranks in (1, 2):
        run = runs.launched(recipe(f"held{ranks}", per_device_train_batch_size=2, **more), "torchrun", ranks=ranks)
        lines = [(run / f"rank{rank}.jsonl").read_text().splitlines()[-1] for rank in range(ranks)]
        held.append([json.loads(line)["held"] for line in lines])
    (one,), two = held
    assert len(one) == 2 and min(one) > 10_000
    for rank in two:
        assert rank == [pytest.approx(whole / 2, rel=0.1) for whole in one]


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_sharded_teacher_is_held_in_its_own_precision(pair, tmp_path, dtype):
    recipe, _, student = pair
    teacher = load_model(ModelOptions(student, dtype="bfloat16"))
    teacher.save_pretrained(tmp_path / "teacher")
    load_processor(student).save_pretrained(tmp_path / "teacher")
    more = {"deepspeed": runs.deepspeed_config(3), "zero_stage": 3, "max_steps": 1, "eval_strategy": "no"}
    path = recipe(f"held_{dtype}", per_device_train_batch_size=2, **more)
    content = yaml.safe_load(path.read_text())
    content["teacher"] |= {"path": str(tmp_path / "teacher"), "dtype": dtype}
    path.write_text(yaml.safe_dump(content))
    line = (runs.launched(path, "torchrun", ranks=1) / "rank0.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["held"][1] == pytest.approx(2 * teacher.num_parameters(), rel=0.01)


def converted_weights_are_the_saved_ones(run: Path):
    """zero_to_fp32.py, which DeepSpeed leaves in a checkpoint, gives the weights that we saved.

    Its own --safe_serialization refuses tied weights, so its default format is read, by tensors alone.
    """
    checkpoint, output = run / "checkpoint-5", run / "fp32"
    script = [sys.executable, checkpoint / "zero_to_fp32.py", checkpoint, output]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    converted, saved = torch.load(output / "pytorch_model.bin", weights_only=True), runs.loaded(run)
    assert converted.keys() == saved.keys()
    for key, value in converted.items():
        assert torch.equal(saved[key], value), key
