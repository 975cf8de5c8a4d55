"""LLaVA and its kin: a tower, a projector, a decoder, and `<image>` repeated in the text."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    MistralConfig,
    PerceptionLMConfig,
    PerceptionLMForConditionalGeneration,
    PerceptionLMImageProcessor,
    PerceptionLMProcessor,
    PerceptionLMVideoProcessor,
    Qwen2Config,
    SiglipVisionConfig,
    TimmWrapperConfig,
)

from vlm_taid.students import CHAT_TEMPLATE, assemble

from . import templates
from .parts import save, text_sizes, tokenizer, tokenizer_with

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def llava(folder: Path, *, seed=0, width=32, layers=2, pad=0, image=32, tie=False, tok=None, template=None) -> str:
    """LLaVA with a CLIP tower: accepts_loss_kwargs is not set (its forward takes them).

    (image / 16)^2 tokens an image. ChatML, unless another template is given.
    """
    torch.manual_seed(seed)
    tok = tok or tokenizer()
    text = LlamaConfig(**text_sizes(len(tok) + pad, width, layers) | {"tie_word_embeddings": tie})
    vision = CLIPVisionConfig(**TOWER, image_size=image, patch_size=16)
    image_id = tok.convert_tokens_to_ids("<image>")
    model = LlavaForConditionalGeneration(
        LlavaConfig(text_config=text, vision_config=vision, image_token_index=image_id, tie_word_embeddings=tie)
    )
    size = {"height": image, "width": image}
    processor = LlavaProcessor(
        CLIPImageProcessor(size=size, do_center_crop=False, crop_size=size), tok, patch_size=16,
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template or CHAT_TEMPLATE,
    )  # fmt: skip
    return save(folder, model, processor)


def llava_vicuna(folder: Path, *, tok=None, **options) -> str:
    """LLaVA 1.5 as it is published: Vicuna's template, which leaves the begin of text to the tokenizer."""
    tok = tokenizer_with(tok, "<image>", bos="<s>", eos="</s>", adds_bos=True)
    return llava(folder, tok=tok, template=templates.LLAVA, **options)


def llava_next(folder: Path, *, seed=0, width=32, layers=2, tile=32, tok=None) -> str:
    """LLaVA-NeXT: tiles that fit the picture's shape, one newline token a row; smaller tiles, fewer tokens."""
    torch.manual_seed(seed)
    tok = tokenizer_with(tok, "<image>", bos="<s>", eos="</s>", adds_bos=True)
    pinpoints = [[tile, 2 * tile], [2 * tile, tile], [2 * tile, 2 * tile]]
    config = LlavaNextConfig(
        text_config=MistralConfig(**text_sizes(len(tok), width, layers), sliding_window=None),
        vision_config=CLIPVisionConfig(**TOWER, image_size=tile, patch_size=16),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": tile}, crop_size={"height": tile, "width": tile}, image_grid_pinpoints=pinpoints
    )
    processor = LlavaNextProcessor(
        image_processor, tok, patch_size=16, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=templates.LLAVA_NEXT,
    )  # fmt: skip
    return save(folder, LlavaNextForConditionalGeneration(config), processor)


def llava_onevision(folder: Path, *, seed=0, width=32, layers=2, tile=32, tok=None) -> str:
    """LLaVA-OneVision: tiles for a row's only picture, none where a row has several."""
    torch.manual_seed(seed)
    tok = tokenizer_with(tok, "<image>", "<video>", "<|im_start|>", bos=None, eos="<|im_end|>")
    pinpoints = [[rows * tile, columns * tile] for rows in (1, 2) for columns in (1, 2)]
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text_sizes(len(tok), width, layers)),
        vision_config=SiglipVisionConfig(**TOWER, image_size=tile, patch_size=16, vision_use_head=False),
        image_token_index=tok.convert_tokens_to_ids("<image>"),
        video_token_index=tok.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=False,
    )
    size = {"height": tile, "width": tile}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=pinpoints), tok,
        LlavaOnevisionVideoProcessor(size=size), num_image_tokens=(tile // 16) ** 2,
        vision_feature_select_strategy="full", chat_template=templates.LLAVA_ONEVISION,
    )  # fmt: skip
    return save(folder, LlavaOnevisionForConditionalGeneration(config), processor)


