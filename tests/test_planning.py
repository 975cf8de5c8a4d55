"""plan: its bytes against the peak of real runs, and its arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, Qwen2Config

from tests.families import FAMILIES, TEXT_ONLY, llama, llava, made, qwen2_5_vl, tokenizer
from tests.runs import recipe_file
from vlm_taid.cli import main
from vlm_taid.data import Conversation, Part, Turn
from vlm_taid.errors import InputError
from vlm_taid.footprint import Pictures, footprint
from vlm_taid.planning import Machine, Setting, memory, step_time
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.streams import StreamEncoder
from vlm_taid.students import StudentOptions
from vlm_taid.trainable import LoRAOptions, freeze, with_adapters

MEASURE = """
import sys
from itertools import accumulate
from torch.profiler import ProfilerActivity, profile
from vlm_taid.distillation import distill
from vlm_taid.recipe import Recipe
with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
    distill(Recipe.load(sys.argv[1]))
events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
print("PEAK", max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))))
"""
ROWS = 8


def peak(recipe: Path) -> float:
    """Most bytes of tensors alive at once in a run; unlike a process's size, the same on every machine."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(recipe)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.split("PEAK")[-1])


@pytest.mark.parametrize(
    ("width", "words", "settings"),
    [
        (768, 12, {}),  # the states are most of it
        (256, 160, {}),  # the activations are
        (512, 160, {"gradient_checkpointing": True}),
    ],
)
def test_the_plan_is_what_a_run_takes(width, words, settings, tmp_path):
    student = llama(tmp_path / "student", width=width, layers=8, intermediate_size=4 * width)
    text = "the quick brown fox jumps over a lazy dog " * (words // 8)
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join([json.dumps({"text": text})] * 24))
    recipe = recipe_file(
        tmp_path / "run.yaml", student, None, str(data), name="sft", max_steps=3,
        per_device_train_batch_size=ROWS, use_cpu=True, **settings,
    )  # fmt: skip
    made = yaml.safe_load(recipe.read_text())
    made["data"]["train"][0]["format"] = "text"
    recipe.write_text(yaml.safe_dump(made))
    length = len(tokenizer()(text).input_ids) + 1
    measured = footprint(ModelOptions(student), length, torch.float32)
    setting = Setting(0, False, bool(settings), ROWS, deepspeed=False, bf16=False)
    planned = memory(measured, 0.0, setting, 1)
    found = peak(recipe)
    print(f"planned {planned.total / 1e6:.0f} MB, measured {found / 1e6:.0f} MB", planned)
    assert planned.total == pytest.approx(found, rel=0.1)


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """Configs of Qwen2-1.5B and -72B, without weights."""
    folder = tmp_path_factory.mktemp("qwen2")
    sizes = {
        "student": (1536, 8960, 28, 12, 2, 151936, True),
        "teacher": (8192, 29568, 80, 64, 8, 152064, False),
    }
    for name, (width, inner, layers, heads, keys, rows, tie) in sizes.items():
        Qwen2Config(
            hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=keys, vocab_size=rows, tie_word_embeddings=tie, architectures=["Qwen2ForCausalLM"],
        ).save_pretrained(folder / name)  # fmt: skip
    return str(folder / "student"), str(folder / "teacher")


