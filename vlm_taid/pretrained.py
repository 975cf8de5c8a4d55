"""Loading of models and processors, as transformers saves them: what students, teachers and evaluation share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations import deepspeed as hf_deepspeed

from .errors import InputError

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""DeepSpeed's names of the half precisions."""


@dataclass
class ModelOptions:
    """A model in transformers' own format."""

    path: str
    """Folder or hub id of the model and its processor."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    """Precision of the loaded weights; auto: as they are saved."""
    attn_implementation: str | None = None
    """Attention of transformers (sdpa, eager, flash_attention_2, ...); None: the model's default."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


def load_processor(
    path: str | Path,
    *,
    trust_remote_code: bool = False,
    image_settings: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Any:
    """The processor of a model, or its tokenizer where there is no processor.

    Args:
        path: folder or hub id.
        trust_remote_code: run code that comes with it.
        image_settings: settings of the image processor over the saved ones.
        revision: branch, tag or commit of a hub id; None: its main.

    Raises:
        InputError: neither can be loaded, or the image processor does not have such a setting.
    """
    check_folder(path)
    try:
        settings = _settings(trust_remote_code, revision)
        processor = AutoProcessor.from_pretrained(path, **settings)
        if not isinstance(processor, ProcessorMixin):
            processor = AutoTokenizer.from_pretrained(path, **settings)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: no processor or tokenizer can be loaded: {first_line(error)}{_where(path)}"
        ) from error
    if image_settings:
        _set_images(path, processor, image_settings)
    return processor


def _where(path: str | Path) -> str:
    return "" if Path(path).exists() else " There is no such folder here, so it was looked for on the hub."


def _settings(trust_remote_code: bool, revision: str | None) -> dict[str, Any]:
    return {"trust_remote_code": trust_remote_code} | ({} if revision is None else {"revision": revision})


def _set_images(path: str | Path, processor: Any, settings: Mapping[str, Any]) -> None:
    """Makes the processor's image processor anew with the settings.

    Raises:
        InputError: naming the setting that it does not have.
    """
    images = getattr(processor, "image_processor", None)
    if images is None:
        raise InputError(f"{path}: the model reads text alone, it has no image processor to set {', '.join(settings)}")
    saved = images.to_dict()
    known = sorted({*saved, *getattr(images.valid_kwargs, "__annotations__", {})} - {"image_processor_type"})
    for key in settings:
        if key not in known:
            raise InputError(
                f"{path}: its image processor, {type(images).__name__}, has no {key}; set one of its own in "
                f"teacher.image_processor: {', '.join(known)}"
            )
    try:
        processor.image_processor = type(images)(**{**saved, **settings})
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {type(images).__name__} refuses {dict(settings)}: {first_line(error)}") from error


def load_model(options: ModelOptions, *, revision: str | None = None, **more: Any) -> PreTrainedModel:
    """The model, by AutoModelForImageTextToText where its family has one, else by AutoModelForCausalLM.

    Args:
        options: ModelOptions.
        revision: branch, tag or commit of a hub id; None: its main.
        more: further arguments of from_pretrained.

    Raises:
        InputError: the folder is missing, holds no safetensors weights (pickles are never opened), or lacks tensors.
    """
    check_folder(options.path)
    check_weights(options.path)
    settings = _settings(options.trust_remote_code, revision)
    try:
        config = AutoConfig.from_pretrained(options.path, **settings)
        is_vlm = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if options.attn_implementation is not None:
            settings["attn_implementation"] = options.attn_implementation
        auto: Any = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
        model, info = auto.from_pretrained(
            options.path,
            config=config,
            dtype=options.dtype if options.dtype == "auto" else getattr(torch, options.dtype),
            use_safetensors=True,
            output_loading_info=True,
            **settings,
            **more,
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise InputError(
            f"{options.path}: the model cannot be loaded: {first_line(error)}{_where(options.path)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{options.path}: the weights lack {len(missing)} tensors of the model, the first is {missing[0]}: "
            "the folder is incomplete or its config.json belongs to another model"
        )
    return model


def precision(options: ModelOptions) -> torch.dtype:
    """What the weights are loaded in."""
    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    try:
        config = AutoConfig.from_pretrained(options.path, trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError):  # load_model says what is wrong
        return torch.float32
    saved = config.dtype or config.get_text_config().dtype or torch.float32
    return getattr(torch, saved) if isinstance(saved, str) else saved


@contextmanager
def loading_under(stage: int, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """What from_pretrained sees: this ZeRO stage, not that of the run; at stage 3 the weights are held in ``dtype``."""
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    run = reference() if reference is not None else None
    kept = None
    if stage == 3:  # the global is a weak reference: keep the object alive
        half = {key: {"enabled": True} for key, held in HALVES.items() if held == dtype}  # else it holds fp32
        zero = {"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1}
        kept = hf_deepspeed.HfDeepSpeedConfig(zero | half)
    else:
        hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        del kept
        if run is not None:
            hf_deepspeed.set_hf_deepspeed_config(run)
        else:
            hf_deepspeed.unset_hf_deepspeed_config()


def check_folder(path: str | Path) -> None:
    """Refuses a path that means a folder and is none, before a hub is asked for it."""
    text = str(path)
    looks_local = text.startswith((".", "/", "~")) or text.count("/") > 1
    if Path(path).is_dir():
        if not (Path(path) / "config.json").is_file():
            raise InputError(f"{path}: no config.json: a model folder in transformers' format was expected")
    elif looks_local or Path(path).exists():
        raise InputError(f"{path}: no such model folder")


def check_weights(path: str | Path) -> None:
    """Refuses a local folder without safetensors weights.

    Raises:
        InputError: naming what is there instead.
    """
    folder = Path(path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles:
        raise InputError(
            f"{path}: its weights are a pickle ({pickles[0]}), which can run code when it is opened: save them as "
            "safetensors (model.save_pretrained does) in a place where you trust the file"
        )
    raise InputError(f"{path}: no weights: *.safetensors was expected beside config.json")


def vision_towers(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The model's vision towers: the outermost submodules that are built from its vision config."""
    config = getattr(model.config, "vision_config", None)
    towers: list[PreTrainedModel] = []
    for module in model.modules():
        if not isinstance(module, PreTrainedModel) or type(module.config) is not type(config):
            continue
        if module is not model and not any(module is inner for tower in towers for inner in tower.modules()):
            towers.append(module)
    return towers


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its name if it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
