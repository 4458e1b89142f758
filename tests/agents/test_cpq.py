"""CPQ against a plain reference, what reaches what, and the toy's known answer."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from saferl.agents.cpq import CPQ
from saferl.data import Dataset
from saferl.errors import SaferlError
from saferl.rng import MemberRandom

from .plain import (
    MEMBERS,
    A,
    B,
    Net,
    T,
    adam,
    bare,
    costly,
    descend,
    differing,
    elsewhere,
    ends,
    gradients_by_part,
    member_of,
    nets,
    toy,
    trained,
)
from .plain import make as make_any

Z, N = 2 * A, 3
RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "vae_lr": 3e-2, "tau": 0.1}
SMALL = {"vae_hidden": [9, 9], "samples": N, "cost_limit": 2.0}


def make(members=MEMBERS, **settings):
    """Policies wide enough for their actions to differ."""
    agent = make_any(CPQ, members, **SMALL | settings)
    with torch.no_grad():
        for weight in (*agent.actor.mlp.weights, *agent.vae.encoder.weights):
            weight *= 2
    return agent


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_updates_are_the_reference(float64, member):
    limits, gamma, gamma_c, omega, theta, alpha_lr = (0.5, 1.5), 0.95, 0.9, 0.6, 1.4, 0.3
    alphas = (0.8, 1.3)
    agent = make(
        cost_limit=limits, discount=gamma, cost_discount=gamma_c, alpha=alphas, alpha_lr=alpha_lr,
        ood_quantile=omega, ood_cost=theta, kl_weight=0.3, **RATES,
    )  # fmt: skip
    budget = sum(limits[member] / T * gamma_c**t for t in range(T))
    actor = Net(agent.actor.mlp, member)
    encoder, decoder = Net(agent.vae.encoder, member), Net(agent.vae.decoder, member)
    critics, costs = nets(agent.critic, member), nets(agent.cost_critic.online, member)
    critic_targets, cost_targets = [c.copy() for c in critics], [c.copy() for c in costs]
    actor_optimizer, vae_optimizer = adam(actor, lr=1e-2), adam(encoder, decoder, lr=3e-2)
    critic_optimizer, cost_optimizer = adam(*critics, lr=2e-2), adam(*costs, lr=2e-2)
    random = MemberRandom(MEMBERS, stream=1)
    log_alpha = math.log(alphas[member])

    def draw(s: Tensor, noise: Tensor) -> Tensor:
        heads = actor(s)
        return (heads[:, :A] + heads[:, A:].clamp(-20, 2).exp() * noise).tanh()

    def latent(s: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        heads = encoder(s, a)
        return heads[:, :Z], heads[:, Z:].clamp(-4, 15).exp()

    def divergence(mu: Tensor, sigma: Tensor) -> Tensor:
        normal = torch.distributions.Normal
        return torch.distributions.kl_divergence(normal(mu, sigma), normal(0.0, 1.0))

    indicators, alpha_path = set(), []
    for step in range(1, 7):
        batch = costly(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        s, a, s2 = own.observations, own.actions, own.next_observations

        mu, sigma = latent(s, a)
        rebuilt = decoder(s, mu + sigma * random.normal(B, Z)[member]).tanh()
        vae_loss = ((rebuilt - a) ** 2).mean() + 0.3 * divergence(mu, sigma).mean()
        descend(vae_optimizer, vae_loss)

        a2 = draw(s2, random.normal(B, A)[member]).detach()
        y, y_cost = [], []
        for i in range(B):
            row = s2[i : i + 1], a2[i : i + 1]
            dear = max(t(*row).item() for t in cost_targets)
            indicators.add(dear <= budget)
            value = min(t(*row).item() for t in critic_targets) if dear <= budget else 0.0
            not_done = 1 - own.terminals[i].item()
            y.append(own.rewards[i].item() + gamma * not_done * value)
            y_cost.append(own.costs[i].item() + gamma_c * not_done * dear)
        critic_loss = sum(((c(s, a)[:, 0] - torch.tensor(y)) ** 2).mean() for c in critics)
        descend(critic_optimizer, critic_loss)

        noise = random.normal(B * N, A)[member].view(B, N, A)
        rows = s[:, None].expand(B, N, -1).reshape(B * N, -1)
        drawn = draw(rows, noise.reshape(B * N, A)).detach()
        assert drawn.abs().max() <= 1
        d = divergence(*latent(rows, drawn)).sum(1).detach()
        chosen = torch.from_numpy(d.numpy() >= np.quantile(d.numpy(), omega))
        assert 0 < chosen.sum() < B * N
        means = [c(rows[chosen], drawn[chosen]).mean() for c in costs]
        alpha = math.exp(log_alpha)
        error = sum(((c(s, a)[:, 0] - torch.tensor(y_cost)) ** 2).mean() for c in costs)
        descend(cost_optimizer, error - alpha * sum(h - theta * budget for h in means))
        h = sum(m.item() for m in means) / 2
        log_alpha = min(5.0, max(-5.0, log_alpha + alpha_lr * alpha * (theta * budget - h)))
        alpha_path.append(log_alpha)

        p = draw(s, random.normal(B, A)[member])
        safe = [max(c(s, p)[i].item() for c in costs) <= budget for i in range(B)]
        indicators |= set(safe)
        value = torch.cat([c(s, p) for c in critics], 1).min(1).values
        actor_loss = -sum(safe[i] * value[i] for i in range(B)) / B
        descend(actor_optimizer, actor_loss + 0 * value.sum())
        for old, net in zip(critic_targets + cost_targets, critics + costs):
            old.follow(net, 0.1)

        losses = {"vae_loss": vae_loss, "critic_loss": critic_loss, "cost_critic_loss": error}
        for name, loss in losses.items():
            torch.testing.assert_close(metrics[name][member], loss.detach())
        assert float(metrics["actor_loss"][member]) == pytest.approx(actor_loss.item(), abs=1e-12)
        assert float(agent.log_alpha[member]) == pytest.approx(log_alpha, rel=1e-9)
        assert float(metrics["safe_share"][member]) == pytest.approx(sum(safe) / B)
        told = h / budget * limits[member]
        assert float(metrics["ood_cost"][member]) == pytest.approx(told, rel=1e-9)
        actor.assert_is(agent.actor.mlp, member)
        encoder.assert_is(agent.vae.encoder, member)
        decoder.assert_is(agent.vae.decoder, member)
        for e in range(2):
            critics[e].assert_is(agent.critic.mlp, member, e)
            costs[e].assert_is(agent.cost_critic.online.mlp, member, e)
            critic_targets[e].assert_is(agent.critic_target.mlp, member, e)
            cost_targets[e].assert_is(agent.cost_critic.target.mlp, member, e)
    assert indicators == {True, False}
    assert len(set(alpha_path)) == 6


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"alpha": 1.0}, {"alpha": 100.0}, "cost_critic.online"),
        ({"ood_quantile": 0.2}, {"ood_quantile": 0.9}, "cost_critic.online"),
        ({"cost_discount": 0.9}, {"cost_discount": 0.5}, "cost_critic.online"),
        ({"discount": 0.9}, {"discount": 0.5}, "critic.mlp"),
        ({"cost_limit": 100.0}, {"cost_limit": 0.0}, "critic.mlp"),
        ({"cost_limit": 100.0}, {"cost_limit": 0.0}, "actor.mlp"),
        ({"kl_weight": 0.5}, {"kl_weight": 5.0}, "vae.encoder"),
    ],
)
def test_coefficients_reach(before, after, reached):
    agents = [make(**settings, **RATES) for settings in (before, after)]
    for agent in agents:
        agent.update(costly(agent))
    assert reached in differing(*agents)


def test_the_goal_moves_alpha_and_nothing_else_at_first():
    """θ q is a constant in the critic's loss; through α it reaches the next update."""
    agents = [make(ood_cost=theta, alpha_lr=0.1, **RATES) for theta in (1.0, 3.0)]
    for agent in agents:
        agent.update(costly(agent))
    assert differing(*agents) == set()
    assert (agents[1].log_alpha > agents[0].log_alpha).all()
    for agent in agents:
        agent.update(costly(agent, 1))
    assert "cost_critic.online" in differing(*agents)


