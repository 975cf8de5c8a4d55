"""Each objective by hand on three tokens, and the proof that the checks see a wrong one."""

import math
from pathlib import Path

import pytest
import torch

from vlm_taid.objectives import OBJECTIVES, LearnedTemperature, Objective, divergences, linear_distillation, objective
from vlm_taid.objectives.objective import Inputs

from .test_linear import OBJECTIVES_AND_OPTIONS, case

LN2 = math.log(2)
P, Q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
# p = (1/2, 1/4, 1/4) and q = (1/4, 1/4, 1/2). With w = 1/2 the mixture is (3/8, 1/4, 3/8).
BY_HAND = {
    "fkl": ({}, LN2 / 4),
    "rkl": ({}, LN2 / 4),
    "sft": ({"labels_N": torch.tensor([2])}, LN2),
    "tvd": ({}, 0.25),
    # KL(p, m) = 1/2 ln 4/3 + 1/4 ln 2/3 = KL(q, m)
    "js": ({"weight": 0.5}, 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3)),
    # m = (5/16, 1/4, 7/16): 1/2 ln 8/5 + 1/4 ln 4/7
    "sfkl": ({"weight": 0.25}, 0.5 * math.log(8 / 5) + 0.25 * math.log(4 / 7)),
    # m = (7/16, 1/4, 5/16): 1/4 ln 4/7 + 1/2 ln 8/5
    "srkl": ({"weight": 0.25}, 0.25 * math.log(4 / 7) + 0.5 * math.log(8 / 5)),
    # the head at 0.6 is the first two tokens: gaps 1/4 and 1/4, both KLs ln 2 / 4
    "akl": ({"mu": 0.6}, LN2 / 4),
    # target: KL((1/4, 3/4), (1/2, 1/2)); others: KL((2/3, 1/3), (1/2, 1/2))
    "dkd": (
        {"labels_N": torch.tensor([2]), "target_weight": 2.0, "non_target_weight": 3.0},
        2.0 * (0.25 * math.log(0.5) + 0.75 * math.log(1.5)) + 3.0 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)),
    ),
    # at T = 1/2 the probabilities are squared: (4, 1, 1) / 6 and (1, 1, 4) / 6: (4/6 - 1/6) ln 4, times T^2
    "ctkd": ({"temperature": 0.5}, 0.25 * 0.5 * math.log(4)),
    # half way in logits: p_t = (sqrt 2, 1, sqrt 2) / (1 + 2 sqrt 2)
    "taid": (
        {"t": 0.5},
        2 * math.sqrt(2) / (1 + 2 * math.sqrt(2)) * math.log(4 * math.sqrt(2) / (1 + 2 * math.sqrt(2)))
        + 1 / (1 + 2 * math.sqrt(2)) * math.log(4 / (1 + 2 * math.sqrt(2)))
        - math.sqrt(2) / (1 + 2 * math.sqrt(2)) * LN2,
    ),
}  # fmt: skip


def by_fused(name, student, teacher, **options):
    """Value and gradient of the closed form, with temperature as ``linear_distillation`` applies it."""
    T, t, labels = (
        options.pop(key, default) for key, default in (("temperature", 1.0), ("t", None), ("labels_N", None))
    )
    teacher = None if teacher is None else teacher / T
    fused = Objective.named(name, **options).fused(student / T, teacher, Inputs(t, labels, T))
    return T * T * fused.loss_N, T * fused.gradient_NB, fused


def test_every_objective_is_tested_by_hand():
    assert set(BY_HAND) == set(OBJECTIVES) == set(divergences.DIVERGENCES)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_values_found_by_hand_on_three_tokens(name):
    options, expected = BY_HAND[name]
    student, teacher = torch.tensor([Q], dtype=torch.float64).log(), torch.tensor([P], dtype=torch.float64).log()
    student, teacher = student + 0.7, teacher - 1.9  # logits are known up to a constant
    assert divergences.per_token(name, student, teacher, **options).item() == pytest.approx(expected, rel=1e-12)
    teacher = None if name == "sft" else teacher.clone()
    assert by_fused(name, student, teacher, **options)[0].item() == pytest.approx(expected, rel=1e-6)


