"""MOORL: its updates against plain ones, the nine exact tests of its mechanism, every switch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from saferl.agents.moorl import MOORL
from saferl.agents.sac import SAC
from saferl.errors import SaferlError
from saferl.replay import OnlineBuffer, ReplayBuffer
from saferl.replay.mixed import MixedSampler
from saferl.rng import MemberRandom
from saferl.rollout import VectorEnv
from saferl.spec import Spec
from saferl.training.memory import probe
from saferl.training.online import OnlineEngine
from tests.conftest import PointEnv, point_dataset
from tests.training.test_online import Cliff

from . import plain
from .plain import MEMBERS, B, PlainSAC, adam, make, make_batch, member_of

RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "temperature_lr": 3e-2, "tau": 0.1,
         "initial_temperature": 0.5, "batch_size": B, "inner_steps": 3}  # fmt: skip
SPEC = Spec(2, 1, action_low=(-2.0,), action_high=(2.0,), horizon=20)
SMALL = {"hidden": [8], "batch_size": 8, "random_steps": 5, "inner_steps": 3}


class PlainMOORL(PlainSAC):
    """Algorithm 1's outer iteration, line by line."""

    def optimizer(self, *networks, lr):
        kind = self.c.inner_optimizer
        optimizer = adam(*networks, lr=lr)
        if kind == "sgd":
            return torch.optim.SGD(optimizer.param_groups[0]["params"], lr=lr)
        if kind == "adam_no_momentum":
            return torch.optim.Adam(optimizer.param_groups[0]["params"], lr, betas=(0.0, 0.999))
        return optimizer

    def weights(self) -> list[torch.Tensor]:
        found = [p for net in (self.actor, *self.critics) for p in net.parameters()]
        return [*found, self.log_temperature] if self.c.meta_temperature else found

    def follow(self):
        if self.c.target_follows == "fast":
            super().follow()

    def update(self, batch):
        c = self.c
        meta = [p.detach().clone() for p in self.weights()]
        if c.inner_optimizer == "adam_reset":
            self.actor_optimizer = self.optimizer(self.actor, lr=c.actor_lr)
            self.critic_optimizer = self.optimizer(*self.critics, lr=c.critic_lr)
            self.temperature_optimizer = self.optimizer(self.log_temperature, lr=c.temperature_lr)
        super().update(batch)
        self.fast_actor = self.actor.copy()
        with torch.no_grad():
            if c.meta_step == "reptile":
                for p, start in zip(self.weights(), meta):
                    p.copy_(start + c.eta * (p - start))
        if c.meta_step == "gradient":
            rows = slice(c.inner_steps * c.batch_size, None)
            extra = member_of(batch, self.member).map(lambda field: field[rows])
            critics = [p for q in self.critics for p in q.parameters()]
            slopes = torch.autograd.grad(self.critic_loss(extra), critics)
            loss, _ = self.actor_loss(extra.observations)
            slopes = (*torch.autograd.grad(loss, self.actor.parameters()), *slopes)
            with torch.no_grad():
                for p, start, slope in zip(self.weights(), meta, slopes):
                    p.copy_(start - c.eta * slope)
        if c.target_follows == "meta":
            rate = 1 - (1 - c.tau) ** c.inner_steps
            for target, critic in zip(self.targets, self.critics):
                target.follow(critic, rate)


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eta": 1.0},
        {"fresh_batches": False},
        {"meta_step": "gradient", "eta": 0.02},
        {"inner_optimizer": "adam_reset"},
        {"inner_optimizer": "adam_no_momentum"},
        {"inner_optimizer": "sgd"},
        {"target_follows": "meta"},
        {"meta_temperature": True},
        {"actor_steps": "last"},
        {"critic_layer_norm": True},
        {"critics": 1},
        {"critics": 4},
        {"target_entropy": -0.5},
        {"entropy_backup": False},
        {"acting": "fast"},
    ],
)
def test_updates_are_the_reference(float64, member, settings):
    """S3 and S5 to S11, S13 and S15, each alone."""
    agent = make("moorl", **RATES | settings)
    plain = PlainMOORL(agent, member)
    for step in range(3):
        batch = make_batch(agent, step, agent.batch_rows)
        agent.update(batch)
        plain.update(batch)
        plain.assert_is(agent)
        if settings == {"acting": "fast"}:  # S4: the policy before the meta step acts
            plain.fast_actor.assert_is(agent.behaviour().actor.mlp, member)
            plain.actor.assert_is(agent.policy().actor.mlp, member)
        else:
            assert agent.behaviour().actor is agent.actor


