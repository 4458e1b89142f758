"""DrQ+BC against a plain reference, and what each coefficient reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import saferl
from saferl.data import Dataset
from saferl.data.frames import Frames
from saferl.errors import SaferlError
from saferl.registry import agent_class
from saferl.rng import MemberRandom
from saferl.spec import Spec

from . import plain
from .plain import MEMBERS, A, B, Net, adam, descend, member_of, moved

IMAGE = (3, 12, 13)
SMALL = {"hidden": [8], "channels": [3, 4], "strides": [2, 1], "features": 5}
SETTINGS = {"actor_lr": 1e-2, "critic_lr": 2e-2, "tau": 0.1, "alpha": 1.7, "pad": 2,
            "noise_start": 0.875, "noise_end": 0.25, "noise_steps": 4,
            "noise_clip": 0.9}  # fmt: skip


def make(**settings):
    cls = agent_class("drq_bc")
    spec = Spec(int(np.prod(IMAGE)), A, False, (-1.0,) * A, (1.0,) * A, image=IMAGE)
    return cls(spec, cls.make_config(SMALL | settings), MEMBERS)


def make_batch(agent, seed: int = 0):
    random = torch.Generator().manual_seed(seed)
    shape = (agent.members, B, *IMAGE)
    pixels = torch.randint(256, (2, *shape), generator=random, dtype=torch.uint8)
    batch = plain.make_batch(agent, seed)
    return batch._replace(observations=pixels[0], next_observations=pixels[1])


class Convolutions:
    """One member's encoder as ordinary convolutions."""

    def __init__(self, encoder, member):
        self.strides = encoder.strides
        self.layers = [
            (w[member].detach().clone().requires_grad_(), b[member].detach().clone())
            for w, b in zip(encoder.weights, encoder.biases)
        ]
        self.layers = [(w, b.requires_grad_()) for w, b in self.layers]

    def parameters(self):
        return [tensor for layer in self.layers for tensor in layer]

    def __call__(self, x):
        x = x.double() / 255 - 0.5
        for (weight, bias), stride in zip(self.layers, self.strides):
            x = F.relu(F.conv2d(x, weight, bias, stride=stride))
        return x.flatten(1)


class Headed:
    """One member's trunk and the perceptrons behind it."""

    def __init__(self, trunk, mlp, member):
        self.linear = Net(trunk.linear, member)
        self.norm = [
            p[member, 0].detach().clone().requires_grad_() for p in (trunk.scale, trunk.offset)
        ]
        self.heads = [Net(mlp, member, e) for e in range(mlp.ensemble)]

    def parameters(self):
        heads = [tensor for head in self.heads for tensor in head.parameters()]
        return [*self.linear.parameters(), *self.norm, *heads]

    def __call__(self, features, *actions):
        x = self.linear(features)
        x = F.layer_norm(x, x.shape[-1:], *self.norm).tanh()
        return [head(x, *actions) for head in self.heads]

    def follow(self, source, rate):
        for own, new in zip(self.parameters(), source.parameters()):
            own.data.copy_(rate * new.data + (1 - rate) * own.data)

    def assert_is(self, trunk, mlp, member):
        self.linear.assert_is(trunk.linear, member)
        for own, p in zip(self.norm, (trunk.scale, trunk.offset)):
            torch.testing.assert_close(p[member, 0], own, rtol=1e-9, atol=1e-11)
        for e, head in enumerate(self.heads):
            head.assert_is(mlp, member, e)


def shift(x, offsets, pad):
    """Cut out of the padded image, as DrQ says."""
    height, width = x.shape[-2:]
    padded = F.pad(x.double(), (pad,) * 4, mode="replicate")
    return torch.stack([
        image[:, i : i + height, j : j + width] for image, (i, j) in zip(padded, offsets.tolist())
    ])  # fmt: skip


