"""Packed rows do not see each other: a packed run is the padded one, in loss, gradients and t."""

import json
import random
from pathlib import Path

import pytest

from tests import families, runs
from vlm_taid.distillation import distill
from vlm_taid.errors import InputError
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.recipe import Recipe
from vlm_taid.streams import StreamEncoder, best_fit
from vlm_taid.teachers import prove_packing
from vlm_taid.teachers.live import hidden_at

NOT_PACKED = {
    "qwen3_5": "rows see each other",  # linear attention has a state that goes on from row to row
    "gemma3": "rows see each other",  # its masks are made of token types alone
    "paligemma": "rows see each other",
}


@pytest.mark.parametrize("family", families.FAMILIES)
def test_each_family_proves_itself(family):
    folder = families.made(family, **families.MORE_IMAGE_TOKENS.get(family, {}))
    model, encoder = load_model(ModelOptions(folder)), StreamEncoder(load_processor(folder))
    training = {name: module.training for name, module in model.train().named_modules()}
    if family in NOT_PACKED:
        with pytest.raises(InputError, match=f"{type(model).__name__}.*{NOT_PACKED[family]}.*data.packing: false"):
            prove_packing(model, encoder, hidden_at)
    else:
        prove_packing(model, encoder, hidden_at)
    assert {name: module.training for name, module in model.named_modules()} == training


def test_best_fit_leaves_little_room():
    draw = random.Random(0)
    sizes = [draw.randint(0, 700) for _ in range(500)] + [1500]
    packs = best_fit(sizes, 1000)
    assert sorted(row for pack in packs for row in pack) == list(range(501))
    assert all(sum(sizes[row] for row in pack) <= 1000 or pack == [500] for pack in packs)
    assert len(packs) <= 1.02 * sum(sizes) / 1000 + 1
    assert [pack[0] for pack in packs] == sorted(pack[0] for pack in packs)


def ragged(folder: Path) -> str:
    """Rows with a picture and without one, and one that is refused."""
    path = Path(families.vqa_rows(folder))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[2]["image"], rows[5]["image"]
    rows[4]["answer"] = ""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def texts(folder: Path) -> str:
    folder.mkdir()
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text * (1 + i % 3)}) + "\n" for i, text in enumerate(families.TEXTS)))
    return str(path)


PAIRS = {
    "text": ("llama3", "llama3", 120),
    "llava": ("llava", "llava", 120),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen2_5_vl", 160),
    "two streams": ("smolvlm", "qwen3_vl", 160),
}


@pytest.mark.parametrize("name", PAIRS)
def test_packed_is_padded(name, tmp_path, monkeypatch):
    student, teacher, length = PAIRS[name]
    tok = families.tokenizer()
    student = families.FAMILIES[student](tmp_path / "student", seed=1, width=16, tok=tok)
    teacher = families.FAMILIES[teacher](tmp_path / "teacher", tok=tok)
    data = texts(tmp_path / "data") if name == "text" else ragged(tmp_path / "data")
    more = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "train_sampling_strategy": "sequential"}
    more |= {"per_device_train_batch_size": 100}  # an epoch is a step, packed or not
    made = {}
    for kind in ("padded", "packed"):
        file = runs.recipe_file(tmp_path / f"{kind}.yaml", student, teacher, data, **more)
        overrides = ["--data.max_length", str(length), "--data.packing", "true" if kind == "packed" else "false"]
        if kind == "packed" and name in ("llava", "two streams"):
            overrides += ["--training.gradient_checkpointing", "true"]
        if name == "text":
            overrides += ["--data.train", json.dumps([{"path": data, "format": "text"}])]
        made[kind] = distill(Recipe.load(file, overrides))
    padded, packed = made["padded"], made["packed"]
    keys = ("loss", "kl", "t", "answer_tokens")
    logs = runs.metrics(packed, *keys), runs.metrics(padded, *keys)
    assert len(logs[0]) == 3 and logs[0][0] == pytest.approx(logs[1][0], rel=1e-5)
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert runs.update_off(packed, padded, student) < 1e-5
    refused = [json.loads((run / "trainer_state.json").read_text())["stateful_callbacks"] for run in (packed, padded)]
    assert (
        refused[0]["DistillationState"]["attributes"]["refused"]
        == (refused[1]["DistillationState"]["attributes"]["refused"])
    )
    assert list(packed.glob("lengths-*.npy"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_packed_under_zero_is_padded_in_one_process(stage, tmp_path):
    student = families.FAMILIES["llava"](tmp_path / "student", seed=1, width=16)
    teacher, data = families.FAMILIES["llava"](tmp_path / "teacher"), ragged(tmp_path / "data")
    more = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "train_sampling_strategy": "sequential"}
    reference = runs.here(
        runs.recipe_file(tmp_path / "padded.yaml", student, teacher, data, per_device_train_batch_size=8, **more)
    )
    more |= {"deepspeed": runs.deepspeed_config(stage), "gradient_checkpointing": True}
    file = runs.recipe_file(
        tmp_path / "packed.yaml", student, teacher, data, zero_stage=3 * (stage == 3), per_device_train_batch_size=2,
        **more,
    )  # fmt: skip
    Recipe.load(file, ["--data.packing", "true", "--data.max_length", "70"]).save(file)  # four packs
    run = runs.launched(file, "deepspeed")
    keys = ("loss", "kl", "t", "answer_tokens")
    logs = runs.metrics(run, *keys), runs.metrics(reference, *keys)
    assert len(logs[0]) == 3
    for ours, theirs in zip(*logs, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert runs.update_off(run, reference, student) < 1e-5


def test_a_family_that_does_not_pack_is_refused_by_name(tmp_path):
    student, teacher = families.llama(tmp_path / "student"), families.llama(tmp_path / "teacher", seed=1)
    picture = families.FAMILIES["gemma3"](tmp_path / "gemma3")
    data = families.vqa_rows(tmp_path / "data")
    packing = ["--data.packing", "true", "--data.max_length", "200"]
    file = runs.recipe_file(tmp_path / "run.yaml", picture, picture, data, max_steps=1)
    with pytest.raises(InputError, match="Gemma3ForConditionalGeneration cannot be packed"):
        distill(Recipe.load(file, packing))
    file = runs.recipe_file(tmp_path / "text.yaml", student, teacher, data, max_steps=1)
    for more, said in (
        ([], "needs data.max_length"),
        ([*packing[2:], "--training.train_sampling_strategy", "group_by_length"], "leaves no padding"),
        ([*packing[2:], "--rollout", "{policy: gkd}"], "row by row"),
    ):
        with pytest.raises(InputError, match=said):
            Recipe.load(file, [*packing[:2], *more])
