"""Tiny models of real families with real processors, made on the spot from their own config classes.

``FAMILIES[name](folder, **options)`` makes one and returns the folder; ``made(name, **options)`` makes it once a
session. All take ``seed``, ``width``, ``layers`` and ``tok`` (a tokenizer, to which the family adds its special
tokens: so that two families share one). ``MORE_IMAGE_TOKENS`` are options that give a family another number of tokens
for a picture.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .llava_kin import fast_vlm, internvl, llava, llava_next, llava_onevision, llava_vicuna, perception_lm
from .others import gemma3, idefics3, mistral3, paligemma, pixtral, smolvlm
from .parts import COLOURS, TEXTS, save, text_sizes, tokenizer, tokenizer_with, vqa_rows
from .qwen_kin import qwen2_5_vl, qwen2_5_vl_published, qwen2_vl, qwen3_5, qwen3_vl
from .text import gemma2, llama, llama3, phi3, qwen2, qwen3

FAMILIES: dict[str, Callable[..., str]] = {
    "llava": llava_vicuna,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl_published,
    "qwen3_vl": qwen3_vl,
    "qwen3_5": qwen3_5,
    "internvl": internvl,
    "smolvlm": smolvlm,
    "idefics3": idefics3,
    "gemma3": gemma3,
    "paligemma": paligemma,
    "pixtral": pixtral,
    "mistral3": mistral3,
    "fast_vlm": fast_vlm,
    "perception_lm": perception_lm,
    "llama3": llama3,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "phi3": phi3,
}
TEXT_ONLY = ["llama3", "qwen2", "qwen3", "gemma2", "phi3"]
MORE_IMAGE_TOKENS: dict[str, dict[str, Any]] = {
    "llava": {"image": 48},
    "llava_next": {"tile": 48},
    "llava_onevision": {"tile": 48},
    "qwen2_vl": {"min_pixels": 84 * 84, "max_pixels": 112 * 112},
    "qwen2_5_vl": {"min_pixels": 84 * 84, "max_pixels": 112 * 112},
    "qwen3_vl": {"min_pixels": 96 * 96, "max_pixels": 128 * 128},
    "qwen3_5": {"min_pixels": 96 * 96, "max_pixels": 128 * 128},
    "internvl": {"tiles": 4},
    "smolvlm": {"split": True},
    "idefics3": {"split": False},
    "gemma3": {"pooled": 16},
    "paligemma": {"image": 48},
    "pixtral": {"longest": 64},
    "mistral3": {"longest": 128},
    "fast_vlm": {"image": 96},
    "perception_lm": {"tiles": 4},
}
_built: dict[tuple, str] = {}


def made(name: str, **options: Any) -> str:
    """The folder of a family, made once a session for the same options (``tok`` is told apart by identity)."""
    key = (name, *sorted(options.items(), key=lambda option: option[0]))
    if key not in _built:
        root = Path(tempfile.mkdtemp(prefix="families-"))
        atexit.register(shutil.rmtree, root, ignore_errors=True)
        _built[key] = FAMILIES[name](root / name, **options)
    return _built[key]


__all__ = ["COLOURS", "FAMILIES", "MORE_IMAGE_TOKENS", "TEXTS", "TEXT_ONLY", "fast_vlm", "llama", "llava", "made",
           "qwen2_5_vl", "save", "text_sizes", "tokenizer", "tokenizer_with", "vqa_rows"]  # fmt: skip
