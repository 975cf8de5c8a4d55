"""data/convert_internvl2.py on a made-up checkpoint of InternVL2's layout, against plain references of the original.

The references follow the original's definitions (fused weights, layer scale, pixel shuffle), not transformers' code.
Legend: B images, P patches and the class token, T positions, D width.
"""

import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import InternVLForConditionalGeneration
from transformers.utils import sentencepiece_model_pb2_new as pb2

from vlm_taid.data import Conversation, Part, Turn
from vlm_taid.errors import InputError
from vlm_taid.pretrained import ModelOptions, load_model, load_processor
from vlm_taid.streams import StreamEncoder

FILE = Path(__file__).parents[2] / "data" / "convert_internvl2.py"
SPECIFICATION = importlib.util.spec_from_file_location("convert_internvl2", FILE)
script = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(script)

TEXTS = ["what is in the image?  two  blanks", "a red circle", "the quick brown fox", "l'été, ein Würfel"] * 4
CHAT = ["<|im_end|>", "<|im_start|>"]  # in the place of unused pieces, as in the published tokenizer
IMAGES = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>"]  # after the last piece
WIDTH, HEADS, KEYS, LAYERS, VISION = 32, 4, 2, 2, 24


def sentencepiece(file: Path) -> dict[str, float]:
    """A BPE model with byte fallback; returns the scores of its pieces."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    learned.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    words = sorted(learned.get_vocab(), key=learned.get_vocab().get)
    words = [word for word in words if len(word) > 1] + [word for word in words if len(word) == 1]
    model = pb2.ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    kinds = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256))]
    for piece, kind in kinds:
        model.pieces.add(piece=piece, score=0.0, type=kind)
    for i, word in enumerate(words):
        model.pieces.add(piece=word, score=-float(i), type=1)
    for i in range(len(CHAT)):
        model.pieces.add(piece=f"[UNUSED_TOKEN_{i}]", score=-1000.0 - i, type=1)
    file.write_bytes(model.SerializeToString())
    return {word: -float(i) for i, word in enumerate(words)}


def vision_block(prefix: str, width: int, inner: int) -> dict:
    return {
        f"{prefix}.attn.qkv.weight": (3 * width, width), f"{prefix}.attn.qkv.bias": (3 * width,),
        f"{prefix}.attn.proj.weight": (width, width), f"{prefix}.attn.proj.bias": (width,),
        f"{prefix}.mlp.fc1.weight": (inner, width), f"{prefix}.mlp.fc1.bias": (inner,),
        f"{prefix}.mlp.fc2.weight": (width, inner), f"{prefix}.mlp.fc2.bias": (width,),
        **{f"{prefix}.norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")},
        f"{prefix}.ls1": (width,), f"{prefix}.ls2": (width,),
    }  # fmt: skip


def text_block(prefix: str, width: int, inner: int, heads: int, keys: int) -> dict:
    return {
        f"{prefix}.attention.wqkv.weight": ((heads + 2 * keys) * (width // heads), width),
        f"{prefix}.attention.wo.weight": (width, width),
        f"{prefix}.feed_forward.w1.weight": (inner, width), f"{prefix}.feed_forward.w3.weight": (inner, width),
        f"{prefix}.feed_forward.w2.weight": (width, inner),
        f"{prefix}.attention_norm.weight": (width,), f"{prefix}.ffn_norm.weight": (width,),
    }  # fmt: skip


def shapes(config: dict) -> dict:
    """Names and shapes of all the tensors of a published checkpoint with that config."""
    text, vision = config["llm_config"], config["vision_config"]
    rows, width, tower = text["vocab_size"], text["hidden_size"], vision["hidden_size"]
    patch = vision["patch_size"]
    found = {
        "vision_model.embeddings.class_embedding": (1, 1, tower),
        "vision_model.embeddings.position_embedding": (1, (config["force_image_size"] // patch) ** 2 + 1, tower),
        "vision_model.embeddings.patch_embedding.weight": (tower, 3, patch, patch),
        "vision_model.embeddings.patch_embedding.bias": (tower,),
        "mlp1.0.weight": (4 * tower,), "mlp1.0.bias": (4 * tower,),
        "mlp1.1.weight": (width, 4 * tower), "mlp1.1.bias": (width,),
        "mlp1.3.weight": (width, width), "mlp1.3.bias": (width,),
        "language_model.model.tok_embeddings.weight": (rows, width),
        "language_model.model.norm.weight": (width,), "language_model.output.weight": (rows, width),
    }  # fmt: skip
    for i in range(vision["num_hidden_layers"]):
        found |= vision_block(f"vision_model.encoder.layers.{i}", tower, vision["intermediate_size"])
    for i in range(text["num_hidden_layers"]):
        heads = text["num_attention_heads"], text["num_key_value_heads"]
        found |= text_block(f"language_model.model.layers.{i}", width, text["intermediate_size"], *heads)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The made-up checkpoint: its tensors, its scores, and the folder of the converted model."""
    source, output = tmp_path_factory.mktemp("internvl2"), tmp_path_factory.mktemp("converted")
    scores = sentencepiece(source / "tokenizer.model")
    first = 259 + len(scores)
    added = dict(enumerate([*CHAT, *IMAGES], start=first)) | {0: "<unk>", 1: "<s>", 2: "</s>"}
    decoder = {str(i): {"content": token} for i, token in added.items()}
    (source / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, "bos_token": "<s>", "pad_token": "</s>"})
    )
    vocabulary = first + len(CHAT) + len(IMAGES)
    config = {
        "model_type": "internvl_chat", "ps_version": "v2", "select_layer": -1, "downsample_ratio": 0.5,
        "force_image_size": 56, "dynamic_image_size": True, "min_dynamic_patch": 1, "max_dynamic_patch": 4,
        "use_thumbnail": True, "template": "internlm2-chat", "torch_dtype": "float32",
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"], "bias": False, "hidden_act": "silu", "hidden_size": WIDTH,
            "intermediate_size": 40, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
            "num_key_value_heads": KEYS, "vocab_size": vocabulary, "rms_norm_eps": 1e-5, "rope_theta": 1000000,
            "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 256,
        },
        "vision_config": {
            "hidden_size": VISION, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14, "hidden_act": "gelu", "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6, "qkv_bias": True, "qk_normalization": False, "attention_dropout": 0.0,
            "dropout": 0.0,
        },
    }  # fmt: skip
    (source / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes(config).items()}
    names = sorted(tensors)
    for part, some in enumerate((names[::2], names[1::2]), start=1):
        shard = {name: tensors[name] for name in some}
        save_file(shard, source / f"model-{part:05}-of-00002.safetensors", metadata={"format": "pt"})
    script.convert(source, output)
    return {"tensors": tensors, "scores": scores, "output": output, "source": source, "added": added}


