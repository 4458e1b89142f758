"""BCQ-Lag against a plain reference, what reaches what, and the toy's known answer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saferl.agents.bcq_lag import BCQLag
from saferl.errors import SaferlError
from saferl.rng import MemberRandom
from saferl.safety.limits import convert

from .plain import (
    MEMBERS,
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

Z, K = 2 * A, 3
RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "vae_lr": 3e-2, "tau": 0.1}
SMALL = {"vae_hidden": [9, 9], "samples": K, "cost_limit": 2.0}


def make(members=MEMBERS, **settings):
    return make_any(BCQLag, members, **SMALL | settings)


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_updates_are_the_reference(float64, member):
    limits, gamma, gamma_c, phi, lam = (0.1, 3.0), 0.95, 0.9, 0.4, 0.7
    kp, ki, kd = 0.5, 0.2, 0.3
    agent = make(
        cost_limit=limits, discount=gamma, cost_discount=gamma_c, perturbation=phi, pessimism=lam,
        kl_weight=0.3, multiplier_kp=kp, multiplier_ki=ki, multiplier_kd=kd, **RATES,
    )  # fmt: skip
    budget = sum(limits[member] / T * gamma_c**t for t in range(T))
    perturbation = Net(agent.actor.perturbation.mlp, member)
    encoder, decoder = Net(agent.actor.vae.encoder, member), Net(agent.actor.vae.decoder, member)
    critics, costs = nets(agent.critic, member), nets(agent.cost_critic, member)
    target = perturbation.copy()
    critic_targets, cost_targets = [c.copy() for c in critics], [c.copy() for c in costs]
    vae_optimizer, actor_optimizer = adam(encoder, decoder, lr=3e-2), adam(perturbation, lr=1e-2)
    critic_optimizer, cost_optimizer = adam(*critics, lr=2e-2), adam(*costs, lr=2e-2)
    random = MemberRandom(MEMBERS, stream=1)

    def perturbed(net: Net, s: Tensor, eps: Tensor) -> Tensor:
        proposed = decoder(s, eps.clamp(-0.5, 0.5)).tanh().detach()
        return (proposed + phi * net(s, proposed).tanh()).clamp(-1, 1)

    integral = before = 0.0
    path = []
    for step in range(1, 7):
        batch = costly(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        s, a, r, s2 = own.observations, own.actions, own.rewards, own.next_observations

        heads = encoder(s, a)
        mu, sigma = heads[:, :Z], heads[:, Z:].clamp(-4, 15).exp()
        rebuilt = decoder(s, mu + sigma * random.normal(B, Z)[member]).tanh()
        kl = -0.5 * (1 + (sigma**2).log() - mu**2 - sigma**2)
        vae_loss = ((rebuilt - a) ** 2).mean() + 0.3 * kl.mean()
        descend(vae_optimizer, vae_loss)

        eps = random.normal(B * K, Z)[member].view(B, K, Z)
        y, y_cost = [], []
        for i in range(B):  # row by row, action by action
            values, spent = [], []
            for j in range(K):
                state = s2[i : i + 1]
                a2 = perturbed(target, state, eps[i, j][None])
                q = [t(state, a2).item() for t in critic_targets]
                groups = min(q[:2]), min(q[2:])
                values.append(lam * min(groups) + (1 - lam) * max(groups))
                q = [t(state, a2).item() for t in cost_targets]
                groups = max(q[:2]), max(q[2:])
                spent.append(lam * max(groups) + (1 - lam) * min(groups))
            not_done = 1 - own.terminals[i].item()
            y.append(r[i].item() + gamma * not_done * max(values))
            y_cost.append(own.costs[i].item() + gamma_c * not_done * max(spent))
        losses = {"vae_loss": vae_loss}
        for name, optimizer, ensemble, goal in (
            ("critic_loss", critic_optimizer, critics, torch.tensor(y)),
            ("cost_critic_loss", cost_optimizer, costs, torch.tensor(y_cost)),
        ):
            losses[name] = sum(((c(s, a)[:, 0] - goal) ** 2).mean() for c in ensemble)
            descend(optimizer, losses[name])

        p = perturbed(perturbation, s, random.normal(B, Z)[member])
        value = torch.cat([c(s, p) for c in critics], 1).min(1).values.mean()
        cost = torch.cat([c(s, p) for c in costs], 1).max(1).values.mean()
        e = cost.item() - budget
        integral = max(0.0, integral + e)
        kappa = max(0.0, kp * max(e, 0) + ki * integral + kd * max(e - before, 0))
        before = e
        path.append(kappa)
        losses["actor_loss"] = -value + kappa * (cost - budget)
        descend(actor_optimizer, losses["actor_loss"])
        target.follow(perturbation, 0.1)
        for old, net in zip(critic_targets + cost_targets, critics + costs):
            old.follow(net, 0.1)

        for name, loss in losses.items():
            torch.testing.assert_close(metrics[name][member], loss.detach())
        assert metrics["multiplier"][member].item() == pytest.approx(kappa, rel=1e-9, abs=1e-12)
        told = cost.item() / budget * limits[member]
        assert metrics["cost_estimate"][member].item() == pytest.approx(told, rel=1e-9)
        perturbation.assert_is(agent.actor.perturbation.mlp, member)
        target.assert_is(agent.perturbation_target.mlp, member)
        encoder.assert_is(agent.actor.vae.encoder, member)
        decoder.assert_is(agent.actor.vae.decoder, member)
        for e_ in range(4):
            critics[e_].assert_is(agent.critic.mlp, member, e_)
            costs[e_].assert_is(agent.cost_critic.mlp, member, e_)
            critic_targets[e_].assert_is(agent.critic_target.mlp, member, e_)
            cost_targets[e_].assert_is(agent.cost_critic_target.mlp, member, e_)
    assert max(path) > 0 or member == 1


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"cost_limit": 0.1}, {"cost_limit": 0.2}, {"actor.perturbation"}),
        ({"multiplier_kp": 0.1}, {"multiplier_kp": 1.0}, {"actor.perturbation"}),
        ({"multiplier_ki": 0.1}, {"multiplier_ki": 1.0}, {"actor.perturbation"}),
        ({"multiplier_kd": 0.1}, {"multiplier_kd": 1.0}, {"actor.perturbation"}),
        ({"cost_discount": 0.9}, {"cost_discount": 0.5}, {"cost_critic.mlp"}),
        ({"discount": 0.9}, {"discount": 0.5}, {"critic.mlp"}),
        ({"kl_weight": 0.5}, {"kl_weight": 5.0}, {"actor.vae"}),
        ({"pessimism": 0.75}, {"pessimism": 0.0}, {"critic.mlp", "cost_critic.mlp"}),
        ({"tau": 0.1}, {"tau": 0.2}, set()),
    ],
)
def test_coefficients_reach(before, after, reached):
    """In the first update. The actor is stepped last, so what moves a critic may reach it too."""
    agents = []
    for settings in (before, after):
        agent = make(**{"cost_limit": 0.1, "multiplier_ki": 0.1, "critic_lr": 0.05} | settings)
        with torch.no_grad():
            for ensemble in (agent.cost_critic, agent.cost_critic_target):
                ensemble.mlp.biases[-1] += 1.0  # above the limit: the price is not 0
        agent.update(costly(agent))
        agents.append(agent)
    found = differing(*agents)
    assert reached <= found
    assert found - reached <= ({"actor.perturbation"} if reached else set())


def test_the_price_rises_while_costs_are_above_the_limit_and_falls_below():
    prices = {}
    for limit in (0.5, 1000.0):
        agent = make(cost_limit=limit, multiplier_kd=0.0, **RATES)
        agent.multipliers.integral.fill_(5.0)
        prices[limit] = [agent.update(costly(agent, i))["multiplier"] for i in range(20)]
    above, below = ([float(p[0]) for p in prices[limit]] for limit in (0.5, 1000.0))
    assert above[-1] > above[10] > 0.003 * 5
    assert below[-1] == 0


def test_costs_are_pessimistic():
    """A cost network made dearer raises the target and the estimate; one made cheaper does not."""
    agents = [make() for _ in range(3)]
    batch = costly(agents[0])
    for agent, shift in zip(agents, (0.0, 5.0, -5.0)):
        with torch.no_grad():
            for ensemble in (agent.cost_critic, agent.cost_critic_target):
                ensemble.mlp.biases[-1][:, 0] += shift
    targets = [agent.backups(batch, batch.costs)[1] for agent in agents]
    estimates = [agent.update(batch)["cost_estimate"] for agent in agents]
    open_ended = batch.terminals == 0
    assert (targets[1] > targets[0] + 2)[open_ended].all()
    assert (targets[2] > targets[0] - 2)[open_ended].all()
    assert (estimates[1] > estimates[0] + 2).all() and (estimates[2] > estimates[0] - 2).all()


def test_only_terminals_end_the_looking_ahead():
    terminal, timeout = ends(BCQLag)
    for batch, looks in ((terminal, False), (timeout, True)):
        one, two = make(), make()
        here, there = one.backups(batch, batch.costs), two.backups(elsewhere(batch), batch.costs)
        for x, y, now in zip(here, there, (batch.rewards, batch.costs)):
            assert torch.equal(x, y) != looks
            assert torch.equal(x, now) != looks


def test_a_constant_action_is_acted():
    """To what the perturbation may move."""
    agent, _ = trained(BCQLag, constant(0.8), 100, vae_hidden=[24, 24], samples=2, vae_lr=8e-3)
    actions = actions_of(agent.policy())
    assert (actions - 0.8).abs().mean() < 0.05 + 0.03
    assert agent.policy().actor.mode(torch.zeros(1, 4, 1)).shape == (1, 4, 1)


def test_samples_stay_within_reach_of_the_prior():
    agent = make()
    s = costly(agent, rows=50).observations
    one, two = (agent.actor.sample(s, MemberRandom((seed, seed))) for seed in (1, 2))
    assert not torch.equal(one, two) and one.abs().max() <= 1
    bound = 0.5 * torch.ones(len(MEMBERS), 50, Z)
    torch.testing.assert_close(agent.actor.act(s, 9 * bound), agent.actor.act(s, bound))


def test_limits_are_kept_side_by_side():
    limits = [0.5, 2.0]
    agent, metrics = trained(
        BCQLag, toy(60), 260, (5, 5), vae_hidden=[16, 16], samples=2, perturbation=1.0,
        discount=0.5, cost_discount=0.5, cost_limit=limits, tau=0.05, critic_lr=3e-3, actor_lr=2e-3,
        multiplier_kp=2.0, multiplier_ki=0.05,
    )  # fmt: skip
    actions = actions_of(agent.policy())
    spent = (10 * actions.relu().square()).mean(1)
    assert (spent <= 1.2 * torch.tensor(limits)).all(), spent
    assert (spent >= 0.3 * torch.tensor(limits)).all(), spent
    assert (actions.mean(1).diff() > 0).all(), actions.mean(1)
    assert metrics["multiplier"][0] > metrics["multiplier"][1] > 0


def test_the_budget_is_the_one_conversion():
    agent = make(cost_limit=[1.0, 20.0], cost_discount=[0.9, 0.99])
    expected = [
        convert(limit, "discounted", horizon=T, discount=g) for limit, g in ((1, 0.9), (20, 0.99))
    ]
    assert agent.budget.tolist() == pytest.approx(expected)
    lines = []
    agent.fit(toy(2), lines.append)
    assert len(lines) == 2 and lines[0].startswith("cost limit: 1 per episode of 20 steps = 0.05")


def test_bad_input():
    with pytest.raises(SaferlError, match=r"toy has no costs: .*with_costs"):
        BCQLag.prepare(bare(toy(2)), BCQLag.make_config({}))
    agent = make()
    with pytest.raises(SaferlError, match="the batch has no costs"):
        agent.update(costly(agent)._replace(costs=None))
    for bad in (-1.0, math.nan, math.inf, [5.0, -1.0]):
        with pytest.raises(SaferlError, match="a cost limit is a number of 0 or more per episode"):
            make(cost_limit=bad)
    with pytest.raises(SaferlError, match="needs the number of steps of an episode"):
        make_any(BCQLag, horizon=0)
    with pytest.raises(SaferlError, match="cost_discount lies between 0 and below 1, got 1"):
        make(cost_discount=1.0)
