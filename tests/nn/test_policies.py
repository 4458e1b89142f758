"""Densities, samples, and the policy from raw to raw units."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from saferl.nn import (
    CategoricalActor,
    DeterministicActor,
    GaussianActor,
    Policy,
    TanhGaussianActor,
)
from saferl.rng import MemberRandom
from saferl.spec import Spec

SEEDS = (0, 1)
OBS, A = 3, 2


def states(rows: int = 4) -> torch.Tensor:
    return torch.randn(len(SEEDS), rows, OBS, generator=torch.Generator().manual_seed(0))


def test_tanh_gaussian_density_integrates_to_one():
    actor = TanhGaussianActor(MemberRandom(SEEDS), OBS, 1, (8,))
    grid = torch.linspace(-1 + 1e-6, 1 - 1e-6, 40_001, dtype=torch.float64)
    s = states(1).expand(-1, len(grid), -1).double()
    mean, log_std = actor.double()(s)
    raw = grid.atanh().expand(len(SEEDS), -1).unsqueeze(-1)
    _, log_prob = actor.squash(mean, log_std, (raw - mean) / log_std.exp())
    total = torch.trapezoid(log_prob.exp(), grid)
    torch.testing.assert_close(total, torch.ones_like(total), atol=1e-3, rtol=0)


def test_tanh_gaussian_density_is_torch_distributions():
    actor = TanhGaussianActor(MemberRandom(SEEDS), OBS, A, (8,)).double()
    s, noise = states().double(), MemberRandom(SEEDS).normal(4, A).double()
    mean, log_std = actor(s)
    actions, log_prob = actor.squash(mean, log_std, noise)
    reference = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform())
    torch.testing.assert_close(log_prob, reference.log_prob(actions).sum(-1))
    torch.testing.assert_close(actor.log_prob(s, actions), log_prob)


def test_squash_broadcasts_and_survives_saturation():
    mean = torch.tensor([[[30.0]]], requires_grad=True)
    noise = torch.tensor([[[[0.0], [1.0], [-1.0]]]])
    log_std = torch.zeros(1, 1, 1)
    actions, log_prob = TanhGaussianActor.squash(mean.unsqueeze(2), log_std.unsqueeze(2), noise)
    assert actions.shape == (1, 1, 3, 1)
    assert log_prob.shape == (1, 1, 3)
    assert torch.isfinite(log_prob).all()
    log_prob.sum().backward()
    assert mean.grad.item() == pytest.approx(6.0, rel=1e-5)  # -d/dx log(1 - tanh²x) → 2, thrice


def test_logged_actions_at_the_bounds_have_a_finite_density():
    actor = TanhGaussianActor(MemberRandom(SEEDS), OBS, A, (8,))
    assert torch.isfinite(actor.log_prob(states(), torch.ones(len(SEEDS), 4, A))).all()


def test_log_std_scale_is_trained_per_member():
    plain = TanhGaussianActor(MemberRandom(SEEDS), OBS, A, (8,))
    scaled = TanhGaussianActor(
        MemberRandom(SEEDS), OBS, A, (8,), scale_log_std=True, log_std_start=(0.5, -2.0)
    )
    mean, log_std = plain(states())
    assert torch.equal(scaled(states())[0], mean)
    torch.testing.assert_close(scaled(states())[1], 0.5 * log_std - 2)
    names = {name for name, _ in scaled.named_parameters()}
    assert {"multiplier", "offset"} <= names
    scaled(states())[1].sum().backward()
    assert scaled.multiplier.grad.shape == (len(SEEDS), 1, 1)
    assert (scaled.offset.grad == 4 * A).all()


def test_gaussian_actor():
    actor = GaussianActor(MemberRandom(SEEDS), OBS, A, (8,))
    with torch.no_grad():
        actor.log_std.copy_(torch.tensor([[[0.1, -1.0]], [[5.0, -30.0]]]))
    s, actions = states(), states()[..., :A].tanh()
    std = torch.tensor([[[0.1, -1.0]], [[2.0, -20.0]]]).exp()  # clipped to [-20, 2]
    expected = Normal(actor.mode(s), std).log_prob(actions).sum(-1)
    torch.testing.assert_close(actor.log_prob(s, actions), expected)
    drawn = actor.sample(states(1).expand(-1, 5000, -1), MemberRandom(SEEDS))
    assert drawn.abs().max() <= 1
    inside = drawn[0, :, 1]  # narrow enough not to be clipped often
    assert inside.mean().item() == pytest.approx(actor.mode(states(1))[0, 0, 1].item(), abs=0.05)


def test_categorical_samples_follow_the_probabilities():
    actor = CategoricalActor(MemberRandom(SEEDS), OBS, 4, (8,))
    s = states(1)
    probabilities = actor(s).exp()[:, 0]
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(len(SEEDS)))
    drawn = actor.sample(s.expand(-1, 20_000, -1), MemberRandom(SEEDS))
    for m in range(len(SEEDS)):
        shares = torch.bincount(drawn[m], minlength=4) / 20_000
        torch.testing.assert_close(shares, probabilities[m], atol=0.02, rtol=0)
    assert torch.equal(actor.mode(s), probabilities.argmax(-1)[:, None])


def test_policy_maps_raw_to_raw():
    actor = DeterministicActor(MemberRandom(SEEDS), OBS, A, (8,))
    mean, std = (1.0, -2.0, 0.5), (2.0, 0.1, 3.0)
    spec = Spec(OBS, A, False, (-1.0, 0.0), (3.0, 10.0), mean, std)
    policy = Policy(actor, spec, len(SEEDS))
    raw = states() * torch.tensor(std) + torch.tensor(mean)
    torch.testing.assert_close(policy(raw), actor(states()) * torch.tensor([2.0, 5.0])
                               + torch.tensor([1.0, 5.0]))  # fmt: skip
    # The inverse of what the buffer does to data.
    back = np.stack([spec.actions(a.numpy()) for a in policy(raw)])
    np.testing.assert_allclose(back, actor(states()).detach(), atol=1e-5)
    assert not policy(raw).requires_grad
    assert {"observation_mean", "observation_std", "action_center"} <= policy.state_dict().keys()


def test_sampled_actions_stay_within_bounds():
    actor = TanhGaussianActor(MemberRandom(SEEDS), OBS, A, (8,))
    policy = Policy(actor, Spec(OBS, A, False, (0.0, -4.0), (1.0, 4.0)), len(SEEDS))
    s = states(500)
    one = policy.sample(s, MemberRandom(SEEDS))
    assert one.shape == (len(SEEDS), 500, A)
    for component, (low, high) in enumerate([(0, 1), (-4, 4)]):
        assert low <= one[..., component].min() < one[..., component].max() <= high
    assert torch.equal(one, policy.sample(s, MemberRandom(SEEDS)))
    assert not torch.equal(one, policy.sample(s, MemberRandom((2, 3))))