def test_the_papers_language_recipe_is_planned(paper, capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    given = ["--config", "configs/llm_1_5b.yaml", "--student.path", paper[0], "--teacher.path", paper[1]]
    assert main(["plan", *given, "--gpus", "16"]) == 0
    said = capsys.readouterr().out
    assert "72.71 billion parameters, 145.4 GB in bf16" in said
    assert "together" in said and ": fits" in said
    assert "136 GB into every GPU, 2.7 s at 50 GB/s" in said
    assert "it is better here" in said
    assert main(["plan", *given, "--gpus", "1"]) == 0
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_stages_share_what_they_share(paper):
    student = footprint(ModelOptions(paper[0]), 64, torch.bfloat16)
    needs = [memory(student, 0.0, Setting(stage, False, False, 1), 8) for stage in range(4)]
    P = student.parameters
    assert [need.optimizer for need in needs] == [12 * P, 1.5 * P, 1.5 * P, 1.5 * P]
    assert [need.gradients for need in needs] == [2 * P, 2 * P, P / 4, P / 4]
    assert needs[3].weights == P / 4 + 2 * 1e9
    assert memory(student, 0.0, Setting(2, True, False, 1), 8).optimizer == 0


def test_operations_are_twice_the_parameters_a_token(paper):
    student = footprint(ModelOptions(paper[0]), 256, torch.bfloat16)
    inside = student.parameters - student.head_rows * student.width  # the head is tied to the embeddings
    assert student.flops == pytest.approx(2 * inside * 256, rel=0.05)
    machine = Machine(gpus=1, gpu_tflops=1.0, utilisation=1.0)
    times = [step_time(student, None, Setting(0, False, deep, 2), machine, 3, 0).student for deep in (False, True)]
    heads = 2 * 256 * student.head_rows * student.width
    assert times[0] == pytest.approx(6 * (3 * student.flops + 3 * heads) / 1e12)
    assert times[1] - times[0] == pytest.approx(6 * student.flops / 1e12)


@pytest.mark.parametrize("family", [llava, qwen2_5_vl])
def test_vision_models_are_planned_by_their_decoder(family, tmp_path):
    model = footprint(ModelOptions(family(tmp_path)), 32, torch.float32)
    assert model.vision > 0 and min(model.activations) > 0


def test_a_missing_config_is_an_input_error(capsys, tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    recipe = recipe_file(tmp_path / "r.yaml", str(tmp_path / "gone"), None, "rows.jsonl", name="sft")
    assert main(["plan", "--config", str(recipe), "--gpus", "1"]) == 2
    assert "no such model folder" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in TEXT_ONLY])
def test_pictures_are_counted_as_a_real_run_keeps_them(name):
    """What autograd keeps of two pictures, on real tensors, up to the decoder, and the operations until there."""
    path, pictures = made(name), Pictures.of(2, "64x56")
    planned = footprint(StudentOptions(path), 32, torch.float32, pictures=pictures)
    model = load_model(ModelOptions(path)).train()
    blank = [Part(image=Image.new("RGB", (64, 56))) for _ in range(2)]
    row = Conversation((Turn("user", (*blank, Part("?"))), Turn("assistant", (Part("!"),))))
    inputs = StreamEncoder(load_processor(path)).encode_batch([row]).inputs
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def stop(*_):
        raise StopIteration

    model.get_decoder().register_forward_pre_hook(stop)
    counted = FlopCounterMode(display=False)
    with counted, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), pytest.raises(StopIteration):
        model.base_model(**inputs, use_cache=False)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert planned.pictures_kept[0] == pytest.approx(found, rel=0.05)
    assert planned.picture_flops == counted.get_total_flops() > 0


@pytest.mark.parametrize("name, tower", [("internvl", "vision_tower"), ("qwen2_5_vl", "visual")])
def test_a_frozen_tower_keeps_next_to_nothing_of_its_pictures(name, tower):
    path, length, pictures = made(name), 32, Pictures.of(2, "64x56")
    planned = footprint(StudentOptions(path), length, torch.float32, pictures=pictures)
    alone = footprint(StudentOptions(path), length, torch.float32)
    assert [full - without for full, without in zip(planned.activations, alone.activations, strict=True)] == list(
        planned.pictures_kept
    )
    frozen = footprint(StudentOptions(path, freeze=[tower]), length, torch.float32, pictures=pictures)
    assert frozen.pictures_kept[0] < 0.3 * planned.pictures_kept[0]
    assert frozen.picture_flops == planned.picture_flops > 0
    model = load_model(ModelOptions(path))
    freeze(model, [tower])
    assert frozen.trained == sum(p.numel() for p in model.parameters() if p.requires_grad) < frozen.parameters


def test_adapters_are_counted_as_peft_makes_them(tmp_path):
    path, lora = llama(tmp_path), LoRAOptions(rank=4)
    planned = footprint(StudentOptions(path, freeze=["layers.0"], lora=lora), 16, torch.bfloat16)
    model = load_model(ModelOptions(path))
    freeze(model, ["layers.0"])
    adapted = with_adapters(model, lora, ["layers.0"], seed=0)
    assert planned.trained == sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    plain = footprint(ModelOptions(path), 16, torch.bfloat16)
    assert not planned.trained_head and planned.parameters == plain.parameters == plain.trained
    need, whole = (memory(one, 0.0, Setting(2, False, False, 1), 4) for one in (planned, plain))
    assert need.weights == whole.weights and need.optimizer == 12 * planned.trained / 4 and need.loss < whole.loss


def test_a_picture_size_is_two_numbers():
    with pytest.raises(InputError, match="896x448"):
        Pictures.of(1, "896")
