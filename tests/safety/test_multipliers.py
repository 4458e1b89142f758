"""Multipliers against closed forms, and what a checkpoint and members must keep apart."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from saferl.errors import SaferlError
from saferl.safety.multipliers import KINDS, Multipliers


def run(multipliers: Multipliers, *excesses: float) -> list[float]:
    """λ of member 0 and constraint 0 after each update."""
    path = []
    for excess in excesses:
        multipliers.update(torch.full_like(multipliers.level, excess))
        path.append(multipliers.value()[0, 0].item())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_it_rises_above_the_limit_and_falls_below(kind):
    multipliers = Multipliers(1, kind=kind, lr=0.1)
    up = run(multipliers, *[0.5] * 20)
    # Leave out the first step of pid, which the derivative's kick also moves.
    assert all(b > a for a, b in pairwise(up[1:])), up
    down = run(multipliers, *[-0.5] * 10)
    assert all(b < a for a, b in pairwise([up[-1], *down])), down
    assert all(value >= 0 for value in run(multipliers, *[-1.0] * 500))


def test_gradient_is_projected_ascent():
    path = run(Multipliers(1, lr=0.1, maximum=0.25), 1, 1, 1, -2, -2, 0.5)
    assert path == pytest.approx([0.1, 0.2, 0.25, 0.05, 0.0, 0.05])


def test_softplus_ascends_in_z():
    z, path = 0.0, []
    excesses = (1.0, 0.5, -2.0, -1.0)
    for excess in excesses:
        z += 0.3 * excess / (1 + math.exp(-z))
        path.append(math.log1p(math.exp(z)))
    multipliers = Multipliers(1, kind="softplus", lr=0.3)
    assert multipliers.value().item() == pytest.approx(math.log(2))
    assert run(multipliers, *excesses) == pytest.approx(path)


def test_softplus_steps_along_the_gradient():
    z = torch.tensor(0.4, requires_grad=True)
    (F.softplus(z) * 0.7).backward()
    multipliers = Multipliers(1, kind="softplus", lr=0.2, start=F.softplus(z).item())
    run(multipliers, 0.7)
    assert multipliers.level.item() == pytest.approx(z.item() + 0.2 * z.grad.item(), rel=1e-5)


def test_pid_is_the_published_controller():
    """κ = relu(kp relu(e) + ki I + kd relu(e - e_before)), I ← relu(I + e)."""
    kp, ki, kd = 0.5, 0.1, 2.0
    excesses = (1.0, 0.5, 0.75, -4.0, -1.0, 0.5)
    integrals = (1.0, 1.5, 2.25, 0.0, 0.0, 0.5)
    rises = (1.0, 0.0, 0.25, 0.0, 3.0, 1.5)
    expected = [
        kp * max(e, 0) + ki * total + kd * rise
        for e, total, rise in zip(excesses, integrals, rises)
    ]
    assert run(Multipliers(1, kind="pid", lr=ki, kp=kp, kd=kd), *excesses) == pytest.approx(
        expected
    )


def test_pid_without_p_and_d_is_gradient():
    excesses = [0.5, 0.5, -0.2, 0.4, -3.0, 0.1]
    pid = run(Multipliers(1, kind="pid", lr=0.1, kp=0, kd=0), *excesses)
    assert pid == pytest.approx(run(Multipliers(1, lr=0.1), *excesses))


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds_and_nothing_winds_up(kind):
    multipliers = Multipliers(1, kind=kind, lr=0.1, kp=0.0, kd=0.0, maximum=0.8)
    path = run(multipliers, *[1.0] * 100)
    assert max(path) == pytest.approx(0.8) and max(path) <= 0.8 + 1e-6
    assert run(multipliers, -1.0)[0] < 0.78  # it falls with the first step below


@pytest.mark.parametrize("kind", KINDS)
def test_loaded_goes_on_identically(kind):
    random = torch.Generator().manual_seed(0)
    excesses = torch.randn(12, 2, 3, generator=random)
    whole, first, second = (Multipliers(2, 3, kind, lr=0.1) for _ in range(3))
    for excess in excesses:
        whole.update(excess)
    for excess in excesses[:5]:
        first.update(excess)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for excess in excesses[5:]:
        second.update(excess)
    assert torch.equal(second.value(), whole.value())
    for key, tensor in second.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[key])
        assert tensor.shape == (2, 3)  # the member axis first, in everything that is saved


@pytest.mark.parametrize("kind", KINDS)
def test_members_and_constraints_do_not_mix(kind):
    random = torch.Generator().manual_seed(0)
    excesses = torch.randn(20, 2, 3, generator=random)
    gains = {"lr": torch.tensor([0.1, 0.3]), "kp": 0.2, "maximum": torch.tensor([0.5, 1.5])}
    together = Multipliers(2, 3, kind, **gains)
    for excess in excesses:
        together.update(excess)
    for m in range(2):
        for c in range(3):
            own = {k: v if isinstance(v, float) else v[m].item() for k, v in gains.items()}
            alone = Multipliers(1, 1, kind, **own)
            for excess in excesses:
                alone.update(excess[m : m + 1, c : c + 1])
            torch.testing.assert_close(alone.value()[0, 0], together.value()[m, c])


@pytest.mark.parametrize("kind", KINDS)
def test_the_state_moves_in_place_and_the_value_does_not(kind):
    """A CUDA graph replays on the same memory; a metric that was handed out must stay."""
    multipliers = Multipliers(2, kind=kind, lr=0.1)
    where = {name: buffer.data_ptr() for name, buffer in multipliers.named_buffers()}
    value = multipliers.value()
    kept = value.clone()
    for _ in range(3):
        multipliers.update(torch.ones(2, 1))
    assert where == {name: buffer.data_ptr() for name, buffer in multipliers.named_buffers()}
    assert torch.equal(value, kept) and not torch.equal(multipliers.value(), kept)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"kind": "pdi"}, "unknown kind of multiplier 'pdi': did you mean 'pid'"),
        ({"lr": -0.1}, "lr of a multiplier is a number of 0 or more"),
        ({"kp": math.nan}, "kp of a multiplier is"),
        ({"kd": math.inf}, "kd of a multiplier is"),
        ({"maximum": 0.0}, "maximum is a number above 0"),
        ({"start": -1.0}, "starts at a number of 0 or more"),
        ({"kind": "softplus", "start": 0.0}, "starts at a number above 0"),
        ({"kind": "pid", "start": 1.0}, "starts at 0"),
        ({"start": 2.0, "maximum": 1.0}, "above its maximum"),
    ],
)
def test_bad_options(options, line):
    with pytest.raises(SaferlError, match=line):
        Multipliers(1, **options)


def test_a_rate_of_zero_keeps_it_where_it_starts():
    assert run(Multipliers(1, lr=0.0, start=0.7), 1.0, -1.0) == pytest.approx([0.7, 0.7])
