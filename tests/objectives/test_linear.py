"""linear_distillation against dense fp64 autograd."""

import math
from dataclasses import replace

import pytest
import torch

from vlm_taid.objectives import OBJECTIVES, Head, HiddenSignal, Objective, as_slice, linear_distillation, per_token
from vlm_taid.objectives.linear import _chunks, chunk_rows, rows_at_a_time

N, H, G = 11, 16, 24
# every objective, and its options; a temperature of ctkd is an argument of the call
OBJECTIVES_AND_OPTIONS = {name: (name, {}) for name in OBJECTIVES} | {
    "taid in probabilities": ("taid", {"interpolation": "probabilities"}),
    "taid rkl": ("taid", {"divergence": "rkl"}),
    "taid js in probabilities": ("taid", {"divergence": "js", "weight": 0.4, "interpolation": "probabilities"}),
    "taid with labels": ("taid", {"ce_weight": 0.3, "temperature": 2.0}),
    "fkl at 2": ("fkl", {"temperature": 2.0}),
    "rkl with labels": ("rkl", {"ce_weight": 0.6}),
    "js even": ("js", {"weight": 0.5}),
    "akl 0.9": ("akl", {"mu": 0.9, "temperature": 0.5}),
    "dkd 0.2, 3": ("dkd", {"target_weight": 0.2, "non_target_weight": 3.0, "temperature": 1.5}),
}


def case(
    V_student, V_teacher, *, bias=False, scale=1.0, softcap=None, columns=None, rest=None, dtype=torch.float32, seed=0
):
    """Hidden states and heads of both models; ``columns``, ``rest``: (student's, teacher's) ids of each."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    student_columns, teacher_columns = (as_slice(ids) for ids in columns) if columns else (None, None)
    options = {"scale": scale, "softcap": softcap}
    mine, theirs = rest or (None, None)
    student = Head(randn(V_student, H) * 0.5, randn(V_student) if bias else None, columns=student_columns, **options)
    teacher = Head(randn(V_teacher, G) * 0.5, randn(V_teacher) if bias else None, columns=teacher_columns, **options)
    student, teacher = replace(student, rest=mine), replace(teacher, rest=theirs)
    real = torch.arange(V_student) if columns is None else torch.cat([columns[0], *([] if rest is None else [mine])])
    labels = real[torch.randint(len(real), (N,), generator=g)]
    return randn(N, H), student, HiddenSignal(randn(N, G), teacher), labels


def in_fp64(head, requires_grad=False):
    weight = head.weight.double().detach().requires_grad_(requires_grad)
    bias = None if head.bias is None else head.bias.double().detach().requires_grad_(requires_grad)
    return replace(head, weight=weight, bias=bias)


def reference(name, hidden, head, target, labels, t, weights, options=None, temperature=None):
    """The loss of taid.md over the buckets, in fp64: a row of the student's in none of them has target mass 0."""
    options = dict(options or {})
    hidden = hidden.double().detach().requires_grad_()
    head = in_fp64(head, requires_grad=True)
    everything = replace(head, columns=None, rest=None)(hidden)
    cross_entropy = per_token("sft", everything, None, labels_N=labels)
    if name == "sft":
        loss = cross_entropy
    else:
        labelled = options.pop("ce_weight", 0.0)
        options |= {} if temperature is None else {"temperature": temperature}
        options |= {"t": t} if name == "taid" else {}
        options |= {"labels_N": head.buckets_of(labels)} if name == "dkd" else {}
        buckets = head(hidden)
        loss = per_token(name, buckets, in_fp64(target.head)(target.hidden_NG.double()), **options)
        loss = loss + everything.logsumexp(-1) - buckets.logsumexp(-1)
        loss = (1.0 - labelled) * loss + labelled * cross_entropy
    (loss * weights).sum().mul(3.0).backward()
    return loss.detach() * weights, hidden.grad, head.weight.grad, None if head.bias is None else head.bias.grad


def ours(name, hidden, head, target, labels, t, weights, chunk, frozen=False, options=None, temperature=None):
    hidden = hidden.clone().requires_grad_()
    weight = head.weight.clone().requires_grad_(not frozen)
    bias = None if head.bias is None else head.bias.clone().requires_grad_(not frozen)
    objective = Objective.named(name, **(options or {}))
    arguments = {"t": t, "labels_N": labels, "weights_N": weights, "chunk": chunk, "temperature": temperature}
    out = linear_distillation(hidden, replace(head, weight=weight, bias=bias), target, objective, **arguments)
    out.loss_N.sum().mul(3.0).backward()
    return out, hidden.grad, weight.grad, None if bias is None else bias.grad


