"""COptiDICE against a plain reference, what reaches what, and the toy's known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saferl.agents.coptidice import COptiDICE, input_gradient
from saferl.errors import SaferlError
from saferl.nn import MLP
from saferl.rng import MemberRandom

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
    toy,
    trained,
    walk,
)
from .plain import make as make_any


def silent(line: str) -> None:
    pass


def make(members=MEMBERS, slope: float = 5.0, **settings):
    """An agent that has seen `walk`; ``slope`` makes ν and χ steep enough for their penalty."""
    agent = make_any(COptiDICE, members, **{"alpha": 0.5, "lr": 1e-2, "actor_lr": 1e-2} | settings)
    agent.fit(walk(), silent)
    with torch.no_grad():
        for network in (agent.nu, agent.chi):
            for weight in network.mlp.weights:
                weight *= slope
    return agent


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_updates_are_the_reference(float64, member):
    limits, gammas, alpha, eps, g, lr = (1.5, 40.0), (0.9, 0.95), 0.5, 0.02, 0.3, 1e-2
    agent = make(
        cost_limit=limits, discount=gammas, alpha=alpha, overestimation=eps, gradient_penalty=g
    )
    gamma = float(torch.tensor(gammas[member], dtype=torch.float32))
    starts = torch.from_numpy(walk().observations[::4].astype(np.float64))
    nu, chi, actor = (Net(x.mlp, member) for x in (agent.nu, agent.chi, agent.actor))
    log_lambda, log_tau = (torch.zeros((), requires_grad=True) for _ in range(2))
    optimizer = adam(nu, chi, log_lambda, log_tau, lr=lr)
    actor_optimizer = adam(actor, lr=1e-2)
    random = MemberRandom(MEMBERS, stream=1)

    def f(x: Tensor) -> Tensor:
        return x * (x.log() - 1) + 1 if x < 1 else 0.5 * (x - 1) ** 2

    def penalty(net: Net, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
        return ((slope.norm(dim=1) - 5).relu() ** 2).mean()

    sides, steep = set(), 0.0
    for step in range(1, 6):
        batch = costly(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        s, a, r, c, s2 = (
            own.observations, own.actions, own.rewards, own.costs, own.next_observations
        )  # fmt: skip
        s0 = starts[random.integers(len(starts), B)[member]]
        z = random.uniform(B, 1)[member]
        x = z * s0 + (1 - z) * s
        price, tau = log_lambda.exp(), log_tau.exp() + 1e-6

        ws, terms = [], []
        for i in range(B):
            ahead = 0.0 if own.terminals[i] else gamma * nu(s2[i])[0]
            e = r[i] - price.item() * c[i] + ahead - nu(s[i])[0]
            y = e / alpha
            sides.add(bool(y < 0))
            w = y.exp() if y < 0 else y + 1
            ws.append(w.item())
            terms.append(w * e - alpha * f(w))
        w = torch.tensor(ws)
        nu_loss = (1 - gamma) * nu(s0).mean() + sum(terms) / B

        ahead = gamma * (1 - own.terminals) * chi(s2)[:, 0]
        ell = (1 - gamma) * chi(s0)[:, 0] + w * (c + ahead - chi(s)[:, 0])
        u = B * (ell / tau.item()).softmax(0)
        kl = sum(x * math.log(x) for x in u.tolist() if x > 0) / B
        spent = sum(u[i].item() * w[i].item() * c[i].item() for i in range(B)) / B
        chi_loss = (u * ell).mean()
        penalties = penalty(nu, x) + penalty(chi, x)
        steep = max(steep, penalties.item())
        dual = tau * (eps - kl) + price * (limits[member] / T - spent)
        descend(optimizer, nu_loss + chi_loss + dual + g * penalties)

        heads = actor(s)
        mu, sigma = heads[:, :A], heads[:, A:].clamp(-5, 2).exp()
        clipped = a.clamp(-0.999, 0.999)
        gaussian = torch.distributions.Normal(mu, sigma)
        density = gaussian.log_prob(clipped.atanh()) - (1 - clipped**2).log()
        actor_loss = -(w * density.sum(1)).mean()
        descend(actor_optimizer, actor_loss)

        expected = {
            "nu_loss": nu_loss.item(), "chi_loss": chi_loss.item(),
            "actor_loss": actor_loss.item(), "lean": kl, "cost_estimate": spent * T,
            "multiplier": price.item(), "weight": w.mean().item(),
            "effective_share": (w.mean() ** 2 / (w**2).mean()).item(),
        }  # fmt: skip
        for name, number in expected.items():
            assert metrics[name][member].item() == pytest.approx(number, rel=1e-6), name
        pairs = ((nu, agent.nu.mlp), (chi, agent.chi.mlp), (actor, agent.actor.mlp))
        for net, mlp in pairs:
            for (weight, bias), mine, offset in zip(net.layers, mlp.weights, mlp.biases):
                # 1e-12 in the root of the penalty.
                torch.testing.assert_close(mine[member, 0].T, weight, rtol=1e-6, atol=1e-8)
                torch.testing.assert_close(offset[member, 0, 0], bias, rtol=1e-6, atol=1e-8)
        assert agent.log_lambda[member].item() == pytest.approx(log_lambda.item(), rel=1e-6)
        assert agent.log_tau[member].item() == pytest.approx(log_tau.item(), rel=1e-6)
    assert sides == {True, False} and steep > 0


def test_the_written_gradient_is_autograd_s(float64):
    mlp = MLP(MemberRandom(MEMBERS), (OBS, 8, 7, 1))
    x = torch.randn(2, 5, OBS, requires_grad=True)
    (expected,) = torch.autograd.grad(mlp(x).sum(), x)
    torch.testing.assert_close(input_gradient(mlp, x.detach()), expected)


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"alpha": 0.5}, {"alpha": 1.0}, {"nu.mlp", "chi.mlp", "actor.mlp", "log_lambda"}),
        ({"cost_limit": 1.0}, {"cost_limit": 2.0}, {"log_lambda"}),
        ({"overestimation": 0.01}, {"overestimation": 0.1}, {"log_tau"}),
        ({"gradient_penalty": 0.0}, {"gradient_penalty": 1.0}, {"nu.mlp", "chi.mlp"}),
        ({"discount": 0.9}, {"discount": 0.5}, {"nu.mlp", "chi.mlp", "actor.mlp", "log_lambda"}),
    ],
)
def test_coefficients_reach(before, after, reached):
    agents = [make(**settings) for settings in (before, after)]
    for agent in agents:
        agent.update(costly(agent))
    found = differing(*agents)
    assert reached <= found <= reached | {"log_tau"} if len(reached) > 2 else found == reached


def test_the_limit_reaches_the_policy_through_the_price():
    agents = [make(cost_limit=limit, lr=0.1) for limit in (0.0, 1000.0)]
    for i in range(2):
        for agent in agents:
            agent.update(costly(agent, i))
    assert {"nu.mlp", "actor.mlp"} <= differing(*agents)


@pytest.mark.parametrize(("limit", "sign"), [(0.1, 1), (1000.0, -1)])
def test_the_price_rises_while_data_cost_more_than_the_limit_and_falls_below(limit, sign):
    """With a large α every weight is 1 and the estimate is the data's own cost."""
    agent = make(cost_limit=limit, alpha=1e4, slope=1.0)
    prices = []
    for i in range(5):
        batch = costly(agent, i)
        metrics = agent.update(batch)
        prices.append(metrics["multiplier"])
        assert (metrics["weight"] - 1).abs().max() < 0.01
        mean = T * batch.costs.mean(-1)
        assert (metrics["cost_estimate"] >= 0.99 * mean).all()  # leans to the costly rows
    assert (sign * torch.stack(prices).diff(dim=0) > 0).all()


