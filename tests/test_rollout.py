"""Answers that the student samples: who decides, what is sampled, what falls back, and what a resumed run keeps."""

import json
import shutil

import pytest
import torch
import yaml
from PIL import Image

from tests import families, runs
from vlm_taid.data import Conversation, Part, Turn
from vlm_taid.distillation import build_trainer
from vlm_taid.errors import InputError
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.recipe import Recipe
from vlm_taid.rollout import Rollout, RolloutOptions
from vlm_taid.streams import PairedCollator, StreamEncoder

FIXED = {"train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.5, "max_steps": 3}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rollout")
    student, teacher = families.llava(folder / "student", seed=1, width=16), families.llava(folder / "teacher")
    model = load_model(ModelOptions(student))
    model.lm_head.weight.data[4:260] *= 0.05  # samples are words, not broken characters
    model.save_pretrained(student)
    data = families.vqa_rows(folder / "data", rows=16)
    held_out = families.vqa_rows(folder / "held_out", rows=4)

    def recipe(file, rollout, **more):
        path = runs.recipe_file(folder / f"{file}.yaml", student, teacher, data, **(FIXED | more))
        content = yaml.safe_load(path.read_text()) | {"rollout": rollout}
        content["data"]["validation"] = [{"path": held_out, "format": "vqa"}]
        path.write_text(yaml.safe_dump(content))
        return path

    return recipe, student


class Rows(list):
    """A dataset of rows that know their places."""

    def __init__(self, rows):
        super().__init__(Conversation(tuple(turns), row=f"row {i}", index=i) for i, turns in enumerate(rows))


def asked(question, answer, image=None):
    picture = () if image is None else (Part(image=image),)
    return Turn("user", (*picture, Part(question))), Turn("assistant", (Part(answer),))


def rollout_of(student, rows, **options):
    encoder = StreamEncoder(load_processor(student))
    rollout = Rollout(RolloutOptions(**options), rows, PairedCollator(encoder), seed=3)
    return rollout, rollout.collator, load_model(ModelOptions(student))


def sources(rollout, steps=400):
    return [rollout.source(step, steps, 0) for step in range(steps)]


def test_gkd_samples_for_its_share_of_the_micro_batches(pair):
    rollout, _, _ = rollout_of(pair[1], [], probability=0.5)
    other = Rollout(rollout.options, [], rollout.collator, seed=3, rank=7)
    assert sources(rollout) == sources(other) and 0.42 < sources(rollout).count("student") / 400 < 0.58
    assert sources(rollout) != sources(Rollout(rollout.options, [], rollout.collator, seed=4))
    assert len({rollout.source(0, 400, micro_batch) for micro_batch in range(20)}) == 2


def test_distillm_threshold_follows_the_validation_loss(pair):
    rollout, _, _ = rollout_of(pair[1], [], policy="distillm")
    assert set(sources(rollout)) == {"data"}
    for loss in (3.0, 2.0, 1.9, 1.95):
        rollout.validated(loss)
    assert rollout.threshold == pytest.approx(0.1)
    for loss in range(2, 20):  # the published code ends in a TypeError at its cap
        rollout.validated(float(loss))
    assert rollout.threshold == 1.0
    assert set(sources(rollout)) == {"student"}  # until the buffer is full every sample is a new one
    rollout.asked = 1000
    found = sources(rollout)
    assert "data" not in found
    assert found[:100].count("student") > 70 and found[300:].count("student") < 30  # ever more from the buffer
    rollout.threshold = 0.4
    assert 0.52 < sources(rollout).count("data") / 400 < 0.68


