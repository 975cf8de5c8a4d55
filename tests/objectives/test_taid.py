"""The schedule against an independent loop; TAID's loss against dense fp64 autograd."""

import math

import pytest
import torch

from vlm_taid.objectives import Objective, TAIDSchedule, per_token


def by_hand(losses, num_steps, t_start, alpha, beta, adaptive, t_end=1.0):
    """taid.md section 2 written once more, in the order of the authors' code, in Python's fp64."""
    t, previous, momentum, path = t_start, None, 0.0, []
    for step, loss in enumerate(losses):
        line = t_start + (t_end - t_start) * step / num_steps
        if not adaptive:
            t = line
        elif previous is None:
            previous = loss
        else:
            momentum = beta * momentum + (1 - beta) * (previous - loss) / (previous + 1e-15)
            t = min(t_end, max(line, t + alpha / (1 + math.exp(-momentum)) * (1 - t)))
            previous = loss
        path.append(t)
    return path


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("alpha, beta", [(5e-4, 0.99), (0.05, 0.5)])
@pytest.mark.parametrize("seed", range(3))
def test_schedule_equals_the_algorithm(adaptive, alpha, beta, seed):
    losses = (torch.rand(300, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 5).tolist()
    schedule = TAIDSchedule(t_start=0.2, alpha=alpha, beta=beta, adaptive=adaptive)
    path = [schedule.update(loss, step, 300) for step, loss in enumerate(losses)]
    expected = by_hand(losses, 300, 0.2, alpha, beta, adaptive)
    assert max(abs(a - b) for a, b in zip(path, expected, strict=True)) < 1e-12
    if adaptive and alpha == 0.05:  # far ahead of the line, so that the adaptive term is what was tested
        assert path[100] > 0.2 + 0.8 * 100 / 300 + 0.2


def test_first_update_only_remembers_the_loss():
    schedule = TAIDSchedule(t_start=0.4)
    assert schedule.update(3.0, 0, 10) == 0.4
    assert schedule.previous == 3.0 and schedule.momentum == 0.0


def test_signal_that_is_not_finite_is_skipped_and_counted():
    schedule, clean = TAIDSchedule(alpha=0.05), TAIDSchedule(alpha=0.05)
    for loss in (3.0, 2.0):
        schedule.update(loss, 0, 1000), clean.update(loss, 0, 1000)
    before = schedule.state_dict()
    for bad in (float("nan"), float("inf"), -float("inf")):
        schedule.update(bad, 1, 1000)
    assert schedule.state_dict() == before | {"skipped_updates": 3, "delta_t": 0.0}
    assert schedule.update(1.0, 2, 1000) == clean.update(1.0, 2, 1000)


def test_state_survives_json_bit_for_bit():
    import json

    schedule = TAIDSchedule()
    for step, loss in enumerate([3.1, 2.7, 2.9]):
        schedule.update(loss, step, 10)
    other = TAIDSchedule()
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert other.state_dict() == schedule.state_dict()
    assert other.update(2.2, 3, 10) == schedule.update(2.2, 3, 10)


def test_closed_form_is_close_to_the_published_schedule():
    schedule = TAIDSchedule(t_start=0.4)
    for step in range(2000):
        schedule.update(3.0 - step / 1000, step, 20000)
    assert schedule.t == pytest.approx(schedule.closed_form(2000, 20000), abs=5e-3)
    assert schedule.t > 0.4 + 0.6 * 2000 / 20000 + 0.1  # and the line is not


@pytest.mark.parametrize("t_start, t_end", [(-0.1, 1.0), (0.5, 0.4), (0.4, 1.1)])
def test_impossible_range_is_refused(t_start, t_end):
    with pytest.raises(ValueError, match="t_start"):
        TAIDSchedule(t_start=t_start, t_end=t_end)


def logits(seed, N=6, V=50, scale=3.0):
    return scale * torch.randn(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(student_NV, teacher_NV, t):
    """Value [N] and gradient [N, V] of KL(p_t || q) from sums written out, in fp64."""
    q = student_NV.exp() / student_NV.exp().sum(-1, keepdim=True)
    mixed = ((1 - t) * student_NV + t * teacher_NV).exp()
    target = mixed / mixed.sum(-1, keepdim=True)
    return (target * (target / q).log()).sum(-1), q - target


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_taid_equals_dense_fp64(t):
    student, teacher = logits(0), logits(1)
    value_N, gradient_NV = dense(student, teacher, t)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        leaf = student.to(dtype).clone().requires_grad_()
        loss_N = per_token("taid", leaf, teacher.to(dtype), t=t)
        loss_N.sum().backward()
        assert (loss_N - value_N).abs().max() <= tolerance * max(1.0, float(value_N.max()))
        assert (leaf.grad - gradient_NV).norm() <= tolerance * max(1.0, float(gradient_NV.norm()))
    if t == 0.0:
        assert gradient_NV.abs().max() < 1e-14
    if t == 0.5:
        assert gradient_NV.abs().max() > 0.05


def test_taid_is_zero_where_the_models_agree():
    student = logits(0).requires_grad_()
    for t in (0.0, 0.5, 1.0):
        assert per_token("taid", student, student.detach(), t=t).abs().max() < 1e-13


def test_taid_at_one_is_forward_kl():
    student, teacher = logits(0), logits(1)
    assert torch.equal(per_token("taid", student, teacher, t=1.0), per_token("fkl", student, teacher, t=0.3))
    with pytest.raises(TypeError, match="t"):
        per_token("taid", student, teacher)


def test_values_found_by_hand_on_three_tokens():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL(p||q) = 1/2 ln 2 - 1/4 ln 2 = KL(q||p)."""
    p, q = torch.tensor([[2.0, 1.0, 1.0]]).log(), torch.tensor([[1.0, 1.0, 2.0]]).log()
    assert per_token("fkl", q, p).item() == pytest.approx(math.log(2) / 4, abs=1e-6)
    assert per_token("rkl", q, p).item() == pytest.approx(math.log(2) / 4, abs=1e-6)
    assert per_token("sft", q, None, labels_N=torch.tensor([2])).item() == pytest.approx(math.log(2), abs=1e-6)
    # half way in logits: p_t is uniform over sqrt(2), 1, sqrt(2)
    target = [math.sqrt(2), 1.0, math.sqrt(2)]
    target = [x / sum(target) for x in target]
    by_sum = sum(m * math.log(m / y) for m, y in zip(target, (0.25, 0.25, 0.5), strict=True))
    assert per_token("taid", q, p, t=0.5).item() == pytest.approx(by_sum, abs=1e-6)


def test_unknown_objective_or_option_names_the_known_ones():
    with pytest.raises(ValueError, match="taid, fkl"):
        Objective.named("tiad")
    with pytest.raises(ValueError, match="no option mu"):
        Objective.named("fkl", mu=0.5)


def test_self_distillation_needs_the_teacher():
    """The paper's proxy: with t = 0 a student keeps no teacher signal; with TAID's schedule it becomes the teacher."""

    def trained(schedule_t):
        student, teacher = logits(2, N=4, V=12).float(), logits(3, N=4, V=12).float()
        for step in range(400):
            leaf = student.clone().requires_grad_()
            per_token("taid", leaf, teacher, t=schedule_t(step)).sum().backward()
            student = student - 1.0 * leaf.grad
        return per_token("fkl", student, teacher).mean().item()

    start = per_token("fkl", logits(2, N=4, V=12), logits(3, N=4, V=12)).mean().item()
    assert trained(lambda step: 0.0) == pytest.approx(start, rel=1e-4)
    assert trained(lambda step: 0.4 + 0.6 * step / 400) < 0.02 * start
