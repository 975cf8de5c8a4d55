"""Held-out rows on two ranks, streamed, packed and accumulated: the loss, the best checkpoint, a truncated last one."""

import json
from pathlib import Path

import pytest
import torch

from tests import families, runs
from vlm_taid.checkpoints import newest_whole
from vlm_taid.distillation import build_trainer
from vlm_taid.recipe import Recipe

STATE = ("step", "loss", "t", "momentum", "epoch", "answer_tokens")
HELD_OUT = ("eval_loss", "eval_cross_entropy", "eval_answer_tokens", "eval_top1_agreement")
STEPS = 12
TRAINING = {
    "max_steps": STEPS, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "dataloader_num_workers": 1,
    "eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2,
    "save_strategy": "steps", "save_steps": 2, "save_total_limit": 3,
    # the loss falls: so the best checkpoint is an early one, which is kept and loaded
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    "optim": "adamw_torch",
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """Rows in shards; seven rows held out, an odd number for two ranks; a student with dropout."""
    folder = tmp_path_factory.mktemp("held_out")
    student = families.llama(folder / "student", seed=1, width=16, attention_dropout=0.2)
    teacher = families.llama(folder / "teacher")
    for shard in range(4):
        families.vqa_rows(folder / "rows", rows=30, images=False, name=f"{shard}.jsonl")
    held_out = families.vqa_rows(folder / "held_out", rows=7, images=False)

    def made(name, **more):
        path = runs.recipe_file(folder / f"{name}.yaml", student, teacher, str(folder / "rows"), **(TRAINING | more))
        validation = json.dumps([{"path": held_out, "format": "vqa"}])
        data = ["--data.validation", validation, "--data.streaming", "true", "--data.packing", "true"]
        Recipe.load(path, [*data, "--data.max_length", "100"]).save(path)
        return path

    return made


def evaluated_here(recipe: Path, checkpoint: Path) -> dict[str, float]:
    """The held-out values of saved weights, by one process."""
    loaded = Recipe.load(recipe, ["--student.path", str(checkpoint)])
    return build_trainer(loaded, loaded.arguments()).evaluate()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["ddp", "zero1", "zero2", "zero3", "fsdp2"])
def test_the_best_is_kept_and_a_truncated_last_checkpoint_is_passed_over(recipe, setting, tmp_path):
    launcher, wrapper = runs.SETTINGS[setting]
    run = runs.launched(recipe(f"whole_{setting}", **wrapper), launcher)
    assert (run / f"checkpoint-{STEPS}" / "pytorch_model_fsdp.bin").exists() == (setting == "fsdp2")
    losses = dict(runs.metrics(run, "step", "eval_loss"))
    best = max(losses, key=lambda step: losses[step])
    assert list(losses) == list(range(2, STEPS + 1, 2)) and best < STEPS - 2
    kept = {best, STEPS - 2, STEPS}
    assert {path.name for path in run.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in kept}

    alone = recipe(f"alone_{setting}", output_dir=str(tmp_path / "alone"))
    lines = {line[0]: line[1:] for line in runs.metrics(run, "step", *HELD_OUT)}
    for step in kept:
        found = evaluated_here(alone, run / f"checkpoint-{step}")
        assert lines[step] == pytest.approx([found[name] for name in HELD_OUT], rel=1e-5), step
    result, chosen = runs.loaded(run), runs.loaded(run / f"checkpoint-{best}")
    assert all(torch.equal(chosen[name], value) for name, value in result.items())

    broken = recipe(f"truncated_{setting}", **wrapper)
    again = runs.output_of(broken)
    reached = lambda: (again / "checkpoint-8").is_dir()  # noqa: E731
    runs.launched(broken, launcher, kill_when=reached)
    last = newest_whole(again)
    assert last is not None and not (again / "complete.json").exists()
    largest = max((path for path in last.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    before = newest_whole(again, lambda message: None)
    assert before is not None and before != last
    runs.launched(broken, launcher)
    said = broken.with_suffix(".log").read_text()
    assert f"{last} is not whole ({largest.relative_to(last)} has" in said and "from the checkpoint before it" in said
    for names in (STATE, ("step", *HELD_OUT)):
        assert runs.metrics(again, *names) == runs.metrics(run, *names)
    for folder in ("", f"checkpoint-{STEPS}", f"checkpoint-{best}"):
        ours, theirs = runs.weights(again / folder), runs.weights(run / folder)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs), folder
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (again, run)]
    assert [Path(state["best_model_checkpoint"]).name for state in states] == [f"checkpoint-{best}"] * 2