def test_taid_in_probabilities_by_hand():
    """Half way in probabilities: p_t = (3/8, 1/4, 3/8)."""
    student, teacher = torch.tensor([Q]).log(), torch.tensor([P]).log()
    expected = {
        "kl": 3 / 8 * math.log(3 / 2) + 3 / 8 * math.log(3 / 4),
        "rkl": 1 / 4 * math.log(2 / 3) + 1 / 2 * math.log(4 / 3),
    }
    for divergence, value in expected.items():
        options = {"t": 0.5, "interpolation": "probabilities", "divergence": divergence}
        assert divergences.per_token("taid", student, teacher, **options).item() == pytest.approx(value, abs=1e-6)


# What each mutation changes: (text, its mutant) in a module's source. Every one must be seen by the check below.
MUTATIONS = [
    (
        "q - p's sign in the KL",
        "log_q_NB.exp_().sub_(p_NB))\n\n\ndef _js",
        "log_q_NB.exp_().add_(p_NB))\n\n\ndef _js",
    ),
    (
        "the KL's value",
        "kl_N = _dot(p_NB, log_p_NB.sub_(log_q_NB))\n    return Fused",
        "kl_N = _dot(p_NB, log_p_NB)\n    return Fused",
    ),
    (
        "rkl without its mean",
        "return Fused(loss_N, loss_N, ce_N, _centred(u_NB, q_NB))",
        "return Fused(loss_N, loss_N, ce_N, u_NB)",
    ),
    ("js without its weight", "loss_N = weight * _dot(p_NB", "loss_N = _dot(p_NB"),
    ("js's gradient without its weight", ".mul_(q_NB).mul_(1.0 - weight)", ".mul_(q_NB)"),
    ("tvd's sign", "gap_NB.sign_().mul_(0.5)", "gap_NB.sign_().mul_(-0.5)"),
    ("tvd's half", "loss_N = 0.5 * gap_NB.abs()", "loss_N = gap_NB.abs()"),
    (
        "sfkl's mixture",
        "_log_to_mixture(gap_NB.neg_(), 1.0 - self.weight)",
        "_log_to_mixture(gap_NB.neg_(), self.weight)",
    ),
    (
        "srkl's mixture",
        "ratio_NB = _log_to_mixture(gap_NB, 1.0 - self.weight)",
        "ratio_NB = _log_to_mixture(gap_NB, self.weight)",
    ),
    ("srkl's second term", "ratio_NB.sub_(ratio_NB.exp(), alpha=self.weight)", "ratio_NB"),
    (
        "akl's mask in sorted order",
        "sorted_NB.scatter_(-1, order_NB, before_NB.lt_(mu))",
        "before_NB.lt_(mu)",
    ),
    (
        "akl's weights swapped",
        "share_N * fkl_N + (1.0 - share_N) * rkl_N",
        "share_N * rkl_N + (1.0 - share_N) * fkl_N",
    ),
    ("akl's head by its own mass", "sub_(sorted_NB)\n", "mul_(1.0)\n"),
    ("dkd's first weight", "self.target_weight * (log_q", "(log_q"),
    ("dkd's second weight", "self.non_target_weight * others_N", "others_N"),
    ("dkd's target column", "gradient_NB.scatter_(-1, at_N1, difference_N1)", "gradient_NB"),
    ("ctkd's factor T^2", "inputs.temperature * (2.0 * kl_N - shrinks_N)", "inputs.temperature * (kl_N - shrinks_N)"),
    ("ctkd's teacher", " + _dot(teacher_gradient_NB, teacher_NB)", ""),
    ("taid backwards", "mul_(t).add_(student_NB)", "mul_(1.0 - t).add_(student_NB)"),
    ("taid in probabilities, backwards", "- math.log(t)", "- math.log1p(-t)"),
    ("taid's divergence", 'if self.divergence == "kl":', "if True:"),
    ("sft's label", "full_like(at_N1, -1, dtype", "full_like(at_N1, 1, dtype"),
]  # fmt: skip


