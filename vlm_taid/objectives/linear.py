"""linear_distillation: both language heads and the objective in one pass, without logits of all positions.

The rows are taken in chunks; a chunk's logits live in fp32 buffers that the next chunk reuses. The gradient is made
in the forward pass, so that no weight and no logits are kept for backward (a ZeRO-3 head need not be gathered twice).

Legend: N answer tokens, n rows of a chunk, H student width, V rows of the student's head, C shared vocabulary,
B buckets: the shared tokens, and the rest where there is one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .diagnostics import Agreement, diagnostic_names, of_student, of_teacher
from .gradients import Gradients, floats_a_row
from .head import Head
from .objective import SFT, Inputs, Objective
from .products import fp32_results, logits
from .signals import HiddenSignal, TeacherSignal, check, teacher_logits
from .streamed import KLChunks, streams

MEMORY = 256  # MiB
STREAMED_BYTES, DENSE_BYTES = 8, 36  # that a logit of a chunk takes: two fp32; nine fp32 at the worst
HALF_SUMS = 4  # chunks whose head gradients are summed in bf16: more would round too often
ENOUGH_ROWS = 192  # a larger chunk is no faster


@dataclass(frozen=True)
class LinearDistillationOutput:
    """What ``linear_distillation`` gives, one value a position.

    loss_N: differentiable, times ``weights_N``; all others are without weights or gradient.
    kl_N, ce_N: the objective's KL and its cross-entropy form, in nats (see ``Fused``).
    rest_N: the teacher's mass in the rest bucket, as a probability; None without a rest.
    temperature_gradient_N: of ``ctkd``: d loss / d T, for ``LearnedTemperature.update``.
    agreement_N: 1 where both models' most probable token is the same shared one, else 0; None without a teacher.
    diagnostics_DN: on request: a row for each of ``diagnostic_names``.
    """

    loss_N: Tensor
    kl_N: Tensor
    ce_N: Tensor
    rest_N: Tensor | None = None
    temperature_gradient_N: Tensor | None = None
    agreement_N: Tensor | None = None
    diagnostics_DN: Tensor | None = None


def linear_distillation(
    hidden_NH: Tensor,
    head: Head,
    target: TeacherSignal | None,
    objective: Objective,
    *,
    t: float | None = None,
    labels_N: Tensor | None = None,
    weights_N: Tensor | None = None,
    temperature: float | None = None,
    memory: float = MEMORY,
    chunk: int | None = None,
    diagnose: bool = False,
) -> LinearDistillationOutput:
    """The objective at N positions from hidden states, without their logits ever being in memory at once.

    The distributions are over the shared tokens and, where the heads have a ``rest``, one bucket of all the others.
    A row of the student's head in neither (padding) stays in its normaliser with target mass 0: it costs minus the log
    of the mass that the buckets hold, in every objective and at temperature 1. The teacher's head is cut to its
    columns and rest before the product. Products are in fp32 (of half-precision inputs), and so are softmax and target.

    Args:
        hidden_NH: the student's hidden states at the predicting positions.
        head: the student's head; its columns name the shared vocabulary.
        target: the teacher's signal over the same shared vocabulary; None for ``sft``.
        objective: what is computed.
        t: the interpolation, for ``taid``.
        labels_N: the student's ids of the next tokens, for ``sft``, ``dkd`` and ``ce_weight``. A label outside the
            shared vocabulary is in the rest.
        weights_N: weights of the positions, in the loss and its gradient.
        temperature: in the place of the objective's, for ``ctkd``. It divides the logits of the buckets.
        memory: MiB for what is kept of a chunk of rows; those whose logits lie in the head's gradient take none of it.
        chunk: rows at a time, whatever their memory.
        diagnose: whether to make ``diagnostics_DN`` too, from the logits of the same pass.

    Returns:
        LinearDistillationOutput; its ``loss_N`` carries gradient to ``hidden_NH`` and to the head's parameters that
        want one. With a trainable head, take the loss's plain sum: weights go into ``weights_N``. (A number by which
        the sum is multiplied belongs there too: afterwards it costs a pass over the head's gradient and a rounding.)

    Raises:
        ValueError: the two heads' columns differ in number, only one has a rest, or a label is in no bucket.
        TypeError: an argument that the objective needs is missing.
        RuntimeError: in backward: it is the second one, or to be differentiated again (``create_graph``).
    """
    needs_labels = objective.uses_labels or objective.ce_weight > 0.0
    buckets_N = None
    if isinstance(objective, SFT):
        head, target, buckets_N = Head(head.weight, head.bias, head.scale, head.softcap), None, labels_N
    elif target is None:
        raise TypeError(f"{objective.name} needs a teacher's signal")
    else:
        check(target, head)
        if needs_labels and labels_N is None:
            raise TypeError(f"{objective.name} with ce_weight {objective.ce_weight} needs labels_N")
        if objective.uses_labels and labels_N is not None:
            buckets_N = head.buckets_of(labels_N)
            if len(labels_N) and int(buckets_N.min()) < 0:
                raise ValueError(
                    f"label {int(labels_N[buckets_N < 0][0])} is outside the shared vocabulary and the heads have no "
                    f"rest: {objective.name} has no target there"
                )
    T = objective.temperature if temperature is None else temperature
    target_t = _streamed_target(head, target, objective, t, T)
    N = len(hidden_NH)
    gradient = torch.is_grad_enabled()
    in_place = gradient and target_t is not None and head.weight.requires_grad
    chunks, weight_dtype = _chunks(N, head.weight, memory, chunk, in_place=in_place, streamed=target_t is not None)
    inputs = Inputs(t, buckets_N, T)
    diagnostics_DN = None
    if diagnose:
        count = len(diagnostic_names(objective.uses_teacher))
        diagnostics_DN = hidden_NH.new_zeros(count, N, dtype=torch.float32)
    call = _Call(
        head, target, objective, inputs, labels_N, weights_N, target_t, chunks, weight_dtype, gradient, diagnostics_DN
    )
    with torch.autocast(hidden_NH.device.type, enabled=False):  # it would make the products bf16
        loss_N, values_XN = _LinearDistillation.apply(hidden_NH, head.weight, head.bias, call)
    return LinearDistillationOutput(
        loss_N,
        values_XN[1],
        values_XN[2],
        values_XN[3] if head.has_rest and target is not None else None,
        values_XN[4] if objective.name == "ctkd" else None,
        values_XN[5] if objective.uses_teacher else None,
        diagnostics_DN,
    )


def rows_at_a_time(vocabulary: int, memory: float = MEMORY, *, streamed: bool = True) -> int:
    """Rows of a chunk.

    Args:
        vocabulary: rows of the student's head.
        memory: MiB for what is kept of a chunk.
        streamed: by the tiled road of ``taid`` and ``fkl``, which keeps less; else by the dense one of all objectives.
    """
    rows = int(memory * 2**20) // ((STREAMED_BYTES if streamed else DENSE_BYTES) * vocabulary)
    return max(1, rows // 16 * 16 or rows)


def _chunks(
    N: int, weight_VH: Tensor, memory: float, chunk: int | None, *, in_place: bool, streamed: bool
) -> tuple[list[slice], torch.dtype]:
    """The chunks of N rows, and the precision in which their gradients of the head are summed.

    Args:
        chunk: rows at a time; None: by ``memory``.
        in_place: whether the first chunk's logits can lie in the head's gradient, and are not counted then.
    """
    dtypes = [torch.bfloat16, torch.float32] if weight_VH.dtype == torch.bfloat16 else [torch.float32]
    chunks = []
    for dtype in dtypes:
        if chunk is not None:
            chunks = _equal(0, N, chunk)
        else:
            first = min(N, _rows_in_gradient(weight_VH, dtype)) if in_place else 0
            rows = rows_at_a_time(len(weight_VH), memory, streamed=streamed)
            others = HALF_SUMS - (first > 0)
            rows = min(rows, max(ENOUGH_ROWS, -(-(N - first) // others)))
            chunks = _equal(0, first, max(1, first)) + _equal(first, N, rows)
        if len(chunks) <= HALF_SUMS:
            return chunks, dtype
    return chunks, torch.float32


def _equal(start: int, stop: int, most: int) -> list[slice]:
    """Chunks of at most so many rows, and of one size."""
    size = max(1, -(-(stop - start) // max(1, -(-(stop - start) // most))))
    return [slice(at, min(at + size, stop)) for at in range(start, stop, size)]


def chunk_rows(
    head: Head,
    target: TeacherSignal | None,
    objective: Objective,
    *,
    t: float | None = None,
    temperature: float | None = None,
    memory: float = MEMORY,
) -> tuple[int, int]:
    """Rows of a chunk of ``linear_distillation`` with these arguments, by the road that it takes for them.

    Returns:
        The most that ``memory`` holds, and those of the first chunk whose logits lie in the head's gradient (twice as
        many where a bf16 head's is summed in fp32).
    """
    T = objective.temperature if temperature is None else temperature
    streamed = _streamed_target(head, target, objective, t, T) is not None
    in_place = streamed and head.weight.requires_grad
    first = _rows_in_gradient(head.weight, head.weight.dtype) if in_place else 0
    return rows_at_a_time(head.weight.shape[0], memory, streamed=streamed), first


def _rows_in_gradient(weight_VH: Tensor, dtype: torch.dtype) -> int:
    """Rows whose logits of both models a gradient of this precision has room for."""
    dtype = dtype if dtype == torch.bfloat16 else torch.float32
    return floats_a_row(weight_VH.shape[1], dtype) // 2


def _streamed_target(
    head: Head, target: TeacherSignal | None, objective: Objective, t: float | None, T: float
) -> float | None:
    """How far a target in logits is from the student's to the teacher's; None: by the dense road."""
    target_t = objective.target_in_logits(t) if T == 1.0 and objective.ce_weight == 0.0 else None
    return target_t if streams(head, target) else None


@dataclass(frozen=True)
class _Call:
    head: Head
    target: TeacherSignal | None
    objective: Objective
    inputs: Inputs
    labels_N: Tensor | None
    weights_N: Tensor | None
    target_t: float | None  # of a streamed KL
    chunks: list[slice]
    weight_dtype: torch.dtype  # in which the weight's gradient is summed
    gradient: bool  # a Function cannot see torch.no_grad() in its forward
    diagnostics_DN: Tensor | None  # that the chunks fill


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, call: _Call):
        wants = [call.gradient and wants for wants in ctx.needs_input_grad[:3]]
        gradients = Gradients(hidden_NH, weight_VH, bias_V, (wants[0], wants[1], wants[2]), call.weight_dtype)
        values_XN = hidden_NH.new_zeros(6, hidden_NH.shape[0], dtype=torch.float32)
        with fp32_results(weight_VH):
            streamed = None
            if call.target_t is not None and isinstance(call.target, HiddenSignal) and call.chunks:
                rows = max(at.stop - at.start for at in call.chunks)
                streamed = KLChunks(rows, call.head, call.target, call.target_t, gradients if call.gradient else None)
            for at in call.chunks:
                hidden_nH = hidden_NH[at].detach()
                if streamed is not None:
                    weights_n = None if call.weights_N is None else call.weights_N[at].float()
                    diagnostics_Dn = None if call.diagnostics_DN is None else call.diagnostics_DN[:, at]
                    streamed(hidden_nH, at, weights_n, values_XN[:, at], diagnostics_Dn)
                    continue
                gradient_nV = _chunk(hidden_nH, at, call, values_XN[:, at])
                if gradient_nV is not None:
                    chunk = gradients.chunk(at, hidden_nH)
                    chunk.add_all(gradient_nV)
                    chunk.close()
        ctx.gradients = (gradients.hidden_NH, gradients.weight_VH, gradients.bias_V)
        ctx.dtypes = (weight_VH.dtype, None if bias_V is None else bias_V.dtype)
        ctx.mark_non_differentiable(values_XN)
        return values_XN[0].clone(), values_XN

    @staticmethod
    def backward(ctx, loss_grad_N: Tensor, *_):  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("linear_distillation has no second derivative: take its gradient without create_graph")
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward of linear_distillation: its gradients are made once, in the forward pass, and given "
                "away; call it again, or take all gradients in one backward"
            )
        hidden_grad_NH, weight_grad_VH, bias_grad_V = ctx.gradients
        ctx.gradients = None
        if hidden_grad_NH is not None:
            hidden_grad_NH.mul_(loss_grad_N[:, None])
        if (weight_grad_VH is not None or bias_grad_V is not None) and len(loss_grad_N):
            factor = loss_grad_N[0]
            if loss_grad_N.stride() != (0,) and not torch.equal(loss_grad_N, factor.expand_as(loss_grad_N)):
                raise ValueError("loss_N of a trainable head is to be summed plainly: give weights as weights_N")
            if weight_grad_VH is not None:
                if factor.is_cuda or factor != 1.0:  # a comparison would make a GPU wait
                    weight_grad_VH.mul_(factor)
                weight_grad_VH = weight_grad_VH.to(ctx.dtypes[0])
            bias_grad_V = None if bias_grad_V is None else bias_grad_V.mul_(factor).to(ctx.dtypes[1])
        return hidden_grad_NH, weight_grad_VH, bias_grad_V, None


def _chunk(hidden_nH: Tensor, at: slice, call: _Call, values_Xn: Tensor) -> Tensor | None:
    """Fills a chunk's values; returns the gradient in the raw products of all V rows."""
    head, objective, T = call.head, call.objective, call.inputs.temperature
    logits_nV = head.curve(logits(hidden_nH, head.weight, head.bias, None))
    buckets = _Buckets(logits_nV, head)
    teacher_nB: Any = None
    if call.target is not None:
        teacher_nB = teacher_logits(call.target, at)
        if head.has_rest:
            values_Xn[3] = (teacher_nB[:, -1] - teacher_nB.logsumexp(-1)).exp()
        values_Xn[5] = buckets.agrees_n(teacher_nB)
    student_nB = buckets.logits_nB
    if call.diagnostics_DN is not None:
        buckets.diagnose(teacher_nB, call.diagnostics_DN[:, at])
    if T != 1.0:
        student_nB, teacher_nB = student_nB / T, teacher_nB.div_(T)
    labels_n = None if call.inputs.labels_N is None else call.inputs.labels_N[at]
    fused = objective.fused(student_nB, teacher_nB, call.inputs._replace(labels_N=labels_n))
    del teacher_nB
    outside_n = buckets.outside_n
    distil, labelled = 1.0 - objective.ce_weight, objective.ce_weight
    weights_n = None if call.weights_N is None else call.weights_N[at].float()
    values_Xn[0] = distil * (T * T * fused.loss_N + outside_n)
    values_Xn[1] = fused.kl_N + outside_n
    values_Xn[2] = fused.ce_N + outside_n
    if fused.temperature_gradient_N is not None:
        values_Xn[4] = distil * fused.temperature_gradient_N
    label_n1 = None
    if labelled:
        assert call.labels_N is not None
        label_n1 = call.labels_N[at][:, None]
        values_Xn[0] += labelled * (logits_nV.logsumexp(-1) - logits_nV.gather(-1, label_n1)[:, 0])
    if weights_n is not None:
        values_Xn[0] *= weights_n
    if not call.gradient:
        return None
    gradient_nV = buckets.spread(fused.gradient_NB.mul_(T) if T != 1.0 else fused.gradient_NB)
    if label_n1 is not None:
        q_nV = logits_nV.softmax(-1).scatter_add_(-1, label_n1, torch.full_like(label_n1, -1, dtype=torch.float32))
        gradient_nV = gradient_nV.mul_(distil).add_(q_nV, alpha=labelled)
    if weights_n is not None:
        gradient_nV *= weights_n[:, None]
    return head.curve_gradient(logits_nV, gradient_nV)


