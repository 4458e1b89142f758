"""What constrained agents share, and A2PR under a limit as the first that uses it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saferl.agents.shared.constraint import Constraint, CostConfig, CostCritic
from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.registry import agent_class
from saferl.replay import ReplayBuffer
from saferl.rng import MemberRandom
from saferl.spec import Spec
from saferl.training.engine import Engine

from .plain import (
    MEMBERS,
    OBS,
    A,
    B,
    Net,
    adam,
    descend,
    gradients,
    make_batch,
    member_of,
    moved,
    nets,
)

T = 20
SMALL = {"hidden": [8, 8], "critic_hidden": [8, 8], "value_hidden": [8, 8], "vae_hidden": [9, 9]}
RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "value_lr": 3e-2, "vae_lr": 4e-2, "tau": 0.1}
Z = 2 * A


def make(members=MEMBERS, horizon: int = T, **settings):
    """A2PR whose values are near their baselines, so that advantages have both signs."""
    cls = agent_class("a2pr")
    spec = Spec(OBS, A, False, (-1.0,) * A, (1.0,) * A, horizon=horizon)
    agent = cls(spec, cls.make_config(SMALL | settings), members)
    batch = make_batch(agent, rows=100)
    s, a = batch.observations, batch.actions
    with torch.no_grad():
        offset = (agent.critic(s, a, elements=1) - agent.value(s)).mean(-1)
        agent.value.mlp.biases[-1] += offset[..., None, None]
        for weight in (*agent.actor.mlp.weights, *agent.vae.decoder.weights):
            weight *= 2  # actions far from 0, and a decoder that follows its input
        if agent.constraint is not None:
            offset = (agent.cost_critic(s, a)[:, None] - agent.cost_value(s)).mean(-1)
            agent.cost_value.mlp.biases[-1] += offset[..., None, None]
    agent.actor_target.load_state_dict(agent.actor.state_dict())
    return agent


def costly(agent, seed: int = 0, rows: int = B):
    return make_batch(agent, seed, rows, costs=True)


# One update is the equations ---------------------------------------------------------------------


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_limited_updates_are_the_reference(float64, member):
    limits, gamma, gamma_c, lr = (1.5, 6.0), 0.95, 0.9, 0.4
    agent = make(
        alpha=1.7, mask=0.8, vae_weight=1.5, kl_weight=0.3, discount=gamma, policy_noise=0.4,
        cost_limit=limits, cost_discount=gamma_c, multiplier_lr=lr, **RATES,
    )  # fmt: skip
    budget = sum(limits[member] / T * gamma_c**t for t in range(T))
    actor, value, cost_value = (
        Net(module.mlp, member) for module in (agent.actor, agent.value, agent.cost_value)
    )
    critics, costs = nets(agent.critic, member), nets(agent.cost_critic.online, member)
    encoder, decoder = Net(agent.vae.encoder, member), Net(agent.vae.decoder, member)
    actor_target = actor.copy()
    critic_targets, cost_targets = [c.copy() for c in critics], [c.copy() for c in costs]
    actor_optimizer, critic_optimizer = adam(actor, lr=1e-2), adam(*critics, lr=2e-2)
    value_optimizer, vae_optimizer = adam(value, lr=3e-2), adam(encoder, decoder, lr=4e-2)
    cost_optimizer, cost_value_optimizer = adam(*costs, lr=2e-2), adam(cost_value, lr=3e-2)
    random = MemberRandom(MEMBERS, stream=1)
    rho, logged = 0.3, []
    agent.constraint.multipliers.level.fill_(rho)

    def reconstruct(s: Tensor, a: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = encoder(s, a)
        mu, log_sigma = heads[:, :Z], heads[:, Z:].clamp(-4, 15)
        return decoder(s, mu + log_sigma.exp() * eta).tanh(), mu, log_sigma.exp()

    def worst(ensemble: list[Net], s: Tensor, a: Tensor) -> Tensor:
        return torch.maximum(*(net(s, a)[:, 0] for net in ensemble))

    path, indicators, seen = [rho], set(), set()
    for step in range(1, 9):
        batch = costly(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        s, a, r, s2, terminal = (
            own.observations, own.actions, own.rewards, own.next_observations, own.terminals
        )  # fmt: skip

        noise = (0.4 * random.normal(B, A)[member]).clamp(-0.5, 0.5)
        a2 = (actor_target(s2).tanh() + noise).clamp(-1, 1).detach()
        ahead = gamma * (1 - terminal)
        y = r + ahead * torch.minimum(*(t(s2, a2)[:, 0] for t in critic_targets)).detach()
        descend(critic_optimizer, sum(((c(s, a)[:, 0] - y) ** 2).mean() for c in critics))
        y_online = r + ahead * torch.minimum(*(c(s2, a2)[:, 0] for c in critics)).detach()
        v = value(s)[:, 0]
        descend(value_optimizer, ((v - torch.minimum(y, y_online)) ** 2).mean())

        ahead = gamma_c * (1 - terminal)
        y_cost = own.costs + ahead * worst(cost_targets, s2, a2).detach()
        cost_loss = sum(((c(s, a)[:, 0] - y_cost) ** 2).mean() for c in costs)
        descend(cost_optimizer, cost_loss)
        y_cost_online = own.costs + ahead * worst(costs, s2, a2).detach()
        v_cost = cost_value(s)[:, 0]
        cost_value_loss = ((v_cost - torch.maximum(y_cost, y_cost_online)) ** 2).mean()
        descend(cost_value_optimizer, cost_value_loss)

        logged += own.costs.tolist()
        spent = sum(sum(logged) / len(logged) * gamma_c**t for t in range(T))
        data_q = critics[0](s, a)[:, 0].detach()
        k = data_q.abs().mean() / spent
        data_p = (data_q - rho * k * worst(costs, s, a).detach()) / (1 + rho)
        base = ((v - rho * k * v_cost) / (1 + rho)).detach()

        rebuilt, mu, sigma = reconstruct(s, a, random.normal(B, Z)[member])
        good = [bool(data_p[i] > base[i]) for i in range(B)]
        indicators |= set(good)
        errors = [good[i] * ((rebuilt[i] - a[i]) ** 2).sum() for i in range(B)]
        kl = -0.5 * (1 + (sigma**2).log() - mu**2 - sigma**2)
        descend(vae_optimizer, 1.5 * sum(errors) / (B * A) + 0.3 * kl.sum() / (B * Z))

        losses = {"cost_critic_loss": cost_loss, "cost_value_loss": cost_value_loss}
        if step % 2 == 0:
            p = actor(s).tanh()
            q, cost = critics[0](s, p)[:, 0], worst(costs, s, p)
            candidate, _, _ = reconstruct(s, p, random.normal(B, Z)[member])
            candidate_p = critics[0](s, candidate)[:, 0] - rho * k * worst(costs, s, candidate)
            candidate_p = (candidate_p / (1 + rho)).detach()
            cloning = 0.0
            for i in range(B):  # row by row
                wins = bool(candidate_p[i] >= data_p[i])
                kept = bool(data_p[i] > base[i]) or bool(candidate_p[i] >= base[i])
                seen.add((wins, kept))
                towards = candidate[i] if wins else a[i]
                cloning = cloning + (0.8 if kept else 0.0) * ((p[i] - towards) ** 2).sum()
            size = (q.abs() + rho * k * cost.abs()).mean().detach()
            # 1 / (1 + ρ) of the value and (1 + ρ) of its weight cancel.
            loss = -1.7 / size * (q - rho * k * cost).mean() + cloning / (B * A)
            losses["actor_loss"] = loss
            descend(actor_optimizer, loss)
            actor_target.follow(actor, 0.1)
            for target, net in zip(critic_targets + cost_targets, critics + costs):
                target.follow(net, 0.1)
            j = cost.mean().item()
            excess = (j - budget) / (abs(j) + budget)
            rho = max(0.0, rho + lr * excess)
            path.append(rho)
            expected = {"multiplier": rho, "cost_excess": excess, "cost_estimate":
                        j / budget * limits[member]}  # fmt: skip
            for name, number in expected.items():
                assert metrics[name][member].item() == pytest.approx(number, rel=1e-9), name

        for name, loss in losses.items():
            torch.testing.assert_close(metrics[name][member], loss.detach())
        pairs = [
            (actor, agent.actor.mlp), (actor_target, agent.actor_target.mlp),
            (value, agent.value.mlp), (cost_value, agent.cost_value.mlp),
            (encoder, agent.vae.encoder), (decoder, agent.vae.decoder),
        ]  # fmt: skip
        for net, mlp in pairs:
            net.assert_is(mlp, member)
        for e in range(2):
            critics[e].assert_is(agent.critic.mlp, member, e)
            costs[e].assert_is(agent.cost_critic.online.mlp, member, e)
            cost_targets[e].assert_is(agent.cost_critic.target.mlp, member, e)
    assert len(set(path)) > 2 and max(path) > 0
    assert indicators == {False, True}
    assert {wins for wins, _ in seen} == {False, True} == {kept for _, kept in seen}


# What moves, and what reaches it -----------------------------------------------------------------

LIMITED = {"cost_limit": 2.0, "multiplier_lr": 0.1} | RATES


def after(updates: int, rho: float = 0.0, **settings):
    agent = make(**LIMITED | settings)
    agent.constraint.multipliers.level.fill_(rho)
    for i in range(updates):
        agent.update(costly(agent, i))
    return agent


def changed(one, two) -> set[str]:
    """Networks whose gradient in the last update differs between two agents."""
    mine, theirs = gradients(one), gradients(two)
    assert mine.keys() == theirs.keys()
    pairs = {k: [(a, b) for a, b in zip(mine[k], theirs[k]) if a is not None] for k in mine}
    return {k for k, grads in pairs.items() if any(not torch.equal(a, b) for a, b in grads)}


def test_every_update_moves_the_cost_s_networks_and_every_second_their_target():
    agent = make(**LIMITED)
    batch = costly(agent)
    every = {"critic", "value", "vae", "cost_critic", "cost_value"}
    target = [p.clone() for p in agent.cost_critic.target.parameters()]
    assert moved(agent, batch) == every
    assert all(torch.equal(p, q) for p, q in zip(target, agent.cost_critic.target.parameters()))
    assert moved(agent, batch) == every | {"actor", "actor_target", "critic_target"}
    assert not any(torch.equal(p, q) for p, q in zip(target, agent.cost_critic.target.parameters()))


def test_costs_reach_the_cost_critic_and_at_no_multiplier_nothing_else():
    """At ρ = 0 the update is the one without a limit, to the bit."""
    one, two = make(**LIMITED | {"cost_limit": 1e9}), make(**RATES)
    for i in range(4):
        batch = costly(one, i)
        metrics, without = one.update(batch), two.update(batch._replace(costs=None))
        for name in without:
            assert torch.equal(metrics[name], without[name]), name
    state = one.state_dict()
    for key, tensor in two.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert any(p.grad.any() for p in one.cost_critic.online.parameters())
    # Costs three times as large, seen by the critic alone.
    three = make(**LIMITED | {"cost_limit": 1e9})
    for i in range(4):
        batch = costly(three, i)
        three.update(batch._replace(costs=3 * batch.costs))
    assert changed(one, three) == {"cost_critic", "cost_value"}


def test_the_limit_reaches_the_multiplier_and_through_it_the_actor():
    tight, loose = after(2, cost_limit=0.1, rho=0.5), after(2, cost_limit=10.0, rho=0.5)
    rho = [agent.constraint.multiplier() for agent in (tight, loose)]
    assert (rho[0] > 0.5).all() and (rho[1] < 0.5).all()
    assert changed(tight, loose) == set()  # ρ moves after the actor, so it acts from the next on
    tight, loose = after(4, cost_limit=0.1, rho=0.5), after(4, cost_limit=10.0, rho=0.5)
    assert {"actor"} <= changed(tight, loose) <= {"actor", "vae"}


def test_the_multiplier_changes_the_actor_s_gradient_alone():
    """And the VAE's, through the rows that it is trained on."""
    free, priced = after(2, rho=0.0), after(2, rho=1.0)
    assert {"actor"} <= changed(free, priced) <= {"actor", "vae"}


