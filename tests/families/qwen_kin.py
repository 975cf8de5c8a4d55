"""Qwen's vision-language families: native resolution within pixel limits, rotary positions in three axes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from vlm_taid.students import CHAT_TEMPLATE

from . import templates
from .parts import save, text_sizes, tokenizer, tokenizer_with

PADS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
TOWER = {"depth": 2, "intermediate_size": 32, "num_heads": 2, "spatial_merge_size": 2}


def _ids(tok) -> dict:
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return dict(zip(names, tok.convert_tokens_to_ids(list(PADS)), strict=True))


def _rope(half: int, **more) -> dict:
    """The halves of a head's rotary dimensions, shared out between time, height and width."""
    sections = [half - half // 2, half // 4, half // 2 - half // 4]
    return {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e4, **more}


def qwen2_5_vl(
    folder: Path, *, seed=0, width=32, layers=2, min_pixels=28 * 28, max_pixels=56 * 56, tok=None, template=None
) -> str:
    """Qwen2.5-VL: accepts_loss_kwargs is False. A token for every 28 x 28 pixels; ChatML, or another template."""
    torch.manual_seed(seed)
    tok = tok or tokenizer()
    tok.add_special_tokens({"additional_special_tokens": list(PADS)})
    config = Qwen2_5_VLConfig(
        text_config=text_sizes(len(tok), width, layers, rope_parameters=_rope(width // 8)),
        vision_config={**TOWER, "hidden_size": 16, "out_hidden_size": width, "patch_size": 14,
                       "fullatt_block_indexes": [1], "window_size": 56},
        tie_word_embeddings=False, **_ids(tok),
    )  # fmt: skip
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(min_pixels=min_pixels, max_pixels=max_pixels), tok, Qwen2VLVideoProcessor(),
        chat_template=template or CHAT_TEMPLATE.replace("<image>", templates.QWEN_IMAGE),
    )  # fmt: skip
    return save(folder, Qwen2_5_VLForConditionalGeneration(config), processor)


def qwen2_5_vl_published(folder: Path, *, tok=None, **options) -> str:
    """Qwen2.5-VL with its published template, which adds a default system turn."""
    tok = tokenizer_with(tok, "<|im_start|>", bos=None, eos="<|im_end|>")
    return qwen2_5_vl(folder, tok=tok, template=templates.QWEN2_VL, **options)


def qwen2_vl(folder: Path, *, seed=0, width=32, layers=2, min_pixels=28 * 28, max_pixels=56 * 56, tok=None) -> str:
    """Qwen2-VL: a token for every 28 x 28 pixels."""
    torch.manual_seed(seed)
    tok = tokenizer_with(tok, *PADS, "<|im_start|>", bos=None, eos="<|im_end|>")
    config = Qwen2VLConfig(
        text_config=text_sizes(len(tok), width, layers, rope_parameters=_rope(width // 8)),
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": width, "mlp_ratio": 2, "num_heads": 2,
                       "patch_size": 14, "spatial_merge_size": 2},
        tie_word_embeddings=False, **_ids(tok),
    )  # fmt: skip
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(min_pixels=min_pixels, max_pixels=max_pixels), tok, Qwen2VLVideoProcessor(),
        chat_template=templates.QWEN2_VL,
    )  # fmt: skip
    return save(folder, Qwen2VLForConditionalGeneration(config), processor)


def _qwen3_processor(tok, min_pixels: int, max_pixels: int, template: str) -> Qwen3VLProcessor:
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(patch_size=16, size=limits), tok, Qwen3VLVideoProcessor(), chat_template=template
    )


def qwen3_vl(folder: Path, *, seed=0, width=32, layers=2, min_pixels=32 * 32, max_pixels=64 * 64, tok=None) -> str:
    """Qwen3-VL: a token for every 32 x 32 pixels, the tower's inner layers added to the decoder's."""
    torch.manual_seed(seed)
    tok = tokenizer_with(tok, *PADS, "<|im_start|>", bos=None, eos="<|im_end|>")
    config = Qwen3VLConfig(
        text_config=text_sizes(len(tok), width, layers, head_dim=8, rope_parameters=_rope(4, mrope_interleaved=True)),
        vision_config={**TOWER, "hidden_size": 16, "out_hidden_size": width, "patch_size": 16,
                       "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        tie_word_embeddings=False, **_ids(tok),
    )  # fmt: skip
    processor = _qwen3_processor(tok, min_pixels, max_pixels, templates.QWEN3_VL)
    return save(folder, Qwen3VLForConditionalGeneration(config), processor)


def qwen3_5(folder: Path, *, seed=0, width=32, layers=2, min_pixels=32 * 32, max_pixels=64 * 64, tok=None) -> str:
    """Qwen3.5: linear attention in all but the last layer, thoughts in the template, Qwen3-VL's processor.

    AutoTokenizer gives it Qwen's own pre-tokenizer, whatever ``tok`` has.
    """
    torch.manual_seed(seed)
    tok = tokenizer_with(tok, *PADS, "<|im_start|>", bos=None, eos="<|im_end|>", pad="<|endoftext|>")
    rope = _rope(4, mrope_interleaved=True, partial_rotary_factor=1.0)
    linear = dict.fromkeys(["linear_num_key_heads", "linear_num_value_heads"], 2)
    linear |= dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim"], 8)
    layer_types = ["linear_attention"] * (layers - 1) + ["full_attention"]
    config = Qwen3_5Config(
        text_config=text_sizes(
            len(tok), width, layers, head_dim=8, rope_parameters=rope, layer_types=layer_types, **linear
        ),
        vision_config={**TOWER, "hidden_size": 16, "out_hidden_size": width, "patch_size": 16,
                       "num_position_embeddings": 16},
        tie_word_embeddings=False, **_ids(tok),
    )  # fmt: skip
    processor = _qwen3_processor(tok, min_pixels, max_pixels, templates.QWEN3)
    return save(folder, Qwen3_5ForConditionalGeneration(config), processor)
