"""CQL against a plain reference, its switches one by one, and what each coefficient reaches."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, TanhTransform, TransformedDistribution

from saferl.registry import agent_class
from saferl.replay import Batch
from saferl.rng import MemberRandom
from saferl.spec import Spec

from .plain import (
    MEMBERS,
    A,
    B,
    Net,
    adam,
    affected,
    descend,
    gradients,
    make,
    make_batch,
    member_of,
    moved,
    nets,
)

N = 3
SMALL = {"critic_hidden": [8, 8], "samples": N}
RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "temperature_lr": 3e-2, "multiplier_lr": 4e-2,
         "tau": 0.1}  # fmt: skip


def cql(**settings):
    return make("cql", **SMALL | settings)


class Reference:
    """One member, its critics one at a time, its states repeated N times."""

    def __init__(self, agent, member: int):
        self.c, self.member = agent.config, member
        self.actor = Net(agent.actor.mlp, member)
        self.scale = agent.actor.multiplier[member, 0].detach().clone().requires_grad_()
        self.offset = agent.actor.offset[member, 0].detach().clone().requires_grad_()
        self.critics = nets(agent.critic, member)
        self.targets = [critic.copy() for critic in self.critics]
        self.k = torch.zeros((), requires_grad=True)
        self.z = torch.tensor(self.c.initial_multiplier, requires_grad=True)
        self.actor_optimizer = adam(self.scale, self.offset, self.actor, lr=self.c.actor_lr)
        self.critic_optimizer = adam(*self.critics, lr=self.c.critic_lr)
        self.k_optimizer = adam(self.k, lr=self.c.temperature_lr)
        self.z_optimizer = adam(self.z, lr=self.c.multiplier_lr)
        self.random = MemberRandom(MEMBERS, stream=1)
        self.updates = 0

    def policy(self, s: Tensor) -> TransformedDistribution:
        mean, log_std = self.actor(s).chunk(2, -1)
        log_std = (self.scale * log_std + self.offset).clamp(-20, 2)
        return TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))

    def draw(self, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions and log densities at s ``[B, O]`` for noise ``[B, …, A]``."""
        policy = self.policy(s if noise.dim() == 2 else s[:, None].expand(-1, noise.shape[1], -1))
        normal = policy.base_dist
        action = (normal.mean + normal.stddev * noise).tanh()
        raw = normal.mean + normal.stddev * noise
        slope = TanhTransform().log_abs_det_jacobian(raw, action)
        return action, (normal.log_prob(raw) - slope).sum(-1)

    def update(self, batch: Batch, penalty: bool = True) -> dict[str, Tensor]:
        c = self.c
        self.updates += 1
        s, a, r, _, s2, terminal, extras = batch
        returns = extras.get("returns_to_go")
        backups = N if c.max_backup else 1
        noise = self.random.normal(B, 1 + 2 * N + backups, A)[self.member]
        uniform = 2 * self.random.uniform(B, N, A)[self.member] - 1

        # Losses, all from the parameters before the update.
        p, log_p = self.draw(s, noise[:, 0])
        temperature = torch.tensor(c.entropy_multiplier)
        if c.automatic_entropy:
            temperature = temperature * self.k.exp().detach()
        k_loss = -self.k * (log_p.detach() + c.target_entropy * A).mean()
        if self.updates <= c.bc_steps:
            objective = self.policy(s).log_prob(a.clamp(-0.999, 0.999)).sum(-1)
        else:
            objective = torch.stack([q(s, p)[:, 0] for q in self.critics]).min(0).values
        actor_loss = (temperature * log_p - objective).mean()

        a2, log_a2 = self.draw(s2, noise[:, 1 + 2 * N :])
        s2_repeated = s2[:, None].expand(-1, backups, -1)
        next_q = torch.stack([t(s2_repeated, a2)[..., 0] for t in self.targets]).min(0).values
        next_q, best = next_q.max(1)
        if c.entropy_backup:
            next_q = next_q - temperature * log_a2[torch.arange(B), best]
        y = (r + c.discount * (1 - terminal) * next_q).detach()
        bellman = sum(((q(s, a)[:, 0] - y) ** 2).mean() for q in self.critics)
        critic_loss, z_loss = bellman, None

        if penalty:
            here, log_here = (x.detach() for x in self.draw(s, noise[:, 1 : 1 + N]))
            there, log_there = (x.detach() for x in self.draw(s2, noise[:, 1 + N : 1 + 2 * N]))
            repeated = s[:, None].expand(-1, N, -1)
            gaps = []
            for q in self.critics:
                logged = q(s, a)
                rows = [q(repeated, x)[..., 0] for x in (uniform, there, here)]
                if returns is not None:  # Cal-QL: values of the policy's actions alone
                    rows[1:] = [torch.maximum(values, returns[:, None]) for values in rows[1:]]
                if c.importance_sampling:
                    densities = (math.log(0.5**A), log_there, log_here)
                    rows = [values - density for values, density in zip(rows, densities)]
                else:
                    rows.append(logged)
                bound = c.temperature * (torch.cat(rows, 1) / c.temperature).exp().sum(1).log()
                gaps.append((bound - logged[:, 0]).clamp(c.gap_min, c.gap_max).mean())
            if c.lagrange:
                multiplier = self.z.exp().clamp(0, 1e6)
                terms = [c.weight * (gap - c.target_gap) for gap in gaps]
                z_loss = -0.5 * sum(multiplier * term.detach() for term in terms)
                critic_loss = critic_loss + sum(multiplier.detach() * term for term in terms)
            else:
                critic_loss = critic_loss + sum(c.weight * gap for gap in gaps)
        if z_loss is not None:
            descend(self.z_optimizer, z_loss)

        # Steps. The actor's gradient needs the critics as they were, so it is taken first.
        if c.automatic_entropy:
            descend(self.k_optimizer, k_loss)
        descend(self.actor_optimizer, actor_loss)
        descend(self.critic_optimizer, critic_loss)
        for target, critic in zip(self.targets, self.critics):
            target.follow(critic, c.tau)
        found = {"actor_loss": actor_loss, "critic_loss": bellman, "temperature": temperature}
        return found | ({"gap": sum(gaps) / len(gaps)} if penalty else {})

    def assert_is(self, agent) -> None:
        m = self.member
        self.actor.assert_is(agent.actor.mlp, m)
        torch.testing.assert_close(agent.actor.multiplier[m, 0], self.scale)
        torch.testing.assert_close(agent.actor.offset[m, 0], self.offset)
        torch.testing.assert_close(agent.log_temperature[m], self.k)
        torch.testing.assert_close(agent.log_multiplier[m], self.z)
        # Adam hides the scale of a loss with one parameter, so the gradients are compared too.
        for own, reference in ((agent.log_temperature, self.k), (agent.log_multiplier, self.z)):
            assert (own.grad is None) == (reference.grad is None)
            if own.grad is not None:
                torch.testing.assert_close(own.grad[m], reference.grad)
        for e, (critic, target) in enumerate(zip(self.critics, self.targets)):
            critic.assert_is(agent.critic.mlp, m, e)
            target.assert_is(agent.critic_target.mlp, m, e)