def check_all(named):
    """Fused values and gradients against fp64 autograd of the dense reference, every objective with its options."""
    g = torch.Generator().manual_seed(3)
    student, teacher = (2.0 * torch.randn(5, 23, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([0, 22, 7, 7, 3])
    for what, (name, options) in OBJECTIVES_AND_OPTIONS.items():
        options = {key: value for key, value in options.items() if key != "ce_weight"}
        T = options.pop("temperature", 3.0 if name == "ctkd" else 1.0)
        leaf, slope = student.clone().requires_grad_(), torch.tensor(T, dtype=torch.float64, requires_grad=True)
        reads = {"taid": {"t": 0.3}, "dkd": {"labels_N": labels}, "sft": {"labels_N": labels}}.get(name, {})
        exact = divergences.per_token(name, leaf, teacher, temperature=slope, **reads, **options)
        exact.sum().backward()
        fused = named(name, **options).fused(
            (student / T).float(), (teacher / T).float(), Inputs(reads.get("t"), labels, T)
        )
        assert (T * T * fused.loss_N - exact).abs().max() < 1e-5, f"{what}: value"
        assert (T * fused.gradient_NB - leaf.grad).norm() < 1e-5 * leaf.grad.norm(), f"{what}: gradient"
        if name == "ctkd":
            assert abs(float(fused.temperature_gradient_N.sum() - slope.grad)) < 1e-5, what


def test_fused_equals_the_reference_in_fp64():
    check_all(Objective.named)


@pytest.mark.parametrize("what, text, mutant", MUTATIONS, ids=[m[0] for m in MUTATIONS])
def test_the_check_sees_a_mutation(what, text, mutant):
    source = Path(objective.__file__).read_text()
    assert source.count(text) == 1, f"the source has {source.count(text)} places for the mutation"
    mutated = {"__name__": objective.__name__, "__package__": objective.__package__}
    exec(compile(source.replace(text, mutant), "mutant", "exec", dont_inherit=True), mutated)
    with pytest.raises(AssertionError):
        check_all(mutated["Objective"].named)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sft"])
def test_equal_models_cost_nothing(name):
    student = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    options = {"t": 0.4} if name == "taid" else {"labels_N": torch.arange(4)} if name == "dkd" else {}
    value, gradient, _ = by_fused(name, student, student.clone(), **options)
    assert value.abs().max() < 1e-6 and gradient.abs().max() < 1e-6


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "sft"])
def test_far_apart_models_stay_finite(name):
    student, teacher = torch.zeros(2, 9), torch.zeros(2, 9)
    student[0, 0] = teacher[0, 1] = student[1, 2] = 300.0
    teacher[1, 2] = -300.0
    options = {"t": 0.4} if name == "taid" else {"labels_N": torch.tensor([1, 5])} if name == "dkd" else {}
    value, gradient, _ = by_fused(name, student, teacher, **options)
    assert value.isfinite().all() and gradient.isfinite().all()


def test_temperature_climbs_what_the_student_descends():
    """A positive slope of the loss raises T; without strength, at the first step, nothing moves."""
    temperature = LearnedTemperature(learning_rate=1.0)
    assert temperature.value == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    assert temperature.update(0.3, 0, 10) == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    for step, strength in ((5, 0.5), (10, 1.0), (12, 1.0)):
        before = temperature.tau
        share = 1 / (1 + math.exp(-before))
        temperature.update(0.3, step, 10)
        assert temperature.tau - before == pytest.approx(strength * 0.3 * 20 * share * (1 - share))
    before = temperature.value
    assert temperature.update(-0.3, 10, 10) < before
    assert temperature.update(float("nan"), 10, 10) == temperature.value
    other = LearnedTemperature()
    other.load_state_dict(temperature.state_dict())
    assert other.value == temperature.value


def test_learned_temperatures_slope_through_both_heads():
    """d loss / d T against central differences of the whole fused loss."""
    hidden, head, target, _ = case(48, 40, columns=(torch.arange(40), torch.arange(40)))

    def at(T, **more):
        return linear_distillation(hidden, head, target, Objective.named("ctkd"), temperature=T, chunk=4, **more)

    slope = at(3.0).temperature_gradient_N
    assert torch.equal(at(3.0, weights_N=torch.full((len(hidden),), 0.3)).temperature_gradient_N, slope)
    difference = (at(3.02).loss_N - at(2.98).loss_N) / 0.04
    assert (slope - difference).abs().max() < 5e-3 * slope.abs().max()


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("js", {"weight": 0.0}, "weight"),
        ("akl", {"mu": 1.0}, "mu"),
        ("fkl", {"temperature": 0.0}, "temperature"),
        ("rkl", {"ce_weight": 1.5}, "ce_weight"),
        ("taid", {"interpolation": "angles"}, "interpolation"),
        ("sft", {"temperature": 2.0}, "no option temperature"),
        ("ctkd", {"temperature": 2.0}, "no option temperature"),
    ],
)
def test_impossible_options_are_refused(name, options, said):
    with pytest.raises(ValueError, match=said):
        Objective.named(name, **options)