def image_features(w: dict, pixels_B3HW: torch.Tensor) -> torch.Tensor:
    """[B, 4, WIDTH] of InternViT, the pixel shuffle of version 2, and the projector."""
    patches = F.conv2d(
        pixels_B3HW,
        w["vision_model.embeddings.patch_embedding.weight"],
        w["vision_model.embeddings.patch_embedding.bias"],
        14,
    )
    x_BPD = patches.flatten(2).transpose(1, 2)
    cls = w["vision_model.embeddings.class_embedding"].expand(len(x_BPD), -1, -1)
    x_BPD = torch.cat([cls, x_BPD], 1) + w["vision_model.embeddings.position_embedding"]
    for i in range(LAYERS):
        at = f"vision_model.encoder.layers.{i}."

        def norm(x, name, at=at):
            return F.layer_norm(x, (VISION,), w[at + name + ".weight"], w[at + name + ".bias"], 1e-6)

        def linear(x, name, at=at):
            return F.linear(x, w[at + name + ".weight"], w[at + name + ".bias"])

        B, P, _ = x_BPD.shape
        query, key, value = (
            linear(norm(x_BPD, "norm1"), "attn.qkv").view(B, P, 3, 4, VISION // 4).permute(2, 0, 3, 1, 4)
        )
        weights = torch.softmax(query @ key.transpose(-1, -2) / (VISION // 4) ** 0.5, -1)
        mixed = (weights @ value).transpose(1, 2).reshape(B, P, VISION)
        x_BPD = x_BPD + w[at + "ls1"] * linear(mixed, "attn.proj")
        x_BPD = x_BPD + w[at + "ls2"] * linear(F.gelu(linear(norm(x_BPD, "norm2"), "mlp.fc1")), "mlp.fc2")
    grid = x_BPD[:, 1:].view(-1, 4, 4, VISION)
    tokens = []
    for row in range(2):  # a token holds a square of 2 x 2 patches, row by row
        for column in range(2):
            square = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            tokens.append(square.reshape(len(grid), -1))
    x = torch.stack(tokens, 1)
    x = F.layer_norm(x, (4 * VISION,), w["mlp1.0.weight"], w["mlp1.0.bias"])
    return F.linear(F.gelu(F.linear(x, w["mlp1.1.weight"], w["mlp1.1.bias"])), w["mlp1.3.weight"], w["mlp1.3.bias"])


def internlm2(w: dict, x_TD: torch.Tensor) -> torch.Tensor:
    """Logits [T, V] of InternLM2 for one sequence of embeddings."""
    size, groups = WIDTH // HEADS, HEADS // KEYS
    T = len(x_TD)
    angles = torch.arange(T)[:, None] / 1e6 ** (torch.arange(0, size, 2) / size)

    def rotated(x):
        half = size // 2
        left, right = x[..., :half], x[..., half:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def norm(x, name):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w[name]

    for i in range(LAYERS):
        at = f"language_model.model.layers.{i}."
        fused = norm(x_TD, at + "attention_norm.weight") @ w[at + "attention.wqkv.weight"].T
        heads = []
        for k in range(KEYS):  # one key-value head after the other, each behind its query heads
            block = fused[:, k * (groups + 2) * size : (k + 1) * (groups + 2) * size].view(T, groups + 2, size)
            key, value = rotated(block[:, groups]), block[:, groups + 1]
            for g in range(groups):
                scores = rotated(block[:, g]) @ key.T / size**0.5
                scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
                heads.append(torch.softmax(scores, -1) @ value)
        x_TD = x_TD + torch.cat(heads, -1) @ w[at + "attention.wo.weight"].T
        y = norm(x_TD, at + "ffn_norm.weight")
        gate = F.silu(y @ w[at + "feed_forward.w1.weight"].T) * (y @ w[at + "feed_forward.w3.weight"].T)
        x_TD = x_TD + gate @ w[at + "feed_forward.w2.weight"].T
    return norm(x_TD, "language_model.model.norm.weight") @ w["language_model.output.weight"].T


def conversation(*sizes) -> Conversation:
    pictures = tuple(Part(image=Image.effect_noise(size, 90).convert("RGB")) for size in sizes)
    return Conversation((Turn("user", (*pictures, Part("what is in the image?"))), Turn("assistant", (Part("a red"),))))


def test_logits_equal_the_original_definition(made):
    model, processor = load_model(ModelOptions(str(made["output"]))), load_processor(str(made["output"]))
    inputs = StreamEncoder(processor).encode_batch([conversation((56, 56), (56, 112))]).inputs
    ids_T, w = inputs["input_ids"][0], {name: tensor.double() for name, tensor in made["tensors"].items()}
    places = (ids_T == model.config.image_token_id).nonzero()[:, 0]
    assert len(inputs["pixel_values"]) == 4 and len(places) == 4 * 4  # one tile; two and their thumbnail
    embedded_TD = w["language_model.model.tok_embeddings.weight"][ids_T]
    embedded_TD[places] = image_features(w, inputs["pixel_values"].double()).flatten(0, 1)
    with torch.no_grad():
        logits_TV = model(**inputs).logits[0]
    reference_TV = internlm2(w, embedded_TD)
    assert (logits_TV - reference_TV).abs().max() < 2e-4 * reference_TV.abs().max()


def test_a_wrong_split_of_the_fused_weight_would_show(made):
    name = "language_model.model.layers.0.attention.wqkv.weight"
    fused, w = made["tensors"][name], {key: tensor.double() for key, tensor in made["tensors"].items()}
    x_TD = w["language_model.model.tok_embeddings.weight"][5:12]
    right = internlm2(w, x_TD)
    wrong = internlm2(w | {name: fused.view(2, 4, 8, WIDTH).transpose(0, 1).reshape(fused.shape).double()}, x_TD)
    assert (right - wrong).abs().max() > 1e-2 * right.abs().max()


@pytest.mark.parametrize(
    "sizes, billions",
    [((2048, 8192, 24, 16), 2.21), ((4096, 14336, 32, 32), 8.08)],  # InternLM2-1.8B's and InternLM2.5-7B's
    ids=["2B", "8B"],
)
def test_every_tensor_of_the_published_sizes_has_its_place(made, sizes, billions):
    config = json.loads((made["source"] / "config.json").read_text())
    text, vision = config["llm_config"], config["vision_config"]
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    text |= dict(zip(keys, sizes, strict=True)) | {"num_key_value_heads": 8, "vocab_size": 92553}
    vision |= dict(zip(keys, (1024, 4096, 24, 16), strict=True)) | {"image_size": 448}
    config["force_image_size"] = 448
    target = script.converted_config(config, 92546)
    placed = {}
    with torch.device("meta"):
        published = {name: torch.empty(shape) for name, shape in shapes(config).items()}
        for name, tensor in published.items():
            placed |= script.converted_tensors(name, tensor, target)
        wanted = InternVLForConditionalGeneration(target).state_dict()
    assert {name: value.shape for name, value in placed.items()} == {name: v.shape for name, v in wanted.items()}
    assert sum(tensor.numel() for tensor in published.values()) == pytest.approx(billions * 1e9, abs=5e6)
    assert script.image_tokens(config) == 256


def sentencepiece_reference(text: str, scores: dict[str, float], id_of: dict[str, int]) -> list[int]:
    """SentencePiece's BPE: again and again the best-scored pair of neighbours becomes one; the rest are bytes."""
    pieces = list(text.replace(" ", "▁"))
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(pieces)) if a + b in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return [id_of[token] for piece in pieces
            for token in ([piece] if piece in id_of else [f"<0x{byte:02X}>" for byte in piece.encode()])]  # fmt: skip


def test_the_tokenizer_is_the_sentencepiece_model(made):
    tokenizer = load_processor(str(made["output"])).tokenizer
    id_of = tokenizer.get_vocab()
    assert len(tokenizer) == 259 + len(made["scores"]) + len(CHAT) + len(IMAGES)
    assert all(tokenizer.convert_tokens_to_ids(token) == i for i, token in made["added"].items())
    for text in [*TEXTS[:4], " a  red ", "unknown: ☃ 雪", "the red fox,circle"]:
        wanted = sentencepiece_reference(text, made["scores"], id_of)
        assert tokenizer(text, add_special_tokens=False).input_ids == wanted
        assert tokenizer(text).input_ids == [1, *wanted]
        assert tokenizer.decode(wanted) == text
    marked = tokenizer("a<|im_end|> b", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(marked) == ["a", "<|im_end|>", "▁b"]


def test_the_template_is_the_published_one(made):
    processor = load_processor(str(made["output"]))
    stream = StreamEncoder(processor).encode(conversation((56, 56)))
    wanted = f"<s><|im_start|>system\n{script.SYSTEM}<|im_end|><|im_start|>user\n<img>{'<IMG_CONTEXT>' * 4}</img>\n"
    assert stream.text == wanted + "what is in the image?<|im_end|><|im_start|>assistant\na red<|im_end|>"
    answer = stream.answers[0]
    assert answer.end_of_turn == len(stream.input_ids_T) - 1 and answer.text == "a red"


@pytest.mark.parametrize(
    ("change", "message"),
    [({"ps_version": "v1"}, "ps_version is 'v1'"), ({"model_type": "qwen2_vl"}, "model_type is 'qwen2_vl'")],
)
def test_another_checkpoint_is_refused(made, change, message):
    config = json.loads((made["source"] / "config.json").read_text()) | change
    with pytest.raises(InputError, match=message):
        script.converted_config(config, 5)


def test_an_unknown_tensor_is_refused(made):
    config = script.converted_config(json.loads((made["source"] / "config.json").read_text()), 5)
    with pytest.raises(InputError, match=r"extra\.weight has no place"):
        script.converted_tensors("extra.weight", torch.zeros(1), config)