def test_the_actor_s_gradient_turns_against_costs():
    """With a large multiplier and no cloning the actor descends Qc and nothing else."""
    agent = make(**LIMITED | {"mask": 0.0, "policy_interval": 1, "multiplier_max": 1e9})
    agent.constraint.multipliers.level.fill_(1e8)
    batch = costly(agent)
    actor = [p.detach().clone() for p in agent.actor.parameters()]
    agent.update(batch)
    got = [p.grad.clone() for p in agent.actor.parameters()]
    with torch.no_grad():
        for p, q in zip(agent.actor.parameters(), actor):
            p.copy_(q)
    cost = agent.cost_critic(batch.observations, agent.actor(batch.observations))
    loss = (2.5 * cost.mean(-1) / cost.detach().abs().mean(-1)).sum()
    expected = torch.autograd.grad(loss, list(agent.actor.parameters()))
    for mine, theirs in zip(got, expected):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["gradient", "softplus", "pid"])
def test_a_limited_agent_resumes_to_the_bit(kind):
    settings = LIMITED | {"multiplier": kind}
    whole, first, second = (make(**settings) for _ in range(3))
    for i in range(8):
        whole.update(costly(whole, i))
    for i in range(4):
        first.update(costly(first, i))
    second.load_state_dict(first.state_dict())
    for i in range(4, 8):
        second.update(costly(second, i))
    expected = whole.state_dict()
    assert {"cost_optimizer.0.exp_avg", "constraint.cost_mean"} <= expected.keys()
    assert second.state_dict().keys() == expected.keys()
    for key, tensor in second.state_dict().items():
        assert torch.equal(tensor, expected[key]), key


