"""Loads a model for generation, on the right device and in the right type, with adapters if there are any."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from vlm_taid.errors import InputError
from vlm_taid.evaluation.card import hub_id
from vlm_taid.pretrained import ModelOptions, first_line, load_model, load_processor


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


MODEL_ARGS = ("attn_implementation", "dtype", "peft", "processor", "revision", "trust_remote_code")


def model_arguments(values: Mapping[str, Any], where: str = "--model_args") -> dict[str, Any]:
    """Arguments of `load` from a command line's words, as lm-eval spells them.

    Args:
        values: a value, or its text, for any of `MODEL_ARGS`.
        where: begins the messages.

    Raises:
        InputError: an unknown key, or a word that is not true or false.
    """
    found = dict(values)
    if "pretrained" in found:
        raise InputError(f"{where}: pretrained is the model itself: give it as --model {found['pretrained']}")
    if unknown := sorted(set(found) - set(MODEL_ARGS)):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(MODEL_ARGS)}")
    if "trust_remote_code" in found:
        word = str(found["trust_remote_code"]).lower()
        if word not in ("true", "false"):
            raise InputError(f"{where}: trust_remote_code is {word!r}, expected true or false")
        found["trust_remote_code"] = word == "true"
    return found


def model_args_text(model: str, values: Mapping[str, Any]) -> str:
    """How a model was loaded, as lm-eval's results files have it."""
    return ",".join(f"{key}={value}" for key, value in {"pretrained": model, **values}.items())


def load(
    model: str,
    *,
    processor: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    revision: str | None = None,
    peft: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Any]:
    """Loads a model and its processor for evaluation.

    Args:
        model: a model folder, or a hub name.
        processor: where the processor lies; the model's own place if None.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``; see `resolve_dtype`.
        device: ``auto`` or a torch device; see `resolve_device`.
        attn_implementation: transformers' attention (sdpa, eager, flash_attention_2, ...); the model's own if None.
        revision: branch, tag or commit of a hub name.
        peft: adapters on that model, a folder or a hub name; they are added to its weights.
        trust_remote_code: run Python code that comes with the model.

    Returns:
        The model in eval mode on its device (AutoModelForImageTextToText where its config maps to that, else
        AutoModelForCausalLM), and its processor (a tokenizer for text-only models).

    Raises:
        InputError: no such folder, no safetensors weights or some missing, or transformers or peft cannot load it.
    """
    if revision is not None and Path(model).is_dir():
        raise InputError(f"revision {revision}: {model} is a folder, revisions are the hub's")
    torch_device = resolve_device(device)
    options = ModelOptions(
        model, resolve_dtype(dtype, torch_device), attn_implementation, trust_remote_code=trust_remote_code
    )
    loaded: Any = load_model(options, revision=revision)
    if peft is not None:
        loaded = _with_adapters(loaded, peft)
    loaded_processor = load_processor(
        processor or model, trust_remote_code=trust_remote_code, revision=None if processor else revision
    )
    return loaded.to(torch_device).eval(), loaded_processor


def _with_adapters(model: PreTrainedModel, adapters: str) -> Any:
    """The model with the adapters added to its weights."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise InputError("peft: adapters need peft: pip install 'vlm-taid[peft]'") from error
    files = ["adapter_config.json", "adapter_model.safetensors"]  # a pickle is never opened
    folder = Path(adapters)
    try:
        if hub_id(adapters):
            folder = Path(snapshot_download(adapters, allow_patterns=files))
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise InputError(f"peft {adapters}: no {missing[0]}: a folder in peft's format is expected")
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted: Any = PeftModel.from_pretrained(model, str(folder))  # pyright: ignore[reportArgumentType]
            return adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError, UserWarning) as error:
        raise InputError(f"peft {adapters}: cannot be added to the model: {first_line(error)}") from error