def off(a, b):
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-9))


SAME, SHIFTED = torch.arange(38), torch.arange(2, 40)
HOLES = (torch.tensor([3, 0, 7, 8, 20, 12]), torch.tensor([1, 2, 30, 5, 9, 4]))
REST = (torch.tensor([1, 2, 30, 31, 39, 4, 5]), torch.tensor([0, 3, 6, 7, 8, 35]))
CASES = {
    "equal": {"V_student": 40, "V_teacher": 40},
    "student padded": {"V_student": 48, "V_teacher": 40, "columns": (torch.arange(40), torch.arange(40))},
    "teacher padded": {"V_student": 40, "V_teacher": 64, "columns": (torch.arange(40), torch.arange(40))},
    "holes": {"V_student": 40, "V_teacher": 36, "columns": HOLES},
    "holes and bias": {"V_student": 40, "V_teacher": 36, "columns": HOLES, "bias": True},
    "teacher slice and bias": {"V_student": 40, "V_teacher": 64, "columns": (SAME, SHIFTED), "bias": True},
    "rest": {"V_student": 40, "V_teacher": 36, "columns": HOLES, "rest": REST, "bias": True},
    "rest of all and slices": {"V_student": 40, "V_teacher": 36, "columns": (torch.arange(9), torch.arange(3, 12)),
                               "rest": (torch.arange(9, 40), torch.tensor([0, 1, 2])), "softcap": 6.0},
    "scale": {"V_student": 40, "V_teacher": 40, "scale": 0.125},
    "soft cap": {"V_student": 40, "V_teacher": 40, "softcap": 2.0, "bias": True},
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 7, N, 100, None])
@pytest.mark.parametrize("kind", CASES)
def test_equals_dense_fp64(chunk, kind):
    for what, (name, options) in OBJECTIVES_AND_OPTIONS.items():
        if chunk not in (7, None) and name not in ("taid", "sft"):
            continue
        hidden, head, target, labels = case(**CASES[kind])
        weights = torch.linspace(0.0, 2.0, N)
        call = {"options": options, "temperature": 3.0 if name == "ctkd" else None}
        expected = reference(name, hidden, head, target, labels, 0.4, weights.double(), **call)
        out, *gradients = ours(name, hidden, head, target, labels, 0.4, weights, chunk, **call)
        assert (out.loss_N.detach() - expected[0]).abs().max() < 1e-5 * max(1.0, float(expected[0].max())), what
        for gradient, exact in zip(gradients, expected[1:], strict=True):
            assert (gradient is None) == (exact is None)
            if gradient is not None:
                assert off(gradient, exact) < 2e-5, what  # fp32 logits of near models: their gap keeps fewer digits


@pytest.mark.parametrize(("tile", "scratch"), [(16, 2**24), (17, 2**24), (38, 2**24), (16, 400), (16, 0)])
@pytest.mark.parametrize("kind", ["equal", "student padded", "teacher slice and bias", "scale"])
@pytest.mark.parametrize("name", ["taid", "fkl"])
def test_any_tiling_of_the_vocabulary_gives_the_same(name, kind, tile, scratch, monkeypatch):
    """Tiles of logits; their gradients go on together: all, one or two tiles at a time, or each."""
    from vlm_taid.objectives import products, streamed

    monkeypatch.setattr(streamed, "CACHED", 4 * tile)
    monkeypatch.setattr(products, "SCRATCH_BYTES", scratch)
    hidden, head, target, labels = case(**CASES[kind])
    assert streamed.streams(head, target)
    weights = torch.linspace(0.5, 2.0, N)
    expected = reference(name, hidden, head, target, labels, 0.4, weights.double())
    out, *gradients = ours(name, hidden, head, target, labels, 0.4, weights, 4)
    assert (out.loss_N.detach() - expected[0]).abs().max() < 3e-6 * max(1.0, float(expected[0].max()))
    for gradient, exact in zip(gradients, expected[1:], strict=True):
        assert exact is None or off(gradient, exact) < 2e-5