def test_alpha_pushes_the_cost_of_unlike_actions_up_until_it_is_the_goal():
    """α rises while the mean is below θ q, falls above it, and its bounds hold."""
    low, high = make(alpha_lr=0.1), make(alpha_lr=0.1)
    with torch.no_grad():
        high.cost_critic.online.mlp.biases[-1] += 50
    for agent, sign in ((low, 1), (high, -1)):
        metrics = agent.update(costly(agent))
        assert torch.equal(metrics["alpha"], torch.ones(2))
        assert (sign * agent.log_alpha > 0).all()
    with torch.no_grad():
        high.cost_critic.online.mlp.biases[-1] += 1e6
    high.update(costly(high))
    assert torch.equal(high.log_alpha, torch.full((2,), -5.0))
    # The critic's own descent direction raises h: with α = e⁵ nothing else is left in it.
    agent = make(alpha=math.exp(5), **RATES | {"critic_lr": 1e-3})
    batch = costly(agent)
    state = agent.random.state_dict()
    s = batch.observations
    before = agent.update(batch)["ood_cost"]
    actions, unlike = agent.unlike(s)
    agent.random.load_state_dict(state)
    for _ in range(5):
        after = agent.update(batch)["ood_cost"]
    assert (after > before).all()
    assert actions.shape == (2, B, N, A) and unlike.shape == (2, B, N)
    assert actions.abs().max() <= 1


