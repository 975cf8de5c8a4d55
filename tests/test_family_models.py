"""Every family's model on the streams: causal, one row like many, its head proven, a training step's gradients."""

import math

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from tests import families, runs
from tests.families import FAMILIES, MORE_IMAGE_TOKENS, TEXT_ONLY
from tests.streams.test_families import TALL, WIDE, conversation
from vlm_taid.objectives import Head, Objective, linear_distillation
from vlm_taid.pretrained import ModelOptions, load_model, load_processor, vision_towers
from vlm_taid.streams import PairedCollator, StreamEncoder
from vlm_taid.teachers.live import hidden_at

ROWS = [
    conversation([WIDE, "what?"], "a red circle"),
    conversation("is it blue?", "no"),
    conversation([WIDE, TALL, "which one is it?"], "the tall one"),
    conversation([TALL, "what is it?"], "red"),
]


def loaded(family, **options):
    folder = families.made(family, **options)
    return load_model(ModelOptions(folder)).eval(), StreamEncoder(load_processor(folder))


def rows_for(encoder):
    return ROWS if encoder.takes_images else [conversation(row.turns[0].text, row.turns[1].text) for row in ROWS]


def moved_before(model, inputs, last):
    """How far the logits of row 0 before position ``last`` move when the token there changes, and those from it on."""
    changed = {key: value.clone() for key, value in inputs.items()}
    changed["input_ids"][0, last] += 1
    with torch.no_grad():
        moved = (model(**inputs).logits[0] - model(**changed).logits[0]).abs().amax(-1)
    return float(moved[:last].max()), float(moved[last])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_position_sees_its_own_answer(family):
    """Changing the last answer token moves no earlier logit."""
    model, encoder = loaded(family)
    batch = encoder.encode_batch(rows_for(encoder)[:1])
    before, after = moved_before(model, batch.inputs, batch.streams[0].answers[0].tokens[-1])
    assert before == 0.0 and after > 0.0


def test_paligemma_without_its_suffix_leaks_the_answer():
    """The test above sees it: an answer in the prefix, which sees itself whole."""
    model, encoder = loaded("paligemma")
    batch = encoder.encode_batch(ROWS[:1])
    last = batch.streams[0].answers[0].tokens[-1]
    types_BT = batch.inputs["token_type_ids"]
    assert types_BT[0].tolist() == [int(i >= batch.streams[0].answers[0].tokens[0]) for i in range(types_BT.shape[1])]
    assert moved_before(model, batch.inputs | {"token_type_ids": torch.zeros_like(types_BT)}, last)[0] > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_gives_each_rows_own_logits(family):
    """Rows with one image, several and none, of different shapes: padded together they change nothing."""
    options = MORE_IMAGE_TOKENS.get(family, {})
    model, encoder = loaded(family, **options)
    rows = rows_for(encoder)
    batch = encoder.encode_batch(rows)
    with torch.no_grad():
        logits_BTV = model(**batch.inputs).logits
        for row, stream, logits_TV in zip(rows, batch.streams, logits_BTV, strict=True):
            own_TV = model(**encoder.encode_batch([row]).inputs).logits[0]
            assert torch.equal(stream.input_ids_T, encoder.encode(row).input_ids_T)
            assert (logits_TV[: len(own_TV)] - own_TV).abs().max() < 1e-4 * own_TV.abs().max()


SIZES = [(1, 1), (1, 2), (20000, 10), (10, 20000)]
TOO_LONG = {family: "absolute aspect ratio" for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")}
TOO_LONG |= dict.fromkeys(["pixtral", "mistral3"], "Size must contain")  # a side of 0 pixels after the resizing


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in TEXT_ONLY])
def test_images_of_extreme_shapes(family):
    """They are read, or refused with their size and the row that holds them; their neighbours are not."""
    model, encoder = loaded(family, **MORE_IMAGE_TOKENS[family])
    for width, height in SIZES:
        odd = conversation([Image.new("RGB", (width, height), (20, 200, 20)), "what?"], "red", row="rows.jsonl:5")
        batch = encoder.encode_batch([ROWS[0], odd])
        if family in TOO_LONG and max(width, height) == 20000:
            assert batch.refused.keys() == {1}
            message = str(batch.refused[1])
            assert message.startswith("rows.jsonl:5: the processor refuses it: ")
            assert TOO_LONG[family] in message and f"images, in pixels: {width} x {height}" in message
        else:
            with torch.no_grad():
                assert not batch.refused and model(**batch.inputs).logits.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_head_gives_the_models_logits(family):
    model, encoder = loaded(family)
    inputs, head = encoder.encode_batch(rows_for(encoder)).inputs, Head.of(model)
    with torch.no_grad():
        own_BTV, hidden_BTH = model(**inputs).logits, model.base_model(**inputs).last_hidden_state
        assert (head(hidden_BTH.flatten(0, 1)) - own_BTV.flatten(0, 1)).abs().max() < 1e-5 * own_BTV.abs().max()


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step(family):
    """The loss of the trainer's path is the cross-entropy of the model's own logits at the answers, in fp64 sums, and
    so is every parameter's gradient."""
    model, encoder = loaded(family)
    model.train()
    for tower in vision_towers(model):
        tower.eval()
    batch = PairedCollator(encoder)(rows_for(encoder))
    labels_N = batch["labels_N"]
    hidden_NH = hidden_at(model, batch["student"], batch["student_rows_N"])
    loss = linear_distillation(hidden_NH, Head.of(model), None, Objective.named("sft"), labels_N=labels_N).loss_N.sum()
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    logits_NV = model(**batch["student"]).logits.flatten(0, 1)[batch["student_rows_N"]]
    reference = F.cross_entropy(logits_NV.double(), labels_N, reduction="sum")
    reference.backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert abs(loss.item() - reference.item()) < 1e-5 * reference.item()
    assert found.keys() == wanted.keys()
    size = max(float(gradient.abs().max()) for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert gradient is not None and (found[name] - gradient).abs().max() < 1e-4 * size, name
    learned = {name for name, gradient in found.items() if gradient.abs().max() > 0}
    assert any("embed_tokens" in name for name in learned)
    if family not in TEXT_ONLY:  # the images reach the answers: every tower learns, and what joins it to the decoder
        for tower in vision_towers(model):
            inside = {id(p) for p in tower.parameters()}
            assert any(id(p) in inside for name, p in model.named_parameters() if name in learned)
        joins = ("projector", "connector", "merger", "multi_modal")
        assert any(part in name for name in learned for part in joins), learned


@pytest.mark.parametrize("family", FAMILIES)
def test_distilled_by_the_command(family, tmp_path):
    """Two steps of TAID from a teacher that sees more image tokens; what is saved loads, and has learned."""
    data = families.vqa_rows(tmp_path / "data", rows=4, images=family not in TEXT_ONLY)
    student, teacher = families.made(family), families.made(family, seed=1, **MORE_IMAGE_TOKENS.get(family, {}))
    recipe = runs.recipe_file(tmp_path / "run.yaml", student, teacher, data, max_steps=2, per_device_train_batch_size=2)
    output = runs.here(recipe)
    losses = [loss for (loss,) in runs.metrics(output, "loss")]
    assert len(losses) == 2 and all(math.isfinite(loss) and loss > 1e-2 for loss in losses)
    before, after = (load_model(ModelOptions(str(path))).state_dict() for path in (student, output))
    assert any(not torch.equal(before[name], tensor) for name, tensor in after.items() if "embed_tokens" in name)
    assert StreamEncoder(load_processor(output)).end_of_turn_id == StreamEncoder(load_processor(student)).end_of_turn_id