def test_rows_at_a_time_follow_vocabulary_and_memory():
    assert rows_at_a_time(151936, 256) == 208  # 8 bytes a logit: under 256 MiB
    assert rows_at_a_time(151936, 256, streamed=False) == 48
    assert rows_at_a_time(49152, 256) == 672 and rows_at_a_time(151936, 0.1) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
def test_logits_of_the_first_rows_lie_in_the_heads_gradient(dtype, trains, monkeypatch):
    """H / 4 rows of a bf16 head, H / 2 of an fp32 one; a frozen head has no gradient."""
    from vlm_taid.objectives.streamed import KLChunks

    room, taken = KLChunks._room, []
    monkeypatch.setattr(KLChunks, "_room", lambda self, n: taken.append((n, room(self, n)[0])) or room(self, n))
    hidden, head, target, labels = case(40, 40, dtype=dtype)
    _, _, weight_gradient, _ = ours("taid", hidden, head, target, labels, 0.4, torch.ones(N), None, frozen=not trains)
    first = H // 2 if dtype == torch.float32 else H // 4
    told = replace(head, weight=head.weight.clone().requires_grad_(trains))
    assert chunk_rows(told, target, Objective.named("taid"), t=0.4)[1] == (first if trains else 0)
    assert [n for n, _ in taken] == ([first, N - first] if trains else [N])
    if trains:
        made = weight_gradient.untyped_storage().nbytes()
        assert [tensor.untyped_storage().nbytes() == made for _, tensor in taken] == [True, False]


@pytest.mark.parametrize("instructions", [True, False])
def test_head_gradients_of_many_chunks_are_summed_in_fp32(instructions, monkeypatch):
    """200 chunks of bf16 sums would be off by several per cent."""
    from vlm_taid.objectives import products

    monkeypatch.setattr(products, "multiplies_bf16", lambda: instructions)
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=g).bfloat16() for shape in ((200, H), (40, H)))
    target = HiddenSignal(torch.randn(200, G, generator=g).bfloat16(), Head(torch.randn(40, G, generator=g).bfloat16()))
    weight = weight.requires_grad_()
    linear_distillation(hidden, Head(weight), target, Objective.named("taid"), t=0.4, chunk=1).loss_N.sum().backward()
    exact = in_fp64(Head(weight), requires_grad=True)
    teacher = in_fp64(target.head)(target.hidden_NG.double())
    per_token("taid", exact(hidden.double()), teacher, t=0.4).sum().backward()
    assert off(weight.grad, exact.weight.grad) < 5e-3