def internvl(folder: Path, *, seed=0, width=32, layers=2, image=32, tiles=1, tok=None) -> str:
    """InternVL: (image / 16)^2 tokens a tile; up to ``tiles`` of them and a thumbnail when more than one."""
    torch.manual_seed(seed)
    tok = tokenizer_with(
        tok, "<|im_start|>", bos=None, eos="<|im_end|>", start_image_token="<img>", end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>", video_token="<video>",
    )  # fmt: skip
    config = InternVLConfig(
        text_config=Qwen2Config(**text_sizes(len(tok), width, layers)),
        vision_config=InternVLVisionConfig(**TOWER, image_size=image, patch_size=8),
        image_token_id=tok.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=(image // 16) ** 2,
        tie_word_embeddings=False,
    )
    size = {"height": image, "width": image}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, crop_to_patches=tiles > 1, max_patches=tiles), tok,
        InternVLVideoProcessor(size=size), image_seq_length=(image // 16) ** 2, chat_template=templates.INTERNVL,
    )  # fmt: skip
    return save(folder, InternVLForConditionalGeneration(config), processor)


def fast_vlm(folder: Path, *, seed=0, width=32, layers=2, image=64, tower_args=None, tok=None) -> str:
    """The quickstart's family: a timm tower, a projector, a Qwen2 decoder; (image / 32)^2 tokens an image."""
    torch.manual_seed(seed)
    tok = tok or tokenizer()
    tower_args = tower_args or {"channels": [8, 8, 16, 16], "stem_width": 8, "norm_layer": "groupnorm1"}
    text = Qwen2Config(**text_sizes(len(tok), width, layers))
    return save(folder, *assemble("resnet10t", text, tok, image, tower_args=tower_args))


def perception_lm(folder: Path, *, seed=0, width=32, layers=2, tile=32, tiles=1, pooling=1, tok=None) -> str:
    """PerceptionLM: a timm token tower, (tile / 16 / pooling)^2 tokens a tile, Llama 3's template."""
    torch.manual_seed(seed)
    headers = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tok = tokenizer_with(
        tok, *headers, bos="<|begin_of_text|>", eos="<|eot_id|>", adds_bos=True,
        image_token="<|image|>", video_token="<|video|>",
    )  # fmt: skip
    tower = {"embed_dim": 16, "depth": 2, "num_heads": 2, "img_size": tile, "global_pool": ""}
    config = PerceptionLMConfig(
        text_config=LlamaConfig(**text_sizes(len(tok), width, layers)),
        vision_config=TimmWrapperConfig(
            architecture="vit_tiny_patch16_224", do_pooling=False, hidden_size=16, model_args=tower
        ),
        vision_use_cls_token=True,
        projector_pooling_ratio=pooling,
        image_token_id=tok.convert_tokens_to_ids("<|image|>"),
        video_token_id=tok.convert_tokens_to_ids("<|video|>"),
        tie_word_embeddings=False,
    )
    kind = {"vision_input_type": "thumb+tile" if tiles > 1 else "vanilla", "tile_size": tile, "max_num_tiles": tiles}
    processor = PerceptionLMProcessor(
        PerceptionLMVideoProcessor(size={"height": tile, "width": tile}), PerceptionLMImageProcessor(**kind), tok,
        patch_size=16, pooling_ratio=pooling, chat_template=templates.PERCEPTION_LM,
    )  # fmt: skip
    return save(folder, PerceptionLMForConditionalGeneration(config), processor)
