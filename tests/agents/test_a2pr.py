"""A2PR against a plain reference, what each loss moves, and the traps of porting it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.rng import MemberRandom

from .plain import (
    MEMBERS,
    A,
    B,
    Net,
    adam,
    affected,
    descend,
    gradients,
    make_batch,
    member_of,
    moved,
    nets,
)
from .plain import make as make_any

SMALL = {"critic_hidden": [8, 8], "value_hidden": [8, 8], "vae_hidden": [9, 9]}
RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "value_lr": 3e-2, "vae_lr": 4e-2, "tau": 0.1}
Z = 2 * A


def make(members=MEMBERS, **settings):
    """An agent whose V is near Q_1 from the start, so that advantages have both signs."""
    agent = make_any("a2pr", members, **SMALL | settings)
    batch = make_batch(agent, rows=100)
    with torch.no_grad():
        q = agent.critic(batch.observations, batch.actions, elements=1)
        offset = (q - agent.value(batch.observations)).mean(-1)
        agent.value.mlp.biases[-1] += offset[..., None, None]
        for weight in (*agent.actor.mlp.weights, *agent.vae.decoder.weights):
            weight *= 2  # actions far from 0, and a decoder that follows its input
    agent.actor_target.load_state_dict(agent.actor.state_dict())
    return agent


def clone(tensors) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


# One update is the equations ---------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["reconstruction", "prior", "data"])
@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_updates_are_the_reference(float64, member, guidance):
    threshold = 0.0 if guidance == "reconstruction" else 0.02
    agent = make(
        alpha=1.7, mask=0.8, vae_weight=1.5, kl_weight=0.3, discount=0.95, policy_noise=0.4,
        advantage_threshold=threshold, guidance=guidance, **RATES,
    )  # fmt: skip
    actor, value = Net(agent.actor.mlp, member), Net(agent.value.mlp, member)
    critics = nets(agent.critic, member)
    encoder, decoder = Net(agent.vae.encoder, member), Net(agent.vae.decoder, member)
    actor_target, critic_targets = actor.copy(), [c.copy() for c in critics]
    actor_optimizer, critic_optimizer = adam(actor, lr=1e-2), adam(*critics, lr=2e-2)
    value_optimizer, vae_optimizer = adam(value, lr=3e-2), adam(encoder, decoder, lr=4e-2)
    random = MemberRandom(MEMBERS, stream=1)

    def reconstruct(s: Tensor, a: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = encoder(s, a)
        mu, log_sigma = heads[:, :Z], heads[:, Z:].clamp(-4, 15)
        return decoder(s, mu + log_sigma.exp() * eta).tanh(), mu, log_sigma.exp()

    seen = set()  # (does ã win, is the row cloned), over all rows
    indicators = set()
    for step in range(1, 7):
        batch = make_batch(agent, step, rows=B)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        s, a, r, s2 = own.observations, own.actions, own.rewards, own.next_observations
        ahead = 0.95 * (1 - own.terminals)

        noise = (0.4 * random.normal(B, A)[member]).clamp(-0.5, 0.5)
        a2 = (actor_target(s2).tanh() + noise).clamp(-1, 1).detach()
        y = r + ahead * torch.minimum(*(t(s2, a2)[:, 0] for t in critic_targets)).detach()
        critic_loss = sum(((c(s, a)[:, 0] - y) ** 2).mean() for c in critics)
        descend(critic_optimizer, critic_loss)

        y_online = r + ahead * torch.minimum(*(c(s2, a2)[:, 0] for c in critics)).detach()
        v = value(s)[:, 0]
        value_loss = ((v - torch.minimum(y, y_online)) ** 2).mean()
        stale = [x.item() for x in v]
        descend(value_optimizer, value_loss)

        data_q = [x.item() for x in critics[0](s, a)[:, 0]]
        good = [q - u > threshold for q, u in zip(data_q, stale)]
        indicators |= set(good)
        rebuilt, mu, sigma = reconstruct(s, a, random.normal(B, Z)[member])
        # Times 0, not left out: Adam moves on its momentum when all rows are.
        errors = [good[i] * ((rebuilt[i] - a[i]) ** 2).sum() for i in range(B)]
        kl = -0.5 * (1 + (sigma**2).log() - mu**2 - sigma**2)
        vae_loss = 1.5 * sum(errors) / (B * A) + 0.3 * kl.sum() / (B * Z)
        descend(vae_optimizer, vae_loss)

        losses = {"critic_loss": critic_loss, "value_loss": value_loss, "vae_loss": vae_loss}
        if step % 2 == 0:
            p = actor(s).tanh()
            q = critics[0](s, p)[:, 0]
            if guidance == "reconstruction":
                candidate, _, _ = reconstruct(s, p, random.normal(B, Z)[member])
            elif guidance == "prior":
                eta = random.normal(B, Z)[member].clamp(-0.5, 0.5)
                candidate = decoder(s, eta).tanh().detach()
            cloning = 0.0
            for i in range(B):  # row by row
                wins, kept, towards = False, data_q[i] - stale[i] > threshold, a[i]
                if guidance != "data":
                    advantage = critics[0](s, candidate)[i, 0].item() - stale[i]
                    wins = advantage >= data_q[i] - stale[i]
                    kept = kept or advantage >= threshold
                    towards = candidate[i] if wins else a[i]
                seen.add((wins, kept))
                cloning = cloning + (0.8 if kept else 0.0) * ((p[i] - towards) ** 2).sum()
            cloning = cloning / (B * A)
            losses["cloning_loss"] = cloning
            losses["actor_loss"] = -1.7 / q.abs().mean().item() * q.mean() + cloning
            descend(actor_optimizer, losses["actor_loss"])
            actor_target.follow(actor, 0.1)
            for target, critic in zip(critic_targets, critics):
                target.follow(critic, 0.1)

        assert ("actor_loss" in metrics) == (step % 2 == 0)
        for name, loss in losses.items():
            torch.testing.assert_close(metrics[name][member], loss.detach())
        pairs = [
            (actor, agent.actor.mlp), (actor_target, agent.actor_target.mlp),
            (value, agent.value.mlp), (encoder, agent.vae.encoder), (decoder, agent.vae.decoder),
        ]  # fmt: skip
        for net, mlp in pairs:
            net.assert_is(mlp, member)
        for e in range(2):
            critics[e].assert_is(agent.critic.mlp, member, e)
            critic_targets[e].assert_is(agent.critic_target.mlp, member, e)
    # The rows were of every kind, so each branch was compared.
    assert indicators == {False, True}
    assert {kept for _, kept in seen} == {False, True}
    assert {wins for wins, _ in seen} == ({False} if guidance == "data" else {False, True})


# What moves, and what reaches it -----------------------------------------------------------------

EVERY_UPDATE = {"critic", "value", "vae"}


def test_actor_and_targets_move_with_every_second_update():
    """Checklist 5: targets stand still in odd updates."""
    agent = make()
    batch = make_batch(agent)
    everything = EVERY_UPDATE | {"actor", "critic_target", "actor_target"}
    assert moved(agent, batch) == EVERY_UPDATE
    assert moved(agent, batch) == everything
    assert moved(agent, batch) == EVERY_UPDATE
    assert moved(agent, batch) == everything


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"alpha": 1.0}, {"alpha": 2.0}, {"actor"}),
        ({"mask": 0.5}, {"mask": 1.0}, {"actor"}),
        ({"mask": 0.0}, {"mask": 1e-3}, {"actor"}),
        ({"guidance": "reconstruction"}, {"guidance": "data"}, {"actor"}),
        ({"guidance": "reconstruction"}, {"guidance": "prior"}, {"actor"}),
        # The actor sees the VAE after its step.
        ({"vae_weight": 1.0}, {"vae_weight": 1.5}, {"vae", "actor"}),
        ({"kl_weight": 0.5}, {"kl_weight": 0.6}, {"vae", "actor"}),
        ({"advantage_threshold": 0.0}, {"advantage_threshold": 0.2}, {"vae", "actor"}),
    ],
)
def test_coefficients_reach(before, after, reached):
    assert affected("a2pr", before, after, updates=2, **SMALL | RATES) == reached


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"discount": 0.9}, {"discount": 0.99}),
        ({"policy_noise": 0.1}, {"policy_noise": 0.2}),
        ({"noise_clip": 0.5}, {"noise_clip": 0.01}),
    ],
)
def test_what_the_target_depends_on_reaches(before, after):
    """The VAE sees the critics through the sign of an advantage alone, which may not change."""
    reached = affected("a2pr", before, after, updates=2, **SMALL | RATES)
    assert reached - {"vae"} == {"critic", "value", "actor"}


def test_the_actor_step_leaves_the_gradients_of_the_other_networks():
    """L_π runs through critic and VAE, whose parameters it must not touch."""
    agent = make()
    batch = make_batch(agent)
    agent.update(batch)
    agent.update(batch)
    through = gradients(agent)
    other = make(alpha=20.0, mask=7.0)
    other.update(batch)
    other.update(batch)
    for name in EVERY_UPDATE:
        assert all(torch.equal(x, y) for x, y in zip(through[name], gradients(other)[name]))
    assert not torch.equal(through["actor"][0], gradients(other)["actor"][0])


def test_terminal_rows_do_not_look_ahead():
    one, two = make(), make()
    batch = make_batch(one)._replace(terminals=torch.ones(len(MEMBERS), B))
    one.update(batch)
    two.update(batch._replace(next_observations=batch.next_observations + 1))
    for name in EVERY_UPDATE:
        for p, q in zip(getattr(one, name).parameters(), getattr(two, name).parameters()):
            assert torch.equal(p, q)


def test_the_vae_has_a_rate_of_its_own():
    agent = make()
    rates = {k: v.param_groups[0]["lr"] for k, v in vars(agent).items() if "optimizer" in k}
    assert rates.pop("vae_optimizer") == 1e-3
    assert set(rates.values()) == {3e-4} and len(rates) == 3


def test_the_paper_s_layers():
    agent = make_any("a2pr", 1, hidden=[256, 256, 256])
    sizes = {
        "actor": agent.actor.mlp, "critic": agent.critic.mlp, "value": agent.value.mlp,
        "encoder": agent.vae.encoder, "decoder": agent.vae.decoder,
    }  # fmt: skip
    hidden = {name: mlp.sizes[1:-1] for name, mlp in sizes.items()}
    assert hidden == {
        "actor": (256,) * 3, "critic": (256,) * 4, "value": (256,) * 4,
        "encoder": (750,) * 2, "decoder": (750,) * 2,
    }  # fmt: skip
    assert agent.Config().hidden == (256, 256, 256)
    assert agent.vae.latent_dim == 2 * A and agent.vae.bounds == (-4, 15)


def test_guidance_must_be_known():
    with pytest.raises(SaferlError, match="unknown guidance 'prio'.*'prior'"):
        make(guidance="prio")


# Traps of porting --------------------------------------------------------------------------------


def test_mask_zero_is_td3_with_a_scaled_value(float64):
    """Checklist 1: without cloning the gradient is that of -λ mean Q₁(s, π(s)) alone."""
    agent = make(mask=0.0, alpha=1.7, **RATES)
    batch = make_batch(agent)
    agent.update(batch)
    before = [Net(agent.actor.mlp, m) for m in range(len(MEMBERS))]
    agent.update(batch)
    for m, actor in enumerate(before):
        critic = Net(agent.critic.mlp, m)  # after its step; the actor's does not move it
        s = batch.observations[m]
        q = critic(s, actor(s).tanh())[:, 0]
        loss = -1.7 / q.abs().mean().item() * q.mean()
        expected = torch.autograd.grad(loss, [w for w, _ in actor.layers])
        for weight, gradient in zip(agent.actor.mlp.weights, expected):
            torch.testing.assert_close(weight.grad[m, 0].T, gradient)


def test_without_guidance_and_gate_it_is_td3_bc(float64):
    """Checklist 1. No noise, for the VAE's draws shift those of the target's."""
    common = {"policy_noise": 0.0, "actor_lr": 1e-2, "critic_lr": 2e-2, "tau": 0.1, "alpha": 1.7}
    switches = {"guidance": "data", "advantage_threshold": -math.inf, "mask": 1.0}
    agent = make_any("a2pr", **SMALL | switches | common)
    other = make_any("td3_bc", **common)
    for step in range(6):
        batch = make_batch(agent, step)
        mine, theirs = agent.update(batch), other.update(batch)
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=1e-12, atol=0)
    for name in ("actor", "critic", "actor_target", "critic_target"):
        for p, q in zip(getattr(agent, name).parameters(), getattr(other, name).parameters()):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def guided(agent, seed: int = 0, rows: int = 40):
    """`A2PR.guide` on random rows; also the policy's actions and the two candidates' advantages."""
    batch = make_batch(agent, seed, rows)
    s, a = batch.observations, batch.actions
    with torch.no_grad():
        q = agent.critic(s, a, elements=1)[:, 0]
        v = q.mean(-1, keepdim=True) + 0.1 * batch.rewards
    p = agent.actor(s).detach().requires_grad_()
    state = agent.random.state_dict()
    clone, gate, wins = agent.guide(s, p, a, q, v)
    agent.random.load_state_dict(state)
    noise = agent.random.normal(rows, Z)
    candidate = agent.vae(s, p, noise)[0]
    advantages = agent.critic(s, candidate, elements=1)[:, 0].detach() - v, q - v
    return s, a, p, clone, gate, wins, candidate, noise, advantages


def test_the_gate_is_m_or_nothing():
    """Checklist 2: an OR, which is m and not 2 m where both candidates beat v."""
    agent = make(mask=[0.7, 1.9])
    *_, gate, wins, _, _, (candidate, data) = guided(agent)
    for m, mask in enumerate((0.7, 1.9)):
        kinds = [(candidate[m] >= 0) & (data[m] > 0), (candidate[m] >= 0) ^ (data[m] > 0),
                 (candidate[m] < 0) & (data[m] <= 0)]  # fmt: skip
        for kind, expected in zip(kinds, (mask, mask, 0.0)):
            assert kind.any()
            assert (gate[m][kind] == torch.tensor(expected)).all()
    assert torch.equal(wins, candidate >= data)


def test_at_zero_advantage_the_candidate_is_cloned_and_the_logged_action_is_not():
    """≥ for ã, > for a, and ties go to ã."""
    agent = make(mask=1.0)
    batch = make_batch(agent)
    s, a = batch.observations, batch.actions
    state = agent.random.state_dict()
    with torch.no_grad():
        candidate = agent.vae(s, agent.actor(s), agent.random.normal(B, Z))[0]
        q = agent.critic(s, candidate, elements=1)[:, 0]

    def guide(data_q: Tensor):
        agent.random.load_state_dict(state)
        return agent.guide(s, agent.actor(s), a, data_q, q)

    towards, gate, wins = guide(q)  # both advantages are 0
    assert wins.all() and (gate == 1).all() and torch.equal(towards, candidate)
    _, gate, wins = guide(q + 1)
    assert not wins.any() and (gate == 1).all()
    data = make(mask=1.0, guidance="data")
    assert (data.guide(s, a, a, q, q)[1] == 0).all()
    assert (data.guide(s, a, a, q + 1, q)[1] == 1).all()


def test_the_vae_s_action_is_not_detached(float64):
    """Checklist 3: where ã is the target, dL/dp = 2 κ (p - ã) (I - ∂ã/∂p) / (B A)."""
    agent = make(mask=0.7)
    s, a, p, towards, gate, wins, candidate, noise, _ = guided(agent)
    rows = p.shape[1]
    loss = (gate[..., None] * (p - towards).square()).mean((1, 2)).sum()
    got = torch.autograd.grad(loss, p)[0]
    naive = 2 * gate[..., None] * (p - towards).detach() / (rows * A)
    torch.testing.assert_close(got[~wins], naive[~wins])
    torch.testing.assert_close(towards[wins], candidate[wins])
    torch.testing.assert_close(towards[~wins], a[~wins])
    checked = differ = 0
    for m in range(len(MEMBERS)):
        for i in torch.nonzero(wins[m] & (gate[m] > 0)).flatten().tolist():

            def decode(x: Tensor, m=m, i=i) -> Tensor:
                whole = p.detach().clone()
                whole[m, i] = x
                return agent.vae(s, whole, noise)[0][m, i]

            jacobian = torch.autograd.functional.jacobian(decode, p[m, i].detach())
            torch.testing.assert_close(got[m, i], naive[m, i] @ (torch.eye(A) - jacobian))
            checked += 1
            differ += int((got[m, i] - naive[m, i]).norm() > 0.01 * naive[m, i].norm())
    assert checked > 5 and differ > checked / 2


def test_the_mean_is_over_all_rows():
    """Rows without cloning count as zeros."""
    agent = make(policy_interval=1, guidance="data", mask=1.0)
    metrics = agent.update(make_batch(agent, rows=40))
    share = metrics["cloned_share"]
    assert ((share > 0) & (share < 1)).all()
    other = make(policy_interval=1, guidance="data", mask=1.0, advantage_threshold=-math.inf)
    everywhere = other.update(make_batch(other, rows=40))["cloning_loss"]
    assert (metrics["cloning_loss"] < everywhere).all()


def test_the_value_s_step_does_not_change_the_iteration():
    """Checklist 4: the advantages of an update use v from before V's step."""
    one, two = make(policy_interval=1, value_lr=1e-6), make(policy_interval=1, value_lr=10.0)
    batch = make_batch(one)
    mine, theirs = one.update(batch), two.update(batch)
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    for name in ("critic", "vae", "actor"):
        for p, q in zip(getattr(one, name).parameters(), getattr(two, name).parameters()):
            assert torch.equal(p, q)
    assert not torch.equal(one.value.mlp.weights[0], two.value.mlp.weights[0])


