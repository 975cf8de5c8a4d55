"""What the log says about both distributions, on request: from logits that the loss has made anyway.

Legend: n rows of a chunk, m rows at a time, V rows of the student's head, C shared vocabulary, B buckets, D values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HEAD = 10  # tokens of the head
TAIL = 5  # the tail is one V-th of so many: the 80th to the 100th percentile
AT_A_TIME = 2**20  # probabilities

DIAGNOSTICS = ("student_entropy", "head_mass", "tail_mass", "teacher_entropy", "teacher_kl")
"""Of the student's own distribution over all rows of its head: its entropy, the mass of its 10 most probable tokens,
and that of the least probable fifth of its tokens (arXiv 2501.16937, table 3). Of the teacher's over the buckets: its
entropy and KL(p || q), whatever the objective. In nats and probabilities, at temperature 1."""


def diagnostic_names(teacher: bool) -> tuple[str, ...]:
    """What there is: without a teacher, the student's own alone."""
    return DIAGNOSTICS if teacher else DIAGNOSTICS[:3]


def of_student(rows: Callable[[slice], Tensor], n: int, V: int, out_Dn: Tensor) -> None:
    """Fills the student's values.

    Args:
        rows: gives some rows' probabilities [m, V], in a buffer of their own.
        n: rows.
        V: rows of the head.
        out_Dn: where the values go.
    """
    step = max(1, AT_A_TIME // V)
    for start in range(0, n, step):
        at = slice(start, min(start + step, n))
        q_mV = rows(at)
        out_Dn[1, at] = q_mV.topk(min(HEAD, V), sorted=False).values.sum(-1)
        out_Dn[2, at] = q_mV.topk(V // TAIL, largest=False, sorted=False).values.sum(-1)
        out_Dn[0, at] = torch.special.entr(q_mV, out=q_mV).sum(-1)


def of_teacher(student_nB: Tensor, teacher_nB: Tensor, out_Dn: Tensor) -> None:
    """Fills the teacher's values, from both models' logits over the buckets."""
    log_p_nB = teacher_nB.log_softmax(-1)
    p_nB = log_p_nB.exp()
    out_Dn[3] = -torch.linalg.vecdot(p_nB, log_p_nB)
    out_Dn[4] = torch.linalg.vecdot(p_nB, log_p_nB.sub_(student_nB.log_softmax(-1)))


class TeacherTiles:
    """The same of one vocabulary tile after another."""

    def __init__(self):
        self.tops, self.sums, self.means = [], [], []

    def add(self, student_nv: Tensor, teacher_nv: Tensor, scratch_nv: Tensor) -> None:
        """Takes a tile's logits; the scratch is overwritten."""
        top_n = teacher_nv.amax(-1)
        exponentials_nv = torch.sub(teacher_nv, top_n[:, None], out=scratch_nv).exp_()
        self.tops.append(top_n)
        self.sums.append(exponentials_nv.sum(-1))
        self.means.append(
            (torch.linalg.vecdot(exponentials_nv, teacher_nv), torch.linalg.vecdot(exponentials_nv, student_nv))
        )

    def fill(self, log_z_student_n: Tensor, out_Dn: Tensor) -> None:
        """Fills the teacher's values; ``log_z_student_n`` is over all rows of the student's head."""
        tops_Kn, sums_Kn = torch.stack(self.tops), torch.stack(self.sums)
        log_z_n = (tops_Kn + sums_Kn.log()).logsumexp(0)
        share_Kn = (tops_Kn - log_z_n).exp()
        teacher_n, student_n = (
            (torch.stack(values) * share_Kn).sum(0) for values in zip(*self.means, strict=True)
        )  # both models' mean logits
        out_Dn[3] = log_z_n - teacher_n
        out_Dn[4] = teacher_n - log_z_n - student_n + log_z_student_n


class Agreement:
    """Whether a token is the most probable one of both models: then, and only then, the largest sum of both logits is
    the sum of the largest. (Rounding keeps the order.) No place is looked for, which would take ten times as long.
    """

    def __init__(self):
        self.tops: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, student_nv: Tensor, teacher_nv: Tensor, scratch_nv: Tensor | None = None) -> None:
        """Takes a tile's logits; the scratch is overwritten."""
        both_nv = torch.add(student_nv, teacher_nv, out=scratch_nv)
        self.tops.append((student_nv.amax(-1), teacher_nv.amax(-1), both_nv.amax(-1)))

    def same_n(self) -> Tensor:
        """Over all tiles, as booleans."""
        student_n, teacher_n, both_n = (torch.stack(tops).amax(0) for tops in zip(*self.tops, strict=True))
        return both_n == student_n + teacher_n