@pytest.mark.parametrize(("V", "width", "n"), [(2000, 64, 768), (32000, 2048, 4096), (49152, 576, 2000), (500, 64, 33)])
def test_four_chunks_are_enough_where_memory_holds_them(V, width, n):
    """And their head gradients are summed in bf16, wherever the first one's logits lie."""
    weight = torch.empty(V, width, dtype=torch.bfloat16, device="meta")
    for in_place in (True, False):
        chunks, dtype = _chunks(n, weight, 2.0**16, None, in_place=in_place, streamed=True)
        assert len(chunks) <= 4 and dtype == torch.bfloat16
        assert [chunk.start for chunk in chunks] == [0, *(chunk.stop for chunk in chunks[:-1])]
        assert chunks[-1].stop == n
        assert not in_place or chunks[0].stop == min(n, width // 4)


def test_the_dense_road_makes_no_second_head(monkeypatch):
    """A bf16 head's gradient that is summed in fp32 is multiplied into its place."""
    from vlm_taid.objectives import gradients, products

    made = []

    class Counted(products.Scratch):
        def take(self, shape, dtype=torch.float32):
            made.append(math.prod(shape) * dtype.itemsize)
            return super().take(shape, dtype)

    monkeypatch.setattr(products, "multiplies_bf16", lambda: True)
    monkeypatch.setattr(products, "SCRATCH_BYTES", 2**14)
    monkeypatch.setattr(gradients, "Scratch", Counted)
    hidden, head, target, labels = case(4000, 4000, dtype=torch.bfloat16)
    expected = reference("rkl", hidden, head, target, labels, 0.4, torch.ones(N).double())
    _, _, weight_gradient, _ = ours("rkl", hidden, head, target, labels, 0.4, torch.ones(N), 2)
    assert made and max(made) <= 2**14
    assert off(weight_gradient, expected[2]) < 0.01


def test_a_second_backward_is_refused():
    """It would be without gradient: the first one gives away what the forward pass made."""
    hidden, head, target, _ = case(40, 40)
    loss = linear_distillation(hidden.requires_grad_(), head, target, Objective.named("taid"), t=0.4).loss_N.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_second_derivative_is_refused():
    """It would be that of other terms alone."""
    hidden, head, target, _ = case(40, 40)
    loss = linear_distillation(hidden.requires_grad_(), head, target, Objective.named("taid"), t=0.4).loss_N.sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


@pytest.mark.parametrize("name", ["taid", "rkl"])
def test_padding_may_have_a_bias_of_minus_infinity(name):
    columns = (torch.arange(24), torch.arange(24))
    hidden, head, target, labels = case(40, 24, bias=True, columns=columns)
    head.bias[24:] = -torch.inf
    finite = replace(head, bias=head.bias.clamp_min(-1e4))
    expected = reference(name, hidden, finite, target, labels, 0.4, torch.ones(N).double())
    out, hidden_gradient, weight_gradient, _ = ours(name, hidden, head, target, labels, 0.4, torch.ones(N), None)
    assert off(out.loss_N.detach(), expected[0]) < 1e-5
    assert off(hidden_gradient, expected[1]) < 1e-5 and off(weight_gradient, expected[2]) < 1e-5


def test_tied_head_gets_both_gradients():
    weight = torch.randn(40, H, generator=torch.Generator().manual_seed(1))
    target = case(40, 40)[2]
    ids = torch.arange(N)
    found = []
    for dtype in (torch.float32, torch.float64):
        tied = weight.to(dtype).clone().requires_grad_()
        hidden = torch.nn.functional.embedding(ids, tied).tanh()
        if dtype == torch.float32:
            linear_distillation(hidden, Head(tied), target, Objective.named("taid"), t=0.4).loss_N.sum().backward()
        else:
            teacher = target.head(target.hidden_NG).double()
            per_token("taid", hidden @ tied.T, teacher, t=0.4).sum().backward()
        found.append(tied.grad)
    assert off(found[0], found[1]) < 5e-6


def test_frozen_head_makes_no_head_gradient(monkeypatch):
    hidden, head, target, labels = case(40, 40)
    made = []
    real = torch.zeros_like
    monkeypatch.setattr(torch, "zeros_like", lambda x, **k: made.append(x.shape) or real(x, **k))
    weights = torch.ones(N)
    _, hidden_gradient, weight_gradient, _ = ours("taid", hidden, head, target, labels, 0.4, weights, 4, frozen=True)
    assert weight_gradient is None and (40, H) not in made
    assert off(hidden_gradient, reference("taid", hidden, head, target, labels, 0.4, weights.double())[1]) < 5e-6


@pytest.mark.parametrize("scratch", [2**24, 2**12])
@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16_gradients_stay_within_one_percent(name, instructions, scratch, monkeypatch):
    """Whether or not the CPU multiplies bf16, and however many pieces of the vocabulary are added up."""
    from vlm_taid.objectives import products

    monkeypatch.setattr(products, "multiplies_bf16", lambda: instructions)
    monkeypatch.setattr(products, "SCRATCH_BYTES", scratch)
    hidden, head, target, labels = case(4000, 4000, dtype=torch.bfloat16)
    weights = torch.ones(N)
    expected = reference(name, hidden, head, target, labels, 0.4, weights.double())
    out, hidden_gradient, weight_gradient, _ = ours(name, hidden, head, target, labels, 0.4, weights, 4)
    assert hidden_gradient.dtype == weight_gradient.dtype == torch.bfloat16
    assert off(out.loss_N.detach(), expected[0]) < 1e-5  # the logits are not rounded to bf16
    assert off(hidden_gradient, expected[1]) < 0.01
    assert off(weight_gradient, expected[2]) < 0.01


@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_weight_and_bias_train_apart(trains):
    hidden, head, target, labels = case(40, 40, bias=True)
    expected = reference("taid", hidden, head, target, labels, 0.4, torch.ones(N).double())
    weight, bias = head.weight.requires_grad_(trains == "weight"), head.bias.requires_grad_(trains == "bias")
    out = linear_distillation(hidden, Head(weight, bias), target, Objective.named("taid"), t=0.4)
    out.loss_N.sum().mul(3.0).backward()
    found = {"weight": weight.grad, "bias": bias.grad}
    assert off(found.pop(trains), expected[2 if trains == "weight" else 3]) < 5e-6
    assert list(found.values()) == [None]


def test_no_rows():
    hidden, head, target, _ = case(40, 40)
    hidden, weight = hidden[:0].requires_grad_(), head.weight.clone().requires_grad_()
    target = HiddenSignal(target.hidden_NG[:0], target.head)
    out = linear_distillation(hidden, Head(weight), target, Objective.named("taid"), t=0.4)
    out.loss_N.sum().backward()
    assert out.loss_N.shape == (0,) and hidden.grad.shape == (0, H)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_kl_and_cross_entropy_forms():
    hidden, head, target, _ = case(48, 40, columns=(torch.arange(40), torch.arange(40)))
    out = linear_distillation(hidden, head, target, Objective.named("taid"), t=0.4)
    shared, teacher = head(hidden).double(), target.head(target.hidden_NG).double()
    p_t = (0.6 * shared + 0.4 * teacher).softmax(-1)
    log_q = Head(head.weight)(hidden).double().log_softmax(-1)[:, :40]
    assert off(out.ce_N, -(p_t * log_q).sum(-1)) < 1e-6
    assert off(out.kl_N, (p_t * (p_t.log() - log_q)).sum(-1)) < 1e-6


def test_without_gradient_nothing_is_made():
    hidden, head, target, _ = case(40, 40)
    with torch.no_grad():
        out = linear_distillation(hidden.requires_grad_(), head, target, Objective.named("taid"), t=0.4)
    assert not out.loss_N.requires_grad


def test_uneven_upstream_gradient_of_a_trainable_head_is_refused():
    hidden, head, target, _ = case(40, 40)
    trainable = Head(head.weight.requires_grad_())
    out = linear_distillation(hidden, trainable, target, Objective.named("taid"), t=0.4)
    with pytest.raises(ValueError, match="weights_N"):
        (out.loss_N * torch.arange(N)).sum().backward()


def test_padded_student_rows_are_driven_down():
    """A padded row has target mass 0 and stays in the normaliser: its gradient is its own mass."""
    hidden, head, target, _ = case(48, 40, columns=(torch.arange(40), torch.arange(40)))
    bias = torch.zeros(48, requires_grad=True)
    student = Head(head.weight, bias, columns=head.columns)
    linear_distillation(hidden, student, target, Objective.named("taid"), t=0.4).loss_N.sum().backward()
    mass_NV = Head(head.weight)(hidden).softmax(-1)
    assert off(bias.grad[40:], mass_NV[:, 40:].sum(0).double()) < 1e-5


def test_wrong_use_is_named():
    hidden, head, target, _ = case(40, 36)
    with pytest.raises(ValueError, match="SharedVocabulary"):
        linear_distillation(hidden, head, target, Objective.named("taid"), t=0.4)
    with pytest.raises(TypeError, match="teacher"):
        linear_distillation(hidden, head, None, Objective.named("fkl"))
    hidden, head, target, _ = case(40, 40)
    with pytest.raises(TypeError, match="needs t"):
        linear_distillation(hidden, head, target, Objective.named("taid"))
    with pytest.raises(TypeError, match="labels_N"):
        linear_distillation(hidden, head, None, Objective.named("sft"))


def test_autocast_does_not_reach_the_products():
    hidden, head, target, labels = case(40, 40)
    plain = ours("taid", hidden, head, target, labels, 0.4, torch.ones(N), 4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = ours("taid", hidden, head, target, labels, 0.4, torch.ones(N), 4)
    assert torch.equal(plain[0].loss_N, cast[0].loss_N) and torch.equal(plain[1], cast[1])


def test_small_weights_lose_no_gradient_of_fp16_hidden_states():
    """A loss scale comes in backward, after the weights: 1 over a step's tokens is below what fp16 holds."""
    hidden, head, target, labels = case(40, 40)
    weights, scale = torch.full((N,), 2.0**-16), 2.0**16
    exact = reference("taid", hidden.half(), head, target, labels, 0.4, torch.ones(N).double())[1] / 3.0
    hidden = hidden.half().requires_grad_()
    out = linear_distillation(hidden, head, target, Objective.named("taid"), t=0.4, weights_N=weights)
    (out.loss_N.sum() * scale).backward()
    assert hidden.grad.dtype == torch.float16
    assert off(hidden.grad, exact) < 2e-3
