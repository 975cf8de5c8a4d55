"""Loads a model folder for generation: safetensors only, checked before torch reads anything."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)

from vlm_taid.errors import InputError


def check_weights(folder: Path) -> None:
    """Raises InputError unless the model folder holds a configuration and safetensors weights."""
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no config.json; give a folder that save_pretrained wrote")
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder}: only pickle weights ({pickles[0]}), which can run code when loaded; "
            "save the model with safe_serialization (safetensors) first"
        )
    raise InputError(f"{folder}: no model weights (*.safetensors)")


def resolve_device(device: str) -> torch.device:
    """``auto`` is this rank's GPU where there is one, else the CPU; anything else is torch's own name."""
    if device != "auto":
        return torch.device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """``auto`` is the saved type on an accelerator and float32 on a CPU, where half types are slow and coarse."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    resolved: Any = getattr(torch, dtype, None)
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise InputError(f"dtype {dtype!r} is unknown; try auto, float32, bfloat16 or float16")
    return resolved


def load(
    model: str,
    *,
    processor: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Loads a model and its processor for evaluation.

    Args:
        model: a model folder, or a hub name.
        processor: where the processor lies; the model's own place if None.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; see `resolve_dtype`.
        device: ``auto`` or a torch device; see `resolve_device`.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        The model in eval mode on its device (AutoModelForImageTextToText where its config maps to that, else
        AutoModelForCausalLM), and its processor (a tokenizer for text-only models).

    Raises:
        InputError: no such folder, no safetensors weights or some missing, or transformers cannot load it.
    """
    if Path(model).is_dir():
        check_weights(Path(model))
    elif Path(model).exists() or model.startswith((".", "/", "~")):
        raise InputError(f"model {model}: not a folder")
    torch_device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, torch_device)
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
        reads_images = type(config) in AutoModelForImageTextToText._model_mapping or (
            "AutoModelForImageTextToText" in getattr(config, "auto_map", {})
        )
        model_class: Any = AutoModelForImageTextToText if reads_images else AutoModelForCausalLM
        processor_class = AutoProcessor if reads_images else AutoTokenizer
        loaded_processor = processor_class.from_pretrained(processor or model, trust_remote_code=trust_remote_code)
        loaded, report = model_class.from_pretrained(
            model,
            dtype=torch_dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise InputError(f"model {model}: transformers cannot load it: {error}") from error
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise InputError(f"model {model}: {len(missing)} weights are missing in its files, the first is {missing[0]}")
    return loaded.to(torch_device).eval(), loaded_processor
