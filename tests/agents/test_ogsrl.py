"""OGSRL: one update against a plain reference, what reaches what, and toys with known answers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saferl.agents.guarded import MARGIN_RATE, Limits
from saferl.agents.ogsrl import OGSRL, TRIES, DiscreteOGSRL
from saferl.agents.rollouts import advantages, ood_budget, split
from saferl.agents.trust_region import CORNER, FREE, RECOVERY, SHRINK
from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.rng import MemberRandom
from saferl.spec import Spec

from .reference import MEMBERS, Net, adam, descend, float64, nets

__all__ = ["float64"]

OBS, LENGTH = 3, 4
SMALL = {"hidden": [4], "episodes": 6, "horizon": 3, "guardian_options": "neighbours=2",
         "alpha": 0.3, "critic_updates": 2, "curvature_share": 1.0, "margin_models": 0}  # fmt: skip


def quiet(line: str) -> None:
    pass


def logged(discrete: bool, episodes: int = 30, seed: int = 0) -> Dataset:
    """Noise in episodes of four steps, half of them with a terminal end."""
    random = np.random.default_rng(seed)
    rows = episodes * LENGTH
    ends = np.arange(rows) % LENGTH == LENGTH - 1
    terminal = ends & (random.random(rows) < 0.5)
    kind = {"n_actions": 4} if discrete else {"action_low": (-2.0, 0.0), "action_high": (2.0, 4.0)}
    return Dataset.from_arrays(
        random.normal(size=(rows, OBS)),
        random.integers(4, size=rows) if discrete else random.uniform([-2, 0], [2, 4], (rows, 2)),
        random.normal(size=rows),
        terminal,
        ends & ~terminal,
        random.normal(size=(rows, OBS)),
        costs=random.random(rows),
        id="noise",
        **kind,
    )


def make(discrete: bool, dataset: Dataset | None = None, members=MEMBERS, **settings):
    """A fitted agent."""
    cls = DiscreteOGSRL if discrete else OGSRL
    dataset = logged(discrete) if dataset is None else dataset
    config = cls.make_config(SMALL | settings)
    agent = cls(Spec.from_dataset(cls.prepare(dataset, config), config), config, members)
    agent.fit(dataset, quiet)
    return agent


def played(agent):
    """What the agent's next update will play, its random stream left as it was."""
    state = agent.random.state_dict()
    rollout = agent._play(agent.models[0])
    agent.random.load_state_dict(state)
    return rollout


# One update is the equations ---------------------------------------------------------------------


class Reference:
    """Advantages and totals of one member by loops over the steps of a rollout."""

    def __init__(self, agent, member: int, discounts: tuple[float, ...], gae: float):
        rollout = played(agent)
        self.critics = nets(agent.critic, member)
        self.episodes = []  # of each: states, actions, signals per critic, advantages, targets
        self.discounts = discounts
        total = [0.0] * len(discounts)
        for n in range(rollout.alive.shape[1]):
            alive = rollout.alive[member, n]
            steps = int(alive.sum())
            states = [rollout.observations[member, n, t] for t in range(steps)]
            ended = bool(rollout.ended[member, n, steps - 1])
            assert ended == bool(rollout.ended[member, n].any())
            assert ended or steps == alive.shape[0]
            last = rollout.final[member, n]
            ood = rollout.ood[member, n, :steps].tolist()
            rewards = agent.spec.reward_scale * rollout.rewards[member, n, :steps]
            columns = [rewards.tolist(), ood]
            if len(discounts) == 3:
                cost = rollout.costs[member, n, :steps, 0].tolist()
                spared = [max(self.critics[2](s).item(), 0.0) for s in states]
                columns.append([c + o * v for c, o, v in zip(cost, ood, spared)])
            all_advantages, all_targets = [], []
            for k, (critic, gamma) in enumerate(zip(self.critics, discounts)):
                v = [critic(s).item() for s in states]
                beyond = 0.0 if ended else critic(last).item()
                following, found = 0.0, [0.0] * steps
                for t in reversed(range(steps)):
                    ahead = v[t + 1] if t + 1 < steps else beyond
                    following = columns[k][t] + gamma * ahead - v[t] + gamma * gae * following
                    found[t] = following
                all_advantages.append(found)
                all_targets.append([a + b for a, b in zip(found, v)])
                total[k] += sum(gamma**t * x for t, x in enumerate(columns[k]))
                if k != 1:  # nothing is added to the unsupported steps within H
                    total[k] += gamma**steps * (max(beyond, 0.0) if k else beyond)
            self.episodes.append((states, rollout.actions[member, n, :steps], all_advantages,
                                  all_targets))  # fmt: skip
        self.totals = [x / len(self.episodes) for x in total]
        self.states = torch.stack([s for episode in self.episodes for s in episode[0]])
        self.actions = torch.cat([episode[1] for episode in self.episodes])

    def column(self, part: int, k: int) -> Tensor:
        return torch.tensor([x for episode in self.episodes for x in episode[part][k]])

    def standard(self, k: int) -> Tensor:
        a = self.column(2, k)
        return (a - a.mean()) / (a.std(correction=0) + 1e-8)

    def discounted(self, k: int) -> Tensor:
        """γ^t A_k of every step."""
        gamma = self.discounts[k]
        return torch.tensor(
            [gamma**t * x for episode in self.episodes for t, x in enumerate(episode[2][k])]
        )

    def regress(self, lr: float, updates: int) -> None:
        for k, critic in enumerate(self.critics):
            optimizer = adam(critic, lr=lr)
            for _ in range(updates):
                error = critic(self.states)[:, 0] - self.column(3, k)
                descend(optimizer, error.square().mean())


