"""The diagnostics of linear_distillation against their definitions, dense and in fp64."""

import pytest
import torch

from vlm_taid.objectives import HiddenSignal, Objective, diagnostic_names, linear_distillation

from .test_linear import CASES, N, case, in_fp64

KINDS = ["equal", "student padded", "teacher slice and bias", "holes", "rest", "soft cap"]


def expected(hidden, head, log_p_NB, student_NB):
    """The definitions, by sorting: nothing here is shared with the code under test."""
    whole = in_fp64(head)
    everything = type(whole)(whole.weight, whole.bias, whole.scale, whole.softcap)(hidden.double())
    q = everything.softmax(-1)
    ranked = q.sort(-1, descending=True).values
    V = q.shape[-1]
    log_q_NB = student_NB - everything.logsumexp(-1, keepdim=True)
    p = log_p_NB.exp()
    return {
        "student_entropy": -(q * q.log()).sum(-1),
        "head_mass": ranked[:, :10].sum(-1),
        "tail_mass": ranked[:, V - V // 5 :].sum(-1),
        "teacher_entropy": -(p * log_p_NB).sum(-1),
        "teacher_kl": (p * (log_p_NB - log_q_NB)).sum(-1),
    }


def check(found_DN, values):
    assert tuple(values) == diagnostic_names(len(values) > 3) and found_DN.shape == (len(values), N)
    for name, row_N in zip(values, found_DN, strict=True):
        assert (row_N - values[name]).abs().max() < 1e-5 * max(1.0, float(values[name].abs().max())), name


def near(target, head, hidden):
    """The same signal, with the student's hidden states mixed in: about half of the positions agree."""
    mixed = target.hidden_NG.clone()
    mixed[::2, : hidden.shape[1]] = 3.0 * hidden[::2]
    weight = target.head.weight.clone()
    rows = min(len(weight), len(head.weight))
    weight[:rows, : hidden.shape[1]] = head.weight[:rows]
    return HiddenSignal(mixed, type(head)(weight, target.head.bias, target.head.scale, target.head.softcap,
                                          target.head.columns, target.head.rest))  # fmt: skip


@pytest.mark.parametrize("chunk, tile", [(4, 16), (None, 2**15)])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_their_definitions_in_fp64(kind, chunk, tile, monkeypatch):
    from vlm_taid.objectives import streamed

    monkeypatch.setattr(streamed, "CACHED", 4 * tile)
    agreed = 0
    for name, options, t in (("taid", {}, 0.4), ("taid", {"temperature": 2.0}, 0.0), ("rkl", {"ce_weight": 0.5}, None)):
        hidden, head, target, labels = case(**CASES[kind])
        target = near(target, head, hidden)
        student, teacher = in_fp64(head)(hidden.double()), in_fp64(target.head)(target.hidden_NG.double())
        best_N = teacher.argmax(-1)
        agreed_N = (student.argmax(-1) == best_N) & (best_N < head.width)
        agreed += int(agreed_N.sum())
        call = {"t": t, "labels_N": labels, "chunk": chunk, "diagnose": True, "weights_N": torch.linspace(0.0, 2.0, N)}
        out = linear_distillation(hidden, head, target, Objective.named(name, **options), **call)
        check(out.diagnostics_DN, expected(hidden, head, teacher.log_softmax(-1), student))
        assert torch.equal(out.agreement_N, agreed_N.float())
    assert kind != "equal" or 0 < agreed < 3 * N  # both answers are seen


def test_without_a_teacher_they_are_the_students():
    hidden, head, _, labels = case(40, 40)
    out = linear_distillation(hidden, head, None, Objective.named("sft"), labels_N=labels, diagnose=True)
    student = in_fp64(head)(hidden.double())
    values = expected(hidden, head, student.log_softmax(-1), student)
    check(out.diagnostics_DN, {name: values[name] for name in diagnostic_names(teacher=False)})
    assert out.agreement_N is None


def test_nothing_else_changes_by_them():
    hidden, head, target, _ = case(48, 40, columns=(torch.arange(40), torch.arange(40)))
    found = []
    for diagnose in (False, True):
        leaf = hidden.clone().requires_grad_()
        out = linear_distillation(leaf, head, target, Objective.named("taid"), t=0.4, diagnose=diagnose)
        out.loss_N.sum().backward()
        found.append((out.loss_N.detach(), leaf.grad, out.diagnostics_DN))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2] is None and not found[1][2].requires_grad