SWITCHES = {
    "default": {},
    "lagrange": {"lagrange": True, "target_gap": 3.0, "weight": 2.0},
    "max backup": {"max_backup": True},
    "entropy backup": {"entropy_backup": True},
    "max and entropy backup": {"max_backup": True, "entropy_backup": True},
    "no importance sampling": {"importance_sampling": False},
    "temperature": {"temperature": 2.5},
    "clipped gap": {"gap_min": 3.05, "gap_max": 3.3},
    "cloning first": {"bc_steps": 2},
    "fixed entropy": {"automatic_entropy": False, "entropy_multiplier": 0.3},
    "entropy": {"target_entropy": -0.5, "entropy_multiplier": 0.7},
    "three critics": {"critics": 3},
    "not orthogonal": {"orthogonal_init": False},
    "log std": {"log_std_multiplier": 0.5, "log_std_offset": 0.1},
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_updates_are_the_reference(float64, switch):
    agent = cql(**RATES, **SWITCHES[switch])
    references = [Reference(agent, m) for m in range(len(MEMBERS))]
    for step in range(4):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        for m, reference in enumerate(references):
            expected = reference.update(member_of(batch, m))
            for name, value in expected.items():
                torch.testing.assert_close(metrics[name][m], value.detach(), msg=name)
            reference.assert_is(agent)


def test_without_weight_it_is_sac_without_entropy_backup(float64):
    """Checklist 1: the reference leaves the whole penalty out."""
    agent = cql(**RATES, weight=0.0)
    reference = Reference(agent, 1)
    for step in range(3):
        batch = make_batch(agent, step)
        agent.update(batch)
        reference.update(member_of(batch, 1), penalty=False)
    reference.assert_is(agent)


def one_dimensional(samples: int):
    """An agent for one action component whose critic is far from flat."""
    cls = agent_class("cql")
    spec = Spec(1, 1, action_low=(-1.0,), action_high=(1.0,))
    settings = {"hidden": [8], "critic_hidden": [16], "critics": 1, "samples": samples,
                "orthogonal_init": False, "log_std_offset": 0.0}  # fmt: skip
    agent = cls(spec, cls.make_config(settings), (3,))
    with torch.no_grad():
        agent.critic.mlp.weights[0] *= 3
        agent.critic.mlp.weights[1] *= 150
    return agent


def test_penalty_estimates_the_integral(float64):
    """Checklist 2: each of the three proposals is unbiased for ∫ exp Q da, so the bound is
    log ∫ exp Q da + log 3N."""
    samples = 20_000
    agent = one_dimensional(samples)
    state, action = torch.tensor([[[0.4]]]), torch.tensor([[[0.2]]])
    grid = torch.linspace(-1, 1, 20_001)
    with torch.no_grad():
        q = agent.critic.many(state, grid.view(1, 1, -1, 1)).flatten()
        logged = agent.critic(state, action).item()
    assert q.max() - q.min() > 2
    integral = torch.trapezoid(q.exp(), grid).log().item()
    flat = torch.zeros(1, 1)
    metrics = agent.update(Batch(state, action, flat, None, state + 1, flat))
    assert metrics["gap"].item() + logged == pytest.approx(
        integral + math.log(3 * samples), abs=0.02
    )


@pytest.mark.parametrize(("sampling", "entries"), [(True, 3 * N), (False, 3 * N + 1)])
def test_the_logsumexp_runs_over_all_samples_of_a_state(monkeypatch, sampling, entries):
    """Checklist 3."""
    shapes = []
    plain = Tensor.logsumexp

    def spy(tensor, dim, keepdim=False):
        shapes.append((tuple(tensor.shape), dim))
        return plain(tensor, dim, keepdim)

    agent = cql(importance_sampling=sampling)
    monkeypatch.setattr(Tensor, "logsumexp", spy)
    agent.update(make_batch(agent))
    assert shapes == [((len(MEMBERS), 2, B, entries), -1)]


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        # Checklist 4: whatever changes in the critics' loss, the actor's gradient does not.
        ({"weight": 0.0}, {"weight": 5.0}, {"critic"}),
        ({"discount": 0.9}, {"discount": 0.99}, {"critic"}),
        ({"temperature": 1.0}, {"temperature": 2.0}, {"critic"}),
        ({"gap_max": 100.0}, {"gap_max": 3.5}, {"critic"}),
        ({"gap_min": -100.0}, {"gap_min": 3.5}, {"critic"}),
        ({"importance_sampling": True}, {"importance_sampling": False}, {"critic"}),
        ({"entropy_backup": True}, {"entropy_backup": False}, {"critic"}),
        ({"target_entropy": -1.0}, {"target_entropy": -2.0}, {"log_temperature"}),
        ({"bc_steps": 0}, {"bc_steps": 1}, {"actor"}),
        ({"automatic_entropy": False, "entropy_multiplier": 1.0},
         {"automatic_entropy": False, "entropy_multiplier": 0.5}, {"actor"}),
        ({"lagrange": True, "target_gap": 1.0}, {"lagrange": True, "target_gap": 2.0},
         {"log_multiplier"}),
        ({"lagrange": True, "weight": 1.0}, {"lagrange": True, "weight": 2.0},
         {"log_multiplier", "critic"}),
        ({"lagrange": True, "initial_multiplier": 1.0},
         {"lagrange": True, "initial_multiplier": 2.0}, {"log_multiplier", "critic"}),
    ],
)  # fmt: skip
def test_coefficients_reach(before, after, reached):
    assert affected("cql", before, after, **SMALL) == reached