def test_sample_is_what_generate_gives_after_the_chat_template(pair):
    image = Image.new("RGB", (48, 40), (220, 30, 30))
    rows = Rows([asked("is there a red circle?", "no", image), (*asked("what?", "yes", image), *asked("again?", "no"))])
    rollout, collator, model = rollout_of(pair[1], rows, temperature=0.0, max_new_tokens=5, probability=1.0)
    processor = collator.student.processor
    batch = rollout.batch(collator(rows), model, model, step=0, num_steps=1, micro_batch=0)
    expected = []
    for row in rows:
        messages = row.messages()[:-1]
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=row.images, return_tensors="pt", add_special_tokens=False)
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    assert all(expected) and rollout.take_counts() == (2, 0)
    ids = batch["student"]["input_ids"].flatten()[batch["student_rows_N"] + 1]
    assert torch.equal(ids, batch["labels_N"])
    tokenizer, end = processor.tokenizer, processor.tokenizer.eos_token
    found = tokenizer.decode(batch["labels_N"])
    assert found == f"{expected[0]}{end}yes{end}{expected[1]}{end}"  # the earlier answer stays the data's
    assert model.training is False and batch["refused"] == []


def test_sample_that_is_no_answer_falls_back_to_the_data(pair):
    rows = Rows([asked("is there a red circle?", "no"), asked("what?", "a red circle")])
    rollout, collator, model = rollout_of(pair[1], rows, temperature=0.0, max_new_tokens=4, probability=1.0)
    data = collator(rows)
    model.lm_head.weight.data.zero_()
    end = collator.student.end_of_turn_id
    for token, expected in ((end, 2), (collator.student.tokenizer.convert_tokens_to_ids("<image>"), 2)):
        model.model.language_model.norm.register_forward_hook(lambda module, args, output: torch.ones_like(output))
        model.lm_head.weight.data[token] += 1.0 + token / 100
        batch = rollout.batch(data, model, model, step=0, num_steps=1, micro_batch=0)
        assert torch.equal(batch["labels_N"], data["labels_N"]) and rollout.take_counts() == (2, expected)


def test_sampling_leaves_the_random_state_alone_and_repeats_itself(pair):
    rows = Rows([asked(f"what is {i}?", "no") for i in range(4)])
    rollout, collator, model = rollout_of(pair[1], rows, max_new_tokens=6, probability=1.0)
    before = torch.get_rng_state()
    one, again, other = (
        rollout.batch(collator(rows), model, model, step=step, num_steps=9, micro_batch=0) for step in (0, 0, 1)
    )
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(one["labels_N"], again["labels_N"])
    assert other["labels_N"].tolist() != one["labels_N"].tolist()


def test_killed_distillm_run_ends_as_if_it_had_not_been(pair):
    """Buffer, threshold and samples: weights and logs are equal bit for bit."""
    options = {"policy": "distillm", "threshold": 0.6, "max_new_tokens": 4, "buffer_rows": 6}
    more = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    more |= {"per_device_train_batch_size": 2, "learning_rate": 40.0}  # too high: the loss rises
    recipe = pair[0]("distillm", options, **more)
    run = runs.here(recipe)
    reference = run.with_name("reference")
    shutil.copytree(run, reference)
    shutil.rmtree(run / "checkpoint-12")
    (run / "complete.json").unlink()
    assert json.loads((run / "checkpoint-6" / "replay_buffer_0.json").read_text())
    runs.here(recipe)
    assert all(torch.equal(runs.weights(run)[key], value) for key, value in runs.weights(reference).items())
    keys = ("step", "loss", "t", "sampled_rows", "sample_fallbacks", "rollout_threshold")
    found = runs.metrics(run, *keys)
    assert found == runs.metrics(reference, *keys) and len(found) == 12
    assert found[-1][-1] > 0.6 and {line[3] for line in found} == {0, 2}  # the threshold rose; both sources were used
    assert sum(line[3] for line in found) > sum(line[4] for line in found) > 0
    buffers = [
        json.loads((folder / "checkpoint-12" / "replay_buffer_0.json").read_text()) for folder in (run, reference)
    ]
    assert buffers[0] == buffers[1] and 0 < len(buffers[0]) <= 6


