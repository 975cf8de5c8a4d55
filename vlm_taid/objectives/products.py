"""The matrix products of the loss: half-precision factors, fp32 results.

Legend: n rows of a chunk, H hidden width, V rows of a head, C columns in use.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

TILE = 16384  # rows of a half-precision head that are in fp32 at a time, on a CPU
SCRATCH_BYTES = 2**24  # a tile of weights in fp32, or some tiles' gradient


def logits(
    hidden_nH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    columns: Tensor | slice | None,
    out: Tensor | None = None,
) -> Tensor:
    """fp32 products [n, C] with the rows named by ``columns``, plus bias; a gathered weight lives a tile long."""
    hidden_nH, weight_VH = hidden_nH.detach(), weight_VH.detach()
    bias_V = None if bias_V is None else bias_V.detach()
    if isinstance(columns, slice):
        weight_VH, bias_V = weight_VH[columns], None if bias_V is None else bias_V[columns]
        columns = None
    width = weight_VH.shape[0] if columns is None else len(columns)
    out_nC = hidden_nH.new_empty(hidden_nH.shape[0], width, dtype=torch.float32) if out is None else out
    whole = columns is None and (weight_VH.dtype == torch.float32 or weight_VH.is_cuda)
    for start in range(0, width, width if whole else TILE):
        tile = slice(start, min(width, start + (width if whole else TILE)))
        rows_tH = weight_VH[tile] if columns is None else weight_VH[columns[tile]]
        out_nC[:, tile] = mm(hidden_nH, rows_tH.T)
    if bias_V is not None:
        out_nC += (bias_V if columns is None else bias_V[columns]).float()
    return out_nC


def gradient_dtype(weight: Tensor) -> torch.dtype:
    """Precision of the logits' gradient in its products: fp32, or bf16 where a bf16 head's products are the faster so.

    bf16 rounds it by 0.17 %; a CPU that does not multiply bf16 is three times as fast in fp32; fp16 would lose small
    ones. The products add up in fp32 in any case.
    """
    if weight.dtype != torch.bfloat16 or not (weight.is_cuda or multiplies_bf16()):
        return torch.float32
    return torch.bfloat16


@cache
def multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16; taken for granted where torch cannot tell."""
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return known.get("architecture") != "x86_64" or bool(known.get("avx512_bf16") or known.get("amx_bf16"))


class Scratch:
    """Memory for what is short-lived, one thing at a time: the C library's heap grows when each has its own."""

    def __init__(self, device: torch.device):
        self._memory = torch.empty(0, dtype=torch.float32, device=device)

    @staticmethod
    def fitting(size: int) -> int:
        """How many of so many bytes it is meant for, at least 1."""
        return max(1, SCRATCH_BYTES // size)

    def take(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor in it; what was taken before is gone."""
        numbers = math.prod(shape)
        floats = -(-numbers * dtype.itemsize // 4)
        if floats > self._memory.numel():
            self._memory = self._memory.new_empty(floats)
        return self._memory[:floats].view(dtype)[:numbers].view(shape)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in fp32, as ``mm`` does it."""
    if b.dtype != torch.float32 and b.is_cuda:  # not run here: no GPU
        torch.mm(a.to(b.dtype), b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b.float(), out=out)


def mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result; half-precision factors are multiplied as they are, without rounding the result."""
    if b.dtype != torch.float32 and b.is_cuda:  # not run here: no GPU
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


@contextmanager
def fp32_results(weight: Tensor):
    """On a CPU with a bf16 head: fp32 tensors are multiplied in bf16 with fp32 results (exact for bf16 values)."""
    if weight.dtype != torch.bfloat16 or weight.is_cuda:
        yield
        return
    matmul: Any = torch.backends.mkldnn.matmul  # pyright: ignore[reportAttributeAccessIssue]
    saved = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = saved
