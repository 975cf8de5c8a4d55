"""A live teacher: frozen, in eval mode, in its own precision and under its own ZeRO stage.

Legend: N paired positions, G teacher width.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import BitsAndBytesConfig

from ..errors import InputError
from ..objectives import Head, HiddenSignal, redirected
from ..pretrained import HALVES, ModelOptions, load_model, loading_under, precision
from ..streams import StreamEncoder
from .packed import prove_packing, with_positions

DROPPED = ("optimizer", "scheduler", "gradient_clipping", "gradient_accumulation_steps", "train_batch_size")


@dataclass
class TeacherOptions(ModelOptions):
    """The teacher: a model that is only read."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "bfloat16"
    """Precision of the teacher's weights; auto: as they are saved."""
    zero_stage: Literal[0, 3] = 0
    """Under DeepSpeed: 0 keeps a whole teacher on every rank, 3 shards it over the ranks."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed settings of a sharded teacher; optimizer, scheduler and optimizer offload are removed."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Load the linear layers in NF4 or LLM.int8 (bitsandbytes); the head stays as it is. Not with zero_stage 3."""
    cache: str | None = None
    """The folder that vlm-taid cache wrote of this teacher: it is read instead, and no teacher is loaded."""
    system: str | None = None
    """A system prompt that the teacher alone reads, before a row's own; rows without a chat template have none."""
    max_pixels: int | None = None
    """The most pixels of a picture that the teacher sees, if its image processor has such a limit (Qwen-VL)."""
    image_processor: dict[str, Any] = field(default_factory=dict)
    """Settings of the teacher's image processor over the saved ones, as {size: {height: 672, width: 672}}."""

    def check(self) -> None:
        """Raises:
        InputError: a quantised teacher that is to be sharded, or bitsandbytes is missing.
        """
        if self.quantize is None:
            return
        if self.zero_stage == 3:
            raise InputError(
                "teacher.quantize: a quantised teacher cannot be sharded: set teacher.zero_stage to 0, or leave "
                "quantize out"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise InputError('teacher.quantize needs bitsandbytes: pip install "vlm-taid[quantize]"')

    @property
    def image_settings(self) -> dict[str, Any]:
        """``image_processor`` with ``max_pixels`` in it."""
        return self.image_processor | ({} if self.max_pixels is None else {"max_pixels": self.max_pixels})


class LiveTeacher:
    """Runs the teacher beside the student.

    Args:
        options: TeacherOptions.
        device: where a teacher that is not sharded lives.

    Load it after the student: from_pretrained must not see the student's DeepSpeed config. Set ``head.columns`` by
    ``share`` when the shared vocabulary is known.
    """

    def __init__(self, options: TeacherOptions, device: torch.device):
        self.options = options
        with loading_under(options.zero_stage, precision(options)):
            self.model: Any = load_model(options, **_quantized(options, device)).requires_grad_(False).eval()
        if options.zero_stage == 3:
            self.wrapper: Any = self._sharded()
        else:
            self.wrapper = self.model if options.quantize else self.model.to(device)

        def prove() -> None:  # a weight that a forward gives back, ZeRO-3 would gather for each one
            self.head = Head.of(self.model)

        with torch.no_grad():
            redirected(self.wrapper, self.model, prove)

    def _sharded(self) -> Any:
        import deepspeed

        engine = deepspeed.initialize(model=self.model, config=teacher_config(self.options, self.model.dtype))[0]
        engine.eval()
        return engine

    @property
    def head_rows(self) -> int:
        """Rows of the language head."""
        return head_rows(self.model)

    def share(self, columns: Tensor | slice, rest: Tensor | None = None) -> None:
        """Cuts the head to the shared vocabulary.

        Args:
            columns: the teacher's ids of the shared tokens, [C] or a slice.
            rest: the ids [R] of the rest bucket; None without one.
        """
        self.head = replace(self.head, columns=columns, rest=rest)

    @torch.no_grad()
    def signal(self, batch: Mapping[str, Any]) -> HiddenSignal:
        """Hidden states at a PairedBatch's ``teacher_rows_N``, and the head; its weight is there in ``gathered()``."""
        at = batch["teacher"], batch["teacher_rows_N"]
        return HiddenSignal(redirected(self.wrapper, self.model, lambda: hidden_at(self.model, *at)), self.head)

    def prove_packing(self, encoder: StreamEncoder) -> None:
        """As ``packed.prove_packing``; every rank must call."""
        redirected(self.wrapper, self.model, lambda: prove_packing(self.model, encoder, hidden_at))

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Holds the whole head on every rank while a loss is made; every rank must enter."""
        if self.options.zero_stage == 0:
            yield
            return
        import deepspeed

        parameters = [p for p in (self.head.weight, self.head.bias) if p is not None]
        with deepspeed.zero.GatheredParameters(parameters):
            yield


def _quantized(options: TeacherOptions, device: torch.device) -> dict[str, Any]:
    """What from_pretrained is told of the quantisation; such a model is made where it stays."""
    if options.quantize is None:
        return {}
    dtype = torch.bfloat16 if options.dtype == "auto" else getattr(torch, options.dtype)
    config = BitsAndBytesConfig(
        load_in_4bit=options.quantize == "4bit",
        load_in_8bit=options.quantize == "8bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config, "device_map": {"": device}}


def head_rows(model: Any) -> int:
    """Rows of a model's language head; a ZeRO-3 weight tells its whole shape."""
    weight = model.get_output_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]


def hidden_at(model: Any, inputs: dict[str, Any], rows_N: Tensor) -> Tensor:
    """Last hidden states [N, width] of a model's backbone at rows of the flattened [B * T] batch."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    inputs = {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in with_positions(model, inputs).items()
    }
    hidden_BTG = model.base_model(**inputs, use_cache=False).last_hidden_state
    return hidden_BTG.flatten(0, 1)[rows_N]


def teacher_config(options: TeacherOptions, loaded: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed config of a sharded teacher of that type: no optimizer, no scheduler, no optimizer offload."""
    config = {key: value for key, value in copy.deepcopy(options.deepspeed).items() if key not in DROPPED}
    zero = {k: v for k, v in config.get("zero_optimization", {}).items() if k != "offload_optimizer"}
    config["zero_optimization"] = {**zero, "stage": options.zero_stage}
    config["train_micro_batch_size_per_gpu"] = 1
    for key, dtype in HALVES.items():
        config[key] = {"enabled": loaded == dtype}
    return config
