"""CAPS against a plain reference, and limits that are chosen after training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saferl.agents.caps import CAPS, tracked
from saferl.errors import SaferlError
from saferl.rng import MemberRandom
from saferl.safety.limits import convert
from saferl.spec import Spec

from .plain import (
    MEMBERS,
    OBS,
    A,
    B,
    Net,
    T,
    actions_of,
    adam,
    bare,
    constant,
    costly,
    descend,
    differing,
    elsewhere,
    ends,
    member_of,
    nets,
    toy,
    trained,
)
from .plain import make as make_any

RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "value_lr": 3e-2, "tau": 0.1}


def make(members=MEMBERS, **settings):
    return make_any(CAPS, members, **settings)


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize("heads", [2, 4])
def test_updates_are_the_reference(float64, member, heads):
    gamma, gamma_c, clip = 0.95, 0.9, 0.9 if heads == 2 else 100.0
    agent = make(
        heads=heads, discount=gamma, cost_discount=gamma_c, expectile=0.8, cost_expectile=0.6,
        beta=2.0, cost_beta=1.5, advantage_clip=clip, actor_decay_steps=10, **RATES,
    )  # fmt: skip
    trunk, value, cost_value = (
        Net(x.mlp, member) for x in (agent.actor.heads, agent.value, agent.cost_value)
    )
    log_std = torch.zeros(heads, A, requires_grad=True)
    critics, costs = nets(agent.actor.critic, member), nets(agent.actor.cost_critic, member)
    critic_targets, cost_targets = [c.copy() for c in critics], [c.copy() for c in costs]
    actor_optimizer = adam(trunk, log_std, lr=1e-2)
    critic_optimizer, cost_optimizer = adam(*critics, lr=2e-2), adam(*costs, lr=2e-2)
    value_optimizer, cost_value_optimizer = adam(value, lr=3e-2), adam(cost_value, lr=3e-2)

    def regress(u: Tensor, eta: float) -> Tensor:
        return sum((eta if x > 0 else 1 - eta) * x**2 for x in u) / B

    clipped, signs = 0, set()
    for step in range(5):
        batch = costly(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        s, a, s2 = own.observations, own.actions, own.next_observations
        not_done = 1 - own.terminals
        y = (own.rewards + gamma * not_done * value(s2)[:, 0]).detach()
        y_cost = (own.costs + gamma_c * not_done * cost_value(s2)[:, 0]).detach()

        earned = torch.minimum(*(t(s, a)[:, 0] for t in critic_targets))
        spent = torch.maximum(*(t(s, a)[:, 0] for t in cost_targets))
        advantage, saving = earned - value(s)[:, 0], cost_value(s)[:, 0] - spent
        signs |= {bool(x > 0) for x in (*advantage, *saving)}
        losses = {
            "value_loss": regress(advantage, 0.8), "cost_value_loss": regress(saving, 0.6),
        }  # fmt: skip
        descend(value_optimizer, losses["value_loss"])
        descend(cost_value_optimizer, losses["cost_value_loss"])
        for name, optimizer, ensemble, goal in (
            ("critic_loss", critic_optimizer, critics, y),
            ("cost_critic_loss", cost_optimizer, costs, y_cost),
        ):
            losses[name] = sum(((c(s, a)[:, 0] - goal) ** 2).mean() for c in ensemble) / 2
            descend(optimizer, losses[name])

        w_r = [math.exp(2.0 * x.item()) for x in advantage]
        w_c = [math.exp(1.5 * x.item()) for x in saving]
        clipped += sum(w > clip for w in w_r + w_c)
        means = trunk(s).tanh().view(B, heads, A)
        total = 0.0
        for i in range(heads):
            density = torch.distributions.Normal(means[:, i], log_std[i].exp()).log_prob(a).sum(1)
            for row in range(B):
                wr, wc = min(w_r[row], clip), min(w_c[row], clip)
                share = {0: wr, heads - 1: wc}.get(i, wr + wc * i / ((heads - 1) / 2))
                total = total - share * density[row] / B / heads
        losses["actor_loss"] = total
        for group in actor_optimizer.param_groups:
            group["lr"] = 0.5e-2 * (1 + math.cos(math.pi * step / 10))
        descend(actor_optimizer, total)
        for old, net in zip(critic_targets + cost_targets, critics + costs):
            old.follow(net, 0.1)

        for name, loss in losses.items():
            torch.testing.assert_close(metrics[name][member], loss.detach())
        for (weight, bias), mine, offset in zip(
            trunk.layers, agent.actor.heads.mlp.weights, agent.actor.heads.mlp.biases
        ):  # the agent's rate is in float64 too, but was rounded on its way
            torch.testing.assert_close(mine[member, 0].T, weight, rtol=1e-6, atol=1e-8)
            torch.testing.assert_close(offset[member, 0, 0], bias, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(agent.actor.heads.log_std[member, 0], log_std, rtol=1e-6,
                                   atol=1e-8)  # fmt: skip
        value.assert_is(agent.value.mlp, member)
        cost_value.assert_is(agent.cost_value.mlp, member)
        for e in range(2):
            critics[e].assert_is(agent.actor.critic.mlp, member, e)
            costs[e].assert_is(agent.actor.cost_critic.mlp, member, e)
            critic_targets[e].assert_is(agent.critic_target.mlp, member, e)
            cost_targets[e].assert_is(agent.cost_critic_target.mlp, member, e)
    assert (clipped > 0) == (clip == 0.9) and signs == {True, False}


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"beta": 3.0}, {"beta": 1.0}, {"actor.heads"}),
        ({"cost_beta": 3.0}, {"cost_beta": 1.0}, {"actor.heads"}),
        ({"advantage_clip": 100.0}, {"advantage_clip": 0.5}, {"actor.heads"}),
        ({"expectile": 0.7}, {"expectile": 0.9}, {"value.mlp"}),
        ({"cost_expectile": 0.7}, {"cost_expectile": 0.9}, {"cost_value.mlp"}),
        ({"discount": 0.9}, {"discount": 0.5}, {"actor.critic"}),
        ({"cost_discount": 0.9}, {"cost_discount": 0.5}, {"actor.cost_critic"}),
        ({"tau": 0.1}, {"tau": 0.2}, set()),
        ({"cost_limit": 0.1}, {"cost_limit": 9.0}, set()),
    ],
)
def test_coefficients_reach(before, after, reached):
    agents = [make(**settings) for settings in (before, after)]
    for agent in agents:
        agent.update(costly(agent))
    assert differing(*agents) == reached


def test_only_terminals_end_the_looking_ahead():
    terminal, timeout = ends(CAPS)
    for batch, looks in ((terminal, False), (timeout, True)):
        one, two = make(), make()
        one.update(batch)
        two.update(elsewhere(batch))
        assert differing(one, two) == ({"actor.critic", "actor.cost_critic"} if looks else set())


# The choice between heads ------------------------------------------------------------------------


def test_the_rule():
    """Of the heads within what is allowed the one of largest Q, else the one of least Qc."""
    limits = (0.1, 1.0)
    agent = make(heads=3, cost_limit=limits)
    with torch.no_grad():
        for weight in (*agent.actor.cost_critic.mlp.weights, *agent.actor.heads.mlp.weights):
            weight *= 2  # so that all heads, some or none are within
    policy = agent.policy()
    s = costly(agent, rows=40).observations
    actions = agent.actor.heads(s).detach()
    taken, counts, chosen = policy(s), set(), set()
    for m, limit in enumerate(limits):
        d = convert(limit, "discounted", horizon=T, discount=0.99)
        critics, costs = nets(agent.actor.critic, m), nets(agent.actor.cost_critic, m)
        for i in range(40):
            pairs = [(s[m, i], action) for action in actions[m, i]]
            q = [min(net(*pair).item() for net in critics) for pair in pairs]
            cost = [max(net(*pair).item() for net in costs) for pair in pairs]
            within = [h for h in range(3) if cost[h] < d]
            best = max(within, key=lambda h: q[h]) if within else int(np.argmin(cost))
            assert torch.equal(taken[m, i], actions[m, i, best])
            counts.add(len(within))
            chosen.add(best)
    assert counts >= {0, 3} and counts & {1, 2} and chosen == {0, 1, 2}


@pytest.fixture(scope="module")
def learner():
    """A CAPS agent of two members trained once on the toy, without any limit."""
    agent, _ = trained(
        CAPS, toy(60), 220, (5, 6), heads=2, discount=0.5, cost_discount=0.5, cost_beta=10.0,
        beta=10.0, actor_lr=3e-3, critic_lr=3e-3, value_lr=3e-3, tau=0.05, actor_decay_steps=0,
    )  # fmt: skip
    return agent


def test_one_training_serves_many_limits(learner):
    """The heads earn much and spend nothing; which acts depends on the limit asked for later."""
    assert math.isinf(learner.config.cost_limit)
    before = {k: v.clone() for k, v in learner.state_dict().items()}
    unlimited = actions_of(learner.policy())
    assert (unlimited.mean(1) > 0.4).all(), unlimited.mean(1)
    spent = []
    for limit in (0.0, 0.2, 1.0, 10.0, math.inf):
        actions = actions_of(learner.policy_for(limit))
        spent.append((10 * actions.relu().square()).mean(1))
    spent = torch.stack(spent)
    assert (spent.diff(dim=0) >= 0).all(), spent
    assert (spent[0] < 0.2).all() and (spent[-1] > 2).all(), spent
    assert torch.equal(actions, unlimited)
    # Members may be asked for different limits, and the agent itself is as it was.
    both = actions_of(learner.policy_for([0.0, 10.0])).mean(1)
    assert both[0] < 0.2 < 0.4 < both[1]
    after = learner.state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())


def test_a_limit_in_the_configuration_is_that_of_the_policy(learner):
    config = CAPS.make_config({"hidden": [24, 24], "cost_discount": 0.5, "cost_limit": [0.0, 10.0]})
    agent = CAPS(learner.spec, config, 2)
    state = learner.state_dict()
    agent.load_state_dict(state | {"actor.allowed": agent.actor.allowed.data})
    expected = actions_of(learner.policy_for([0.0, 10.0]))
    assert torch.equal(actions_of(agent.policy()), expected)
    member = agent.policy().member(1)  # the limit goes with its member
    assert torch.equal(actions_of(member)[0], expected[1])


def play(act, observe, steps: int = 10) -> np.ndarray:
    """Costs of the steps of one episode of the toy."""
    rng, costs = np.random.default_rng(1), []
    for t in range(steps):
        action = float(act(rng.normal(size=1).astype(np.float32))[0])
        costs.append(max(action, 0) ** 2)
        observe(costs[-1], t == steps - 1)
    return np.array(costs)


def test_the_tracked_policy_spends_its_budget_and_stops(learner):
    policy = learner.policy().member(1)
    free = play(lambda s: policy(torch.from_numpy(s)[None, None])[0, 0], lambda *_: None)
    totals = []
    for limit in (0.0, 1.0, 2.0, 1000.0):
        guard = tracked(policy, limit)
        guard.reset()
        costs = play(guard, guard.observe)
        totals.append(costs.sum())
        assert costs.sum() <= limit + costs.max() + 1e-6  # no more than one step beyond
        assert guard.remaining[0] == pytest.approx(limit - costs.sum(), abs=1e-6)
    assert (np.diff(totals) > 0).all(), totals
    assert totals[-1] == pytest.approx(free.sum(), rel=1e-5)
    assert totals[2] > 0.5 * 2.0  # it does not stop long before


def test_the_tracked_rule_is_caps_s(float64):
    """Qc of both heads against b (1 - γⁿ) / ((1 - γ) n), step by step, in raw units."""
    spec = Spec(OBS, A, False, (-2.0, 0.0), (2.0, 10.0), (0.5,) * OBS, (2.0,) * OBS, horizon=6)
    agent = CAPS(spec, CAPS.make_config({"hidden": [8, 8], "heads": 3}), MEMBERS)
    with torch.no_grad():
        agent.actor.cost_critic.mlp.biases[-1] += 1.0
        for weight in agent.actor.cost_critic.mlp.weights:
            weight *= 2
    agent.actor.float()
    policy = agent.policy().float().member(0)
    guard = tracked(policy, 6.0)
    guard.reset()
    rng = np.random.default_rng(0)
    left, taken = 6.0, set()
    for t in range(6):
        s = rng.normal(size=OBS).astype(np.float32)
        action = guard(s)
        rows = ((torch.from_numpy(s) - 0.5) / 2)[None, None]
        with torch.no_grad():
            heads = policy.actor.heads(rows)[0, 0]
            q = [policy.actor.critic(rows, h[None, None]).min().item() for h in heads]
            cost = [policy.actor.cost_critic(rows, h[None, None]).max().item() for h in heads]
        n = 6 - t
        allowed = left * sum(0.99**i for i in range(n)) / n
        within = [h for h in range(3) if cost[h] < allowed]
        chosen = max(within, key=lambda h: q[h]) if within else int(np.argmin(cost))
        raw = heads[chosen].numpy() * [2.0, 5.0] + [0.0, 5.0]
        assert action == pytest.approx(raw, abs=1e-5)
        taken.add(bool(within))
        guard.observe(2.5, t == 5)
        left -= 2.5
    assert taken == {True, False}


def test_a_constant_action_is_acted():
    agent, _ = trained(CAPS, constant(0.8), 90, actor_lr=6e-3, actor_decay_steps=0)
    assert (actions_of(agent.policy()) - 0.8).abs().mean() < 0.03
    states = torch.zeros(1, 500, 1)
    with torch.no_grad():
        agent.actor.heads.log_std.fill_(-3.0)
    drawn = agent.policy().sample(states, MemberRandom((1,)))
    assert drawn.std() == pytest.approx(math.exp(-3), rel=0.15)
    assert (drawn.mean() - agent.policy()(states).mean()).abs() < 0.01


def test_bad_input(learner):
    with pytest.raises(SaferlError, match=r"caps learns what actions cost but toy has no costs"):
        CAPS.prepare(bare(toy(2)), CAPS.make_config({}))
    agent = make()
    with pytest.raises(SaferlError, match="the batch has no costs"):
        agent.update(costly(agent)._replace(costs=None))
    for bad in (-1.0, math.nan):
        with pytest.raises(SaferlError, match="a cost limit is a number of 0 or more per episode"):
            agent.policy_for(bad)
    with pytest.raises(SaferlError, match="cost_limit has 3 values for 2 members"):
        agent.policy_for([1.0, 2.0, 3.0])
    with pytest.raises(SaferlError, match="needs the number of steps of an episode"):
        make_any(CAPS, horizon=0).policy_for(5.0)
    with pytest.raises(SaferlError, match="caps needs 2 heads or more, got 1"):
        make(heads=1)
    with pytest.raises(SaferlError, match="cost_discount lies between 0 and below 1, got 1"):
        make(cost_discount=1.0)
    with pytest.raises(SaferlError, match="the policy has 2 members"):
        tracked(agent.policy(), 5.0)
    with pytest.raises(SaferlError, match="needs a policy of the agent caps"):
        tracked(lambda s: s, 5.0)