# The nine exact tests -----------------------------------------------------------------------------


def engine_of(cls, data=None, members=(5, 6), env=PointEnv, steps=100, **settings):
    agent = cls(SPEC, cls.make_config(SMALL | settings), members)
    offline = ReplayBuffer.from_dataset(data or point_dataset(), SPEC, members)
    return OnlineEngine(agent, VectorEnv(env, len(members), None), steps, offline)


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_1_at_eta_1_it_is_sac_in_blocks_of_one_source(inner_steps):
    moorl = engine_of(MOORL, eta=1.0, inner_steps=inner_steps)
    sac = engine_of(SAC, sampling="block", inner_steps=inner_steps)
    other = engine_of(MOORL, eta=0.9, inner_steps=inner_steps)
    for engine in (moorl, sac, other):
        engine.run(40)
    ours, theirs = ({**e.state_dict(), **e.agent.state_dict()} for e in (moorl, sac))
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        assert torch.equal(tensor, theirs[key]), key
    assert not torch.equal(other.agent.actor.mlp.weights[0], moorl.agent.actor.mlp.weights[0])


@pytest.mark.parametrize("still", ["actor_lr", "critic_lr"])
def test_2_one_step_of_sgd_is_sgd_at_eta_times_its_rate(float64, still):
    """Actor and critics one at a time: the actor's inner step sees the critics' fast weights."""
    rates = {"actor_lr": 0.1, "critic_lr": 0.2, "temperature_lr": 0.0} | {still: 0.0}
    common = {"inner_steps": 1, "batch_size": B, "tau": 0.1, "inner_optimizer": "sgd",
              "target_follows": "meta"}  # fmt: skip
    slow = make("moorl", **common, **rates, eta=0.3)
    plain = make("moorl", **common, **{k: 0.3 * v for k, v in rates.items()}, eta=1.0)
    start = slow.state_dict()
    start = {k: v.clone() for k, v in start.items()}
    for step in range(5):
        batch = make_batch(slow, step)
        slow.update(batch)
        plain.update(batch)
    end, other = slow.state_dict(), plain.state_dict()
    for key in end:
        torch.testing.assert_close(end[key], other[key], rtol=1e-10, atol=1e-12, msg=key)
    moves = "critic." if still == "actor_lr" else "actor."
    assert any(not torch.equal(end[k], start[k]) for k in end if k.startswith(moves))


class Quadratic(MOORL):
    """Two sources, each with a loss ½ h (x - a)² of its own, of which SGD takes K steps."""

    RATE = 0.1

    def build(self, init):
        self.x = nn.Parameter(torch.zeros(self.members))
        self._moving, self._meta = [self.x], [torch.empty_like(self.x)]
        self._back = 1 - self.scalar("eta", 0)
        if isinstance(self._back, torch.Tensor):
            self._back = [self._back.to(self.x)]

    def inner_loop(self, batch):
        h, a = batch.rewards[:, 0], batch.observations[:, 0, 0]
        with torch.no_grad():
            for _ in range(self.config.inner_steps):
                self.x.sub_(self.RATE * h * (self.x - a))
        return {}


def quadratic(sources, members: int, iterations: int, burn: int, **settings) -> np.ndarray:
    """x of every member after each iteration, ``[iterations - burn, M]``."""
    spec = Spec(1, 1, action_low=(-1.0,), action_high=(1.0,))
    config = MOORL.make_config({"batch_size": 1, "fresh_batches": False} | settings)
    agent = Quadratic(spec, config, members)
    (h, a), (h_on, a_on) = sources
    one, zero = np.ones((1, 1)), np.zeros((1, 1))
    offline, online = ReplayBuffer(spec, 1, agent.seeds), OnlineBuffer(spec, 1, agent.seeds)
    offline.extend(a * one, zero, h * one[0], zero, zero[0], zero[0])
    which, ones, zeros = np.arange(members), np.ones((members, 1)), np.zeros((members, 1))
    online.append(which, which < 0, a_on * ones, zeros, h_on * ones[:, 0], zeros, zeros[:, 0],
                  zeros[:, 0])  # fmt: skip
    source, found = MixedSampler(config, offline, online, agent.seeds), []
    for iteration in range(iterations):
        agent.update(source.sample(agent.batch_rows))
        if iteration >= burn:
            found.append(agent.x.detach().numpy().copy())
    return np.array(found)


