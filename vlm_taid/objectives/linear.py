"""linear_distillation: both language heads and the objective in one pass, without logits of all positions.

The rows are taken in chunks; a chunk's logits live in fp32 buffers that the next chunk reuses. The gradient is made
in the forward pass, so that no weight and no logits are kept for backward (a ZeRO-3 head need not be gathered twice).

Legend: N answer tokens, n rows of a chunk, H student width, G teacher width, V rows of the student's head,
C shared vocabulary.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .head import Head
from .objective import SFT, Objective

CHUNK_BYTES = 2**28  # four fp32 buffers of [n, V] fit into this many bytes
TILE = 16384  # rows of a half-precision head that are in fp32 at a time, on a CPU


@dataclass(frozen=True)
class HiddenSignal:
    """A live teacher's signal: its hidden states [N, G] at the paired positions, and its head."""

    hidden_NG: Tensor
    head: Head


TeacherSignal = HiddenSignal


@dataclass(frozen=True)
class LinearDistillationOutput:
    """loss_N: differentiable, times ``weights_N``. kl_N, ce_N: without weights or gradient, in nats (see ``Fused``)."""

    loss_N: Tensor
    kl_N: Tensor
    ce_N: Tensor


def linear_distillation(
    hidden_NH: Tensor,
    head: Head,
    target: TeacherSignal | None,
    objective: Objective,
    *,
    t: float | None = None,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    chunk: int | None = None,
) -> LinearDistillationOutput:
    """The objective at N positions from hidden states, without their logits ever being in memory at once.

    A student's token outside ``head.columns`` (a padded or unshared row) stays in its normaliser with target mass 0:
    it costs minus the log of the mass that the shared tokens hold, in every objective. The teacher's head is cut to
    its columns before the product. Products are in fp32 (of half-precision inputs), and so are softmax and target.

    Args:
        hidden_NH: the student's hidden states at the predicting positions.
        head: the student's head; its columns name the shared vocabulary.
        target: the teacher's signal over the same shared vocabulary; None for ``sft``.
        objective: what is computed.
        t: the interpolation, for ``taid``.
        labels_N: the student's ids of the next tokens, for ``sft``.
        weights_N: weights of the positions, in the loss and its gradient.
        chunk: rows at a time; None: as many as ``CHUNK_BYTES`` holds.

    Returns:
        LinearDistillationOutput; its ``loss_N`` carries gradient to ``hidden_NH`` and to the head's parameters that
        want one. With a trainable head, take the loss's plain sum (times a number): weights go into ``weights_N``.

    Raises:
        ValueError: the two heads' columns differ in number.
        TypeError: an argument that the objective needs is missing.
    """
    if isinstance(objective, SFT):
        head, target = Head(head.weight, head.bias, head.scale, head.softcap), None
    elif target is None:
        raise TypeError(f"{objective.name} needs a teacher's signal")
    elif head.width != target.head.width:
        raise ValueError(
            f"the student's head has {head.width} columns in use and the teacher's {target.head.width}: give both "
            "heads the columns of their SharedVocabulary"
        )
    chunk = chunk or max(1, CHUNK_BYTES // (4 * 4 * head.weight.shape[0]))
    call = _Call(head, target, objective, t, labels_N, weights_N, chunk, torch.is_grad_enabled())
    with torch.autocast(hidden_NH.device.type, enabled=False):  # it would make the products bf16
        loss_N, kl_N, ce_N = _LinearDistillation.apply(hidden_NH, head.weight, head.bias, call)
    return LinearDistillationOutput(loss_N, kl_N, ce_N)


@dataclass(frozen=True)
class _Call:
    head: Head
    target: TeacherSignal | None
    objective: Objective
    t: float | None
    labels_N: Tensor | None
    weights_N: Tensor | None
    chunk: int
    gradient: bool  # a Function cannot see torch.no_grad() in its forward


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, call: _Call):
        wants_hidden, wants_weight, wants_bias = (call.gradient and wants for wants in ctx.needs_input_grad[:3])
        N = hidden_NH.shape[0]
        values_3N = hidden_NH.new_empty(3, N, dtype=torch.float32)
        hidden_grad_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        weight_grad_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        bias_grad_V = torch.zeros_like(bias_V, dtype=torch.float32) if wants_bias and bias_V is not None else None
        with _products(weight_VH):
            for start in range(0, N, call.chunk):
                at = slice(start, start + call.chunk)
                gradient_nV = _chunk(hidden_NH[at].detach(), at, call, values_3N[:, at])
                if gradient_nV is None:
                    continue
                if hidden_grad_NH is not None:
                    hidden_grad_NH[at] = _times_weight(gradient_nV, weight_VH)
                if weight_grad_VH is not None:
                    weight_grad_VH.addmm_(gradient_nV.T, hidden_NH[at].detach().float())
                if bias_grad_V is not None:
                    bias_grad_V += gradient_nV.sum(0)
        ctx.gradients = (hidden_grad_NH, weight_grad_VH, bias_grad_V)
        ctx.dtypes = (weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        kl_N, ce_N = values_3N[1], values_3N[2]
        ctx.mark_non_differentiable(kl_N, ce_N)
        return values_3N[0].clone(), kl_N, ce_N

    @staticmethod
    def backward(ctx, loss_grad_N: Tensor, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden_grad_NH, weight_grad_VH, bias_grad_V = ctx.gradients
        ctx.gradients = (None, None, None)
        if hidden_grad_NH is not None:
            hidden_grad_NH.mul_(loss_grad_N[:, None])
        if (weight_grad_VH is not None or bias_grad_V is not None) and len(loss_grad_N):
            factor = loss_grad_N[0]
            if loss_grad_N.stride() != (0,) and not torch.equal(loss_grad_N, factor.expand_as(loss_grad_N)):
                raise ValueError("loss_N of a trainable head is to be summed plainly: give weights as weights_N")
            weight_grad_VH = None if weight_grad_VH is None else weight_grad_VH.mul_(factor).to(ctx.dtypes[0])
            bias_grad_V = None if bias_grad_V is None else bias_grad_V.mul_(factor).to(ctx.dtypes[1])
        return hidden_grad_NH, weight_grad_VH, bias_grad_V, None


def _chunk(hidden_nH: Tensor, at: slice, call: _Call, values_3n: Tensor) -> Tensor | None:
    """Fills a chunk's loss, KL and cross-entropy; returns the gradient in the raw products of all V rows."""
    head = call.head
    logits_nV = head.curve(_logits(hidden_nH, head.weight, head.bias, None))
    shared = slice(0, head.weight.shape[0]) if head.columns is None else head.columns
    shared_nC = logits_nV[:, shared]
    teacher_nC = None
    if call.target is not None:
        teacher = call.target.head
        teacher_nC = teacher.curve(_logits(call.target.hidden_NG[at], teacher.weight, teacher.bias, teacher.columns))
    labels_n = None if call.labels_N is None else call.labels_N[at]
    fused = call.objective.fused(shared_nC, teacher_nC, call.t, labels_n)
    log_z_n = logits_nV.logsumexp(-1)
    outside_n = 0.0 if head.width == logits_nV.shape[1] else log_z_n - shared_nC.logsumexp(-1)
    weights_n = None if call.weights_N is None else call.weights_N[at].float()
    for row, value_n in enumerate((fused.loss_N, fused.kl_N, fused.ce_N)):
        values_3n[row] = value_n + outside_n
    if weights_n is not None:
        values_3n[0] *= weights_n
    if not call.gradient:
        return None
    gradient_nV = (logits_nV - log_z_n[:, None]).exp_()
    if isinstance(shared, slice):
        gradient_nV[:, shared] += fused.residual_NV
    else:
        gradient_nV.index_add_(1, shared, fused.residual_NV)
    if weights_n is not None:
        gradient_nV *= weights_n[:, None]
    return head.curve_gradient(logits_nV, gradient_nV)


def _logits(hidden_nH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, columns: Tensor | slice | None) -> Tensor:
    """fp32 products [n, C] with the rows named by ``columns``, plus bias; a gathered weight lives a tile long."""
    weight_VH, bias_V = weight_VH.detach(), None if bias_V is None else bias_V.detach()
    if isinstance(columns, slice):
        weight_VH, bias_V = weight_VH[columns], None if bias_V is None else bias_V[columns]
        columns = None
    width = weight_VH.shape[0] if columns is None else len(columns)
    out_nC = hidden_nH.new_empty(hidden_nH.shape[0], width, dtype=torch.float32)
    whole = columns is None and (weight_VH.dtype == torch.float32 or weight_VH.is_cuda)
    for start in range(0, width, width if whole else TILE):
        tile = slice(start, min(width, start + (width if whole else TILE)))
        rows_tH = weight_VH[tile] if columns is None else weight_VH[columns[tile]]
        out_nC[:, tile] = _mm(hidden_nH, rows_tH.T)
    if bias_V is not None:
        out_nC += (bias_V if columns is None else bias_V[columns]).float()
    return out_nC


def _times_weight(gradient_nV: Tensor, weight_VH: Tensor) -> Tensor:
    """gradient @ weight in fp32, [n, H]."""
    weight_VH = weight_VH.detach()
    if weight_VH.dtype == torch.float32 or weight_VH.is_cuda:
        return _mm(gradient_nV, weight_VH)
    out_nH = gradient_nV.new_zeros(gradient_nV.shape[0], weight_VH.shape[1])
    for start in range(0, weight_VH.shape[0], TILE):
        out_nH.addmm_(gradient_nV[:, start : start + TILE], weight_VH[start : start + TILE].float())
    return out_nH


def _mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with an fp32 result; half-precision factors are multiplied as they are, without rounding the result."""
    if b.dtype != torch.float32 and b.is_cuda:  # not run here: no GPU
        return torch.mm(a.to(b.dtype), b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


@contextmanager
def _products(weight: Tensor):
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