def test_a_member_without_a_limit_is_unconstrained():
    mixed, free = make(**LIMITED | {"cost_limit": [0.01, math.inf]}), make(**RATES)
    for i in range(6):
        batch = costly(mixed, i)
        metrics, without = mixed.update(batch), free.update(batch)
    assert metrics["multiplier"][0] > 0 == metrics["multiplier"][1]
    assert all(torch.isfinite(value).all() for value in metrics.values())
    assert torch.equal(metrics["actor_loss"][1], without["actor_loss"][1])
    for p, q in zip(mixed.actor.parameters(), free.actor.parameters()):
        assert torch.equal(p[1], q[1]) and not torch.equal(p[0], q[0])


# The shared parts --------------------------------------------------------------------------------


def test_the_target_is_pessimistic_and_only_terminals_end_it():
    init = MemberRandom(MEMBERS)
    critic = CostCritic(init, OBS, A, (8,), 2)
    agent = make()
    batch = costly(agent)
    actions = make_batch(agent, 1).actions
    with torch.no_grad():
        critic.target.mlp.biases[-1] += 0.5  # unlike the online one
        both = critic.target(batch.next_observations, actions)
    backup = critic.backup(batch, 0.9, actions)
    for m in range(len(MEMBERS)):
        for i in range(B):
            following = 0 if batch.terminals[m, i] else 0.9 * max(both[m, :, i])
            assert backup[m, i].item() == pytest.approx(float(batch.costs[m, i] + following))
    assert {float(x) for x in batch.terminals.flatten()} == {0.0, 1.0}
    online = critic.backup(batch, 0.9, actions, online=True)
    assert torch.equal(online == backup, batch.terminals.bool())
    largest = critic.online(batch.observations, batch.actions).amax(1)
    assert torch.equal(critic(batch.observations, batch.actions), largest)