def test_what_an_update_moves():
    always = {"actor", "critic", "critic_target"}
    for settings, more in (
        ({}, {"log_temperature"}),
        ({"automatic_entropy": False}, set()),
        ({"lagrange": True}, {"log_temperature", "log_multiplier"}),
    ):
        agent = cql(**settings)
        assert moved(agent, make_batch(agent)) == always | more


@pytest.mark.parametrize(("gap", "direction"), [(-1000.0, 1), (1000.0, -1)])
def test_the_multiplier_follows_the_gap(gap, direction):
    """Checklist 5: it grows while the gap exceeds its target and shrinks otherwise."""
    agent = cql(lagrange=True, target_gap=gap)
    history = [agent.update(make_batch(agent, step))["multiplier"] for step in range(5)]
    history = torch.stack(history)
    assert (direction * history.diff(dim=0) > 0).all()
    torch.testing.assert_close(history[0], torch.full((len(MEMBERS),), math.e))


def test_the_multiplier_stops_at_its_clip():
    agent = cql(lagrange=True, initial_multiplier=20.0)
    assert (agent.update(make_batch(agent))["multiplier"] == 1e6).all()
    assert (gradients(agent)["log_multiplier"][0] == 0).all()


def test_uniform_actions_span_the_whole_range(monkeypatch):
    agent = cql(samples=500)
    seen = []
    plain = agent.critic.many
    monkeypatch.setattr(agent.critic, "many", lambda s, a: seen.append(a) or plain(s, a))
    agent.update(make_batch(agent))
    uniform = seen[0][:, :, :500]
    assert -1 <= uniform.min() < -0.99
    assert 0.99 < uniform.max() <= 1
    assert uniform.mean().abs() < 0.05


def test_initial_networks():
    """Critics: orthogonal, gains √2 and 0.01. Actor: torch's own with a small last layer."""
    agent = cql(hidden=[8, 8])
    for e in range(2):
        weights = [w[0, e] for w in agent.critic.mlp.weights]
        torch.testing.assert_close(weights[1].T @ weights[1], 2 * torch.eye(8))
        assert weights[2].norm().item() == pytest.approx(0.01)
    assert all((b == 0).all() for b in agent.critic.mlp.biases)
    bound = 0.01 * math.sqrt(6 / (8 + 2 * A))
    assert 0.5 * bound < agent.actor.mlp.weights[-1].abs().max() <= bound
    assert (agent.actor.mlp.biases[-1] == 0).all()
    assert (agent.actor.mlp.biases[0] != 0).any()