def test_options_that_cannot_work_are_refused(pair):
    for options, message in (
        ({"policy": "distillm"}, "eval_strategy"),
        ({"probability": 1.5}, "probability is 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ):
        with pytest.raises(InputError, match=message):
            Recipe.load(pair[0]("refused", options))
    with pytest.raises(InputError, match="train on labels, and a sample is none"):
        Recipe.load(pair[0]("refused", {}, name="sft"))
    recipe = Recipe.load(pair[0]("read", {"probability": 0.3}), ["--rollout.temperature", "0.7"])
    assert recipe.to_dict()["rollout"]["temperature"] == 0.7 and recipe.to_dict()["rollout"]["probability"] == 0.3
    assert build_trainer(recipe, recipe.arguments()).rollout is not None


@pytest.mark.parametrize(
    "setting",
    ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero2", "fsdp2"))],
)
def test_two_ranks_sample_as_one_process_does(pair, setting):
    """Greedy samples: generation gathers a sharded student, and training goes on with its hooks."""
    options = {"probability": 0.6, "temperature": 0.0, "max_new_tokens": 4}
    reference = runs.here(pair[0](f"one_{setting}", options, per_device_train_batch_size=4))
    launcher, wrapper = runs.SETTINGS[setting]
    more = wrapper | {"per_device_train_batch_size": 2, "zero_stage": 3 if setting == "zero3" else 0}
    run = runs.launched(pair[0](setting, options, **more), launcher)
    keys = ("sampled_rows", "sample_fallbacks", "answer_tokens")
    assert runs.metrics(run, *keys) == runs.metrics(reference, *keys)
    assert sum(line[0] for line in runs.metrics(run, *keys)) > sum(line[1] for line in runs.metrics(run, *keys))
    assert runs.update_off(run, reference, pair[1]) < 1e-4


@pytest.mark.slow
def test_distillm_on_two_ranks_goes_on_as_if_it_had_not_stopped(pair):
    options = {"policy": "distillm", "threshold": 0.6, "max_new_tokens": 4, "buffer_rows": 6}
    more = {"max_steps": 12, "save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 2}
    more |= {"per_device_train_batch_size": 1, "learning_rate": 40.0, "deepspeed": runs.deepspeed_config(2)}
    recipe = pair[0]("distillm_two", options, **more)
    run = runs.launched(recipe, "deepspeed")
    reference = run.with_name("distillm_two_reference")
    shutil.copytree(run, reference)
    shutil.rmtree(run / "checkpoint-12")
    (run / "complete.json").unlink()
    assert {json.loads((run / "checkpoint-6" / f"replay_buffer_{rank}.json").read_text())[0][0] for rank in (0, 1)}
    runs.launched(recipe, "deepspeed")
    assert all(torch.equal(runs.weights(run)[key], value) for key, value in runs.weights(reference).items())
    keys = ("step", "loss", "t", "sampled_rows", "sample_fallbacks", "rollout_threshold")
    assert runs.metrics(run, *keys) == runs.metrics(reference, *keys) != []
    for rank in (0, 1):
        buffers = [(folder / "checkpoint-12" / f"replay_buffer_{rank}.json").read_text() for folder in (run, reference)]
        assert buffers[0] == buffers[1] != "[]"


@pytest.mark.parametrize("kind", ["text", "more image tokens", "another tokenizer"])
def test_samples_are_paired_as_the_datas_answers_are(pair, kind, tmp_path):
    """A text-only student; a teacher with its own processor; a teacher with its own tokenizer and vocabulary."""
    make = families.llama if kind == "text" else families.llava
    student = make(tmp_path / "student", seed=1, width=16)
    model = load_model(ModelOptions(student))
    model.get_output_embeddings().weight.data[4:260] *= 0.05
    model.save_pretrained(student)
    if kind == "text":
        teacher = families.llama(tmp_path / "teacher")
    elif kind == "more image tokens":
        teacher = families.llava(tmp_path / "teacher", **families.MORE_IMAGE_TOKENS["llava"])
    else:
        teacher = families.made("gemma3")
    data = families.vqa_rows(tmp_path / "data", rows=8, images=kind != "text")
    path = runs.recipe_file(tmp_path / "r.yaml", student, teacher, data, **(FIXED | {"use_cpu": True}))
    options = {"probability": 1.0, "max_new_tokens": 4}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"rollout": options}))
    lines = runs.metrics(runs.here(path), "sampled_rows", "sample_fallbacks", "answer_tokens", "loss")
    assert len(lines) == 3 and sum(line[0] for line in lines) > sum(line[1] for line in lines)
    assert all(line[2] > 0 and line[3] == line[3] for line in lines)
