"""Turns an InternVL2 checkpoint whose decoder is InternLM2 (2B, 8B, 26B) into transformers' InternVL.

    python data/convert_internvl2.py OpenGVLab-InternVL2-2B runs/models/internvl2-2b

InternVL2 is published with Python files of its own. Nothing of them is run: config, safetensors and SentencePiece
model are read as data, and what is written loads with AutoModelForImageTextToText and AutoProcessor.

InternLM2 is a Llama under other names, but for one weight: ``wqkv`` holds, for each key-value head in turn, the rows
of its query heads, then of its key, then of its value.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    GenerationConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.tokenization_utils_base import generate_merges
from transformers.utils.import_utils import is_protobuf_available

from vlm_taid.errors import InputError

RENAMED = [
    # the vision tower
    (r"^vision_model\.embeddings\.class_embedding$", "model.vision_tower.embeddings.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "model.vision_tower.embeddings.position_embeddings"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "model.vision_tower.embeddings.patch_embeddings.projection."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.", r"model.vision_tower.encoder.layer.\1."),
    (r"\.ls([12])$", r".lambda_\1"),
    (r"(vision_tower.*)\.attn\.proj\.", r"\1.attention.projection_layer."),
    (r"(vision_tower.*)\.attn\.", r"\1.attention."),
    (r"(vision_tower.*)\.norm1\.", r"\1.layernorm_before."),
    (r"(vision_tower.*)\.norm2\.", r"\1.layernorm_after."),
    # the projector
    (r"^mlp1\.0\.", "model.multi_modal_projector.layer_norm."),
    (r"^mlp1\.1\.", "model.multi_modal_projector.linear_1."),
    (r"^mlp1\.3\.", "model.multi_modal_projector.linear_2."),
    # the decoder
    (r"^language_model\.output\.", "lm_head."),
    (r"^language_model\.model\.tok_embeddings\.", "model.language_model.embed_tokens."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"\.attention\.wqkv\.", ".self_attn.wqkv."),
    (r"\.attention\.wo\.", ".self_attn.o_proj."),
    (r"\.feed_forward\.w1\.", ".mlp.gate_proj."),
    (r"\.feed_forward\.w3\.", ".mlp.up_proj."),
    (r"\.feed_forward\.w2\.", ".mlp.down_proj."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
]

# What the model was trained with: no line break after the end of a turn, and this system message.
SYSTEM = "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
CHAT_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\n" + SYSTEM + "<|im_end|>' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{- '<IMG_CONTEXT>\n' -}}"
    "{%- elif part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- else -%}{{- raise_exception('a part is text or image, not ' + part['type']) -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def converted_config(config: dict[str, Any], image_token_id: int) -> InternVLConfig:
    """The checkpoint's config.json as an InternVLConfig.

    Raises:
        InputError: the checkpoint is another than InternVL2 with an InternLM2 decoder, or has a setting that
            transformers' class cannot express.
    """
    text, vision = config.get("llm_config", {}), config.get("vision_config", {})
    expected = [
        ("model_type", config.get("model_type"), "internvl_chat"),
        ("llm_config.architectures", text.get("architectures"), ["InternLM2ForCausalLM"]),
        ("ps_version", config.get("ps_version"), "v2"),
        ("select_layer", config.get("select_layer", -1), -1),
        ("llm_config.bias", text.get("bias", False), False),
        ("llm_config.hidden_act", text.get("hidden_act", "silu"), "silu"),
    ]
    for key, found, wanted in expected:
        if found != wanted:
            raise InputError(f"config.json: {key} is {found!r}, and this converter is for {wanted!r}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(text["rope_theta"])}
    if scaling := text.get("rope_scaling"):
        rope |= {"rope_type": scaling["type"], "factor": float(scaling["factor"])}
    same = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "layer_norm_eps")
    dropout = vision.get("attention_dropout", 0.0)
    return InternVLConfig(
        text_config=LlamaConfig(
            **{key: text[key] for key in same[:4]},
            num_key_value_heads=text["num_key_value_heads"],
            vocab_size=text["vocab_size"],
            rms_norm_eps=text["rms_norm_eps"],
            max_position_embeddings=text["max_position_embeddings"],
            rope_parameters=rope,
            bos_token_id=text.get("bos_token_id", 1),
            eos_token_id=text.get("eos_token_id", 2),
            pad_token_id=text.get("pad_token_id", 2),
            tie_word_embeddings=False,
        ),
        vision_config={
            **{key: vision[key] for key in same},
            "hidden_act": vision["hidden_act"],
            "norm_type": vision["norm_type"],
            "image_size": config.get("force_image_size") or vision["image_size"],
            "patch_size": vision["patch_size"],
            "attention_bias": vision["qkv_bias"],
            "use_qk_norm": vision["qk_normalization"],
            "attention_dropout": dropout,
            "projection_dropout": vision.get("dropout", 0.0),
        },
        image_token_id=image_token_id,
        image_seq_length=image_tokens(config),
        downsample_ratio=config["downsample_ratio"],
        tie_word_embeddings=False,
        architectures=["InternVLForConditionalGeneration"],
        dtype=config.get("torch_dtype", "bfloat16"),
    )


def image_tokens(config: dict[str, Any]) -> int:
    """Tokens of one tile: 256 for 448 pixels, patches of 14 and a ratio of 0.5."""
    side = (config.get("force_image_size") or config["vision_config"]["image_size"]) // config["vision_config"][
        "patch_size"
    ]
    return int(side * config["downsample_ratio"]) ** 2


def converted_tensors(name: str, tensor: Tensor, config: InternVLConfig) -> dict[str, Tensor]:
    """One of the checkpoint's tensors under transformers' names; a fused one comes back as three.

    Raises:
        InputError: no place is known for the tensor.
    """
    new = name
    for pattern, replacement in RENAMED:
        new = re.sub(pattern, replacement, new)
    if not new.startswith(("model.", "lm_head.")):
        raise InputError(f"the tensor {name} has no place in transformers' InternVL")
    if ".wqkv." in new:
        text: Any = config.text_config
        head_size = text.hidden_size // text.num_attention_heads
        groups = text.num_attention_heads // text.num_key_value_heads
        rows = tensor.view(text.num_key_value_heads, groups + 2, head_size, tensor.shape[-1])
        parts = (rows[:, :groups], rows[:, groups], rows[:, groups + 1])
        names = [new.replace("wqkv", part) for part in ("q_proj", "k_proj", "v_proj")]
        return {key: part.reshape(-1, tensor.shape[-1]).contiguous() for key, part in zip(names, parts, strict=True)}
    if ".attention.qkv." in new:
        names = [new.replace(".qkv.", f".{part}.") for part in ("q_proj", "k_proj", "v_proj")]
        return {key: part.contiguous() for key, part in zip(names, tensor.chunk(3), strict=True)}
    return {new: tensor}


def converted_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A fast tokenizer from ``tokenizer.model`` and the added tokens of ``tokenizer_config.json``.

    Raises:
        InputError: a file is missing, or the SentencePiece model is of another kind.
    """
    model = _sentencepiece(folder / "tokenizer.model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {int(i): token["content"] for i, token in settings.get("added_tokens_decoder", {}).items()}
    if (folder / "added_tokens.json").is_file():
        added |= {i: token for token, i in json.loads((folder / "added_tokens.json").read_text()).items()}
    pieces = {added.get(i, piece.piece): i for i, piece in enumerate(model.pieces)}  # some take unused pieces' ids
    scores = {piece.piece: piece.score for i, piece in enumerate(model.pieces) if piece.type == 1 and i not in added}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=pieces,
            merges=generate_merges(pieces, scores),
            unk_token=settings.get("unk_token", "<unk>"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = model.normalizer_spec.add_dummy_prefix
    scheme: Any = "always" if prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    controls = {i: piece.piece for i, piece in enumerate(model.pieces) if piece.type in (2, 3) and i not in added}
    for i, token in sorted((added | controls).items()):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        if tokenizer.token_to_id(token) != i:
            raise InputError(f"{folder}: the token {token} has the id {i}, and the ids before it leave a gap")
    bos = settings.get("bos_token", "<s>")
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token="<|im_end|>",  # what ends an answer
        pad_token=settings.get("pad_token", "</s>"),
        unk_token=settings.get("unk_token", "<unk>"),
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<quad>",  # the processor wants one, and a new token would have no embedding
        },
        chat_template=CHAT_TEMPLATE,
    )


