"""The KL to a target that is linear in logits (``taid``, ``fkl``), a vocabulary tile at a time.

Three statistics a row and tile (the largest logit, the sum of exponentials, and the target's mean of the gap between
the logits) give the value: KL(p_t || q) = E_pt[z_m - z_s] - log Z_m + log Z_s. What is kept of a chunk are the tiles'
exponentials, which become q - p_t by one factor a row and tile. So every element-wise operation meets its tile in the
processor's cache, and two buffers of [n, V] are all that there is, beside the gradient in the head's own precision.

Legend: n rows of a chunk, H student width, G teacher width, V rows of the student's head, v rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .diagnostics import Agreement, TeacherTiles, of_student
from .head import Head
from .products import gradient_dtype, product
from .signals import Corrections, HiddenSignal, TeacherSignal

CACHED = 2**19  # logits of a tile on a CPU: 2 MiB; a GPU takes larger tiles, for fewer launches (not run here)
CAST_BYTES = 2**24  # of a tile of half-precision weights that is in fp32 at a time, on a CPU


def streams(head: Head, target: TeacherSignal | None) -> bool:
    """Whether both heads can be walked tile by tile side by side: consecutive columns, no rest, no cap on the student.

    (A capped student's gradient needs its logits again.)
    """
    if not isinstance(target, HiddenSignal) or head.has_rest or head.softcap is not None:
        return False
    return not any(isinstance(columns, Tensor) for columns in (head.columns, target.head.columns))


class KLChunks:
    """Buffers for chunks of at most ``rows`` rows, and the loss and gradient of one chunk after another."""

    def __init__(self, rows: int, head: Head, target: HiddenSignal, t: float):
        self.head, self.target, self.t = head, target, t
        V, device = head.weight.shape[0], head.weight.device
        widest = max(head.weight.shape[1], target.head.weight.shape[1])
        self.tile = max(16, 2**26 // rows if head.weight.is_cuda else min(CACHED // rows, CAST_BYTES // (4 * widest)))
        self.student = torch.empty(rows * V, dtype=torch.float32, device=device)
        self.teacher = torch.empty(rows * head.width, dtype=torch.float32, device=device)
        self.gap = torch.empty(rows * self.tile, dtype=torch.float32, device=device)
        self.gradient = torch.empty(rows, V, dtype=gradient_dtype(head.weight), device=device)
        # one buffer for all tiles: the C library's heap grows when each has its own
        casts = [
            one.weight for one in (head, target.head) if one.weight.dtype != torch.float32 and not one.weight.is_cuda
        ]
        self.cast = torch.empty(self.tile * max((weight.shape[1] for weight in casts), default=0))

    def _tiles(self, n: int) -> Iterator[tuple[slice, slice | None, Tensor, Tensor | None]]:
        """Rows of both heads, and the places [n, v] of their logits; the student's padding has no teacher's."""
        mine, theirs = _span(self.head), _span(self.target.head)
        V = self.head.weight.shape[0]
        for first, last in ((0, mine.start), (mine.start, mine.stop), (mine.stop, V)):
            for start in range(first, last, self.tile):
                at = slice(start, min(start + self.tile, last))
                student_nv = self.student[n * at.start : n * at.stop].view(n, -1)
                if first == mine.start and last == mine.stop:
                    place = slice(at.start - mine.start, at.stop - mine.start)
                    other = slice(place.start + theirs.start, place.stop + theirs.start)
                    yield at, other, student_nv, self.teacher[n * place.start : n * place.stop].view(n, -1)
                else:
                    yield at, None, student_nv, None

    def _logits(self, hidden_nH: Tensor, head: Head, at: slice, out_nv: Tensor) -> None:
        weight_vH = head.weight.detach()[at]
        if weight_vH.dtype != torch.float32 and not weight_vH.is_cuda:
            weight_vH = self.cast[: weight_vH.numel()].view_as(weight_vH).copy_(weight_vH)
        product(hidden_nH, weight_vH.T, out_nv)
        if head.bias is not None:
            out_nv += head.bias.detach()[at].float()
        head.curve(out_nv)

    def __call__(
        self,
        hidden_nH: Tensor,
        at: slice,
        weights_n: Tensor | None,
        values_Xn: Tensor,
        diagnostics_Dn: Tensor | None,
        gradient: bool,
    ) -> Tensor | None:
        """Fills a chunk's values, the loss first; returns the gradient in the raw products, [n, V]."""
        n = hidden_nH.shape[0]
        hidden_nH, hidden_nG = hidden_nH.detach().float(), self.target.hidden_NG[at].detach().float()
        student, teacher, means = [], [], []
        agreement, watched = Agreement(), None if diagnostics_Dn is None else TeacherTiles()
        corrections = None if self.target.corrections is None else _Sorted(self.target.corrections, at)
        for mine, theirs, student_nv, teacher_nv in self._tiles(n):
            self._logits(hidden_nH, self.head, mine, student_nv)
            if theirs is not None and teacher_nv is not None:
                self._logits(hidden_nG, self.target.head, theirs, teacher_nv)
                if corrections is not None:
                    corrections.add(teacher_nv, mine.start - _span(self.head).start)
                gap_nv = self.gap[: teacher_nv.numel()].view(n, -1)
                if watched is not None:
                    watched.add(student_nv, teacher_nv, gap_nv)
                agreement.add(student_nv, teacher_nv, gap_nv)
                torch.sub(teacher_nv, student_nv, out=gap_nv).mul_(self.t)
                torch.add(student_nv, gap_nv, out=teacher_nv)
                teacher.append(_exponentials(teacher_nv))
                means.append((torch.linalg.vecdot(teacher_nv, gap_nv), torch.linalg.vecdot(teacher_nv, student_nv)))
            student.append(_exponentials(student_nv))
        top_s_Kn, sum_s_Kn = (torch.stack(values) for values in zip(*student, strict=True))
        top_t_Kn, sum_t_Kn = (torch.stack(values) for values in zip(*teacher, strict=True))
        gap_Kn, own_Kn = (torch.stack(values) for values in zip(*means, strict=True))
        log_z_s_n = (top_s_Kn + sum_s_Kn.log()).logsumexp(0)
        log_z_t_n = (top_t_Kn + sum_t_Kn.log()).logsumexp(0)
        share_s_Kn, share_t_Kn = (top_s_Kn - log_z_s_n).exp(), (top_t_Kn - log_z_t_n).exp()
        values_Xn[1] = (gap_Kn * share_t_Kn).sum(0) - log_z_t_n + log_z_s_n
        values_Xn[2] = log_z_s_n - (own_Kn * share_t_Kn).sum(0)
        values_Xn[0] = values_Xn[1]
        values_Xn[5] = agreement.same_n()
        if watched is not None and diagnostics_Dn is not None:
            watched.fill(log_z_s_n, diagnostics_Dn)
            tiles = [
                (tile_nv, share_n[:, None])
                for (*_, tile_nv, _), share_n in zip(self._tiles(n), share_s_Kn, strict=True)
            ]

            def probabilities(rows: slice) -> Tensor:
                return torch.cat([tile_nv[rows] * share_n1[rows] for tile_nv, share_n1 in tiles], -1)

            of_student(probabilities, n, self.head.weight.shape[0], diagnostics_Dn)
        if weights_n is not None:
            values_Xn[0] *= weights_n
            share_s_Kn, share_t_Kn = share_s_Kn * weights_n, share_t_Kn * weights_n
        if not gradient:
            return None
        factor_s = iter(share_s_Kn * self.head.scale)
        factor_t = iter(share_t_Kn * -self.head.scale)
        gradient_nV = self.gradient[:n]
        for mine, _, student_nv, teacher_nv in self._tiles(n):
            student_nv.mul_(next(factor_s)[:, None])
            if teacher_nv is not None:
                student_nv.addcmul_(teacher_nv, next(factor_t)[:, None])
            gradient_nV[:, mine] = student_nv
        return gradient_nV


class _Sorted:
    """A chunk's corrections in the order of their buckets, so that each tile finds its own."""

    def __init__(self, corrections: Corrections, at: slice):
        ids_nK = corrections.ids_NK[at]
        self.ids_M, order_M = ids_nK.flatten().sort()
        self.rows_M = order_M // ids_nK.shape[1]
        self.added_M = corrections.added_NK[at].float().flatten()[order_M]

    def add(self, logits_nv: Tensor, first: int) -> None:
        """Adds those of the buckets from ``first`` on to a tile of logits."""
        edges = torch.tensor([first, first + logits_nv.shape[1]], device=self.ids_M.device)
        start, stop = torch.searchsorted(self.ids_M, edges).tolist()
        places = self.rows_M[start:stop], self.ids_M[start:stop] - first
        logits_nv.index_put_(places, self.added_M[start:stop], accumulate=True)


def _span(head: Head) -> slice:
    return head.columns if isinstance(head.columns, slice) else slice(0, head.weight.shape[0])


def _exponentials(logits_nv: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits - largest) in place; the largest and the sum, [n]."""
    top_n = logits_nv.amax(-1)
    logits_nv.sub_(top_n[:, None]).exp_()
    return top_n, logits_nv.sum(-1)