def test_the_limit_is_one_per_step():
    agent = make(cost_limit=[2.0, 5.0], discount=0.99)
    assert agent.allowed.tolist() == pytest.approx([2 / T, 5 / T])


def test_only_terminals_end_the_looking_ahead():
    terminal, timeout = ends(COptiDICE)
    for batch, looks in ((terminal, False), (timeout, True)):
        one, two = make(), make()
        one.update(batch)
        two.update(elsewhere(batch))
        assert ({"nu.mlp", "chi.mlp"} <= differing(one, two)) == looks
        assert bool(differing(one, two)) == looks


def test_starts_are_the_first_observations_of_episodes():
    dataset = walk()
    rows = dataset._arrays()
    cut = type(dataset)(**{name: array[:-2] for name, array in rows.items()}, card=dataset.card)
    assert cut.fragment == (28, 30)
    settings = COptiDICE.make_config({"hidden": [8, 8], "normalize_observations": True})
    spec = cut.spec(settings)
    agent = COptiDICE(spec, settings, MEMBERS)
    agent.fit(cut, silent)
    expected = torch.from_numpy(spec.observations(cut.observations[::4]))
    assert torch.equal(agent.starts.rows, expected) and len(expected) == 8
    drawn = agent.starts.sample(agent.random, 200)
    assert drawn.shape == (2, 200, OBS) and not torch.equal(drawn[0], drawn[1])
    assert len({tuple(row) for row in drawn[0].tolist()}) == 8