@pytest.mark.parametrize(("k", "expected"), [(1, 0.600), (5, 0.385), (20, 0.065)])
def test_3_where_the_meta_weights_settle(k, expected):
    """h = (1, 4), a = (-1, +1), p = ½: from the pooled minimum to the average of the two."""
    kappa = [1 - (1 - 0.1 * h) ** k for h in (1, 4)]
    assert (kappa[1] - kappa[0]) / sum(kappa) == pytest.approx(expected, abs=5e-4)
    x = quadratic(((1.0, -1.0), (4.0, 1.0)), 100, 600, 200, inner_steps=k, eta=0.2)
    means = x.mean(0)  # of each member, which are independent
    error = means.std() / len(means) ** 0.5
    assert error < 0.02 and abs(means.mean() - expected) < 4 * error + 1e-3


def test_3_how_far_they_swing():
    """h = 1, δ = 1, K = 50: the variance at η = 1, ½ and 1/10, in one run of three values."""
    etas, expected, each = (1.0, 0.5, 0.1), (0.990, 0.331, 0.0523), 50
    kappa = 1 - 0.9**50
    assert [e * kappa / (2 - e * kappa) for e in etas] == pytest.approx(expected, rel=2e-3)
    x = quadratic(((1.0, -1.0), (1.0, 1.0)), 3 * each, 500, 100, inner_steps=50,
                  eta=[eta for eta in etas for _ in range(each)])  # fmt: skip
    squares = (x**2).mean(0).reshape(3, each)
    for values, variance in zip(squares, expected):
        error = values.std() / each**0.5
        assert error < 0.05 * variance
        assert abs(values.mean() - variance) < 4 * error + 1e-3


def test_4_the_meta_step_leaves_temperature_moments_and_targets(monkeypatch):
    agent, changed = make("moorl", **RATES), []
    step = MOORL.meta_step

    def watched(self):
        before = {k: v.clone() for k, v in self.state_dict().items()}
        step(self)
        after = self.state_dict()
        changed.append({k for k in before if not torch.equal(before[k], after[k])})

    monkeypatch.setattr(MOORL, "meta_step", watched)
    for i in range(3):
        agent.update(make_batch(agent, i, agent.batch_rows))
    moved = {k for k in agent.state_dict() if k.startswith(("actor.", "critic."))}
    assert changed == [moved] * 3


@pytest.mark.parametrize(("share", "unread"), [(0.0, "offline"), (1.0, "online")])
def test_5_p_decides_what_is_read_and_every_iteration_adds_a_row(share, unread):
    engine = engine_of(MOORL, offline_share=share)
    engine.run(6)
    for i in range(20):
        getattr(engine.buffer, unread).rows.fill_(torch.nan)
        engine.run(1)
        assert engine.online.added.tolist() == [7 + i] * 2
    assert engine.agent.updates == 21
    for parameter in (*engine.agent.actor.parameters(), *engine.agent.critic.parameters()):
        assert parameter.isfinite().all()


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("source", ["offline", "online"])
def test_6_a_block_draws_as_many_rows_as_it_has_batches(fresh, source, monkeypatch):
    engine = engine_of(MOORL, offline_share=float(source == "offline"), fresh_batches=fresh)
    engine.run(5)  # the random ones
    buffer, drawn = getattr(engine.buffer, source), []
    gather = buffer.gather
    monkeypatch.setattr(buffer, "gather", lambda index: drawn.append(index.shape) or gather(index))
    twin = MemberRandom(engine.agent.seeds, stream=2 if source == "offline" else 4)
    twin.load_state_dict(buffer.random.state_dict())
    engine.run(1)
    rows = 8 * (3 if fresh else 1)  # K B, or B
    assert drawn == [(2, rows)]
    size = buffer.size if source == "offline" else 6
    twin.pick([0, 1], [size, size], rows)
    assert torch.equal(twin.state_dict()["state"], buffer.random.state_dict()["state"])
    assert engine.agent.critic_optimizer.state_dict()["state"][0]["step"] == 3


