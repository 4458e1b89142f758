"""OGSRL: one update against a plain reference, and the episodes that are simulated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from saferl.agents.ogsrl.agent import OGSRL, TRIES, DiscreteOGSRL
from saferl.agents.ogsrl.trust_region import CORNER, FREE, RECOVERY, SHRINK
from saferl.data import Dataset
from saferl.rng import MemberRandom
from saferl.safety.guardians.fitting import split

from .plain import MEMBERS, Net, adam, descend, nets

OBS, LENGTH = 3, 4
SMALL = {"hidden": [4], "episodes": 6, "horizon": 3, "guardian_options": "neighbours=2",
         "alpha": 0.3, "critic_updates": 2, "curvature_share": 1.0, "margin_models": 0}  # fmt: skip


def quiet(line: str) -> None:
    pass


def logged(discrete: bool, episodes: int = 30, seed: int = 0, states: int = 0) -> Dataset:
    """Noise in episodes of four steps, half of them with a terminal end.

    ``states``: how many there are; 0: none occurs twice.
    """
    random = np.random.default_rng(seed)
    rows = episodes * LENGTH
    ends = np.arange(rows) % LENGTH == LENGTH - 1
    terminal = ends & (random.random(rows) < 0.5)
    kind = {"n_actions": 4} if discrete else {"action_low": (-2.0, 0.0), "action_high": (2.0, 4.0)}
    few = np.random.default_rng(1)

    def visited() -> np.ndarray:
        found = random.normal(size=(rows, OBS))
        return found[few.integers(states, size=rows)] if states else found

    return Dataset.from_arrays(
        visited(),
        random.integers(4, size=rows) if discrete else random.uniform([-2, 0], [2, 4], (rows, 2)),
        random.normal(size=rows),
        terminal,
        ends & ~terminal,
        visited(),
        costs=random.random(rows),
        id="noise",
        **kind,
    )


def make(discrete: bool, dataset: Dataset | None = None, members=MEMBERS, **settings):
    """A fitted agent."""
    cls = DiscreteOGSRL if discrete else OGSRL
    dataset = logged(discrete) if dataset is None else dataset
    config = cls.make_config(SMALL | settings)
    agent = cls(cls.prepare(dataset, config).spec(config), config, members)
    agent.fit(dataset, quiet)
    return agent


def simulated(agent):
    """What the agent's next update will play, its random stream left as it was."""
    state = agent.random.state_dict()
    rollout = agent._simulate(agent.models[0])
    agent.random.load_state_dict(state)
    return rollout


def seen(agent, rollout) -> Tensor:
    """Observations ``[M, N, H + 1, O]`` of all places in the agent's units."""
    return (agent.world.see(rollout.states) - agent._mean) / agent._std


# One update is the equations ---------------------------------------------------------------------


class Reference:
    """Advantages and totals of one member by loops over the steps of a rollout."""

    def __init__(self, agent, member: int, discounts: tuple[float, ...], gae: float):
        rollout = simulated(agent)
        observations = seen(agent, rollout)
        self.critics = nets(agent.critic, member)
        cost_net, shift, scale = (
            nets(agent.cost_to_go.net, member)[0],
            agent.cost_to_go.shift[member].item(),
            agent.cost_to_go.scale[member].item(),
        )
        self.episodes = []  # of each: states, actions, signals per critic, advantages, targets
        self.discounts = discounts
        total = [0.0] * len(discounts)
        for n in range(rollout.alive.shape[1]):
            alive = rollout.alive[member, n]
            steps = int(alive.sum())
            states = [observations[member, n, t] for t in range(steps)]
            ended = bool(rollout.ended[member, n, steps - 1])
            assert ended == bool(rollout.ended[member, n].any())
            assert ended or steps == alive.shape[0]
            last = observations[member, n, -1]
            ood = rollout.ood[member, n, :steps].tolist()
            rewards = agent.spec.reward_scale * rollout.rewards[member, n, :steps]
            columns = [rewards.tolist(), ood]
            if len(discounts) == 3:
                cost = rollout.costs[member, n, :steps, 0].tolist()
                cost_to_go = [max(shift + scale * cost_net(s).item(), 0.0) for s in states]
                columns.append([c + o * v for c, o, v in zip(cost, ood, cost_to_go)])
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


