"""Language heads as data: what turns a hidden state into logits, proven against the model that it comes from.

Legend: N positions, T short input, H hidden width, V rows of the head, C columns in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import InputError
from .products import TILE


def redirected(wrapper: nn.Module, module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Runs ``function(*args)`` as ``module``'s forward, called through ``wrapper``.

    So the hooks of DDP, DeepSpeed and FSDP fire (parameters are gathered, gradients are reduced) although the
    function, not the module's own forward, does the work. ``wrapper`` may be the module itself.
    """
    saved = module.__dict__.get("forward")  # accelerate leaves a forward on the instance

    def restore():
        if saved is not None:
            module.forward = saved
        else:
            del module.forward

    def once(*inner: Any) -> Any:
        restore()
        return function(*inner)

    module.forward = once
    try:
        return wrapper(*args)
    finally:
        if module.__dict__.get("forward") is once:
            restore()


def weight_and_bias(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """A module's own parameters of these names, not read as attributes.

    ZeRO-3 takes a sharded attribute that is read in a model's forward for one that this forward needs: from then on it
    would gather the head before each forward and hold it to its end.
    """
    found = dict(module.named_parameters(recurse=False))
    return found.get("weight"), found.get("bias")


@dataclass(frozen=True)
class Head:
    """A language head: ``softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)``, cut to ``columns``.

    Args:
        weight: [V, H].
        bias: [V] or None.
        scale: factor on the logits (Granite divides by ``logits_scaling``, Cohere multiplies by ``logit_scale``).
        softcap: soft cap of the logits (Gemma 2), or None.
        columns: this model's ids of the shared vocabulary, in the shared order ([C]; a slice costs no copy, see
            ``as_slice``); None: all rows.
        rest: this model's real ids outside the shared vocabulary ([R]); all their mass is one more bucket, after the
            columns. None: there is none. Rows in neither (padding) are in no bucket.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    columns: Tensor | slice | None = None
    rest: Tensor | None = None

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, columns: Tensor | slice | None = None) -> Head:
        """The head of a transformers model, proven: on a short input it gives the model's own logits.

        The hidden state is amplified for the proof, so that a soft cap bends and a wrong one shows.

        Args:
            model: with weights that are there (under ZeRO-3, gathered).
            columns: this model's ids of the shared vocabulary; None for all.

        Raises:
            InputError: no form of head that is known here gives the model's logits.
        """
        output: Any = model.get_output_embeddings()
        weight, bias = (None, None) if output is None else weight_and_bias(output)
        if weight is None:
            raise InputError(f"{type(model).__name__} has no language head (get_output_embeddings() is None)")
        config = model.config.get_text_config()
        softcap = getattr(config, "final_logit_softcapping", None)
        scales = [1.0 / value for value in [getattr(config, "logits_scaling", None)] if value]
        scales += [value for value in [getattr(config, "logit_scale", None)] if value]
        plain = cls(weight, bias)
        forms = [plain] + [replace(plain, scale=scale) for scale in scales]
        forms += [replace(plain, softcap=softcap)] if softcap else []

        raw_TV, own_TV = _raw_and_own_logits(model, plain, 3.0 * (softcap or 10.0))
        size = own_TV.masked_fill(own_TV == -torch.inf, 0.0).abs().max().clamp_min(1e-6)
        curved = [form.curve(raw_TV.clone()) for form in forms]  # padding may be -inf in both
        found = [
            float((form_TV - own_TV).masked_fill_(form_TV == own_TV, 0.0).abs().max() / size) for form_TV in curved
        ]
        best = min(range(len(forms)), key=found.__getitem__)
        tolerance = 1e-3 if own_TV.dtype == torch.float32 else 3e-2
        if not found[best] <= tolerance:
            raise InputError(
                f"{type(model).__name__}: the language head is none of those known here (a linear head with bias, "
                f"scale or soft cap): its logits differ from the model's own by {found[best]:.2g} of their size"
            )
        return replace(forms[best], columns=columns)

    @property
    def width(self) -> int:
        """Columns in use, C."""
        if isinstance(self.columns, slice):
            return self.columns.stop - self.columns.start
        return self.weight.shape[0] if self.columns is None else len(self.columns)

    @property
    def has_rest(self) -> bool:
        """Whether there is a rest bucket, index C."""
        return self.rest is not None and len(self.rest) > 0

    def buckets_of(self, ids_N: Tensor) -> Tensor:
        """The bucket of each of this model's ids: its place among the columns, C in the rest, -1 in neither."""
        if self.columns is None:
            return ids_N
        rows = self.weight.shape[0]
        place_V = torch.full((rows,), -1, dtype=torch.long, device=ids_N.device)
        place_V[self.columns] = torch.arange(self.width, device=ids_N.device)
        if self.rest is not None:
            place_V[self.rest] = self.width
        return place_V[ids_N]

    def curve(self, raw: Tensor) -> Tensor:
        """Scale and soft cap, in place, on raw products plus bias."""
        if self.scale != 1.0:
            raw.mul_(self.scale)
        if self.softcap is not None:
            raw.div_(self.softcap).tanh_().mul_(self.softcap)
        return raw

    def curve_gradient(self, logits: Tensor, gradient: Tensor) -> Tensor:
        """The gradient in the raw products from that in the logits, both [N, B]; written over ``gradient``."""
        if self.softcap is not None:
            gradient.mul_(1.0 - (logits / self.softcap).square_())
        return gradient.mul_(self.scale) if self.scale != 1.0 else gradient

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """Dense fp32 logits [N, C], or [N, C + 1] with the rest's logsumexp last; differentiable: the reference."""
        logits_NC = self._rows(hidden_NH, slice(None) if self.columns is None else self.columns)
        if self.rest is None or not self.has_rest:
            return logits_NC
        return torch.cat([logits_NC, self._rows(hidden_NH, self.rest).logsumexp(-1, keepdim=True)], -1)

    def _rows(self, hidden_NH: Tensor, at: Tensor | slice) -> Tensor:
        dtype = torch.promote_types(torch.float32, self.weight.dtype)
        bias = None if self.bias is None else self.bias[at].to(dtype)
        logits_NC = F.linear(hidden_NH.to(dtype), self.weight[at].to(dtype), bias) * self.scale
        return logits_NC if self.softcap is None else self.softcap * torch.tanh(logits_NC / self.softcap)


def as_slice(columns_C: Tensor) -> Tensor | slice:
    """Consecutive ids as a slice, so that a head is cut without a copy; others as they are."""
    first = int(columns_C[0]) if len(columns_C) else 0
    if torch.equal(columns_C.cpu(), torch.arange(first, first + len(columns_C))):
        return slice(first, first + len(columns_C))
    return columns_C


@torch.no_grad()
def _raw_and_own_logits(model: Any, plain: Head, amplify: float) -> tuple[Tensor, Tensor]:
    """Of a short input, amplified: the head's products [T, V] in fp32, and the logits [T, V] that the model gives.

    The products are made where the model calls its head: there its weight is whole, and under FSDP a head that is
    called once more than the norm with which it is grouped would no longer be gathered in time.
    """
    output, kept = model.get_output_embeddings(), []
    own_forward, had_one = output.forward, "forward" in output.__dict__

    def amplified(module, args, output):
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden * (amplify / hidden.norm(dim=-1, keepdim=True).mean().clamp_min(1e-6))
        return output

    def with_products(hidden_BTH: Tensor) -> Tensor:
        weight, bias = weight_and_bias(output)
        assert weight is not None
        head = replace(plain, weight=weight, bias=bias)
        tiles = [slice(start, start + TILE) for start in range(0, len(weight), TILE)]  # no whole fp32 copy
        kept.append(torch.cat([replace(head, columns=tile)(hidden_BTH[0]) for tile in tiles], -1))
        return own_forward(hidden_BTH)

    device = next(model.parameters()).device
    ids_BT = torch.arange(3, 3 + 6, device=device)[None]
    modes = [(module, module.training) for module in model.modules()]  # some parts may be kept in eval mode
    hook = model.base_model.register_forward_hook(amplified)
    output.forward = with_products
    try:
        model.eval()
        own_TV = model.forward(input_ids=ids_BT, use_cache=False).logits[0]
    finally:
        hook.remove()
        if had_one:
            output.forward = own_forward
        else:
            del output.forward
        for module, training in modes:
            module.training = training
    if not kept:
        raise InputError(f"{type(model).__name__}: its forward does not call its language head, so it cannot be proven")
    return kept[0], own_TV
