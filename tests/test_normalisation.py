"""The loss is a mean over the answer tokens of the whole optimizer step, whatever the batch shape, accumulation, ranks.

Rows are ragged; in the first step a rank's micro-batch has no image, in the second one has no answer token at all.
"""

import json
from pathlib import Path

import pytest

from tests import families, runs

FAMILIES = {"accepts_loss_kwargs": families.llava, "refuses_loss_kwargs": families.qwen2_5_vl}
SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 2, "train_sampling_strategy": "sequential"}


def ragged_rows(folder: Path) -> str:
    """Rows 2 and 3 without a picture, rows 4 and 5 without an answer (skipped)."""
    path = Path(families.vqa_rows(folder))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for i in (2, 3):
        del rows[i]["image"]
    for i in (4, 5):
        rows[i]["answer"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    build = FAMILIES[request.param]
    student, teacher = build(folder / "student", seed=1, width=16), build(folder / "teacher")
    data = ragged_rows(folder / "data")

    def recipe(name, **more):
        return runs.recipe_file(folder / f"{name}.yaml", student, teacher, data, **(SGD | more))

    reference = runs.here(recipe("one", per_device_train_batch_size=4))
    return recipe, reference, student


def check(run, reference, student):
    for ours, theirs in zip(
        runs.metrics(run, "loss", "t", "kl"), runs.metrics(reference, "loss", "t", "kl"), strict=True
    ):
        assert ours == pytest.approx(theirs, rel=1e-5)
    tokens = runs.metrics(run, "answer_tokens")
    assert tokens == runs.metrics(reference, "answer_tokens") and len(tokens) == 2
    assert runs.update_off(run, reference, student) < 1e-5


def test_models_differ_in_what_the_trainer_would_do(family):
    from transformers import LlavaForConditionalGeneration, Qwen2_5_VLForConditionalGeneration

    assert Qwen2_5_VLForConditionalGeneration.accepts_loss_kwargs is False
    assert getattr(LlavaForConditionalGeneration, "accepts_loss_kwargs", True) is True


def test_accumulation(family):
    recipe, reference, student = family
    run = runs.here(recipe("accumulated", per_device_train_batch_size=1, gradient_accumulation_steps=4))
    check(run, reference, student)


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_ranks(family, launcher):
    recipe, reference, student = family
    more = {"deepspeed": runs.deepspeed_config(2)} if launcher == "deepspeed" else {}
    run = runs.launched(recipe(launcher, per_device_train_batch_size=2, **more), launcher)
    check(run, reference, student)
    if launcher == "torchrun":  # every rank told what it holds: the same t and weights, bit for bit
        held = [[json.loads(line) for line in (run / f"rank{rank}.jsonl").read_text().splitlines()] for rank in (0, 1)]
        assert len(held[0]) == 2 and held[0] == held[1]
        assert held[0][1]["schedule"]["t"] > 0.2