def test_a_timeout_row_bootstraps():
    """The batch has no timeouts: what ends an episode without a terminal looks ahead."""
    dataset = toy(2)
    assert dataset.timeouts.sum() == 2 and not dataset.terminals.any()
    spec = dataset.spec(CostConfig())
    buffer = ReplayBuffer.from_dataset(dataset, spec, (0,))
    batch = buffer.gather(torch.from_numpy(np.flatnonzero(dataset.timeouts))[None])
    critic = CostCritic(MemberRandom((0,)), 1, 1, (8,))
    ahead = critic.target(batch.next_observations, batch.actions).amax(1)
    torch.testing.assert_close(
        critic.backup(batch, 0.5, batch.actions), batch.costs + 0.5 * ahead.detach()
    )


def constraint(horizon: int = 100, members: int = 3, **settings) -> Constraint:
    return Constraint(agent_class("a2pr").make_config(settings), members, horizon)


def test_the_excess_has_no_unit():
    limits = constraint(cost_limit=[10.0, 0.0, math.inf], cost_discount=0.9)
    d = sum(0.1 * 0.9**t for t in range(100))
    costs = [d / 3, d, 3 * d, 0.0]
    for cost, expected in zip(costs, [-0.5, 0.0, 0.5, -1.0]):
        excess = limits.excess(torch.full((3,), cost))
        assert excess[0].item() == pytest.approx(expected, abs=1e-6)
        assert excess[1].item() == (1.0 if cost else 0.0)
        assert excess[2].item() == -1.0
    never = constraint(2, 2, cost_limit=[10.0, math.inf], multiplier="softplus").multiplier()
    assert never[0] > 0 == never[1]
    # The same costs counted in cents.
    cents = constraint(cost_limit=[1000.0, 0.0, math.inf], cost_discount=0.9)
    for cost in costs:
        torch.testing.assert_close(
            cents.excess(torch.full((3,), 100 * cost)), limits.excess(torch.full((3,), cost))
        )


