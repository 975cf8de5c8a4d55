"""SmolVLM and Idefics3, Gemma 3, PaliGemma, Pixtral and Mistral 3."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessor,
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    PixtralVisionConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
)

from . import templates
from .parts import save, text_sizes, tokenizer_with

TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
GRID = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]


def smolvlm(folder: Path, *, seed=0, width=32, layers=2, tile=32, split=False, tok=None) -> str:
    """SmolVLM: (tile / 16)^2 tokens a tile; ``split``: up to 2 x 2 tiles with marks between them, and the whole."""
    torch.manual_seed(seed)
    tok = tokenizer_with(
        tok, *GRID, "<global-img>", bos="<|im_start|>", eos="<end_of_utterance>", image_token="<image>",
        fake_image_token="<fake_token_around_image>", end_of_utterance_token="<end_of_utterance>",
    )  # fmt: skip
    config = SmolVLMConfig(
        text_config={"model_type": "llama", **text_sizes(len(tok), width, layers), "pad_token_id": tok.pad_token_id},
        vision_config={**TOWER, "image_size": tile, "patch_size": 8},
        image_token_id=tok.convert_tokens_to_ids("<image>"), scale_factor=2, tie_word_embeddings=False,
        pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    sizes = {"size": {"longest_edge": 2 * tile}, "max_image_size": {"longest_edge": tile}}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(**sizes, do_image_splitting=split), tok, SmolVLMVideoProcessor(**sizes),
        image_seq_len=(tile // 16) ** 2, chat_template=templates.IDEFICS3,
    )  # fmt: skip
    return save(folder, SmolVLMForConditionalGeneration(config), processor)


def idefics3(folder: Path, *, seed=0, width=32, layers=2, tile=32, split=True, tok=None) -> str:
    """Idefics3: as SmolVLM, with splitting; its processor adds its own special tokens to the tokenizer."""
    torch.manual_seed(seed)
    tok = tokenizer_with(tok, *GRID, "<global-img>", bos="<|begin_of_text|>", eos="<end_of_utterance>", adds_bos=True)
    sizes = {"size": {"longest_edge": 2 * tile}, "max_image_size": {"longest_edge": tile}}
    processor = Idefics3Processor(
        Idefics3ImageProcessor(**sizes, do_image_splitting=split), tok, image_seq_len=(tile // 16) ** 2,
        chat_template=templates.IDEFICS3,
    )  # fmt: skip
    config = Idefics3Config(
        text_config={"model_type": "llama", **text_sizes(len(tok), width, layers), "pad_token_id": tok.pad_token_id},
        vision_config={**TOWER, "image_size": tile, "patch_size": 8},
        image_token_id=tok.convert_tokens_to_ids("<image>"), scale_factor=2, tie_word_embeddings=False,
        pad_token_id=tok.pad_token_id,
    )  # fmt: skip
    return save(folder, Idefics3ForConditionalGeneration(config), processor)


def gemma3(folder: Path, *, seed=0, width=32, layers=2, image=32, pooled=4, crops=False, tok=None) -> str:
    """Gemma 3: ``pooled`` tokens an image, newlines round it; ``crops``: more views of long pictures."""
    torch.manual_seed(seed)
    tok = tokenizer_with(
        tok, "<start_of_turn>", "<end_of_turn>", bos="<bos>", eos="<eos>", adds_bos=True,
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>",
    )  # fmt: skip
    config = Gemma3Config(
        text_config=text_sizes(
            len(tok), width, layers, head_dim=8, query_pre_attn_scalar=8, pad_token_id=tok.pad_token_id,
            layer_types=["sliding_attention"] * (layers - 1) + ["full_attention"],
        ),
        vision_config={**TOWER, "image_size": image, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=pooled, boi_token_index=tok.boi_token_id, eoi_token_index=tok.eoi_token_id,
        image_token_index=tok.image_token_id, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    crop = {"do_pan_and_scan": crops, "pan_and_scan_min_crop_size": 16, "pan_and_scan_max_num_crops": 2,
            "pan_and_scan_min_ratio_to_activate": 1.5}  # fmt: skip
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": image, "width": image}, **crop), tok, image_seq_length=pooled,
        chat_template=templates.GEMMA3,
    )  # fmt: skip
    model = Gemma3ForConditionalGeneration(config)
    torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight, std=0.3)  # zeros as it is made
    return save(folder, model, processor)


def paligemma(folder: Path, *, seed=0, width=32, layers=2, image=32, tok=None) -> str:
    """PaliGemma: a prefix that sees itself whole, then a causal suffix; no chat template; (image / 16)^2 tokens."""
    torch.manual_seed(seed)
    tok = tokenizer_with(tok, "<image>", bos="<bos>", eos="<eos>", adds_bos=True)
    image_processor = SiglipImageProcessor(size={"height": image, "width": image})
    image_processor.image_seq_length = (image // 16) ** 2
    processor = PaliGemmaProcessor(image_processor, tok)  # adds 1,152 tokens for places and shapes
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**text_sizes(len(tok), width, layers, head_dim=8, pad_token_id=tok.pad_token_id)),
        vision_config=SiglipVisionConfig(
            **TOWER, image_size=image, patch_size=16, projection_dim=width, vision_use_head=False
        ),
        image_token_index=tok.convert_tokens_to_ids("<image>"), projection_dim=width, tie_word_embeddings=False,
    )  # fmt: skip
    return save(folder, PaliGemmaForConditionalGeneration(config), processor)


MISTRAL_TOKENS = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")


def _pixtral_parts(tok, longest: int, merge: int):
    tok = tokenizer_with(
        tok, *MISTRAL_TOKENS, bos="<s>", eos="</s>", adds_bos=True, image_token="[IMG]",
        image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]",
    )  # fmt: skip
    image_processor = PixtralImageProcessor(size={"longest_edge": longest}, patch_size={"height": 8, "width": 8})
    vision = PixtralVisionConfig(**TOWER, image_size=longest, patch_size=8, head_dim=8)
    make = {"image_processor": image_processor, "tokenizer": tok, "patch_size": 8, "spatial_merge_size": merge}
    return tok, vision, make


def pixtral(folder: Path, *, seed=0, width=32, layers=2, longest=32, tok=None) -> str:
    """Pixtral 12B's form: LLaVA's class, a token for every 8 x 8 pixels and one a row; a system turn goes last."""
    torch.manual_seed(seed)
    tok, vision, make = _pixtral_parts(tok, longest, 1)
    config = LlavaConfig(
        text_config=MistralConfig(**text_sizes(len(tok), width, layers), head_dim=8, sliding_window=None),
        vision_config=vision,
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    processor = PixtralProcessor(**make, chat_template=templates.PIXTRAL)
    return save(folder, LlavaForConditionalGeneration(config), processor)


def mistral3(folder: Path, *, seed=0, width=32, layers=2, longest=64, tok=None) -> str:
    """Mistral Small 3.1: a token for every 16 x 16 pixels and one a row."""
    torch.manual_seed(seed)
    tok, vision, make = _pixtral_parts(tok, longest, 2)
    config = Mistral3Config(
        text_config=MistralConfig(**text_sizes(len(tok), width, layers), head_dim=8, sliding_window=None),
        vision_config=vision,
        image_token_index=tok.convert_tokens_to_ids("[IMG]"),
        vision_feature_layer=-1,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    processor = PixtralProcessor(**make, chat_template=templates.MISTRAL3)
    return save(folder, Mistral3ForConditionalGeneration(config), processor)
