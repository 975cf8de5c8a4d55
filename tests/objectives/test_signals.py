"""Targets that are more than one live teacher's logits: the rest bucket, corrected logits, mixed teachers."""

from dataclasses import replace

import pytest
import torch

from vlm_taid.objectives import (
    Corrections,
    Head,
    HiddenSignal,
    MixedSignal,
    Objective,
    linear_distillation,
    per_token,
    streamed,
)

from .test_linear import CASES, OBJECTIVES_AND_OPTIONS, N, case, in_fp64, off, ours

WITH_TEACHER = {what: value for what, value in OBJECTIVES_AND_OPTIONS.items() if value[0] != "sft"}


def stored(kind, K):
    """A student, and a teacher as a cache has it: a head over the buckets themselves, and corrections of K of them."""
    hidden, head, _, labels = case(**CASES[kind])
    generator = torch.Generator().manual_seed(3)
    B = head.width + head.has_rest
    rest = torch.tensor([B - 1]) if head.has_rest else None
    basis = Head(torch.randn(B, 5, generator=generator), torch.randn(B, generator=generator), rest=rest)
    basis = replace(basis, columns=slice(0, head.width))
    ids_NK = torch.rand(N, B, generator=generator).argsort(-1)[:, :K]
    corrections = Corrections(ids_NK, torch.randn(N, K, generator=generator) * 3)
    return hidden, head, HiddenSignal(torch.randn(N, 5, generator=generator), basis, corrections), labels


@pytest.mark.parametrize("kind", ["equal", "student padded", "holes", "rest"])
@pytest.mark.parametrize("K", [1, 6])
def test_corrected_logits_equal_dense_fp64(kind, K, monkeypatch):
    monkeypatch.setattr(streamed, "CACHED", 7 * 16)  # tiles of 16 buckets
    hidden, head, target, labels = stored(kind, K)
    basis = target.head.weight.double(), target.head.bias.double()
    teacher = target.hidden_NG.double() @ basis[0].T + basis[1]
    for n in range(N):
        teacher[n, target.corrections.ids_NK[n]] += target.corrections.added_NK[n].double()
    for what, (name, options) in WITH_TEACHER.items():
        temperature = 3.0 if name == "ctkd" else None
        exact_hidden = hidden.double().requires_grad_()
        exact_head = in_fp64(head, requires_grad=True)
        everything, shared = replace(exact_head, columns=None, rest=None)(exact_hidden), exact_head(exact_hidden)
        dense = {**options} | ({"t": 0.4} if name == "taid" else {}) | ({"temperature": 3.0} if temperature else {})
        labelled = dense.pop("ce_weight", 0.0)
        dense |= {"labels_N": head.buckets_of(labels)} if name == "dkd" else {}
        loss = per_token(name, shared, teacher, **dense)
        loss = (1.0 - labelled) * (loss + everything.logsumexp(-1) - shared.logsumexp(-1))
        loss = loss + labelled * per_token("sft", everything, None, labels_N=labels)
        loss.sum().mul(3.0).backward()
        found = ours(name, hidden, head, target, labels, 0.4, None, 7, options=options, temperature=temperature)
        assert (found[0].loss_N - loss.detach()).abs().max() < 1e-5 * max(1.0, float(loss.detach().max())), what
        assert off(found[1], exact_hidden.grad) < 2e-5, what
        assert off(found[2], exact_head.weight.grad) < 2e-5, what
        if kind == "rest":
            assert off(found[0].rest_N, teacher.softmax(-1)[:, -1]) < 1e-5, what


def test_rest_is_one_bucket_and_reaches_each_of_its_rows():
    """Each rest row's gradient is its share of the student's rest times the bucket's own, q - p_t."""
    hidden, head, target, _ = case(**CASES["rest"])
    bias = head.bias.clone().requires_grad_()
    linear_distillation(
        hidden, replace(head, bias=bias), target, Objective.named("taid"), t=0.4
    ).loss_N.sum().backward()
    exact = in_fp64(head)
    student, teacher = exact(hidden.double()), in_fp64(target.head)(target.hidden_NG.double())
    everything = replace(exact, columns=None, rest=None)(hidden.double())
    share = everything[:, head.rest].softmax(-1)
    mass = everything.softmax(-1)[:, head.rest].sum(-1)
    p_t = (0.6 * student + 0.4 * teacher).softmax(-1)[:, -1]
    assert off(bias.grad[head.rest], (share * (mass - p_t)[:, None]).sum(0)) < 1e-5
    padded = torch.ones(40).index_fill(0, torch.cat([head.rest, head.columns]), 0.0).nonzero()[:, 0]
    assert len(padded) == 40 - head.width - len(head.rest) > 0
    assert off(bias.grad[padded], everything.softmax(-1)[:, padded].sum(0)) < 1e-5  # target mass 0