def test_an_update_without_a_safe_action_leaves_the_policy():
    agent = make(cost_limit=0.0)
    with torch.no_grad():
        agent.cost_critic.online.mlp.biases[-1] += 50
    assert not agent.update(costly(agent))["safe_share"].any()
    assert not any(g.any() for g in gradients_by_part(agent)["actor.mlp"])


def test_only_terminals_end_the_looking_ahead():
    terminal, timeout = ends(CPQ)
    for batch, looks in ((terminal, False), (timeout, True)):
        one, two = make(cost_limit=100.0), make(cost_limit=100.0)
        one.update(batch)
        two.update(elsewhere(batch))
        found = differing(one, two)
        assert ({"critic.mlp", "cost_critic.online"} <= found) == looks
        assert bool(found) == looks


def road() -> Dataset:
    """The state is the last action; a step earns (a + 1) / 2 and costs what the state does.

    That is 2 relu(s) per step. Without looking ahead for costs (γ_c = 0) Qc is that number, the
    budget is L / 10, and a next state is too costly where a > L / 20: then nothing is earned after
    it. With γ near 1 the best action is L / 20.
    """
    rng = np.random.default_rng(0)
    n = 1200
    a = rng.uniform(-1, 1, (n, 1))
    s = np.vstack([[[0.0]], a[:-1]])
    return Dataset.from_arrays(
        s, a, (a[:, 0] + 1) / 2, np.zeros(n), np.arange(n) % 10 == 9, a, horizon=10, id="road",
        costs=2 * np.maximum(s[:, 0], 0), action_low=(-1.0,), action_high=(1.0,),
    )  # fmt: skip


def test_the_penalised_backup_keeps_each_member_on_its_own_side():
    limits = torch.tensor([8.0, 14.0, 1000.0])
    agent, _ = trained(
        CPQ, road(), 200, (5, 5, 5), vae_hidden=[16, 16], samples=2, alpha=0.01, alpha_lr=0.0,
        discount=0.9, cost_discount=0.0, cost_limit=limits.tolist(), tau=0.05, critic_lr=1e-2,
        actor_lr=2e-3,
    )  # fmt: skip
    states = torch.linspace(-0.9, 0, 10).view(1, -1, 1).expand(3, -1, -1)  # which cost nothing
    actions = agent.policy()(states)[..., 0].mean(1)
    best = (limits / 20)[:2]
    assert (actions[:2] < best + 0.05).all() and (actions[:2] > 0).all(), actions
    assert actions[2] > 0.9 and actions[1] > actions[0] + 0.1, actions


def test_what_is_optimised_is_what_is_executed():
    """tanh of the mean, where the draws that the losses see are when they do not vary."""
    agent = make()
    s = costly(agent).observations
    for m in range(len(MEMBERS)):
        expected = Net(agent.actor.mlp, m)(s[m])[:, :A].tanh()
        torch.testing.assert_close(agent.policy()(s)[m], expected.detach())
    with torch.no_grad():
        agent.actor.mlp.biases[-1][..., A:] -= 50  # log σ
    torch.testing.assert_close(agent.actor.sample(s, agent.random), agent.policy()(s))


def test_what_is_told_before_training():
    lines = []
    make_any(CPQ, cost_limit=[5.0, 10.0]).fit(toy(2, reward=lambda a: a), lines.append)
    assert [line.split(" per")[0] for line in lines[:2]] == ["cost limit: 5", "cost limit: 10"]
    assert len(lines) == 3 and lines[2].startswith("warning: training rewards go down to -0.")
    lines.clear()
    make_any(CPQ).fit(toy(2), lines.append)
    assert len(lines) == 1


def test_bad_input():
    with pytest.raises(SaferlError, match=r"toy has no costs: .*with_costs"):
        CPQ.prepare(bare(toy(2)), CPQ.make_config({}))
    agent = make()
    with pytest.raises(SaferlError, match="the batch has no costs"):
        agent.update(costly(agent)._replace(costs=None))
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(SaferlError, match="a cost limit is a number of 0 or more per episode"):
            make(cost_limit=bad)
    with pytest.raises(SaferlError, match="needs the number of steps of an episode"):
        make_any(CPQ, horizon=0)
    with pytest.raises(SaferlError, match="ood_quantile lies between 0 and below 1, got 1"):
        make(ood_quantile=1.0)
    with pytest.raises(SaferlError, match=r"alpha lies between exp\(-5\) and exp\(5\), got 0"):
        make(alpha=0.0)
