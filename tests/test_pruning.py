"""student.prune: the kept layers compute what they did, and the saved folder is an ordinary model."""

import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from tests import families, runs
from vlm_taid.errors import InputError
from vlm_taid.footprint import footprint
from vlm_taid.pretrained import ModelOptions, load_model
from vlm_taid.pruning import PruneOptions, kept_layers, prune
from vlm_taid.students import StudentOptions, load_student

# full and sliding attention by turns, linear attention, a fused qkv, text parts of vision-language models
FAMILIES = ["llama3", "gemma2", "phi3", "qwen3_5", "internvl", "qwen2_5_vl", "gemma3"]


def test_the_kept_layers_are_evenly_spaced():
    assert kept_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert kept_layers(5, 2) == [0, 4] and kept_layers(4, 3) == [0, 2, 3]
    for layers in (1, 4, 5):
        with pytest.raises(InputError, match=f"student.prune.layers is {layers}: the model has 4, so 2 to 3"):
            kept_layers(4, layers)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pruned_model_is_the_whole_one_without_its_other_layers(name, tmp_path, capsys):
    path = families.made(name, layers=4)
    options = StudentOptions(path, prune=PruneOptions(3))
    pruned = load_student(options).eval()
    assert f"of {path}'s 4 decoder layers 0, 2, 3 are kept" in capsys.readouterr().out
    whole = load_model(ModelOptions(path)).eval()
    whole.get_decoder().layers[1].forward = lambda hidden, *_, **__: hidden
    ids_BT = torch.randint(10, 200, (1, 40), generator=torch.Generator().manual_seed(0))
    expected = whole(input_ids=ids_BT, use_cache=False).logits
    assert torch.equal(pruned(input_ids=ids_BT, use_cache=False).logits, expected)
    pruned.save_pretrained(tmp_path)
    saved = load_model(ModelOptions(str(tmp_path))).eval()
    assert saved.config.get_text_config().num_hidden_layers == 3
    assert torch.equal(saved(input_ids=ids_BT).logits, expected)
    written = [model.generate(ids_BT, max_new_tokens=4, do_sample=False) for model in (pruned, saved)]  # with a cache
    assert torch.equal(*written)
    plan = footprint(options, 16, torch.float32)
    assert plan.parameters == sum(p.numel() for p in saved.parameters())


def test_what_cannot_be_pruned_is_named(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 2}
    mixed = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, **heads, **experts, mlp_only_layers=[3]))
    with pytest.raises(InputError, match=r"Qwen2MoeForCausalLM cannot be pruned: its layers are not alike .*layers\.2"):
        prune(mixed, PruneOptions(3))
    with pytest.raises(InputError, match="GPT2Model has no list of its 3 layers"):
        prune(GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=64)), PruneOptions(2))


@pytest.mark.parametrize("stage, lora", [(None, True), (3, False)])
def test_a_recipe_prunes_its_teacher(stage, lora, tmp_path):
    """The student's layers are the teacher's at the first step, so its first KL is that of the pruned model."""
    teacher = families.made("llama3", layers=4)
    data = families.vqa_rows(tmp_path / "data", rows=4, images=False)
    more = {"deepspeed": runs.deepspeed_config(3), "zero_stage": 3} if stage else {"use_cpu": True}
    path = runs.recipe_file(tmp_path / "run.yaml", teacher, teacher, data, max_steps=2, learning_rate=0.0, **more)
    recipe = yaml.safe_load(path.read_text())
    recipe["student"]["prune"] = {"layers": 2}
    recipe["student"] |= {"lora": {"rank": 2}} if lora else {}
    path.write_text(yaml.safe_dump(recipe))
    run = runs.launched(path, "deepspeed") if stage else runs.here(path)
    trained = AutoModelForCausalLM.from_pretrained(run)
    kept = load_student(StudentOptions(teacher, prune=PruneOptions(2)))
    assert trained.config.num_hidden_layers == 2
    assert all(torch.equal(value, kept.state_dict()[key]) for key, value in trained.state_dict().items())
    assert "pruned to 2 decoder layers" in (run / "README.md").read_text()
    assert json.loads((run / "complete.json").read_text()) == {"global_step": 2}