def test_mass_of_the_teachers_rest_is_told():
    hidden, head, target, _ = case(**CASES["rest"])
    out = linear_distillation(hidden, head, target, Objective.named("taid"), t=0.4, chunk=4)
    logits = replace(in_fp64(target.head), columns=None, rest=None)(target.hidden_NG.double())
    columns, rest = logits[:, target.head.columns], logits[:, target.head.rest]
    expected = rest.exp().sum(-1) / (rest.exp().sum(-1) + columns.exp().sum(-1))
    assert out.rest_N is not None and off(out.rest_N, expected) < 1e-5
    hidden, head, target, _ = case(40, 40)
    assert linear_distillation(hidden, head, target, Objective.named("taid"), t=0.4).rest_N is None


def test_label_outside_the_shared_vocabulary_is_the_rest():
    _, head, _, _ = case(**CASES["rest"])
    ids = torch.tensor([3, 0, 12, 1, 39, 6])
    assert head.buckets_of(ids).tolist() == [0, 1, 5, 6, 6, -1]
    sliced = Head(torch.randn(8, 2), columns=slice(2, 6), rest=torch.tensor([7]))
    assert sliced.buckets_of(torch.arange(8)).tolist() == [-1, -1, 0, 1, 2, 3, -1, 4]


def test_label_in_no_bucket_is_refused():
    hidden, head, target, labels = case(**CASES["holes"])
    labels[3] = 39
    with pytest.raises(ValueError, match="label 39"):
        linear_distillation(hidden, head, target, Objective.named("dkd"), labels_N=labels)


def test_rest_of_one_head_alone_is_refused():
    hidden, head, target, _ = case(**CASES["rest"])
    with pytest.raises(ValueError, match="rest"):
        linear_distillation(hidden, replace(head, rest=None), target, Objective.named("fkl"))


@pytest.mark.parametrize("kind", ["equal", "rest"])
@pytest.mark.parametrize("mix", ["logits", "probabilities"])
def test_mixed_teachers_equal_dense_fp64(kind, mix):
    hidden, head, first, labels = case(**CASES[kind])
    second = case(**CASES[kind], seed=5)[2]
    p, r = (in_fp64(one.head)(one.hidden_NG.double()).softmax(-1) for one in (first, second))
    target = 0.25 * p + 0.75 * r if mix == "probabilities" else p**0.25 * r**0.75
    for name in ("taid", "rkl", "ctkd"):
        exact = hidden.double().requires_grad_()
        options = {"t": 0.4} if name == "taid" else {"temperature": 2.0} if name == "ctkd" else {}
        buckets = in_fp64(head)(exact)
        loss = per_token(name, buckets, target.log(), **options)
        everything = replace(in_fp64(head), columns=None, rest=None)(exact)
        (loss + everything.logsumexp(-1) - buckets.logsumexp(-1)).sum().mul(3.0).backward()
        mixed = MixedSignal((first, second), (1.0, 3.0), mix)
        temperature = options.get("temperature")
        found = ours(name, hidden, head, mixed, labels, 0.4, None, 4, frozen=True, temperature=temperature)
        assert off(found[1], exact.grad) < 1e-5
        if kind == "rest":
            assert off(found[0].rest_N, target[:, -1] / target.sum(-1)) < 1e-5


def test_mixed_teachers_are_checked():
    _, head, target, _ = case(40, 40)
    with pytest.raises(ValueError, match="weights"):
        MixedSignal((target, target), (1.0,))
    with pytest.raises(ValueError, match="positive"):
        MixedSignal((target,), (0.0,))
    narrow = HiddenSignal(target.hidden_NG, replace(target.head, columns=slice(0, 30)))
    with pytest.raises(ValueError, match="40 columns in use and the teacher's 30"):
        linear_distillation(torch.randn(N, 16), head, MixedSignal((target, narrow), (1.0, 1.0)), Objective.named("fkl"))
