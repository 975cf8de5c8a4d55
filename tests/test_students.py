"""Models assembled from parts save, load by transformers' Auto classes, and count their image tokens right."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    set_seed,
)

from tests import families
from vlm_taid.cli import main
from vlm_taid.errors import InputError
from vlm_taid.students import IMAGE, TURN_END, TURN_START, assemble, inherit, train_tokenizer

TEXTS = ["what is the color of the shape?", "is there a red circle?", "what shape is in the image?", "red", "yes", "no"]
RESNET = {"norm_layer": "groupnorm1", "channels": [8, 8, 16, 16], "stem_width": 8}
DECODERS = {"qwen2": Qwen2Config, "llama": LlamaConfig}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS)


def decoder(family: str = "qwen2", tie: bool = True):
    return DECODERS[family](
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )


def conversation(images: int, question: str = "is there a red circle?") -> list[dict]:
    parts = [{"type": "image"}] * images
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    return Image.effect_noise(size, 80).convert(mode)


def prompt_inputs(processor, sizes: list[tuple[int, int]], mode: str = "RGB"):
    text = processor.apply_chat_template(conversation(len(sizes)), add_generation_prompt=True)
    return processor(text=[text], images=[picture(size, mode) for size in sizes] or None, return_tensors="pt")


@pytest.mark.parametrize(
    ("family", "tower", "tower_args", "image_size", "image_tokens", "tie"),
    [
        ("qwen2", "resnet10t", RESNET, 64, 4, True),
        ("qwen2", "resnet10t", {**RESNET, "output_stride": 16}, 64, 16, False),
        ("llama", "resnet10t", {**RESNET, "output_stride": 16}, 96, 36, True),
        ("llama", "mobilenetv3_small_050", None, 64, 4, False),
    ],
)
def test_saved_model_loads_and_generates(family, tower, tower_args, image_size, image_tokens, tie, tokenizer, tmp_path):
    set_seed(0)
    model, processor = assemble(tower, decoder(family, tie), tokenizer, image_size, tower_args=tower_args)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tie
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    loaded_processor = AutoProcessor.from_pretrained(tmp_path)
    assert (loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight) == tie

    inputs = prompt_inputs(processor, [(image_size, image_size), (50, 31)])
    again = prompt_inputs(loaded_processor, [(image_size, image_size), (50, 31)])
    assert inputs.keys() == again.keys()
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    assert (inputs["input_ids"] == tokenizer.convert_tokens_to_ids(IMAGE)).sum() == 2 * image_tokens
    assert inputs["pixel_values"].shape == (2, 3, image_size, image_size)
    with torch.no_grad():
        # the same pixels for both, because each picture is noise
        assert torch.equal(model(**inputs).logits, loaded(**inputs).logits)
    tokens = loaded.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert inputs["input_ids"].shape[1] < tokens.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_text_alone_and_odd_pictures(tokenizer):
    model, processor = assemble("resnet10t", decoder(), tokenizer, 64, tower_args=RESNET)
    assert model(**prompt_inputs(processor, [])).logits.shape[-1] == len(tokenizer)
    for mode, size in (("L", (7, 90)), ("RGBA", (300, 20)), ("P", (64, 64))):
        assert prompt_inputs(processor, [size], mode)["pixel_values"].shape == (1, 3, 64, 64)


def test_chat_template_and_end_of_turn(tokenizer):
    messages = [*conversation(1), {"role": "assistant", "content": "yes"}]
    prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"{TURN_START}user\n{IMAGE}is there a red circle?{TURN_END}\n{TURN_START}assistant\n"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == f"{prompt}yes{TURN_END}\n"
    with pytest.raises(Exception, match="text or image, not video"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], tokenize=False)
    model, _ = assemble("resnet10t", decoder(), tokenizer, 64, tower_args=RESNET)
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids(TURN_END)
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}) == 3


def test_tokenizer_writes_any_text_and_is_repeatable(tokenizer):
    text = " Größe 日本語\t🙂\n  two  blanks <|im_start|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert train_tokenizer(TEXTS).get_vocab() == tokenizer.get_vocab()
    with pytest.raises(InputError, match="at least 260 tokens, not 100"):
        train_tokenizer(TEXTS, 100)


def test_a_seed_fixes_the_weights_and_the_tower_keeps_its_own_start(tokenizer):
    models = []
    for seed in (3, 3, 4):
        set_seed(seed)
        models.append(assemble("resnet10t", decoder(), tokenizer, 64, tower_args=RESNET)[0])
    first, second, third = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
    convolution = models[0].model.vision_tower.timm_model.layer4[0].conv2.weight
    fan = convolution.shape[0] * convolution[0, 0].numel()
    assert convolution.std().item() == pytest.approx((2 / fan) ** 0.5, rel=0.1)  # He et al.; not transformers' 0.02


@pytest.mark.parametrize(
    ("tower", "image_size", "message"),
    [
        ("swin_tiny_patch4_window7_224", 224, "neither"),
        ("vit_small_patch16_dinov3", 64, "5 tokens before its patches"),
        ("resnet10t", 80, "no multiple of the stride"),
        ("resnet_of_nobody", 64, "'resnet_of_nobody'"),
    ],
)
def test_unfit_parts_are_refused_by_name(tower, image_size, message, tokenizer):
    with pytest.raises(InputError, match=message):
        assemble(tower, decoder(), tokenizer, image_size)


def test_a_tokenizer_without_image_token_is_refused(tokenizer):
    tokenizers = pytest.importorskip("tokenizers")
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a")))
    with pytest.raises(InputError, match="no <image> token"):
        assemble("resnet10t", decoder(), bare, 64)


def test_the_quickstart_pair(tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"question": question, "answer": "rectangle"} for question in TEXTS]
    (data / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = Path(__file__).parent.parent / "data" / "quickstart_models.py"
    spec = importlib.util.spec_from_file_location("quickstart_models", file)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "quickstart_models", script)
    spec.loader.exec_module(script)

    def run(model, source, folder):
        monkeypatch.setattr(
            sys, "argv", ["quickstart_models.py", model, *map(str, source), "--output", str(tmp_path / folder)]
        )
        script.main()

    run("teacher", ["--data", data], "teacher")
    run("student", ["--teacher", tmp_path / "teacher"], "student")
    assert "fresh weights: model.multi_modal_projector.linear_1.weight\n" in capsys.readouterr().out
    teacher, student = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("teacher", "student"))
    assert 3 * student.num_parameters() <= teacher.num_parameters()
    assert 2 * teacher.num_parameters() < 12e6  # bytes in bf16, to be shipped
    assert not [module for module in [*teacher.modules(), *student.modules()] if "BatchNorm" in type(module).__name__]
    vocabularies = [
        AutoProcessor.from_pretrained(tmp_path / name).tokenizer.get_vocab() for name in ("teacher", "student")
    ]
    assert vocabularies[0] == vocabularies[1]
    mine, theirs = student.model.language_model.layers, teacher.model.language_model.layers
    for kept, layer in zip(script.KEPT_LAYERS, mine, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, theirs[kept].mlp.up_proj.weight)
    with pytest.raises(InputError, match="2 of the teacher's 3 decoder layers"):
        inherit(student, teacher, [0, 1, 2])
    (data / "train.jsonl").unlink()
    with pytest.raises(SystemExit):
        run("teacher", ["--data", data], "again")
    assert "train.jsonl is missing" in capsys.readouterr().err


def test_shipped_teacher_fits_its_place():
    """At most 12 MB of bf16 safetensors, no file over 10 MB, and three times the student or more."""
    folder = Path(__file__).parent.parent / "data" / "quickstart" / "teacher"
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert sum(sizes) < 12e6 and max(sizes) < 10e6
    teacher = AutoModelForImageTextToText.from_pretrained(folder)
    assert teacher.dtype == torch.bfloat16 and teacher.num_parameters() == 5_693_304


PARTS = {"resnet10t": "FastVlmForConditionalGeneration", "vit_tiny_patch16_224": "PerceptionLMForConditionalGeneration"}


@pytest.mark.parametrize("tower", PARTS)
def test_parts_with_their_weights_become_one_model(tower, tmp_path, capsys):
    """The text-only decoder keeps its logits, the tower its weights; a picture is seen and has its mark."""
    language = families.llama(tmp_path / "language")
    pretrained = timm.create_model(tower, num_classes=0)
    save_file(pretrained.state_dict(), tmp_path / "tower.safetensors")
    output = tmp_path / "vlm"
    arguments = ["--vision", f"timm/{tower}", "--language", language, "--output", str(output)]
    arguments += ["--vision_weights", str(tmp_path / "tower.safetensors"), "--image_size", "64"]
    arguments += ["--pooling", "2"] if tower.startswith("vit") else []
    assert main(["assemble", *arguments]) == 0
    model: Any = AutoModelForImageTextToText.from_pretrained(output)
    processor = AutoProcessor.from_pretrained(output)
    assert type(model).__name__ == PARTS[tower]
    loaded = model.model.vision_tower.timm_model.state_dict()
    same = {name for name, value in pretrained.state_dict().items() if torch.equal(loaded[name], value)}
    assert {name for name in loaded if name not in same} <= {"pos_embed"}  # another number of patches
    decoder = AutoModelForCausalLM.from_pretrained(language)
    ids = torch.arange(12)[None]
    rows = decoder.get_input_embeddings().weight.shape[0]
    assert torch.allclose(model(input_ids=ids).logits[..., :rows], decoder(input_ids=ids).logits, atol=1e-5)
    rendered = processor.apply_chat_template(conversation(2), tokenize=False)
    assert rendered.count(IMAGE) == 2
    inputs = processor(text=[rendered], images=[picture((50, 70)), picture((64, 64))], return_tensors="pt")
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 2 * 4
    before = model(**inputs).logits
    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    assert not torch.allclose(before, model(**inputs).logits)
    assert main(["assemble", *arguments]) == 2 and "is not empty" in capsys.readouterr().err


def test_a_towers_published_weights_come_from_the_hubs_cache(tmp_path, monkeypatch, capsys):
    """``--vision_weights hub``, the default, by the way that timm goes; no network: its answer to that is named."""
    tower = "resnet10t"
    language = families.llama(tmp_path / "language")
    published = timm.create_model(tower)  # with the classifier that the hub's file has too
    source = timm.get_pretrained_cfg(tower)
    assert source is not None and source.hf_hub_id
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    arguments = ["assemble", "--vision", f"timm/{tower}", "--language", language, "--image_size", "64"]
    assert main([*arguments, "--output", str(tmp_path / "nothing")]) == 2
    assert "the weights hub" in capsys.readouterr().err
    repository = tmp_path / "hub" / f"models--{source.hf_hub_id.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(published.state_dict(), repository / "snapshots" / ("0" * 40) / "model.safetensors")
    assert main([*arguments, "--output", str(tmp_path / "vlm")]) == 0
    model: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "vlm")
    loaded, weights = model.model.vision_tower.timm_model.state_dict(), published.state_dict()
    assert loaded and all(torch.equal(value, weights[name]) for name, value in loaded.items())


def test_parts_that_do_not_fit_are_named(tmp_path, capsys):
    language = families.llama(tmp_path / "language")
    granite = tmp_path / "granite"
    config = GraniteConfig(
        vocab_size=400,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        logits_scaling=8.0,
    )
    GraniteForCausalLM(config).save_pretrained(granite)
    AutoTokenizer.from_pretrained(language).save_pretrained(granite)
    for vision, model, weights, message in (
        ("timm/resnet_of_nobody", language, "fresh", "timm/NAME"),
        ("resnet10t", language, "fresh", "timm/NAME"),
        ("timm/resnet10t", language, str(tmp_path / "none.safetensors"), "none.safetensors: expected"),
        ("timm/resnet10t", str(tmp_path / "nothing"), "fresh", "no such model folder"),
        ("timm/resnet10t", str(granite), "fresh", "scales or caps"),
    ):
        arguments = ["--vision", vision, "--language", model, "--vision_weights", weights, "--image_size", "64"]
        assert main(["assemble", *arguments, "--output", str(tmp_path / "output")]) == 2
        assert message in capsys.readouterr().err