def test_estimates_are_told_per_episode():
    limits = constraint(cost_limit=[10.0, 20.0, 40.0], multiplier_lr=0.1)
    metrics = limits.step(limits.budget * torch.tensor([1.0, 2.0, 0.5]))
    assert metrics["cost_estimate"].tolist() == pytest.approx([10, 40, 20], rel=1e-5)
    assert metrics["multiplier"].tolist() == pytest.approx([0, 0.1 / 3, 0], abs=1e-6)
    assert limits.budget.tolist() == pytest.approx(
        [limit * (1 - 0.99**100) / (0.01 * 100) for limit in (10, 20, 40)]
    )


def test_weights_do_not_depend_on_the_units():
    """Rewards in cents and costs in thousandths: the penalised value is in cents, no more."""
    random = torch.Generator().manual_seed(0)
    q, cost, logged = (torch.randn(3, 50, generator=random) for _ in range(3))

    def penalised(reward_unit: float, cost_unit: float) -> Tensor:
        part = constraint(cost_limit=1.0, multiplier_max=10.0)
        part.multipliers.level.fill_(0.7)
        part.observe(logged.abs() * cost_unit)
        part.observe(logged.abs() * cost_unit)
        one, other = part.weights(q * reward_unit)
        return one * q * reward_unit - other * cost * cost_unit

    torch.testing.assert_close(penalised(100, 1e-3), 100 * penalised(1, 1))
    assert not torch.equal(penalised(1, 1), q)


def test_data_that_cost_nothing_have_no_price():
    part = constraint(cost_limit=1.0)
    part.multipliers.level.fill_(2.0)
    part.observe(torch.zeros(3, 5))
    one, other = part.weights(torch.ones(3, 5))
    assert (one == 1 / 3).all() and (other == 0).all()