class _Buckets:
    """The student's logits over the buckets of a chunk, and the way of a gradient back to all rows of its head.

    A bucket's logit is the logsumexp of its tokens' logits, so a token's share of the bucket's gradient is its share
    of the bucket's mass. ``outside_n`` is minus the log of the mass that all buckets hold.
    """

    def __init__(self, logits_nV: Tensor, head: Head):
        self.logits_nV, self.head = logits_nV, head
        shared_nC = logits_nV if head.columns is None else logits_nV[:, head.columns]
        self.rest_nR = None
        if head.has_rest:
            self.rest_nR = logits_nV[:, head.rest]
            self.rest_n1 = self.rest_nR.logsumexp(-1, keepdim=True)
            shared_nC = torch.cat([shared_nC, self.rest_n1], -1)
        self.logits_nB = shared_nC
        rows = head.width + (0 if self.rest_nR is None else self.rest_nR.shape[1])
        self.has_padding = rows < logits_nV.shape[1]
        self.outside_n: Any = 0.0
        if self.has_padding:
            self.log_z_n1 = logits_nV.logsumexp(-1, keepdim=True)
            self.log_b_n1 = self.logits_nB.logsumexp(-1, keepdim=True)
            self.outside_n = (self.log_z_n1 - self.log_b_n1)[:, 0]

    def diagnose(self, teacher_nB: Tensor | None, out_Dn: Tensor) -> None:
        """Fills a chunk's diagnostics."""
        n, V = self.logits_nV.shape
        of_student(lambda rows: self.logits_nV[rows].softmax(-1), n, V, out_Dn)
        if teacher_nB is None:
            return
        of_teacher(self.logits_nB, teacher_nB, out_Dn)
        out_Dn[4] += self.outside_n

    def agrees_n(self, teacher_nB: Tensor) -> Tensor:
        """Whether both models' most probable token is the same one; a rest's tokens agree with none."""
        agreement = Agreement()
        agreement.add(self.logits_nB, teacher_nB)
        same_n = agreement.same_n()
        if self.rest_nR is not None:  # in the rest are many tokens
            same_n &= teacher_nB[:, -1] < teacher_nB.amax(-1)
        return same_n

    def spread(self, gradient_nB: Tensor) -> Tensor:
        """The gradient [n, V] of the objective and of ``outside_n`` from that in the buckets' logits."""
        if self.has_padding:
            gradient_nB = gradient_nB.sub_((self.logits_nB - self.log_b_n1).exp_())
        if self.head.columns is None:
            return gradient_nB
        gradient_nV = self._background()
        shared_nC = gradient_nB
        if self.rest_nR is not None and self.head.rest is not None:
            rest_nR = (self.rest_nR - self.rest_n1).exp_().mul_(gradient_nB[:, -1:])
            gradient_nV.index_add_(1, self.head.rest, rest_nR)
            shared_nC = gradient_nB[:, :-1]
        if isinstance(self.head.columns, slice):
            gradient_nV[:, self.head.columns] += shared_nC
        else:
            gradient_nV.index_add_(1, self.head.columns, shared_nC)
        return gradient_nV

    def _background(self) -> Tensor:
        if self.has_padding:
            return (self.logits_nV - self.log_z_n1).exp_()
        return torch.zeros_like(self.logits_nV)