def check_cpo(
    member: int,
    probability: float,
    limit: float | None,
    close: bool = False,
    states: int = 0,
    seed: int = 0,
    **settings,
) -> tuple[int, bool]:
    """One update against the reference; which case of the step it was, and whether the line search
    refused a try for the limit that the step does not know of.

    ``limit=None`` sets the cost's budget just above what the policy spends; ``close`` the other,
    which is then the tighter one, too.
    """
    gamma, gamma_c, delta, damping = 0.9, 0.8, 0.02, 0.05
    agent = make(
        True, logged(True, seed=seed, states=states), ood_probability=probability,
        cost_limit=limit or 1.0, discount=gamma, kl=delta,
        cost_discount=gamma_c, damping=damping, cg_iterations=120, critic_lr=1e-2, **settings,
    )  # fmt: skip
    # Networks are asked about all states where there are more simulated steps than states.
    assert (agent._rows(torch.zeros(2, 1).long(), None).lookup is None) == (not states)
    reference = Reference(agent, member, (gamma, gamma, gamma_c), 0.95)
    j_ood, j_cost = reference.totals[1:]
    unit = sum(gamma_c**t for t in range(LENGTH)) / LENGTH
    if limit is None:
        limit = (j_cost + 1e-3) / unit
        agent.limits.budget[member, 1] = j_cost + 1e-3
    budgets = [probability * gamma**3, limit * unit]
    if close:
        budgets[0] = j_ood + 1e-5
        agent.limits.budget[member, 0] = budgets[0]
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
    advantage = reference.standard(0)
    cost_advantage, other_advantage = reference.discounted(worst), reference.discounted(3 - worst)
    slack = budgets[2 - worst] - reference.totals[3 - worst]

    def ratio(flat: Tensor) -> Tensor:
        rows = torch.arange(len(actions))
        return (log_prob(flat)[rows, actions] - old[rows, actions]).exp()

    def reward(flat: Tensor) -> Tensor:
        return (ratio(flat) * advantage).mean()

    def cost(flat: Tensor, of: Tensor = cost_advantage) -> Tensor:
        return (ratio(flat) * of).sum() / count

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
    scale, refused = 0.0, False
    for i in range(TRIES):
        tried = start + SHRINK**i * step
        good = bool(kl(tried) <= delta) and bool(cost(tried) - cost(start) <= max(-c, 0.0))
        good &= c > 0 or bool(reward(tried) > reward(start))
        rise = cost(tried, other_advantage) - cost(start, other_advantage)
        kept = slack < 0 or bool(rise <= slack)
        refused |= good and not kept
        if good and kept:
            scale = SHRINK**i
            break
    assert scale > 0 or close
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
    found = {
        "ood_value": j_ood,
        "predicted_cost": j_cost / unit,
        "step_share": scale,
        "margin": 0.0,
    }
    found |= {"kl": float(kl(after)), "recovery": float(case == RECOVERY)}
    for name, number in found.items():
        assert metrics[name][member].item() == pytest.approx(number, rel=1e-6, abs=1e-9), name
    return case, refused


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize(
    ("probability", "limit", "case"), [(0.99, 50.0, FREE), (0.05, 50.0, RECOVERY)]
)
def test_a_cpo_update_is_the_reference(float64, member, probability, limit, case):
    assert check_cpo(member, probability, limit) == (case, False)


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_a_cpo_update_at_its_budget_is_the_reference(float64, member):
    """A reward and its opposite: what one of them gains costs more, so its step is cut."""
    for close in (False, True):
        found = [check_cpo(member, 0.99, None, close, seed=seed, reward_scale=scale)
                 for scale in (1.0, -1.0) for seed in (0, 1)]  # fmt: skip
        assert CORNER in {case for case, _ in found}
        assert any(refused for _, refused in found) == close


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_a_cpo_update_of_few_states_is_the_reference(float64, member):
    """Networks are asked about all states then, and the steps pick their answers."""
    budgets = ((0.99, 50.0), (0.01, 50.0), (0.99, 0.1), (0.99, None))
    cases = {check_cpo(member, *budget, states=7)[0] for budget in budgets}
    assert len(cases) > 1


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
    rollout = agent._simulate(agent.models[0])
    spec = agent.spec
    raw = agent.world.see(rollout.states)
    scaled = (raw - torch.tensor(spec.observation_mean)) / torch.tensor(spec.observation_std)
    torch.testing.assert_close(seen(agent, rollout), scaled)
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
    one, two = (a._simulate(a.models[0]) for a in (plain, absorbing))
    scale, shift = torch.ones(()), torch.zeros(())
    if not discrete:
        scale, shift = plain._half_range, plain._center
    for agent, rollout in ((plain, one), (absorbing, two)):
        actions = rollout.actions if discrete else rollout.actions.clamp(-1, 1) * scale + shift
        observations = agent.world.see(rollout.states)[:, :, :-1]
        outside = agent.guardian.is_ood(observations, actions) & (rollout.alive > 0)
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


