"""Packed batches through a model: the positions that it wants, and the proof that its rows do not see each other.

Legend: P packs, L their positions, S rows of all packs (what is left of each pack is one, of padding), T positions of
the longest row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data import Conversation, Part, Turn
from ..errors import InputError
from ..streams import StreamEncoder, packed


def with_positions(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A packed batch's inputs as the model reads them.

    Multimodal rotary positions (Qwen-VL and kin) are made of each row alone and follow the plain ones, which tell
    where rows begin. Flash attention takes all packs as one sequence.

    Args:
        model: a transformers model.
        inputs: as ``packed`` made them; others are given back as they are.
    """
    position_ids = inputs.get("position_ids")
    if position_ids is None:
        return inputs
    rope_index = getattr(model.base_model, "get_rope_index", None)
    if rope_index is not None:
        position_ids = torch.cat([position_ids[None], _rotary(rope_index, inputs)])
    shape = inputs["input_ids"].shape
    inputs = {**inputs, "position_ids": position_ids}
    if "flash" in str(getattr(model.config.get_text_config(), "_attn_implementation", "")):
        keys = [k for k, v in inputs.items() if isinstance(v, Tensor) and v.shape[-2:] == shape and k != "pixel_values"]
        inputs |= {key: inputs[key].reshape(*inputs[key].shape[:-2], 1, -1) for key in keys}
    return inputs


def _rotary(rope_index: Callable[..., Any], inputs: dict[str, Any]) -> Tensor:
    """Multimodal positions [3, P, L]."""
    ids_PL = inputs["input_ids"]
    starts_S = (inputs["position_ids"].flatten() == 0).nonzero().flatten()
    lengths_S = torch.diff(starts_S, append=starts_S.new_tensor([ids_PL.numel()])).tolist()

    def rows(values_PL: Tensor) -> Tensor:
        return pad_sequence(list(values_PL.flatten().split(lengths_S)), batch_first=True)

    mask_ST = rows(torch.ones_like(ids_PL))
    images = {key: inputs[key] for key in ("image_grid_thw",) if key in inputs}
    types_PL = inputs.get("mm_token_type_ids", torch.zeros_like(ids_PL))
    positions_3ST = rope_index(
        rows(ids_PL), mm_token_type_ids=rows(types_PL), attention_mask=mask_ST, **images
    )[0]  # fmt: skip
    return positions_3ST[:, mask_ST.bool()].view(3, *ids_PL.shape)


@torch.no_grad()
def prove_packing(model: Any, encoder: StreamEncoder, hidden_at: Callable[[Any, dict, Tensor], Tensor]) -> None:
    """Holds packed rows against the same rows alone.

    Args:
        model: a transformers model, in its wrapper's forward.
        encoder: its encoder.
        hidden_at: gives a model's hidden states at rows of a batch.

    Raises:
        InputError: the model's rows see each other, or it does not take packed rows.
    """
    name = type(model).__name__
    device, dtype = next(model.parameters()).device, model.dtype
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        worst = 0.0
        for rows in _probes(encoder):
            batch = encoder.without_limit(rows)
            lengths = [len(stream.input_ids_T) for stream in batch.streams]
            inputs, starts = packed(batch.inputs, lengths, [list(range(len(rows)))], encoder.tokenizer.pad_token_id)
            together = hidden_at(model, _on(device, inputs), torch.arange(sum(lengths), device=device))
            for row, start, length in zip(rows, starts, lengths, strict=True):
                alone_TH = hidden_at(
                    model, _on(device, encoder.without_limit([row]).inputs), torch.arange(length, device=device)
                ).float()
                off_TH = together[start : start + length].float() - alone_TH
                worst = max(worst, float((off_TH.norm(dim=-1) / alone_TH.norm(dim=-1)).max()))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        raise InputError(
            f"{name} does not take packed rows ({error}): set data.packing: false, and "
            "training.train_sampling_strategy: group_by_length for little padding"
        ) from error
    finally:
        for module, training in modes:
            module.training = training
    if not worst <= (1e-3 if dtype == torch.float32 else 0.1):
        raise InputError(
            f"{name} cannot be packed: in one sequence rows see each other (their hidden states move by {worst:.2g} of "
            "their size): set data.packing: false, and training.train_sampling_strategy: group_by_length for little "
            "padding"
        )


def _probes(encoder: StreamEncoder) -> list[list[Conversation]]:
    text = [
        Conversation(
            (Turn("user", (Part(asked),)), Turn("assistant", (Part(said),))), templated=encoder.filler.templated
        )
        for asked, said in (("What is this, and what is that?", "A circle."), ("And now?", "Nothing at all."))
    ]
    if not encoder.takes_images:
        return [[*text, encoder.filler]]
    return [[encoder.filler, text[0], encoder.filler, text[1]]]


def _on(device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