def test_7_time_outs_bootstrap_and_terminals_do_not():
    flat = Spec(2, 1, action_low=(-2.0,), action_high=(2.0,))
    agent = MOORL(flat, MOORL.make_config(SMALL | {"random_steps": 0}), (5,))
    engine = OnlineEngine(agent, VectorEnv(Cliff, 1, None), 12)
    engine.run(12)
    batch, ends = engine.online.of_member(0)
    assert np.flatnonzero(ends).tolist() == [1, 5, 7, 11]
    target, _ = agent.target(batch)
    assert (target[0, [1, 7]] == 1).all() and (target[0, [5, 11]] != 1).all()


def test_8_mixing_moves_the_mean_reward_by_no_more_than_the_bound():
    """|ΔR| ≤ 2 λ TV(d_π, d_μ) R_max / (1 - γ) on 300 random tabular processes.

    This is the theorem alone: that batches are mixed so is for the tests of `MixedSampler`.
    """
    rng, ratios = np.random.default_rng(0), []
    for _ in range(300):
        states, actions = rng.integers(2, 8), rng.integers(2, 5)
        gamma, share = rng.uniform(0.5, 0.99), rng.uniform(0.05, 1.0)
        dynamics = rng.dirichlet(np.full(states, 0.3), (states, actions))
        rewards = rng.uniform(-1, 1, (states, actions)) ** 3
        start = rng.dirichlet(np.ones(states))
        occupancies = []
        for _ in range(2):
            policy = rng.dirichlet(np.full(actions, 0.3), states)
            chain = np.einsum("sa,sat->st", policy, dynamics)
            visited = np.linalg.solve(np.eye(states) - gamma * chain.T, (1 - gamma) * start)
            occupancies.append(visited[:, None] * policy)
        ours, logged = occupancies
        assert ours.sum() == pytest.approx(1) and logged.sum() == pytest.approx(1)
        distance = 0.5 * np.abs(ours - logged).sum()
        mixed = share * logged + (1 - share) * ours
        change = abs(((mixed - ours) * rewards).sum()) / (1 - gamma)  # of the return
        bound = 2 * share * distance * np.abs(rewards).max() / (1 - gamma)
        ratios.append(change / bound)
    assert max(ratios) <= 1
    assert max(ratios) > 0.3  # near enough to mean something


def test_9_memory_is_one_copy_more():
    common = {"hidden": [32, 32], "batch_size": 8, "inner_steps": 3}
    both = [probe(c, SPEC, c.make_config(common), 2, costs=False) for c in (SAC, MOORL)]
    agent = MOORL(SPEC, MOORL.make_config(common), 2)
    weights = sum(p.nbytes for net in (agent.actor, agent.critic) for p in net.parameters())
    assert both[1].kept - both[0].kept == weights == sum(t.nbytes for t in agent._meta)
    assert not any("meta" in key for key in agent.state_dict())  # nothing more to save


# Further ------------------------------------------------------------------------------------------


def test_the_meta_step_is_one_operation_for_all_members():
    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls.append(str(function))
            return function(*args, **(kwargs or {}))

    for eta in (0.5, [0.5, 0.9]):
        agent = make("moorl", **RATES, eta=eta)
        with Count() as count:
            agent.meta_step()
        calls = [c for c in count.calls if "detach" not in c]
        assert len(calls) == 1 and "_foreach_lerp_" in calls[0], count.calls


def test_an_adapted_policy_is_k_steps_ahead_and_changes_nothing():
    agent = make("moorl", **RATES, eta=0.5)
    batch = make_batch(agent, 1, agent.batch_rows)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    adapted = agent.adapted(batch)
    after = agent.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    twin = make("moorl", **RATES, eta=1.0)
    twin.update(batch)
    for ours, theirs in zip(adapted.parameters(), twin.actor.parameters()):
        assert torch.equal(ours, theirs)


