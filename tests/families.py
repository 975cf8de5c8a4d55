"""Tiny models of real families with real processors, made on the spot from their own config classes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from vlm_taid.students import CHAT_TEMPLATE, assemble, train_tokenizer

TEXTS = [
    "what shape is in the image?", "is there a red circle?", "what color is the square?",
    "a red circle, a blue square",
    "The quick brown fox jumps over the lazy dog.", "yes", "no",
    "triangle rectangle green gray black brown teal yellow",
] * 3  # fmt: skip
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 60, 230), "black": (0, 0, 0), "white": (255,) * 3}


def tokenizer():
    return train_tokenizer(TEXTS, 400)


def text_sizes(vocab_size: int, width: int = 32, layers: int = 2, **more) -> dict:
    return {
        "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
        "tie_word_embeddings": False, **more,
    }  # fmt: skip


def save(folder: Path, model, processor) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def llava(folder: Path, *, seed=0, width=32, layers=2, pad=0, image=32, tie=False) -> str:
    """LLaVA with a CLIP tower: accepts_loss_kwargs is not set (its forward takes them)."""
    torch.manual_seed(seed)
    tok = tokenizer()
    text = LlamaConfig(**text_sizes(len(tok) + pad, width, layers) | {"tie_word_embeddings": tie})
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image,
        patch_size=16,
    )
    image_id = tok.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=image_id, tie_word_embeddings=tie)
    )
    size = {"height": image, "width": image}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size), tok, patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    return save(folder, model, processor)


def qwen2_5_vl(folder: Path, *, seed=0, width=32, layers=2) -> str:
    """Qwen2.5-VL: accepts_loss_kwargs is False."""
    torch.manual_seed(seed)
    tok = tokenizer()
    pads = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tok.add_special_tokens({"additional_special_tokens": pads})
    ids = dict(zip(pads, tok.convert_tokens_to_ids(pads), strict=True))
    half = width // 8  # of a head: its pairs are shared out between time, height and width
    rope = {
        "rope_type": "default",
        "mrope_section": [half - half // 2, half // 4, half // 2 - half // 4],
        "rope_theta": 1e4,
    }
    text = text_sizes(len(tok), width, layers, rope_parameters=rope)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": width,
                       "patch_size": 14, "spatial_merge_size": 2, "fullatt_block_indexes": [1], "window_size": 56},
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )  # fmt: skip
    template = CHAT_TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=28 * 28, max_pixels=56 * 56),
        tok,
        Qwen2VLVideoProcessor(),
        chat_template=template,
    )
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def fast_vlm(folder: Path, *, seed=0, width=32, layers=2, tower_args=None) -> str:
    """The quickstart's family: a timm tower, a projector, a Qwen2 decoder."""
    torch.manual_seed(seed)
    tok = tokenizer()
    tower_args = tower_args or {"channels": [8, 8, 16, 16], "stem_width": 8, "norm_layer": "groupnorm1"}
    return save(
        folder,
        *assemble("resnet10t", Qwen2Config(**text_sizes(len(tok), width, layers)), tok, 64, tower_args=tower_args),
    )


def llama(folder: Path, *, seed=0, width=32, layers=2, pad=0, **more) -> str:
    """A text-only Llama."""
    torch.manual_seed(seed)
    tok = tokenizer()
    return save(folder, LlamaForCausalLM(LlamaConfig(**text_sizes(len(tok) + pad, width, layers, **more))), tok)


def vqa_rows(folder: Path, *, rows: int = 8, images: bool = True, name: str = "rows.jsonl") -> str:
    """Squares of one colour with a question, the answers ragged in length; some rows without a picture if asked."""
    folder.mkdir(parents=True, exist_ok=True)
    words = ["red", "a red circle", "yes", "a red circle, a blue square", "no", "green", "The quick brown fox", "blue"]
    lines = []
    for i in range(rows):
        row = {"question": f"what is in the image {i}?", "answer": words[i % len(words)]}
        if images:
            colour = list(COLOURS)[i % len(COLOURS)]
            Image.new("RGB", (40 + 8 * (i % 3), 64), COLOURS[colour]).save(folder / f"{i}.png")
            row["image"] = f"{i}.png"
        lines.append(json.dumps(row))
    path = folder / name
    path.write_text("\n".join(lines) + "\n")
    return str(path)