def test_the_mean_cost_is_over_all_batches():
    part = constraint(cost_limit=1.0)
    batches = torch.arange(24.0).view(4, 3, 2)
    for batch in batches:
        part.observe(batch)
    torch.testing.assert_close(part.cost_mean, batches.mean((0, 2)))


def test_bad_input():
    without = costly(make())._replace(costs=None)
    with pytest.raises(SaferlError, match="the batch has no costs: .*with_costs"):
        make(**LIMITED).update(without)
    cls = agent_class("a2pr")
    dataset = toy(2)
    bare = Dataset(**dataset._arrays() | {"costs": None}, card=dataset.card)
    limited = cls.make_config({"cost_limit": [5, math.inf]})
    with pytest.raises(SaferlError, match=r"toy has no costs: .*Dataset\.with_costs"):
        cls.prepare(bare, limited)
    assert cls.prepare(dataset, limited) is dataset
    assert cls.prepare(bare, cls.make_config({})) is bare
    for bad in (-1.0, math.nan, [5.0, -1.0]):
        with pytest.raises(SaferlError, match="a cost limit is a number of 0 or more per episode"):
            make(cost_limit=bad)
    with pytest.raises(SaferlError, match="needs the number of steps of an episode"):
        make(horizon=0, cost_limit=5.0)
    with pytest.raises(SaferlError, match="cost_discount lies between 0 and below 1, got 1"):
        make(cost_limit=5.0, cost_discount=1.0)
    with pytest.raises(SaferlError, match="unknown kind of multiplier 'pdi'"):
        make(cost_limit=5.0, multiplier="pdi")


# A problem with a known answer -------------------------------------------------------------------


def toy(episodes: int = 120) -> Dataset:
    """Ten steps, each paying its action a and costing relu(a)²; the states say nothing.

    Logged actions are uniform on [-1, 1], so the data's mean episode costs 10 / 6. The best policy
    under a limit L is a = √(L / 10) in every step; without one, a = 1, which costs 10.
    """
    rng = np.random.default_rng(0)
    n = episodes * 10
    s, a, following = rng.normal(size=(n, 1)), rng.uniform(-1, 1, (n, 1)), rng.normal(size=(n, 1))
    return Dataset.from_arrays(
        s, a, a[:, 0], np.zeros(n), np.arange(n) % 10 == 9, following,
        costs=np.maximum(a[:, 0], 0) ** 2, action_low=(-1.0,), action_high=(1.0,), horizon=10,
        id="toy",
    )  # fmt: skip


def test_limits_are_kept_side_by_side_that_no_limit_breaks():
    cls, limits = agent_class("a2pr"), [1.0, 2.0, 4.0, math.inf]
    layers = {key: [24, 24] for key in SMALL}
    rates = {"actor_lr": 3e-3, "critic_lr": 3e-3, "value_lr": 3e-3, "tau": 0.05}
    config = cls.make_config(
        layers | rates | {"batch_size": 64, "discount": 0.5, "cost_discount": 0.5}
        | {"cost_limit": limits, "multiplier_lr": 5e-3, "policy_interval": 1}
    )  # fmt: skip
    dataset = cls.prepare(toy(), config)
    spec = dataset.spec(config)
    agent = cls(spec, config, len(limits))
    engine = Engine(agent, ReplayBuffer.from_dataset(dataset, spec, agent.seeds))
    engine.run(500)
    metrics = engine.read()
    states = torch.linspace(-2, 2, 41).view(1, -1, 1).expand(len(limits), -1, -1)
    actions = agent.policy()(states)[..., 0]
    spent = (10 * actions.relu().square()).mean(1)
    earned = 10 * actions.mean(1)
    assert (spent[:3] <= 1.15 * torch.tensor(limits[:3])).all(), spent
    assert (spent[:3] >= 0.3 * torch.tensor(limits[:3])).all(), spent
    assert spent[3] > 5, spent
    assert (earned.diff() > 0).all(), earned
    assert (np.diff(metrics["multiplier"]) < 0).all()