def _sentencepiece(file: Path) -> Any:
    """The parsed SentencePiece model: a BPE model with byte fallback and without a normaliser."""
    if not file.is_file():
        raise InputError(f"{file}: no such file; the checkpoint's tokenizer is expected there")
    if not is_protobuf_available():
        raise InputError("reading tokenizer.model needs protobuf: pip install protobuf")
    from transformers.utils import sentencepiece_model_pb2_new as pb2

    model: Any = pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    model.ParseFromString(file.read_bytes())
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    for key, found, wanted in (
        ("trainer_spec.model_type", trainer.model_type, 2),
        ("trainer_spec.byte_fallback", trainer.byte_fallback, True),
        ("normalizer_spec.remove_extra_whitespaces", normalizer.remove_extra_whitespaces, False),
        ("normalizer_spec.precompiled_charsmap", bool(normalizer.precompiled_charsmap), False),
    ):
        if found != wanted:
            raise InputError(f"{file}: {key} is {found!r}, and this converter is for {wanted!r}")
    return model


def convert(source: Path, output: Path) -> None:
    """Writes model, tokenizer and processor in transformers' format.

    Args:
        source: the checkpoint's folder, with config.json, tokenizer.model and safetensors.
        output: the folder to write; a shard of the source becomes a shard of the same name.

    Raises:
        InputError: something is missing, or belongs to another model.
    """
    if not (source / "config.json").is_file():
        raise InputError(f"{source}: no config.json: the folder of a downloaded InternVL2 checkpoint is expected")
    raw = json.loads((source / "config.json").read_text())
    tokenizer = converted_tokenizer(source)
    image_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert isinstance(image_id, int)
    config = converted_config(raw, image_id)
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise InputError(f"{source}: no weights: *.safetensors was expected")
    output.mkdir(parents=True, exist_ok=True)
    placed, size = {}, 0
    for shard in shards:  # one at a time: the memory of a shard is enough
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(shard).items():
            tensors |= converted_tensors(name, tensor, config)
        placed |= dict.fromkeys(tensors, shard.name)
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, output / shard.name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": placed}
        (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    config.save_pretrained(output)
    end = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.convert_tokens_to_ids("</s>")]
    GenerationConfig(bos_token_id=1, eos_token_id=end, pad_token_id=tokenizer.pad_token_id).save_pretrained(output)
    side = raw.get("force_image_size") or raw["vision_config"]["image_size"]
    settings: dict[str, Any] = {
        "size": {"height": side, "width": side},
        "image_mean": [0.485, 0.456, 0.406],  # ImageNet's
        "image_std": [0.229, 0.224, 0.225],
    }
    processor = InternVLProcessor(
        image_processor=GotOcr2ImageProcessor(
            **settings,
            crop_to_patches=bool(raw.get("dynamic_image_size", True)),
            min_patches=raw.get("min_dynamic_patch", 1),
            max_patches=raw.get("max_dynamic_patch", 12),
        ),
        tokenizer=tokenizer,
        video_processor=InternVLVideoProcessor(**settings),
        image_seq_length=image_tokens(raw),
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(output)
    _check_names(config, set(placed), source)


def _check_names(config: InternVLConfig, names: set[str], source: Path) -> None:
    """Every tensor of the model is there, and no other."""
    from transformers import InternVLForConditionalGeneration

    with torch.device("meta"):
        wanted = set(InternVLForConditionalGeneration(config).state_dict())
    for problem, which in (("lacks", wanted - names), ("has no place for", names - wanted)):
        if which:
            raise InputError(f"{source}: the converted model {problem} {len(which)} tensors, as {min(which)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of the downloaded checkpoint")
    parser.add_argument("output", type=Path, help="folder to write")
    given = parser.parse_args()
    try:
        convert(given.source, given.output)
    except InputError as error:
        sys.exit(f"convert_internvl2: {error}")
    print(f"{given.output}: written; AutoModelForImageTextToText and AutoProcessor load it")
