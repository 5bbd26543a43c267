"""Schedules against their formulas, and the learned temperature: its value, its reversed gradient, its resume."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kdfast import Distiller, distill_loss
from kdfast.methods import KD, Cosine, Linear, WarmUp
from kdfast.methods.response import LearnedTemperature
from kdfast.methods.schedule import value


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def uniform(low, high):
    return torch.empty((), dtype=torch.float64).uniform_(low, high).item()


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
def test_values_at_every_step(steps):
    a, b = uniform(-3, 3), uniform(-3, 3)
    linear, cosine, warm = Linear(a, b, steps), Cosine(a, b, steps), WarmUp(b, steps)
    for step in range(2 * steps + 2):
        share = step / steps if step < steps else 1.0
        assert linear(step) == pytest.approx((1 - share) * a + share * b, rel=1e-12, abs=1e-12)
        # cos(x)^2 = (1 + cos 2x) / 2
        falling = math.cos(math.pi / 2 * share) ** 2
        assert cosine(step) == pytest.approx(falling * a + (1 - falling) * b, rel=1e-12, abs=1e-12)
        assert warm(step) == pytest.approx(share * b, rel=1e-12, abs=1e-12)
    for schedule in (linear, cosine):
        assert schedule(0) == pytest.approx(a, rel=1e-15)
        assert schedule(10**9) == pytest.approx(b, rel=1e-15)


def test_a_schedule_after_a_warm_up_starts_at_its_end():
    after = Cosine(2.0, 1.0, steps=10)
    warm = WarmUp(after, steps=4)
    assert [warm(step) for step in range(4)] == [0.0, 0.5, 1.0, 1.5]
    assert [warm(4 + step) for step in range(12)] == [after(step) for step in range(12)]


@pytest.mark.parametrize("kind", [Linear, Cosine])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0.0, 1.0, 0), ValueError, "steps must be > 0 and finite, got 0"),
        ((0.0, 1.0, -3), ValueError, "steps must be > 0"),
        ((0.0, 1.0, math.inf), ValueError, "steps must be > 0 and finite"),
        ((0.0, 1.0, math.nan), ValueError, "steps must be > 0"),
        ((0.0, 1.0, "ten"), TypeError, "steps must be a number"),
        ((0.0, 1.0, True), TypeError, "steps must be a number"),
        ((math.nan, 1.0, 5), ValueError, "start must be a finite number, got nan"),
        ((0.0, math.inf, 5), ValueError, "end must be a finite number, got inf"),
        (("low", 1.0, 5), TypeError, "start must be a number"),
        ((0.0, None, 5), TypeError, "end must be a number"),
    ],
)
def test_nonsense_is_refused(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind(*arguments)


def test_nonsense_of_a_warm_up_is_refused():
    for then, steps, error in ((math.nan, 4, ValueError), ("then", 4, TypeError), (1.0, 0, ValueError)):
        with pytest.raises(error):
            WarmUp(then, steps)


def test_what_a_callable_returns_is_looked_at():
    assert value(lambda step: 2 * step, 3) == 6
    with pytest.raises(TypeError, match=r"what .* returns must be a number or a 0-d tensor, got NoneType"):
        value(lambda step: None, 3)
    with pytest.raises(ValueError, match="finite number, got nan"):
        value(lambda step: math.nan, 3)
    with pytest.raises(ValueError, match="0-d tensor, got shape"):
        value(lambda step: torch.ones(2), 3)


def test_learned_temperature_is_its_formula():
    theta, low, span = uniform(-3, 3), uniform(0.5, 2), uniform(1, 30)
    temperature = LearnedTemperature(0.7, minimum=low, span=span, theta=theta)
    tau = temperature(0)
    assert tau.shape == ()
    assert tau.dtype == torch.float32
    assert tau.item() == pytest.approx(low + span * sigmoid(theta), rel=1e-6)
    assert LearnedTemperature()(0).item() == pytest.approx(1 + 20 * sigmoid(1.0), rel=1e-6)


@pytest.mark.parametrize("reversal", [0.0, 0.4, 1.0, Cosine(0.0, 1.0, steps=10)])
def test_the_gradient_is_reversed_and_scaled(reversal):
    theta, upstream, step = uniform(-2, 2), uniform(-3, 3), 4
    temperature = LearnedTemperature(reversal, theta=theta)
    (upstream * temperature(step)).backward()
    factor = reversal(step) if callable(reversal) else reversal
    slope = 20 * sigmoid(theta) * (1 - sigmoid(theta))
    assert temperature.theta.grad.item() == pytest.approx(-factor * upstream * slope, rel=1e-5, abs=1e-9)


def test_theta_climbs_where_a_temperature_of_its_own_would_descend():
    student, teacher, theta = 2 * torch.randn(16, 9), 2 * torch.randn(16, 9), uniform(-1, 1)
    temperature = LearnedTemperature(0.5, theta=theta)
    distill_loss(student, teacher, temperature=temperature(0)).backward()
    own = torch.tensor(theta, requires_grad=True, dtype=torch.float32)
    distill_loss(student, teacher, temperature=1 + 20 * torch.sigmoid(own)).backward()
    torch.testing.assert_close(temperature.theta.grad, -0.5 * own.grad)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"reversal": -0.5}, ValueError),
        ({"reversal": math.inf}, ValueError),
        ({"reversal": "full"}, TypeError),
        ({"minimum": 0.0}, ValueError),
        ({"span": -1.0}, ValueError),
        ({"theta": math.nan}, ValueError),
    ],
)
def test_wrong_learned_temperatures_are_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        LearnedTemperature(**options)


def losses():
    schedule = Cosine(0.5, 1.0, steps=10)  # from the first step on, so that theta has moved by the third
    return [KD(temperature=LearnedTemperature(schedule), alpha=Linear(1.0, 0.5, steps=8), weight=WarmUp(2.0, steps=4))]


def run(d, student, optimizer, batches):
    found = []
    for batch in batches:
        loss, _ = d(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_training_resumes_where_it_was():
    """The step, theta, and all that follows are as if nothing had happened."""
    teacher = nn.Linear(3, 5)
    batches = [(torch.randn(6, 3), torch.randint(0, 5, (6,))) for _ in range(8)]
    student = nn.Linear(3, 5)
    with Distiller(student, teacher, losses()) as d:
        (theta,) = d.parameters()
        optimizer = torch.optim.SGD([*student.parameters(), *d.parameters()], lr=0.1)
        run(d, student, optimizer, batches[:3])
        saved = {"student": {k: v.clone() for k, v in student.state_dict().items()}, "d": d.state_dict()}
        saved["d"]["losses"] = {k: v.clone() for k, v in saved["d"]["losses"].items()}
        assert d.number == 3
        at_save = theta.item()
        assert at_save != 1.0
        expected = run(d, student, optimizer, batches[3:])
        theta_at_end = theta.item()

    again = nn.Linear(3, 5)
    again.load_state_dict(saved["student"])
    with Distiller(again, teacher, losses()) as d:
        d.load_state_dict(saved["d"])
        (theta,) = d.parameters()
        assert (d.number, theta.item()) == (3, at_save)
        optimizer = torch.optim.SGD([*again.parameters(), *d.parameters()], lr=0.1)
        assert run(d, again, optimizer, batches[3:]) == expected
        assert theta.item() == theta_at_end


def test_schedules_count_optimizer_steps_and_not_micro_batches():
    student, teacher = nn.Linear(3, 5), nn.Linear(3, 5)
    batch = (torch.randn(6, 3), torch.randint(0, 5, (6,)))
    with Distiller(student, teacher, [KD(weight=Linear(1.0, 0.0, steps=4))], accumulation_steps=2) as d:
        weights = []
        for _ in range(6):
            loss, terms = d(batch)
            weights.append((loss / terms["kd"]).item())
    assert weights == pytest.approx([1.0, 1.0, 0.75, 0.75, 0.5, 0.5], rel=1e-5)