def relative(total: float, budget: float) -> float:
    return (total - budget) / (abs(total) + budget)


def assert_net(net: Net, mlp, member: int, element: int = 0) -> None:
    for (w, b), weight, bias in zip(net.layers, mlp.weights, mlp.biases):
        torch.testing.assert_close(weight[member, element].T, w.detach(), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(bias[member, element, 0], b.detach(), rtol=1e-6, atol=1e-8)


def check_cpo(member: int, probability: float, limit: float | None, **settings) -> int:
    """One update against the reference; which case of the step it was.

    ``limit=None`` sets the cost's budget just above what the policy spends.
    """
    gamma, gamma_c, delta, damping = 0.9, 0.8, 0.02, 0.05
    agent = make(
        True, ood_probability=probability, cost_limit=limit or 1.0, discount=gamma, kl=delta,
        cost_discount=gamma_c, damping=damping, cg_iterations=120, critic_lr=1e-2, **settings,
    )  # fmt: skip
    reference = Reference(agent, member, (gamma, gamma, gamma_c), 0.95)
    j_ood, j_cost = reference.totals[1:]
    unit = sum(gamma_c**t for t in range(LENGTH)) / LENGTH
    if limit is None:
        limit = (j_cost + 1e-3) / unit
        agent.limits.budget[member, 1] = j_cost + 1e-3
    budgets = [probability * gamma**3, limit * unit]
    worst = 1 if relative(j_ood, budgets[0]) > relative(j_cost, budgets[1]) else 2
    c = reference.totals[worst] - budgets[worst - 1]
    states, actions, count = reference.states, reference.actions, len(reference.episodes)
    net = Net(agent.actor.mlp, member)
    shapes = [p.shape for p in net.parameters()]
    start = torch.cat([p.detach().flatten() for p in net.parameters()])

    def log_prob(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        w1, b1, w2, b2 = (part.view(shape) for part, shape in zip(parts, shapes))
        return F.linear(F.relu(F.linear(states, w1, b1)), w2, b2).log_softmax(-1)

    old = log_prob(start)
    advantage, cost_advantage = reference.standard(0), reference.discounted(worst)

    def ratio(flat: Tensor) -> Tensor:
        rows = torch.arange(len(actions))
        return (log_prob(flat)[rows, actions] - old[rows, actions]).exp()

    def reward(flat: Tensor) -> Tensor:
        return (ratio(flat) * advantage).mean()

    def cost(flat: Tensor) -> Tensor:
        return (ratio(flat) * cost_advantage).sum() / count

    def kl(flat: Tensor) -> Tensor:
        return (old.exp() * (old - log_prob(flat))).sum(-1).mean()

    g = torch.autograd.functional.jacobian(reward, start)
    b = torch.autograd.functional.jacobian(cost, start)
    h = torch.autograd.functional.hessian(kl, start) + damping * torch.eye(len(start))
    inverse_g, inverse_b = torch.linalg.solve(h, g), torch.linalg.solve(h, b)
    q, r, s = g @ inverse_g, -g @ inverse_b, b @ inverse_b
    free = (2 * delta / q).sqrt() * inverse_g
    if c + b @ free <= 0:
        step, case = free, FREE
    elif c > 0 and c**2 / s > 2 * delta:
        step, case = -((2 * delta / s).sqrt()) * inverse_b, RECOVERY
    else:
        price = ((q - r**2 / s) / (2 * delta - c**2 / s)).sqrt()
        step, case = (inverse_g - (price * c - r) / s * inverse_b) / price, CORNER
    scale = 0.0
    for i in range(TRIES):
        tried = start + SHRINK**i * step
        better = c > 0 or reward(tried) > reward(start)
        if kl(tried) <= delta and cost(tried) - cost(start) <= max(-c, 0.0) and better:
            scale = SHRINK**i
            break
    assert scale > 0
    after = start + scale * step
    reference.regress(1e-2, 2)

    metrics = agent.update(None)
    for layer, part in zip(
        [tensor for pair in net.layers for tensor in pair],
        after.split([s.numel() for s in shapes]),
    ):
        layer.data.copy_(part.view_as(layer))
    assert_net(net, agent.actor.mlp, member)
    for k, critic in enumerate(reference.critics):
        assert_net(critic, agent.critic.mlp, member, k)
    found = {"ood_value": j_ood, "predicted_cost": j_cost / unit, "step": scale, "margin": 0.0}
    found |= {"kl": float(kl(after)), "recovery": float(case == RECOVERY)}
    for name, number in found.items():
        assert metrics[name][member].item() == pytest.approx(number, rel=1e-6, abs=1e-9), name
    return case


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize(
    ("probability", "limit", "case"), [(0.99, 50.0, FREE), (0.05, 50.0, RECOVERY)]
)
def test_a_cpo_update_is_the_reference(float64, member, probability, limit, case):
    assert check_cpo(member, probability, limit) == case


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_a_cpo_update_at_its_budget_is_the_reference(float64, member):
    """A reward and its opposite: what one of them gains costs more, so its step is cut."""
    cases = {check_cpo(member, 0.99, None, reward_scale=scale) for scale in (1.0, -1.0)}
    assert CORNER in cases


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_a_ppo_lagrangian_update_is_the_reference(float64, member):
    gamma, gamma_c, lr = 0.9, 0.8, 0.4
    agent = make(
        False, optimiser="ppo_lag", cost_limit=1.0, discount=gamma, cost_discount=gamma_c,
        multiplier="gradient", multiplier_lr=lr, actor_lr=2e-2, epochs=4, clip=0.05, critic_lr=1e-2,
    )  # fmt: skip
    prices = [0.3, 0.2]
    agent.multipliers.level.copy_(torch.tensor([prices]))
    budgets = [0.05 * gamma**3, sum(1 / LENGTH * gamma_c**t for t in range(LENGTH))]
    net = Net(agent.actor.mlp, member)
    log_std = agent.actor.log_std[member, 0].detach().clone().requires_grad_()
    optimizer = adam(net, log_std, lr=2e-2)
    clipped = False
    for update in (1, 2):
        reference = Reference(agent, member, (gamma, gamma, gamma_c), 0.95)
        states, actions = reference.states, reference.actions
        prices = [
            max(0.0, before + lr * relative(total, budget))
            for before, total, budget in zip(prices, reference.totals[1:], budgets)
        ]
        paid = sum(price * reference.standard(k + 1) for k, price in enumerate(prices))
        advantage = (reference.standard(0) - paid) / (1 + sum(prices))

        def density(states: Tensor = states) -> torch.distributions.Normal:
            return torch.distributions.Normal(net(states).tanh(), log_std.exp())

        with torch.no_grad():
            before = density()
            old = before.log_prob(actions).sum(-1)
        for _ in range(4):
            ratio = (density().log_prob(actions).sum(-1) - old).exp()
            limited = ratio.clamp(0.95, 1.05)
            clipped |= bool((limited != ratio).any())
            descend(optimizer, -torch.minimum(ratio * advantage, limited * advantage).mean())
        with torch.no_grad():
            kl = torch.distributions.kl_divergence(before, density()).sum(-1).mean()

        metrics = agent.update(None)
        assert_net(net, agent.actor.mlp, member)
        torch.testing.assert_close(agent.actor.log_std[member, 0], log_std, rtol=1e-6, atol=1e-8)
        if update == 1:
            reference.regress(1e-2, 2)
            for k, critic in enumerate(reference.critics):
                assert_net(critic, agent.critic.mlp, member, k)
        expected = {"multiplier_ood": prices[0], "multiplier_cost": prices[1], "kl": float(kl),
                    "predicted_cost": reference.totals[2] / budgets[1]}  # fmt: skip
        for name, number in expected.items():
            assert metrics[name][member].item() == pytest.approx(number, rel=1e-6), name
        assert prices[0] != prices[1] and min(prices) > 0
    assert clipped


# Rollouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [True, False])
def test_rollouts_replay_the_model_and_end_where_it_does(discrete):
    dataset = logged(discrete)
    agent = make(discrete, dataset, guardian="none", cost_limit=1.0, episodes=40, horizon=6,
                 normalize_observations=True)  # fmt: skip
    rollout = agent._play(agent.models[0])
    spec = agent.spec
    raw = rollout.observations * torch.tensor(spec.observation_std) + torch.tensor(
        spec.observation_mean
    )
    first = dataset.observations[dataset.episodes[:, 0]]
    train, _ = split(dataset, 0.2)
    alive, ended = rollout.alive.bool(), rollout.ended.bool()
    for m in range(2):
        for n in range(40):
            assert np.abs(first - raw[m, n, 0].numpy()).max(1).min() < 1e-5
            for t in range(int(alive[m, n].sum())):
                cost, reward = float(rollout.costs[m, n, t, 0]), float(rollout.rewards[m, n, t])
                row = np.flatnonzero(train.rewards == np.float32(reward))  # rewards are distinct
                assert len(row) == 1 and train.costs[row[0]] == np.float32(cost)
                assert bool(ended[m, n, t]) == bool(train.terminals[row[0]])
                if t + 1 < 6 and not ended[m, n, t]:
                    following = train.next_observations[row[0]]
                    np.testing.assert_allclose(raw[m, n, t + 1], following, atol=1e-5)
    lasting = alive.sum(-1)
    assert (ended.sum(-1) == (rollout.open == 0)).all() and lasting.min() < 6 == lasting.max()
    dead = ~alive
    for x in (rollout.rewards, rollout.costs[..., 0], rollout.ood):
        assert (x[dead] == 0).all()
    assert not rollout.ood.any()
    if not discrete:  # drawn actions leave the bounds, what the model is asked does not
        assert rollout.actions.abs().max() > 1


@pytest.mark.parametrize("discrete", [True, False])
def test_absorbing_ends_at_the_first_unsupported_step(discrete):
    plain = make(discrete, ood_mode="constraint", episodes=60, cost_limit=1.0)
    absorbing = make(discrete, episodes=60, cost_limit=1.0)
    one, two = (a._play(a.models[0]) for a in (plain, absorbing))
    scale, shift = torch.ones(()), torch.zeros(())
    if not discrete:
        scale, shift = plain._half_range, plain._center
    for agent, rollout in ((plain, one), (absorbing, two)):
        actions = rollout.actions if discrete else rollout.actions.clamp(-1, 1) * scale + shift
        outside = agent.guardian.is_ood(rollout.observations, actions) & (rollout.alive > 0)
        assert torch.equal(rollout.ood > 0, outside)
    # The same start, the same draws: equal up to the first unsupported step.
    first = (one.ood.cumsum(-1) - one.ood) == 0
    assert torch.equal(two.alive > 0, first & (one.alive > 0))
    assert torch.equal(two.ood, one.ood * first)
    assert one.ood.sum(-1).max() > 1 and two.ood.sum(-1).max() == 1
    last = two.ood > 0
    assert (two.ended[last] == 1).all()
    assert (two.rewards[last] == 0).all() and (two.costs[last] == 0).all()
    assert (one.rewards[last] != 0).any()
    inside = (two.alive > 0) & ~last
    assert torch.equal(two.rewards[inside], one.rewards[inside])


def test_the_table_is_the_guardian():
    """Discrete actions and a replaying model: asked once before training, at all logged states."""
    dataset = logged(True)
    agent = make(True, dataset)
    assert agent.world.outside.shape == (2 * len(dataset), 4)
    states = torch.tensor(np.concatenate([dataset.observations, dataset.next_observations]))
    states = states[torch.randperm(len(states), generator=torch.Generator().manual_seed(0))]
    for action in range(4):
        rows, actions = states.expand(2, -1, -1), torch.full((2, len(states)), action)
        expected = agent.guardian.is_ood(rows, actions)
        assert torch.equal(agent.world.ood(rows, actions) > 0, expected)
        assert expected.any() and not expected.all()
    assert make(False).world.outside is None


def test_a_mask_leaves_supported_actions_in_training_and_after():
    dataset = logged(True)
    agent = make(True, dataset, ood_mode="mask", cost_limit=1.0, episodes=200)
    rollout = agent._play(agent.models[0])
    states = torch.tensor(dataset.observations).expand(2, -1, -1)
    every = torch.arange(4)
    outside = agent.guardian.is_ood(states[..., None, :], every)
    allowed = agent.world.allowed(states, 4)
    none = outside.all(-1)
    assert none.any() and not none.all()
    assert torch.equal(allowed[~none], ~outside[~none])
    best = agent.guardian.score(states[..., None, :], every).argmin(-1)
    assert torch.equal(allowed[none], F.one_hot(best[none], 4).bool())
    chosen = rollout.allowed.gather(-1, rollout.actions[..., None])[..., 0]
    assert chosen.all()
    assert torch.equal(rollout.allowed, agent.world.allowed(rollout.observations.flatten(1, 2), 4)
                       .view_as(rollout.allowed))  # fmt: skip
    agent.update(None)
    policy = agent.policy()
    for actions in (policy(states), policy.sample(states, MemberRandom(MEMBERS))):
        assert allowed.gather(-1, actions[..., None]).all()
    one = policy.member(1)
    torch.testing.assert_close(one(states[:1])[0], policy(states)[1])


def test_a_penalty_is_paid_from_the_step_to_the_horizon():
    agent = make(True, optimiser="trpo", ood_mode="penalty", ood_penalty=7.0, discount=0.9,
                 horizon=5, reward_scale=2.0, reward_shift=-1.0)  # fmt: skip
    rollout = agent._play(agent.models[0])
    signals = agent._signals(rollout, agent._values(rollout))[..., 0]
    seen = set()
    for m, n in np.ndindex(2, 6):
        for t in range(5):
            if not rollout.alive[m, n, t]:
                expected = 0.0
            elif rollout.ood[m, n, t]:
                expected = -sum(7.0 * 0.9**k for k in range(5 - t))
                seen.add(t)
            else:
                expected = 2.0 * float(rollout.rewards[m, n, t]) - 1.0
            assert float(signals[m, n, t]) == pytest.approx(expected, rel=1e-5), (m, n, t)
    assert len(seen) > 1


def test_starts_are_initial_states_or_any():
    dataset = logged(False)
    initial, every = make(False, dataset), make(False, dataset, starts="any")
    assert len(initial.world.starts) == len(dataset.episodes)
    np.testing.assert_array_equal(every.world.starts, dataset.observations)


# What reaches what -------------------------------------------------------------------------------


def after(updates: int = 1, discrete: bool = True, **settings):
    agent = make(discrete, **settings)
    for _ in range(updates):
        agent.update(None)
    return agent


def same(one, two, element: int | None = None, part: str = "critic") -> bool:
    pick = slice(None) if element is None else element
    pairs = zip(getattr(one, part).parameters(), getattr(two, part).parameters())
    return all(torch.equal(a[:, pick], b[:, pick]) for a, b in pairs)


def test_each_signal_reaches_its_own_critic_and_multiplier():
    base = {"optimiser": "ppo_lag", "cost_limit": 1.0, "episodes": 40}
    dataset = logged(True)
    costlier = dataset.with_costs(np.clip(3 * dataset.costs, 0, 2))
    plain = after(**base)
    for changed, critic in (
        (after(**base, reward_shift=0.5), 0),
        (after(**base, dataset=costlier), 2),
    ):
        assert [same(plain, changed, k) for k in range(3)] == [k != critic for k in range(3)]
        assert not same(plain, changed, part="actor") or critic == 0
    dearer, rarer = after(**base, dataset=costlier), after(**base | {"ood_probability": 0.5})
    level = plain.multipliers.level
    assert (dearer.multipliers.level[:, 1] > level[:, 1]).all()
    assert torch.equal(dearer.multipliers.level[:, 0], level[:, 0])
    assert (rarer.multipliers.level[:, 0] < level[:, 0]).all()
    assert torch.equal(rarer.multipliers.level[:, 1], level[:, 1])


@pytest.mark.parametrize("discrete", [True, False])
def test_guard_and_limit_reach_the_policy(discrete):
    tight = {"cost_limit": 0.2, "ood_probability": 0.9}
    guarded, free = after(discrete=discrete, **tight), after(
        discrete=discrete, guardian="none", **tight
    )  # fmt: skip
    assert not same(guarded, free, part="actor")
    loose = after(discrete=discrete, **tight | {"cost_limit": 100.0})
    assert not same(guarded, loose, part="actor")
    hard = after(discrete=discrete, **tight | {"cost_limit": 100.0, "ood_probability": 1e-6})
    assert not same(loose, hard, part="actor")
    unguarded = {"optimiser": "trpo", "discrete": discrete}
    absorbed = after(**unguarded, ood_mode="penalty", ood_penalty=0.0)
    penalised = after(**unguarded, ood_mode="penalty", ood_penalty=25.0)
    assert not same(absorbed, penalised, 0) and not same(absorbed, penalised, part="actor")


def test_limits_of_members_are_their_own():
    """The first member's cost limit binds and the second has none."""
    agent = make(True, cost_limit=[0.2, math.inf], ood_probability=0.9)
    # One without a limit has a critic less, so its initial weights differ: a limit too far to bind.
    alone = [make(True, members=(seed,), cost_limit=limit, ood_probability=0.9)
             for seed, limit in zip(MEMBERS, (0.2, 1e9))]  # fmt: skip
    for _ in range(4):
        agent.update(None)
        for one in alone:
            one.update(None)
    for m, one in enumerate(alone):
        for ours, theirs in zip(agent.actor.parameters(), one.actor.parameters()):
            torch.testing.assert_close(ours[m], theirs[0], rtol=1e-4, atol=1e-5)


# Budgets -----------------------------------------------------------------------------------------


def test_budgets_are_the_users_limits_in_the_units_of_the_estimates():
    lines: list[str] = []
    cls, dataset = DiscreteOGSRL, logged(True)
    config = cls.make_config(SMALL | {"cost_limit": [1.0, 2.0], "cost_discount": 0.8,
                                      "discount": [0.9, 0.95], "horizon": 7})  # fmt: skip
    agent = cls(Spec.from_dataset(dataset, config), config, 2)
    agent.fit(dataset, lines.append)
    cost = sum(0.8**t for t in range(LENGTH)) / LENGTH  # logged episodes last four steps
    expected = torch.tensor([[0.05 * 0.9**7, cost], [0.05 * 0.95**7, 2 * cost]])
    torch.testing.assert_close(agent.limits.budget, expected)
    undiscounted = make(True, cost_limit=3.0, cost_discount=0.999999)
    torch.testing.assert_close(undiscounted.limits.budget[:, 1], torch.full((2,), 3.0), rtol=1e-4,
                               atol=0)  # fmt: skip
    assert any(line.startswith("budget of cost: 0.738, 1.476") for line in lines), lines


def test_the_margin_comes_from_models_of_episodes_kept_aside():
    dataset = logged(True)
    agent = make(True, dataset, cost_limit=2.0, margin_models=3, calibration=0.4)
    train, held = split(dataset, 0.4)
    assert not set(train.rewards) & set(held.rewards)
    assert set(agent.models[0].rewards.tolist()) == set(train.rewards.tolist())
    others = [set(model.rewards.tolist()) for model in agent.models[1:]]
    assert all(other < set(held.rewards.tolist()) for other in others)
    assert others[0] != others[1] != others[2]
    for update in range(1, 7):
        metrics = agent.update(None)
        assert (agent.limits.seen.sum(1) == update).all()
    assert (agent.limits.seen == 2).all()
    torch.testing.assert_close(metrics["margin"] * agent.limits.unit, agent.limits.margin())

    limits = Limits(1, ("ood", "cost"), 2)
    limits.budget.copy_(torch.tensor([[0.3, 2.0]]))
    for gap in (1.0, 3.0):
        limits.observe(0, torch.tensor([gap]))
    limits.observe(1, torch.tensor([0.5]))
    assert limits.gaps[0].tolist() == [2.0, 0.5]  # means while there are few
    torch.testing.assert_close(limits.margin(), torch.tensor([0.5 + 0.9 * 1.5]))
    torch.testing.assert_close(limits.tightened(), torch.tensor([[0.3, 2.0 - 1.85]]))
    for _ in range(400):
        limits.observe(0, torch.tensor([-1.0]))
        limits.observe(1, torch.tensor([-1.0]))
    assert float(limits.margin()) == 0  # a model that is too pessimistic loosens nothing
    limits.observe(0, torch.tensor([0.0]))
    assert float(limits.gaps[0, 0]) == pytest.approx(MARGIN_RATE - 1, abs=1e-6)
    assert not make(True, cost_limit=2.0).limits.margin().any()


@pytest.mark.parametrize("optimiser", ["cpo", "ppo_lag"])
def test_the_margin_tightens_what_training_keeps(optimiser):
    settings = {"optimiser": optimiser, "cost_limit": 3.0, "ood_probability": 0.9, "kl": 0.1}
    settings |= {"margin_models": 2, "episodes": 30}
    plain, tight = make(True, **settings), make(True, **settings)
    tight.limits.gaps.fill_(2.5)
    tight.limits.seen.fill_(1000)
    tight.limits.observe = lambda model, gap: None
    one, two = plain.update(None), tight.update(None)
    assert (two["margin"] > 2).all() and torch.equal(one["predicted_cost"], two["predicted_cost"])
    if optimiser == "cpo":
        assert (one["recovery"] == 0).all() and (two["recovery"] == 1).all()
    else:
        assert (two["multiplier_cost"] > one["multiplier_cost"]).all()
    assert not same(plain, tight, part="actor")


def exits(hazard: np.ndarray, gamma: float, absorb: bool) -> tuple[float, float]:
    """V_ĝ and the chance of at least one unsupported step of a chain whose step h is unsupported
    with chance ``hazard[h]``."""
    alive = np.concatenate([[1.0], np.cumprod(1 - hazard)[:-1]])
    weight = hazard * (alive if absorb else 1.0)
    return float((gamma ** np.arange(len(hazard)) * weight).sum()), 1 - float(np.prod(1 - hazard))


@pytest.mark.parametrize("absorb", [True, False])
def test_the_ood_budget_bounds_the_chance_of_leaving(absorb):
    """Chains whose V is the budget exactly leave with chance β at most, simulated too."""
    random = np.random.default_rng(0)
    gamma, horizon, beta = 0.97, 20, 0.1
    budget = ood_budget(beta, gamma, horizon)
    shares = []
    for _ in range(50):
        shape = random.random(horizon) * (random.random(horizon) < random.random())
        shape[random.integers(horizon)] += 1
        low, high = 0.0, 1 / shape.max()
        for _ in range(60):  # V rises with the hazard
            middle = (low + high) / 2
            low, high = (middle, high) if exits(middle * shape, gamma, absorb)[0] < budget else (
                low, middle)  # fmt: skip
        value, leaves = exits(low * shape, gamma, absorb)
        assert value == pytest.approx(budget, rel=1e-6)
        assert leaves <= beta
        played = random.random((20_000, horizon)) < low * shape
        share = played.any(1).mean()
        assert share == pytest.approx(leaves, abs=4 * math.sqrt(beta / 20_000))
        shares.append(leaves)
    # The bound is met but for one step of discount where only the last step may leave.
    hazard = np.zeros(horizon)
    hazard[-1] = beta * gamma
    value, leaves = exits(hazard, gamma, absorb)
    assert value == pytest.approx(budget) and leaves == pytest.approx(beta * gamma)
    assert max(shares) < beta


@pytest.mark.parametrize("mode", ["constraint_absorb", "constraint"])
def test_the_estimate_of_the_agent_bounds_the_share_that_leaves(mode):
    agent = make(True, ood_mode=mode, episodes=300, horizon=8, discount=0.95)
    rollout = agent._play(agent.models[0])
    values = agent._values(rollout)
    totals = agent._totals(rollout, agent._signals(rollout, values), values)
    left = (rollout.ood.sum(-1) > 0).float().mean(-1)
    value = (rollout.ood * 0.95 ** torch.arange(8)).sum(-1).mean(-1)
    torch.testing.assert_close(totals[:, 1], value)
    assert (left > 0.1).all() and (left <= value / 0.95**8).all()
    if mode == "constraint_absorb":  # counted once
        assert (left >= value).all()


# A toy with a known answer -----------------------------------------------------------------------


def bandit() -> Dataset:
    """One decision per episode, in one of three states.

    In state 0 (share 0.6) action 1 earns 1 at a cost of 1 and action 0 earns 0.5; in state 1 only
    action 2 was logged, and earned 3; in state 2 (far away) only action 0, for nothing. A pair that
    was never logged replays its nearest: action 2 in state 0 promises the 3 of state 1.
    """
    kinds = [(0.0, 0, 0.5, 0), (0.0, 1, 1.0, 1), (1.0, 2, 3.0, 0), (9.0, 0, 0.0, 0)]
    rows = [kind for kind, count in zip(kinds, (60, 60, 40, 40)) for _ in range(count)]
    order = np.random.default_rng(0).permutation(len(rows))
    s, a, r, c = (np.array(column)[order] for column in zip(*rows))
    return Dataset.from_arrays(
        s[:, None], a.astype(np.int64), r, np.ones(len(s), bool), None, s[:, None], costs=c,
        n_actions=3, horizon=1, id="bandit",
    )  # fmt: skip


BANDIT = {"hidden": [16], "episodes": 100, "horizon": 1, "model": "tabular", "alpha": 0.1,
          "guardian_options": "", "kl": 0.03, "cg_iterations": 5, "critic_lr": 1e-2}  # fmt: skip


def shares(agent, updates: int, last: int) -> np.ndarray:
    """Probabilities ``[M, state, action]``, averaged over the last updates."""
    states, found = torch.tensor([[0.0], [1.0], [9.0]]).expand(agent.members, -1, -1), []
    for i in range(updates):
        agent.update(None)
        if i >= updates - last:
            with torch.no_grad():
                found.append(agent.actor(states).exp())
    return torch.stack(found).mean(0).numpy()


def test_the_lure_outside_the_data_takes_the_unguarded_alone():
    fast = BANDIT | {"kl": 0.1}
    free = make(True, bandit(), **fast, guardian="none", optimiser="trpo")
    assert (shares(free, 30, 5)[:, 0, 2] > 0.9).all()
    for extra in (
        {"ood_probability": 0.02},
        {"optimiser": "trpo", "ood_mode": "penalty"},
        {"optimiser": "trpo", "ood_mode": "mask"},
    ):
        guarded = make(True, bandit(), **fast, guardian="count", **extra)
        found = shares(guarded, 36, 8)
        assert (found[:, 0, 2] < 0.05).all(), extra
        assert (found[:, 1, 2] > 0.8).all(), extra  # where it was logged it is taken


@pytest.mark.parametrize("optimiser", ["cpo", "ppo_lag"])
def test_a_cost_limit_binds_to_the_right_mixture(optimiser):
    """State 0 has a share of 0.6, so costs of 0.15 and 0.45 are action 1 in 1/4 and 3/4 of it."""
    agent = make(
        True, bandit(), **BANDIT | {"guardian": "count"}, cost_limit=[0.15, 0.45],
        optimiser=optimiser, actor_lr=3e-3, epochs=5, cost_discount=0.9,
    )  # fmt: skip
    updates, last = (80, 40) if optimiser == "cpo" else (220, 100)
    found = shares(agent, updates, last)
    np.testing.assert_allclose(found[:, 0, 1], [0.25, 0.75], atol=0.09)
    assert (found[:, 0, 2] < 0.08).all()


# State -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("discrete", "settings"),
    [
        (True, {"guardian": "kde", "guardian_options": "", "model": "tabular", "cost_limit": 2.0}),
        (False, {"optimiser": "ppo_lag", "multiplier": "pid", "cost_limit": 2.0}),
        (True, {"ood_mode": "mask", "cost_limit": 2.0, "starts": "any"}),
        (False, {"model": "ensemble", "model_options": "epochs=1 ensemble=2 hidden=4,4"}),
    ],
)
def test_a_checkpoint_holds_guardian_and_model(discrete, settings):
    settings = {"margin_models": 2, "clone_updates": 3} | settings
    one = make(discrete, **settings)
    for _ in range(3):
        one.update(None)
    state = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    two = type(one)(one.spec, one.config, MEMBERS)  # neither fitted nor calibrated
    two.load_state_dict(state)
    for _ in range(2):
        first, second = one.update(None), two.update(None)
        assert all(torch.equal(first[name], second[name]) for name in first)
    ours, theirs = one.state_dict(), two.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    shared = tuple(type(one).shared)
    for key, tensor in ours.items():
        if tensor.dim() and not key.startswith(shared):
            assert len(tensor) == len(MEMBERS), key
    assert any(key.startswith("world.guardian.") for key in ours)


@pytest.mark.parametrize("optimiser", ["cpo", "ppo_lag"])
def test_a_member_among_others_is_that_member_alone(optimiser):
    settings = {"optimiser": optimiser, "cost_limit": 2.0, "margin_models": 2}
    both, alone = make(False, **settings), make(False, members=MEMBERS[1:], **settings)
    for _ in range(4):
        both.update(None)
        alone.update(None)
    state = alone.state_dict()
    for key, tensor in both.state_dict().items():
        if not tensor.dim() or key.startswith(("world.", "replay.", "random.")):
            continue
        torch.testing.assert_close(tensor[1], state[key][0], rtol=1e-4, atol=1e-5, msg=key)


def test_cloning_starts_from_the_behaviour():
    """Of what was logged; clones of 300 updates are near it, random weights are not."""
    found = [shares(make(True, bandit(), **BANDIT, guardian="count", clone_updates=n,
                         ood_probability=0.5, actor_lr=1e-2), 1, 1) for n in (0, 300)]  # fmt: skip
    logged_shares = np.array([[0.5, 0.5, 0], [0, 0, 1], [1, 0, 0]])
    distance = [np.abs(f - logged_shares).max() for f in found]
    assert distance[1] < 0.2 < distance[0]


# Advantages and errors ---------------------------------------------------------------------------


def test_advantages_do_not_cross_episodes():
    """λ = 1 is Monte Carlo: the return until the end, or until H and V there, less V."""
    signals = torch.tensor([1.0, 2.0, 4.0]).view(1, 1, 3, 1).expand(1, 3, -1, -1)
    values = torch.tensor([10.0, 20.0, 30.0, 40.0]).view(1, 1, 4, 1).expand(1, 3, -1, -1)
    alive = torch.tensor([[[1.0, 1, 1], [1, 1, 0], [1, 1, 1]]])
    ended = torch.tensor([[[0.0, 0, 0], [0, 1, 0], [0, 0, 1]]])
    found = advantages(signals, values, alive, ended, 0.5, 1.0)[0, ..., 0]
    expected = [[1 + 1 + 1 + 5 - 10, 2 + 2 + 10 - 20, 4 + 20 - 30], [1 + 1 - 10, 2 - 20, 0],
                [1 + 1 + 1 - 10, 2 + 2 - 20, 4 - 30]]  # fmt: skip
    assert found.tolist() == expected


@pytest.mark.parametrize(
    ("discrete", "settings", "message"),
    [
        (True, {"optimiser": "trpo"}, "trpo keeps no limits"),
        (True, {"optimiser": "trpo", "guardian": "none", "cost_limit": 1.0}, "trpo keeps no"),
        (True, {"guardian": "none"}, "cpo has no limit to keep"),
        (True, {"ood_mode": "penalty"}, "cpo has no limit to keep"),
        (False, {"ood_mode": "mask", "cost_limit": 1.0}, "mask needs discrete actions"),
        (True, {"optimiser": "cop"}, "optimiser 'cop': did you mean 'cpo'"),
        (True, {"ood_mode": "absorb"}, "ood_mode 'absorb'"),
        (True, {"starts": "all"}, "starts 'all'"),
        (True, {"model": "kn"}, "model 'kn': did you mean 'knn'"),
        (True, {"guardian": "kd"}, "guardian 'kd': did you mean 'kde'"),
        (True, {"guardian_options": "neighbors=3"}, "did you mean 'neighbours'"),
        (True, {"ood_probability": 0.0}, "ood_probability = 0.0"),
        (True, {"horizon": 0}, "start at 1"),
        (True, {"calibration": 1.0}, "calibration = 1.0"),
        (True, {"cost_limit": -1.0}, "0 or more"),
        (True, {"cost_discount": 1.5, "cost_limit": 1.0}, "discount lies between"),
    ],
)
def test_bad_settings_are_one_clear_line(discrete, settings, message):
    with pytest.raises(SaferlError, match=message):
        make(discrete, **settings)


def test_bad_data_are_one_clear_line():
    dataset = logged(True)
    spec = Spec.from_dataset(dataset, DiscreteOGSRL.make_config(SMALL))
    agent = DiscreteOGSRL(spec, DiscreteOGSRL.make_config(SMALL), 1)
    with pytest.raises(SaferlError, match="not fitted: call fit"):
        agent.update(None)
    with pytest.raises(SaferlError, match="two are needed"):
        agent.fit(dataset.subset(episodes=1), quiet)
    free = dataclasses.replace(agent.config, cost_limit=1.0)
    costless = Dataset(**{**dataset._arrays(), "costs": None}, card=dataset.card)
    with pytest.raises(SaferlError, match="has no costs"):
        DiscreteOGSRL.prepare(costless, free)
    lines: list[str] = []
    config = dataclasses.replace(agent.config, alpha=0.01)
    small = DiscreteOGSRL(spec, config, 1)
    small.fit(dataset, lines.append)
    assert any("alpha = 0.01 needs 99 calibration episodes but there are 6" in x for x in lines)
    assert float(small.guardian.alpha) == pytest.approx(1 / 7)