def test_tables_of_counted_states_are_guardian_and_model():
    """Discrete actions and a replaying model: both are asked once before training."""
    dataset = logged(True)
    for settings in ({}, {"model_options": "k=3"}, {"model": "tabular"}):
        agent = make(True, dataset, margin_models=1, cost_limit=1.0, **settings)
        states = agent.world.states
        logged_states = np.concatenate([dataset.observations, dataset.next_observations])
        assert {tuple(s) for s in logged_states} == {tuple(s) for s in states.numpy()}
        places = torch.arange(len(states)).expand(2, -1)
        for action in range(4):
            rows, actions = states.expand(2, -1, -1), torch.full(places.shape, action)
            expected = agent.guardian.is_ood(rows, actions)
            assert torch.equal(agent.world.ood(places, actions) > 0, expected)
            assert expected.any() and not expected.all()
            for model in agent.models:
                walked = model.walk(places, actions, MemberRandom(MEMBERS))
                stepped = model.step(rows, actions, MemberRandom(MEMBERS))
                for one, two in zip(walked[1:], stepped[1:]):
                    assert torch.equal(one, two)
                assert torch.equal(states[walked.next_observations], stepped.next_observations)
    assert make(False).world.flagged is None and make(False).world.states is None


def test_leaving_the_support_is_charged_the_behaviour_cost_to_go():
    """Regression on the discounted costs that logged episodes had yet to spend, state by state."""
    dataset = logged(True, episodes=200, states=5)
    settings = {"cost_limit": 1.0, "cost_discount": 0.5, "hidden": [32], "critic_lr": 1e-2}
    agent = make(True, dataset, **settings)
    train, _ = split(dataset, 0.2)
    to_go = [sum(0.5**k * c for k, c in enumerate(train.costs[t : t - t % LENGTH + LENGTH]))
             for t in range(len(train))]  # fmt: skip
    for state in np.unique(train.observations, axis=0):
        mean = np.mean(np.array(to_go)[(train.observations == state).all(1)])
        for found in agent.cost_to_go(torch.tensor(state).expand(2, 1, -1)).detach():
            assert float(found) == pytest.approx(mean, abs=0.08)
    rollout = agent._simulate(agent.models[0])
    charged = agent._signals(rollout)[..., 2] - rollout.costs[..., 0]
    every = agent.cost_to_go(agent.world.states.expand(2, -1, -1))
    expected = every.gather(1, rollout.states[:, :, :-1].flatten(1, 2)).view_as(charged)
    torch.testing.assert_close(charged, expected * rollout.ood)
    assert rollout.ood.any()


def test_a_mask_leaves_supported_actions_in_training_and_after():
    dataset = logged(True)
    agent = make(True, dataset, ood_mode="mask", cost_limit=1.0, episodes=200)
    rollout = agent._simulate(agent.models[0])
    states = agent.world.states.expand(2, -1, -1)
    every = torch.arange(4)
    outside = agent.guardian.is_ood(states[..., None, :], every)
    allowed = agent.world.allowed(torch.arange(states.shape[1]).expand(2, -1), 4)
    none = outside.all(-1)
    assert none.any() and not none.all()
    assert torch.equal(allowed[~none], ~outside[~none])
    best = agent.guardian.score(states[..., None, :], every).argmin(-1)
    assert torch.equal(allowed[none], F.one_hot(best[none], 4).bool())
    chosen = rollout.allowed.gather(-1, rollout.actions[..., None])[..., 0]
    assert chosen.all()
    assert torch.equal(rollout.allowed, agent.world.allowed(rollout.states[:, :, :-1], 4))
    agent.update(None)
    policy = agent.policy()
    for actions in (policy(states), policy.sample(states, MemberRandom(MEMBERS))):
        assert allowed.gather(-1, actions[..., None]).all()
    one = policy.member(1)
    torch.testing.assert_close(one(states[:1])[0], policy(states)[1])


def test_a_penalty_is_paid_from_the_step_to_the_horizon():
    agent = make(True, optimiser="trpo", ood_mode="penalty", ood_penalty=7.0, discount=0.9,
                 horizon=5, reward_scale=2.0, reward_shift=-1.0)  # fmt: skip
    rollout = agent._simulate(agent.models[0])
    signals = agent._signals(rollout)[..., 0]
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