def test_under_a_limit_the_cost_critic_is_meta_averaged_too():
    agent = plain.make(MOORL, cost_limit=1.0, inner_steps=2, batch_size=B, eta=0.25)
    start = [p.detach().clone() for p in agent.cost_critic.online.parameters()]
    whole = plain.make(MOORL, cost_limit=1.0, inner_steps=2, batch_size=B, eta=1.0)
    batch = plain.costly(agent, 1, agent.batch_rows)
    for one in (agent, whole):
        one.update(batch)
    for slow, fast, before in zip(agent.cost_critic.online.parameters(),
                                  whole.cost_critic.online.parameters(), start):  # fmt: skip
        torch.testing.assert_close(slow, before + 0.25 * (fast - before))
        assert not torch.equal(fast, before)


def test_a_meta_gradient_moves_the_cost_critic_from_where_it_was():
    """From φ_m by -η times its gradient at the fast weights, on rows that no inner step saw."""
    agent = plain.make(
        MOORL, cost_limit=1.0, inner_steps=2, batch_size=B, eta=1e-9, meta_step="gradient",
        actor_steps="all",
    )  # fmt: skip
    moved = [*agent.actor.parameters(), *agent.critic.parameters()]
    moved += agent.cost_critic.online.parameters()
    start = [p.detach().clone() for p in moved]
    seen = []
    inner = agent.inner_loop
    agent.inner_loop = lambda batch: (seen.append(batch), inner(batch))[1]
    agent.update(plain.costly(agent, 1, agent.batch_rows))
    for now, before in zip(moved, start):
        torch.testing.assert_close(now, before, rtol=0, atol=1e-6)
    assert seen[0].rewards.shape[1] == 2 * B and agent.batch_rows == 3 * B
    one, two = (
        plain.make(MOORL, cost_limit=1.0, inner_steps=2, batch_size=B, eta=eta,
                     meta_step="gradient")
        for eta in (0.1, 0.2)
    )  # fmt: skip
    for each in (one, two):
        before = [p.detach().clone() for p in each.cost_critic.online.parameters()]
        each.update(plain.costly(each, 1, each.batch_rows))
        each.moved = [p - b for p, b in zip(each.cost_critic.online.parameters(), before)]
    for short, long in zip(one.moved, two.moved):
        assert short.any()
        torch.testing.assert_close(long, 2 * short, rtol=1e-3, atol=1e-6)


def test_what_acts_first_is_the_policy_that_the_run_starts_from():
    source = make("sac", **RATES)
    source.update(make_batch(source, 1, source.batch_rows))
    agent = make("moorl", **RATES, acting="fast")
    agent.warm_start(source.state_dict())
    for ours, theirs in zip(agent.behaviour().actor.parameters(), source.actor.parameters()):
        assert torch.equal(ours, theirs)


def test_environment_steps_per_iteration():
    """S2: one by default, which is a UTD of K; K for a UTD of 1."""
    for settings, updates in (({}, 30), ({"utd": 1.0}, 10)):
        engine = engine_of(MOORL, **settings)
        engine.run(35)
        assert engine.agent.updates == updates
    engine = engine_of(MOORL, offline_steps=7)  # S12
    engine.run(7)
    assert engine.agent.updates == 7 and not engine.online.added.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eta": 0.0}, "eta must be above 0 and at most 1, got 0"),
        ({"eta": 1.5}, "eta must be above 0 and at most 1, got 1.5"),
        ({"eta": math.nan}, "eta must be above 0 and at most 1, got nan"),
        ({"eta": [0.5, 2.0]}, "eta must be above 0 and at most 1, got 2"),
        ({"inner_steps": 0}, "inner_steps must be 1 or more, got 0"),
        ({"inner_steps": 2.5}, "inner_steps = 2.5 is not a whole number"),
        ({"meta_step": "maml"}, "unknown meta_step 'maml'"),
        ({"inner_optimizer": "adamw"}, "unknown inner_optimizer 'adamw': did you mean 'adam'"),
        ({"meta_step": "gradient", "fresh_batches": False}, "a batch of its own"),
        ({"sampling": "mixed", "offline_share": [0.2, 0.5]}, "only with sampling=block"),
    ],
)
def test_settings_out_of_range_are_one_line(settings, message):
    with pytest.raises(SaferlError, match=message) as caught:
        MOORL.make_config(settings)
    assert "\n" not in str(caught.value)
