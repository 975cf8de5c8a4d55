"""The gradients of a loss: to the hidden states, the head's weight and its bias, those that are wanted.

Legend: N answer tokens, n rows of a chunk, H hidden width, V rows of the head, v some of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import Scratch, gradient_dtype


class Gradients:
    """Sums what chunks of rows give.

    Args:
        hidden_NH, weight_VH, bias_V: what the loss is of.
        wants: which of them want a gradient.
        weight_dtype: in which the weight's is summed.
    """

    def __init__(
        self,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        wants: tuple[bool, bool, bool],
        weight_dtype: torch.dtype,
    ):
        self.head_VH = weight_VH.detach()
        # weights may be small, and a loss scale comes in backward: fp16 would lose the gradient before it
        hidden_dtype = torch.float32 if hidden_NH.dtype == torch.float16 else hidden_NH.dtype
        self.hidden_NH = torch.empty_like(hidden_NH, dtype=hidden_dtype) if wants[0] else None
        self.weight_VH = None
        if wants[1]:
            new = torch.empty if len(hidden_NH) else torch.zeros  # the first chunk overwrites it
            self.weight_VH = new(weight_VH.shape, dtype=weight_dtype, device=weight_VH.device)
        self.bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants[2] and bias_V is not None else None
        self.scratch, self.product = Scratch(weight_VH.device), Scratch(weight_VH.device)
        self._written = False

    def room(self) -> Tensor | None:
        """The memory of the weight's gradient while no chunk has written there: fp32, [V * H], of bf16 [V * H / 2].

        What lies where a row of the head will be may stay until ``add`` is given that row.
        """
        if self.weight_VH is None or self._written or floats_a_row(self.weight_VH.shape[1], self.weight_VH.dtype) == 0:
            return None
        return self.weight_VH.view(-1).view(torch.float32)

    def chunk(self, at: slice, hidden_nH: Tensor, tile: int = 1) -> ChunkGradients:
        """For the gradients of a chunk, the rows ``at``, which come as tiles of so many rows of the head."""
        first, self._written = not self._written, True
        return ChunkGradients(self, at, hidden_nH, tile, first)


class ChunkGradients:
    """Takes a chunk's gradients in the raw products, fp32, from the head's first row to its last.

    Those that are multiplied in bf16 wait for each other: a product has the more to do, and the sum over the vocabulary
    is rounded the fewer times.
    """

    def __init__(self, sums: Gradients, at: slice, hidden_nH: Tensor, tile: int, first: bool):
        self._sums, self._at, self._first = sums, at, first
        (n, H), dtype = hidden_nH.shape, gradient_dtype(sums.head_VH)
        self._half_nH = None if dtype == torch.float32 else hidden_nH.to(dtype)
        self._fp32_nH = hidden_nH.float()
        self._sum_nH = None if sums.hidden_NH is None else torch.zeros_like(self._fp32_nH)
        self._waiting = slice(0, 0)
        self._most = max(tile, sums.scratch.fitting(4 * H if self._half_nH is None else n * dtype.itemsize))

    def add_all(self, gradient_nV: Tensor) -> None:
        """Takes the gradient in the products with all rows, which lies nowhere else."""
        for start in range(0, gradient_nV.shape[1], self._most):
            rows = slice(start, min(start + self._most, gradient_nV.shape[1]))
            self.add(rows, gradient_nV[:, rows], in_place=False)

    def add(self, rows: slice, gradient_nv: Tensor, *, in_place: bool = True) -> None:
        """Takes the gradient in the products with a tile of rows; ``in_place``, it may lie where theirs will be."""
        sums = self._sums
        if sums.bias_V is not None:
            sums.bias_V[rows] += gradient_nv.sum(0)
        if self._half_nH is not None:
            if rows.stop - self._waiting.start > self._most:
                self._multiply_waiting()
            self._waiting = slice(self._waiting.start, rows.stop)
            self._half(slice(rows.start, rows.stop)).copy_(gradient_nv)
        elif self._sum_nH is not None:
            head_vH = sums.head_VH[rows]
            if head_vH.dtype != torch.float32:
                head_vH = sums.scratch.take(head_vH.shape).copy_(head_vH)
            self._sum_nH.addmm_(gradient_nv, head_vH)
        if sums.weight_VH is not None and (self._half_nH is None or sums.weight_VH.dtype == torch.float32):
            sum_vH = sums.weight_VH[rows]
            if sum_vH.dtype == torch.float32 and not (self._first and in_place):
                sum_vH.addmm_(gradient_nv.T, self._fp32_nH, beta=0.0 if self._first else 1.0)
            else:
                product_vH = torch.mm(gradient_nv.T, self._fp32_nH, out=sums.product.take(sum_vH.shape))
                sum_vH.copy_(product_vH) if self._first else sum_vH.add_(product_vH)

    def close(self) -> None:
        """All rows have been given."""
        self._multiply_waiting()
        if self._sums.hidden_NH is not None and self._sum_nH is not None:
            self._sums.hidden_NH[self._at] = self._sum_nH

    def _half(self, rows: slice) -> Tensor:
        """The place of waiting rows."""
        assert self._half_nH is not None
        whole_ng = self._sums.scratch.take((len(self._half_nH), self._most), self._half_nH.dtype)
        return whole_ng[:, rows.start - self._waiting.start : rows.stop - self._waiting.start]

    def _multiply_waiting(self) -> None:
        rows, sums = self._waiting, self._sums
        if self._half_nH is None or rows.start == rows.stop:
            return
        gradient_nv = self._half(rows)
        if self._sum_nH is not None:
            self._sum_nH += gradient_nv @ sums.head_VH[rows]
        if sums.weight_VH is not None and sums.weight_VH.dtype == gradient_nv.dtype:
            sums.weight_VH[rows].addmm_(gradient_nv.T, self._half_nH, beta=0.0 if self._first else 1.0)
        self._waiting = slice(rows.stop, rows.stop)


def floats_a_row(width: int, dtype: torch.dtype) -> int:
    """fp32 numbers that a row of a head's gradient has room for; 0: rows do not begin at a whole one."""
    size = width * dtype.itemsize
    return 0 if size % 4 else size // 4