class Straight(torch.autograd.Function):
    """Clip whose gradient is that of no clip."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1 + 1e-6, 1 - 1e-6)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_updates_are_the_reference(float64, member):
    agent = make(**SETTINGS)
    encoder = Convolutions(agent.actor.encoder, member)
    actor = Headed(agent.actor.trunk, agent.actor.actor.mlp, member)
    critic, target = (Headed(agent.critic.trunk, agent.critic.critic.mlp, member) for _ in "qt")
    critic_optimizer = adam(*encoder.parameters(), *critic.parameters(), lr=2e-2)
    actor_optimizer = adam(*actor.parameters(), lr=1e-2)
    random, clipped = MemberRandom(MEMBERS, stream=1), False
    for step in range(6):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        noise, next_noise = random.normal(2, B, A)[member]
        offsets, next_offsets = random.integers(5, 2, B, 2)[member]
        deviation = 0.875 - 0.625 * min(step / 4, 1.0)

        x = encoder(shift(own.observations, offsets, 2))
        x2 = encoder(shift(own.next_observations, next_offsets, 2))
        a2 = actor(x2)[0].tanh() + (deviation * next_noise).clamp(-0.9, 0.9)
        clipped |= bool((a2.abs() > 1).any())  # the clip to the bounds matters
        next_q = torch.minimum(*(q[:, 0] for q in target(x2, a2.clamp(-1 + 1e-6, 1 - 1e-6))))
        y = (own.rewards + 0.99**3 * (1 - own.terminals) * next_q).detach()
        critic_loss = sum(((q[:, 0] - y) ** 2).mean() for q in critic(x, own.actions))
        descend(critic_optimizer, critic_loss)
        torch.testing.assert_close(metrics["critic_loss"][member], critic_loss.detach())

        x = x.detach()  # of the encoder before its step
        mean = actor(x)[0].tanh()
        proposed = Straight.apply(mean + (deviation * noise).clamp(-0.9, 0.9))
        q = torch.minimum(*(q[:, 0] for q in critic(x, proposed)))
        cloning = ((proposed - own.actions) ** 2).mean()
        actor_loss = -1.7 / q.abs().mean().item() * q.mean() + cloning
        descend(actor_optimizer, actor_loss)
        torch.testing.assert_close(metrics["actor_loss"][member], actor_loss.detach())
        torch.testing.assert_close(metrics["cloning_loss"][member], cloning.detach())
        clipped |= bool((mean + (deviation * noise).clamp(-0.9, 0.9)).abs().max() > 1)
        target.follow(critic, 0.1)

        for layer, (weight, bias) in enumerate(encoder.layers):
            for name, tensor in (("weights", weight), ("biases", bias)):
                got = getattr(agent.actor.encoder, name)[layer][member]
                torch.testing.assert_close(got, tensor, rtol=1e-9, atol=1e-11)
        actor.assert_is(agent.actor.trunk, agent.actor.actor.mlp, member)
        critic.assert_is(agent.critic.trunk, agent.critic.critic.mlp, member)
        target.assert_is(agent.critic_target.trunk, agent.critic_target.critic.mlp, member)
    assert clipped


def test_what_each_loss_moves():
    agent = make()
    assert moved(agent, make_batch(agent)) == {"actor", "critic", "critic_target"}
    assert all(not p.requires_grad for p in agent.critic_target.parameters())
    # Without a value term or data to clone, only the critics' loss is left to move the encoder.
    batch, before = make_batch(agent), [p.clone() for p in agent.actor.encoder.parameters()]
    agent.critic_optimizer.param_groups[0]["lr"] = 0.0
    agent.update(batch)
    assert all(torch.equal(p, q) for p, q in zip(agent.actor.encoder.parameters(), before))


def affected(before: dict, after: dict) -> set[str]:
    """Parts whose gradients in the second update differ between two configurations."""
    found = []
    for settings in (before, after):
        agent = make(**settings)
        for step in range(2):
            agent.update(make_batch(agent, step))
        parts = {"encoder": agent.actor.encoder, "critic": agent.critic, "actor": agent.actor.actor}
        found.append({k: [p.grad.clone() for p in v.parameters()] for k, v in parts.items()})
    one, two = found
    return {k for k in one if any(not torch.equal(a, b) for a, b in zip(one[k], two[k]))}


@pytest.mark.parametrize(
    ("before", "after", "reached"),
    [
        ({"alpha": 1.0}, {"alpha": 2.0}, {"actor", "critic", "encoder"}),  # by a' of update 2
        ({"discount": 0.9}, {"discount": 0.99}, {"actor", "critic", "encoder"}),
        ({"noise_clip": 0.3}, {"noise_clip": 0.01}, {"actor", "critic", "encoder"}),
        ({"noise_steps": 2}, {"noise_steps": 200}, {"actor", "critic", "encoder"}),
        ({"pad": 0}, {"pad": 2}, {"actor", "critic", "encoder"}),
        ({"tau": 0.1}, {"tau": 0.2}, {"critic", "encoder", "actor"}),
    ],
)
def test_coefficients_reach(before, after, reached):
    assert affected(before, after) == reached


def test_terminal_rows_do_not_look_ahead():
    one, two = make(), make()
    batch = make_batch(one)._replace(terminals=torch.ones(len(MEMBERS), B))
    one.update(batch)
    two.update(batch._replace(next_observations=255 - batch.next_observations))
    for p, q in zip(one.critic.parameters(), two.critic.parameters()):
        assert torch.equal(p, q)


def pixels(episodes=4, length=12, seed=0) -> Dataset:
    """A bright column that moves with the action; the reward is where it is."""
    random, frames, rows, starts = np.random.default_rng(seed), [], [], []
    for _ in range(episodes):
        first, place = len(frames), 6.0
        for step in range(length + 1):
            frame = np.full((1, 12, 13), 40, np.uint8)
            frame[:, :, int(np.clip(place, 0, 12))] = 220
            frames.append(frame)
            if step < length:
                action = random.uniform(-1, 1, 2)
                rows.append((len(frames) - 1, action, place / 12, step == length - 1))
                place += 2 * action[0]
        starts += [first] * (len(frames) - first)
    at, actions, rewards, ends = (np.array(column) for column in zip(*rows))
    held, begins = np.stack(frames), np.array(starts)
    return Dataset.from_arrays(
        Frames(held, at, begins, 3), actions, rewards, np.zeros(len(at), bool), ends,
        Frames(held, at + 1, begins, 3), action_low=(-1, -1), action_high=(1, 1), id="columns",
    )  # fmt: skip


def test_a_run_on_frames_resumes_to_the_bit(tmp_path):
    data = pixels()
    options = {"members": 2, "settings": SMALL | {"batch_size": 8}, "progress": False}
    whole = saferl.train("drq_bc", data, steps=8, out=tmp_path / "a", **options)
    saferl.train("drq_bc", data, steps=4, out=tmp_path / "b", **options)
    again = saferl.resume(tmp_path / "b", dataset=data, steps=8, progress=False)
    state = whole.agent.state_dict()
    assert all(torch.equal(state[k], v) for k, v in again.agent.state_dict().items())
    raw = torch.from_numpy(data.observations[:5].reshape(1, 5, -1).astype(np.float32))
    policy = whole.policy()
    actions = policy(raw.expand(2, -1, -1))
    assert actions.shape == (2, 5, 2)
    torch.testing.assert_close(policy.member(1)(raw)[0], actions[1])


def test_it_finds_the_better_direction_in_pixels(tmp_path):
    """Random play, where going right pays: cloning alone would stay at 0."""
    settings = SMALL | {"batch_size": 64, "noise_steps": 1, "alpha": 20.0, "pad": 0, "tau": 0.1,
                        "actor_lr": 3e-3, "critic_lr": 3e-3, "hidden": [32]}  # fmt: skip
    data = pixels(episodes=40)
    run = saferl.train("drq_bc", data, steps=250, members=2, settings=settings,
                       out=tmp_path / "run", progress=False)  # fmt: skip
    raw = torch.from_numpy(data.observations[::5].reshape(1, 96, -1).astype(np.float32))
    actions = run.policy()(raw.expand(2, -1, -1)).mean(1)
    assert (actions[:, 0] > 0.4).all() and (actions[:, 0] > actions[:, 1].abs() + 0.2).all()


def test_errors_say_what_to_do():
    data = pixels()
    with pytest.raises(SaferlError, match="IQL learns from vectors but .* pixels"):
        saferl.train("iql", data, steps=1, progress=False)
    with pytest.raises(SaferlError, match="pixels are not normalised"):
        saferl.train("td3_bc", data, steps=1, progress=False)
    for settings, message in (
        ({"normalize_rewards": True}, "set n_step=1"),
        ({"n_step": 0}, "must be 1 or more"),
        ({"strides": [2]}, "one per layer"),
        ({"channels": [3, 3, 3], "strides": [2, 2, 2]}, "too small"),
    ):
        with pytest.raises(SaferlError, match=message):
            saferl.train("drq_bc", data, steps=1, settings=SMALL | settings, progress=False)