def test_starts_are_in_the_checkpoint():
    """A run resumes without `fit`, to the bit."""
    whole, first = make(), make()
    second = make_any(COptiDICE, alpha=0.5, lr=1e-2, actor_lr=1e-2)
    for i in range(6):
        whole.update(costly(whole, i))
    for i in range(3):
        first.update(costly(first, i))
    second.load_state_dict(first.state_dict())
    for i in range(3, 6):
        second.update(costly(second, i))
    for key, tensor in second.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[key]), key
        shared = key.startswith(tuple(COptiDICE.shared))
        assert shared == (key == "starts.rows")
        assert shared or not tensor.dim() or len(tensor) == len(MEMBERS), key


def test_a_constant_action_is_acted():
    """Fitted and executed on the same side of the tanh."""
    agent, _ = trained(COptiDICE, constant(0.8), 100, actor_lr=5e-3, alpha=1.0)
    assert (actions_of(agent.policy()) - 0.8).abs().max() < 0.03


def test_limits_are_kept_side_by_side():
    """The weighted data cost what the limit allows, and earn more the more it allows."""
    limits = [0.5, 1.0, 3.0]
    agent, metrics = trained(
        COptiDICE, toy(60), 240, (5, 5, 5), discount=0.5, alpha=0.1, lr=2e-2, actor_lr=3e-3,
        cost_limit=limits,
    )  # fmt: skip
    assert metrics["cost_estimate"].tolist() == pytest.approx(limits, rel=0.15)
    price = metrics["multiplier"]
    assert price[0] > price[1] > price[2]
    actions = actions_of(agent.policy()).mean(1)
    assert (actions.diff() > 0.03).all(), actions
    assert (10 * actions.relu().square() <= 1.1 * torch.tensor(limits)).all(), actions


def test_bad_input():
    with pytest.raises(SaferlError, match=r"toy has no costs: .*with_costs"):
        COptiDICE.prepare(bare(toy(2)), COptiDICE.make_config({}))
    agent = make_any(COptiDICE)
    with pytest.raises(SaferlError, match=r"first observations .* call agent\.fit"):
        agent.update(costly(agent))
    with pytest.raises(SaferlError, match="the batch has no costs"):
        agent.update(costly(agent)._replace(costs=None))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(SaferlError, match="a cost limit is a number of 0 or more per episode"):
            make(cost_limit=bad)
    with pytest.raises(SaferlError, match="needs the number of steps of an episode"):
        make_any(COptiDICE, horizon=0)
    with pytest.raises(SaferlError, match="discount lies between 0 and below 1, got 1"):
        make(discount=1.0)
    with pytest.raises(SaferlError, match="alpha is a number above 0, got 0"):
        make(alpha=0.0)
