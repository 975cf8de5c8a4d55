"""Frozen parts, LoRA adapters, and FSDP: what is trained, what is saved, and that ranks change nothing."""

import shutil

import pytest
import torch
import yaml
from transformers import AutoTokenizer, GenerationConfig

from tests import families, runs
from vlm_taid.distillation import build_trainer
from vlm_taid.errors import InputError
from vlm_taid.pretrained import ModelOptions, load_model, vision_towers
from vlm_taid.recipe import Recipe

SGD = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 3, "train_sampling_strategy": "sequential"}
LORA = {"rank": 4, "alpha": 8.0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainable")
    student, teacher = families.llava(folder / "student", seed=1, width=16), families.llava(folder / "teacher")
    data = families.vqa_rows(folder / "data", rows=16)

    def recipe(file, student_options, **more):
        more = {"per_device_train_batch_size": 4} | more
        path = runs.recipe_file(folder / f"{file}.yaml", student, teacher, data, **(SGD | more))
        content = yaml.safe_load(path.read_text())
        content["student"] |= student_options
        path.write_text(yaml.safe_dump(content))
        return path

    return recipe, student


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_parts_stay_and_run_without_a_graph(pair, checkpointing):
    options = {"freeze": ["vision_tower", "layers.0", "q_proj"]}
    recipe = Recipe.load(pair[0](f"frozen{checkpointing}", options, gradient_checkpointing=checkpointing))
    trainer = build_trainer(recipe, recipe.arguments())
    graphs = []
    vision_towers(trainer.model)[0].register_forward_hook(
        lambda module, args, output: graphs.append(output.last_hidden_state.requires_grad)
    )
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    still = {name for name, parameter in trainer.model.named_parameters() if torch.equal(parameter, before[name])}
    assert {name for name in before if "vision_tower" in name or "layers.0." in name or "q_proj" in name} == still
    assert graphs and not any(graphs)


def test_lora_trains_adapters_alone_and_saves_an_ordinary_model(pair):
    recipe = pair[0]("lora", {"lora": LORA, "freeze": ["vision_tower"]}, gradient_checkpointing=True)
    run = runs.here(recipe)
    before, after = runs.loaded(pair[1]), runs.loaded(run)  # plain transformers load it
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_1", "linear_2")
    assert moved == {
        name for name in before
        if name.endswith(".weight") and name.split(".")[-2] in projections and "vision_tower" not in name
    }  # fmt: skip
    ranks = {name: int(torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4)) for name in moved}
    assert max(ranks.values()) == 4
    from peft import PeftModel

    model = PeftModel.from_pretrained(load_model(ModelOptions(pair[1])), str(run / "adapter"))
    ids = torch.arange(3, 20)[None]
    expected, merged = model(input_ids=ids).logits, load_model(ModelOptions(str(run)))(input_ids=ids).logits
    assert torch.allclose(expected, merged, atol=1e-4) and (run / "processor_config.json").is_file()


@pytest.mark.parametrize("options", [{}, {"lora": LORA}], ids=["whole", "lora"])
def test_saved_student_stops_at_the_end_of_turn_that_it_was_taught(tmp_path, options):
    student = families.phi3(tmp_path / "student")  # its turns end with <|end|>, its texts with another token
    data = families.vqa_rows(tmp_path / "data", images=False)
    path = runs.recipe_file(tmp_path / "run.yaml", student, None, data, name="sft", max_steps=1)
    content = yaml.safe_load(path.read_text())
    content["student"] |= options
    path.write_text(yaml.safe_dump(content))
    tokenizer = AutoTokenizer.from_pretrained(student)
    text_end, turn_end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")
    assert GenerationConfig.from_pretrained(student).eos_token_id == text_end != turn_end
    assert GenerationConfig.from_pretrained(runs.here(path)).eos_token_id == [text_end, turn_end]


def test_lora_run_resumes(pair):
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    recipe = pair[0]("resumed", {"lora": LORA | {"dropout": 0.2}}, **more)
    run = runs.here(recipe)
    reference = runs.weights(run)
    for path in (run / "checkpoint-6" / "complete.json", run / "complete.json"):
        path.unlink()
    runs.here(recipe)
    assert all(torch.equal(value, runs.weights(run)[name]) for name, value in reference.items())


def test_wrong_parts_are_refused(pair):
    for options, message in (
        ({"freeze": ["visual_tower"]}, "named 'visual_tower'; its parts are .*vision_tower"),
        ({"freeze": ["*"]}, "nothing that is trained"),
        ({"lora": {"modules": ["lm_head"]}}, "'lm_head' is the language head"),
        ({"lora": {"modules": ["query"]}}, "no linear layer is named 'query'"),
    ):
        recipe = Recipe.load(pair[0]("refused", options))
        with pytest.raises(InputError, match=message):
            build_trainer(recipe, recipe.arguments())


@pytest.mark.parametrize(
    "setting",
    ["zero3", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero1", "zero2"))],
)
def test_lora_and_frozen_parts_on_two_ranks_equal_one_process(pair, setting):
    options = {"lora": LORA, "freeze": ["vision_tower"]}
    reference = runs.here(pair[0](f"one_{setting}", options))
    launcher, wrapper = runs.SETTINGS[setting]
    more = wrapper | {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
    run = runs.launched(pair[0](setting, options, **more), launcher)
    for ours, theirs in zip(*(runs.metrics(r, "loss", "kl", "t", "grad_norm") for r in (run, reference)), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert runs.update_off(run, reference, pair[1]) < 1e-4


def test_fsdp2_equals_one_process(pair):
    reference = runs.here(pair[0]("whole", {}))
    launcher, wrapper = runs.SETTINGS["fsdp2"]
    run = runs.launched(pair[0]("fsdp2", {}, **wrapper, per_device_train_batch_size=2), launcher)
    for ours, theirs in zip(*(runs.metrics(r, "loss", "kl", "t", "grad_norm") for r in (run, reference)), strict=True):
        assert ours[:3] == pytest.approx(theirs[:3], rel=1e-5)
        assert ours[3] == pytest.approx(theirs[3], rel=1e-4)  # sharded gradients are summed in another order
    assert runs.update_off(run, reference, pair[1]) < 1e-4


def test_fsdp_that_would_save_no_model_is_refused(pair):
    sharded = {"fsdp": "full_shard", "fsdp_config": runs.FSDP2 | {"state_dict_type": "SHARDED_STATE_DICT"}}
    with pytest.raises(InputError, match="must be FULL_STATE_DICT"):
        Recipe.load(pair[0]("sharded", {}, **sharded)).arguments()


@pytest.mark.slow
def test_fsdp2_run_resumes(pair):
    launcher, wrapper = runs.SETTINGS["fsdp2"]
    more = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    recipe = pair[0]("fsdp2_resumed", {}, **(wrapper | more), per_device_train_batch_size=2)
    run = runs.launched(recipe, launcher)
    assert (run / "checkpoint-6" / "pytorch_model_fsdp.bin").is_file()  # it was FSDP: accelerate leaves it off on CPUs
    reference = runs.loaded(run)
    lines = runs.metrics(run, "step", "loss", "t")
    shutil.rmtree(run / "checkpoint-6")
    (run / "complete.json").unlink()
    runs.launched(recipe, launcher)
    assert all(torch.equal(value, runs.loaded(run)[name]) for name, value in reference.items())
    assert runs.metrics(run, "step", "loss", "t") == lines and len(lines) == 6