@pytest.mark.parametrize("shift", [-5.0, 5.0])
def test_advantages_are_the_first_critic_s(shift):
    """The second critic acts through the targets alone, of which terminal rows have none."""
    one, two = make(policy_interval=1), make(policy_interval=1)
    with torch.no_grad():
        two.critic.mlp.biases[-1][:, 1] += shift
    batch = make_batch(one)._replace(terminals=torch.ones(len(MEMBERS), B))
    mine, theirs = one.update(batch), two.update(batch)
    for name in ("vae_loss", "actor_loss", "cloned_share", "guided_share", "advantageous_share"):
        assert torch.equal(mine[name], theirs[name]), name
    for name in ("value", "vae", "actor"):
        for p, q in zip(getattr(one, name).parameters(), getattr(two, name).parameters()):
            assert torch.equal(p, q)


def test_the_divergence_is_of_all_rows():
    """Checklist 6: with no advantageous row the VAE still moves, by the divergence alone."""
    agent = make(advantage_threshold=math.inf, kl_weight=0.5, vae_weight=3.0)
    batch = make_batch(agent)
    mean, log_std = agent.vae.encode(batch.observations, batch.actions)
    loss = 0.5 * agent.vae.divergence(mean, log_std).mean((1, 2)).sum()
    expected = torch.autograd.grad(loss, list(agent.vae.encoder.parameters()))
    before = clone(agent.vae.encoder.parameters())
    metrics = agent.update(batch)
    assert (metrics["advantageous_share"] == 0).all()
    torch.testing.assert_close(metrics["vae_loss"].sum(), loss.detach())
    for parameter, gradient in zip(agent.vae.encoder.parameters(), expected):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all((p.grad == 0).all() for p in agent.vae.decoder.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(before, agent.vae.encoder.parameters()))


# Without a cost limit ----------------------------------------------------------------------------


def test_without_a_limit_nothing_of_it_is_there():
    """tests/agents/test_costs.py has A2PR under a limit."""
    agent = make()
    networks = {"actor", "critic", "value", "vae", "actor_target", "critic_target"}
    optimizers = {"actor_optimizer", "critic_optimizer", "value_optimizer", "vae_optimizer"}
    agent.update(make_batch(agent))
    agent.update(make_batch(agent))  # whose costs are None
    parts = {key.split(".")[0] for key in agent.state_dict()}
    assert parts == networks | optimizers | {"random", "updates"}
    other = make(multiplier="pid", multiplier_lr=1.0, cost_discount=0.5)
    other.update(make_batch(other))
    batch = make_batch(other)
    metrics = other.update(batch._replace(costs=batch.rewards.abs()))
    assert not any("cost" in name or name == "multiplier" for name in metrics)
    for key, tensor in agent.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key
