"""Loads a model for generation, on the right device and in the right type."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import PreTrainedModel

from vlm_taid.errors import InputError
from vlm_taid.pretrained import ModelOptions, load_model, load_processor


def resolve_device(device: str) -> torch.device:
    """``auto`` is this rank's GPU where there is one, else the CPU; anything else is torch's own name."""
    if device != "auto":
        return torch.device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def resolve_dtype(dtype: str, device: torch.device) -> Any:
    """``auto`` is the saved type on an accelerator and float32 on a CPU, where half types are slow and coarse."""
    if dtype == "auto":
        return "float32" if device.type == "cpu" else "auto"
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {dtype!r} is unknown; try auto, float32, bfloat16 or float16")
    return dtype


def load(
    model: str,
    *,
    processor: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Loads a model and its processor for evaluation.

    Args:
        model: a model folder, or a hub name.
        processor: where the processor lies; the model's own place if None.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; see `resolve_dtype`.
        device: ``auto`` or a torch device; see `resolve_device`.
        attn_implementation: transformers' attention (sdpa, eager, flash_attention_2, ...); the model's own if None.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        The model in eval mode on its device (AutoModelForImageTextToText where its config maps to that, else
        AutoModelForCausalLM), and its processor (a tokenizer for text-only models).

    Raises:
        InputError: no such folder, no safetensors weights or some missing, or transformers cannot load it.
    """
    torch_device = resolve_device(device)
    options = ModelOptions(
        model, resolve_dtype(dtype, torch_device), attn_implementation, trust_remote_code=trust_remote_code
    )
    loaded: Any = load_model(options)
    loaded_processor = load_processor(processor or model, trust_remote_code=trust_remote_code)
    return loaded.to(torch_device).eval(), loaded_processor
