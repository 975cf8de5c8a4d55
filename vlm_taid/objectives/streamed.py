"""The KL to a target that is linear in logits (``taid``, ``fkl``), a vocabulary tile at a time.

Three statistics a row and tile (the largest logit, the sum of exponentials, and the target's mean of the gap between
the logits) give the value: KL(p_t || q) = E_pt[z_m - z_s] - log Z_m + log Z_s. What is kept of a chunk are the tiles'
exponentials, which become q - p_t by one factor a row and tile. So every element-wise operation meets its tile in the
processor's cache, and both models' exponentials are all that is kept of a chunk.

The first chunk's lie in the memory of the head's gradient, each tile's at the rows of the head that it belongs to: they
are gone when the gradient of these rows is written. In bf16 there is room for H / 4 answer tokens at no cost.

Legend: n rows of a chunk, H student width, G teacher width, V rows of the student's head, v rows of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .diagnostics import Agreement, TeacherTiles, of_student
from .gradients import Gradients
from .head import Head
from .products import Scratch, product
from .signals import Corrections, HiddenSignal, TeacherSignal

CACHED = 2**19  # logits of a tile on a CPU: 2 MiB; a GPU takes larger tiles, for fewer launches (not run here)


def streams(head: Head, target: TeacherSignal | None) -> bool:
    """Whether both heads can be walked tile by tile side by side: consecutive columns, no rest, no cap on the student.

    (A capped student's gradient needs its logits again.)
    """
    if not isinstance(target, HiddenSignal) or head.has_rest or head.softcap is not None:
        return False
    return not any(isinstance(columns, Tensor) for columns in (head.columns, target.head.columns))


class KLChunks:
    """The loss and gradients of one chunk of rows after another, in the same memory.

    Args:
        rows: of the largest chunk.
        head, target, t: what ``linear_distillation`` got.
        gradients: where the chunks' go; None: nothing wants one.
    """

    def __init__(self, rows: int, head: Head, target: HiddenSignal, t: float, gradients: Gradients | None):
        self.head, self.target, self.t, self.gradients = head, target, t, gradients
        device = head.weight.device
        self.scratch = Scratch(device) if gradients is None else gradients.scratch
        V, H = head.weight.shape
        if head.weight.is_cuda:  # 256 MiB of logits, or of a tile's gradient of the head
            tile = 2**26 // max(rows, H)
        else:
            tile = min(CACHED // rows, self.scratch.fitting(4 * max(H, target.head.weight.shape[1])))
        self.tile = min(max(16, tile), V)
        self.gap = torch.empty(rows * self.tile, dtype=torch.float32, device=device)
        self._own = None

    def _room(self, n: int) -> tuple[Tensor, int]:
        """Memory for a chunk's exponentials, and how many fp32 numbers of it belong to a row of the head."""
        V = self.head.weight.shape[0]
        room = None if self.gradients is None else self.gradients.room()
        if room is not None and room.numel() >= 2 * n * V:
            return room, room.numel() // V
        if self._own is None or self._own.numel() < 2 * n * V:
            self._own = self.gap.new_empty(2 * n * V)
        return self._own, 2 * n

    def _tiles(self, n: int, room: Tensor, pitch: int) -> Iterator[tuple[slice, slice | None, Tensor, Tensor | None]]:
        """Rows of both heads, and the places [n, v] of their logits; the student's padding has no teacher's."""
        mine, theirs = _span(self.head), _span(self.target.head)
        V = self.head.weight.shape[0]
        for first, last in ((0, mine.start), (mine.start, mine.stop), (mine.stop, V)):
            for start in range(first, last, self.tile):
                at = slice(start, min(start + self.tile, last))
                logits = n * (at.stop - at.start)
                student_nv, teacher_nv = (
                    room[pitch * start + kept : pitch * start + kept + logits].view(n, -1) for kept in (0, logits)
                )
                if first == mine.start and last == mine.stop:
                    ahead = theirs.start - mine.start
                    yield at, slice(at.start + ahead, at.stop + ahead), student_nv, teacher_nv
                else:
                    yield at, None, student_nv, None

    def _logits(self, hidden_nH: Tensor, head: Head, at: slice, out_nv: Tensor) -> None:
        weight_vH = head.weight.detach()[at]
        if weight_vH.dtype != torch.float32 and not weight_vH.is_cuda:
            weight_vH = self.scratch.take(weight_vH.shape).copy_(weight_vH)
        product(hidden_nH, weight_vH.T, out_nv)
        if head.bias is not None:
            out_nv += head.bias.detach()[at].float()
        head.curve(out_nv)

    def __call__(
        self, hidden_nH: Tensor, at: slice, weights_n: Tensor | None, values_Xn: Tensor, diagnostics_Dn: Tensor | None
    ) -> None:
        """Fills a chunk's values, the loss first, and adds its gradients."""
        n, V = hidden_nH.shape[0], self.head.weight.shape[0]
        room, pitch = self._room(n)
        fp32_nH, fp32_nG = hidden_nH.float(), self.target.hidden_NG[at].detach().float()
        student, teacher, means = [], [], []
        agreement, watched = Agreement(), None if diagnostics_Dn is None else TeacherTiles()
        corrections = None if self.target.corrections is None else _Sorted(self.target.corrections, at)
        for mine, theirs, student_nv, teacher_nv in self._tiles(n, room, pitch):
            self._logits(fp32_nH, self.head, mine, student_nv)
            if theirs is not None and teacher_nv is not None:
                self._logits(fp32_nG, self.target.head, theirs, teacher_nv)
                if corrections is not None:
                    corrections.add(teacher_nv, mine.start - _span(self.head).start)
                gap_nv = self.gap[: teacher_nv.numel()].view(n, -1)
                if watched is not None:
                    watched.add(student_nv, teacher_nv, gap_nv)
                agreement.add(student_nv, teacher_nv, gap_nv)
                torch.sub(teacher_nv, student_nv, out=gap_nv).mul_(self.t)
                torch.add(student_nv, gap_nv, out=teacher_nv)
                teacher.append(_exponentials(teacher_nv))
                # vecdot would make a tile of its own, and small results amid such tiles leave holes in the heap
                means.append([torch.mul(teacher_nv, one, out=gap_nv).sum(-1) for one in (gap_nv, student_nv)])
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
                for (*_, tile_nv, _), share_n in zip(self._tiles(n, room, pitch), share_s_Kn, strict=True)
            ]

            def probabilities(rows: slice) -> Tensor:
                return torch.cat([tile_nv[rows] * share_n1[rows] for tile_nv, share_n1 in tiles], -1)

            of_student(probabilities, n, V, diagnostics_Dn)
        if weights_n is not None:
            values_Xn[0] *= weights_n
            share_s_Kn, share_t_Kn = share_s_Kn * weights_n, share_t_Kn * weights_n
        if self.gradients is None:
            return
        factor_s = iter(share_s_Kn * self.head.scale)
        factor_t = iter(share_t_Kn * -self.head.scale)
        gradients = self.gradients.chunk(at, hidden_nH, self.tile)
        for mine, _, student_nv, teacher_nv in self._tiles(n, room, pitch):
            student_nv.mul_(next(factor_s)[:, None])
            if teacher_nv is not None:
                student_nv.addcmul_(teacher_nv, next(factor_t)[:, None])
            gradients.add(mine, student_nv)
        gradients.close()


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
    top_n = logits_nv.amax(-1).clamp_min_(torch.finfo(torch.float32).min)  # a tile may be all padding of -inf
    logits_nv.sub_(top_n[:, None]).exp_()
    return top_n, logits_nv.sum(-1)
