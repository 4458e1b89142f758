"""SAC and MOORL from pixels: an update against a plain reference, the meta step, online runs."""

from __future__ import annotations

import math

import gymnasium
import numpy as np
import pytest
import torch

import saferl
from saferl.data import save_dataset
from saferl.data.frames import Frames
from saferl.errors import SaferlError
from saferl.registry import agent_class
from saferl.replay import OnlineBuffer, online_buffer_class
from saferl.replay.frames import OnlineFrameBuffer
from saferl.rng import MemberRandom
from saferl.spec import Spec

from .plain import MEMBERS, A, B, adam, descend, member_of
from .test_drq_bc import IMAGE, SMALL, Convolutions, Headed, make_batch, pixels, shift

SPEC = Spec(int(np.prod(IMAGE)), A, False, (-1.0,) * A, (1.0,) * A, image=IMAGE)
RATES = {"actor_lr": 1e-2, "critic_lr": 2e-2, "temperature_lr": 3e-2, "tau": 0.1, "pad": 2}


def make(name: str, spec: Spec = SPEC, members=MEMBERS, **settings):
    cls = agent_class(name)
    return cls(spec, cls.make_config(SMALL | RATES | settings), members)


def density(mean, log_std, noise):
    """Action and its log density, from the change of variables."""
    raw = mean + log_std.exp() * noise
    gauss = (-0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)
    return raw.tanh(), gauss - torch.log(1 - raw.tanh() ** 2).sum(-1)


@pytest.mark.parametrize("member", range(len(MEMBERS)))
def test_sac_is_the_reference(float64, member):
    agent = make("sac")
    encoder = Convolutions(agent.actor.encoder, member)
    actor = Headed(agent.actor.trunk, agent.actor.actor.mlp, member)
    critic, target = (Headed(agent.critic.trunk, agent.critic.critic.mlp, member) for _ in "qt")
    log_temperature = agent.log_temperature[member].detach().clone().requires_grad_()
    steps = [
        adam(*encoder.parameters(), *critic.parameters(), lr=2e-2),
        adam(*actor.parameters(), lr=1e-2),
        adam(log_temperature, lr=3e-2),
    ]
    random = MemberRandom(MEMBERS, stream=1)

    def policy(x, noise):
        mean, log_std = actor(x)[0].chunk(2, -1)
        return density(mean, log_std.clamp(-5, 2), noise)

    for step in range(4):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        own = member_of(batch, member)
        offsets, next_offsets = random.integers(5, 2, B, 2)[member]
        next_noise = random.normal(B, A)[member]
        (actor_offsets,) = random.integers(5, 1, B, 2)[member]
        noise = random.normal(B, A)[member]
        temperature = log_temperature.detach().exp()

        x = encoder(shift(own.observations, offsets, 2))
        x2 = encoder(shift(own.next_observations, next_offsets, 2))
        a2, next_density = policy(x2, next_noise)
        next_q = torch.minimum(*(q[:, 0] for q in target(x2, a2))) - temperature * next_density
        y = (own.rewards + 0.99 * (1 - own.terminals) * next_q).detach()
        critic_loss = sum(((q[:, 0] - y) ** 2).mean() for q in critic(x, own.actions))
        descend(steps[0], critic_loss)
        torch.testing.assert_close(metrics["critic_loss"][member], critic_loss.detach())

        # The actor sees the encoder after its step, and a shift of its own.
        x = encoder(shift(own.observations, actor_offsets, 2)).detach()
        a, log_density = policy(x, noise)
        q = torch.minimum(*(q[:, 0] for q in critic(x, a)))
        actor_loss = (temperature * log_density - q).mean()
        descend(steps[1], actor_loss)
        torch.testing.assert_close(metrics["actor_loss"][member], actor_loss.detach())
        entropy = -log_density.detach().mean()
        descend(steps[2], log_temperature * (entropy + A))
        target.follow(critic, 0.1)

        for layer, (weight, bias) in enumerate(encoder.layers):
            for name, tensor in (("weights", weight), ("biases", bias)):
                got = getattr(agent.actor.encoder, name)[layer][member]
                torch.testing.assert_close(got, tensor, rtol=1e-8, atol=1e-10)
        for mine, parts in (
            (actor, (agent.actor.trunk, agent.actor.actor.mlp)),
            (critic, (agent.critic.trunk, agent.critic.critic.mlp)),
            (target, (agent.critic_target.trunk, agent.critic_target.critic.mlp)),
        ):
            mine.assert_is(*parts, member)


def test_the_meta_step_moves_the_encoder_and_both_trunks(float64):
    """η of the way from the fast weights, which are SAC's, back to where the update began."""
    settings = {"inner_steps": 2, "batch_size": B}
    plain, meta = make("sac", **settings), make("moorl", eta=0.25, **settings)
    batch = make_batch(plain)
    batch = batch.map(lambda field: torch.cat([field, field.flip(1)], 1))
    before = {k: v.clone() for k, v in meta.state_dict().items()}
    plain.update(batch)
    meta.update(batch)
    fast, slow = plain.state_dict(), meta.state_dict()
    parts = [k for k in slow if k.startswith(("actor.", "critic.")) and "optimizer" not in k]
    assert sum("encoder" in k for k in parts) == 4 and sum("trunk" in k for k in parts) == 8
    for key in parts:
        assert not torch.equal(fast[key], before[key]), key
        expected = fast[key] + 0.75 * (before[key] - fast[key])
        torch.testing.assert_close(slow[key], expected, msg=key)


class Columns(gymnasium.Env):
    """The task of `pixels`: a bright column moves with the action, the reward is where it is."""

    observation_space = gymnasium.spaces.Box(0, 255, (3, 12, 13), np.uint8)
    action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def frame(self):
        frame = np.full((1, 12, 13), 40, np.uint8)
        frame[:, :, int(np.clip(self.place, 0, 12))] = 220
        return frame

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = float(self.np_random.uniform(3, 9)), 0
        self.frames = [self.frame()] * 3
        return np.concatenate(self.frames), {}

    def step(self, action):
        reward = self.place / 12
        self.place, self.steps = self.place + 2 * float(action[0]), self.steps + 1
        self.frames = [*self.frames[1:], self.frame()]
        return np.concatenate(self.frames), reward, False, self.steps == 12, {}


QUICK = SMALL | {"batch_size": 8, "random_steps": 3, "hidden": [8]}


def test_what_members_gather_is_what_they_saw():
    data = pixels()
    spec = data.spec(agent_class("sac").make_config({}))
    buffer = online_buffer_class(spec)(spec, 5, (0, 1), costs=False)
    assert isinstance(buffer, OnlineFrameBuffer)
    assert online_buffer_class(Spec(3, 2)) is OnlineBuffer
    rows = [0, 1, 2, 11, 12, 13, 14]  # an episode ends at 11; the oldest two are overwritten
    for row in rows:
        for member in (0, 1) if row != 2 else (0,):
            fields = [data.observations[[row]], data.actions[[row]], data.rewards[[row]],
                      data.next_observations[[row]], data.terminals[[row]], None]  # fmt: skip
            if member:  # flattened, as a rollout has them
                fields[0] = fields[0].reshape(1, -1).astype(np.float32)
            buffer.append(np.array([member]), np.array([row == 11]), *fields)
    for member, kept in ((0, rows[2:]), (1, [1, 11, 12, 13, 14])):
        batch, ends = buffer.of_member(member)
        np.testing.assert_array_equal(batch.observations[0], data.observations[kept])
        np.testing.assert_array_equal(batch.next_observations[0], data.next_observations[kept])
        np.testing.assert_allclose(batch.rewards[0], data.rewards[kept])
        assert ends.tolist() == [row == 11 for row in kept]
    again = online_buffer_class(spec)(spec, 5, (0, 1), costs=False)
    again.load_state_dict(buffer.state_dict())
    assert torch.equal(again.sample(9).observations, buffer.sample(9).observations)
    with pytest.raises(SaferlError, match="not the last 3 frames, oldest first"):
        fields[:1], fields[3:4] = [data.observations[[0]]], [255 - data.next_observations[[0]]]
        buffer.append(np.array([0]), np.array([False]), *fields)


@pytest.mark.parametrize("agent", ["sac", "moorl"])
def test_a_hybrid_run_resumes_to_the_bit(agent, tmp_path):
    data = pixels()
    settings = QUICK | ({"inner_steps": 2} if agent == "moorl" else {})
    options = {"members": 2, "settings": settings, "env": Columns, "eval_episodes": 1,
               "eval_interval": 0, "progress": False}  # fmt: skip
    whole = saferl.train(agent, data, steps=20, out=tmp_path / "a", **options)
    saferl.train(agent, data, steps=14, out=tmp_path / "b", **options)
    again = saferl.resume(tmp_path / "b", dataset=data, env=Columns, steps=20, progress=False)
    state = whole.agent.state_dict()
    assert whole.agent.updates > 10
    for key, tensor in again.agent.state_dict().items():
        assert torch.equal(state[key], tensor), key
    assert whole.evaluation.lengths.tolist() == [12, 12]


def test_without_a_dataset(tmp_path):
    run = saferl.train("sac", env=Columns, steps=8, members=1, settings=QUICK, out=tmp_path / "r",
                       eval_interval=0, eval_episodes=1, progress=False)  # fmt: skip
    assert run.agent.spec.image == (3, 12, 13) and run.agent.updates == 5


@pytest.mark.parametrize("capacity", [0, 16])
@pytest.mark.parametrize("alone", [True, False])
def test_gathered_pixels_are_what_members_saw(alone, capacity, tmp_path):
    """With a dataset without costs and without any, and of a ring that was written over."""
    settings = QUICK | {"online_capacity": capacity}
    run = saferl.train(
        "sac", None if alone else pixels(), env=Columns, steps=20, members=2, settings=settings,
        out=tmp_path / "r", eval_interval=0, eval_episodes=1, progress=False,
    )  # fmt: skip
    data = saferl.gathered(run.path)
    kept = capacity or 20
    assert data.timeouts.nonzero()[0].tolist() == [kept - 9, kept - 1, 2 * kept - 9, 2 * kept - 1]
    assert data.costs is None and isinstance(data.observations, Frames) is not alone
    env, row = Columns(), 0
    own = [saferl.gathered(run.path, member=m) for m in range(2)]
    for m, one in enumerate(own):
        seen = [env.reset(seed=m * 1_000_003 + episode)[0] for episode in (0, 1)]
        assert np.array_equal(one.observations[kept - 8], seen[1])
        if not capacity:
            assert np.array_equal(one.observations[0], seen[0])
        for row in range(kept - 8, kept):  # the second episode, played again
            assert np.array_equal(one.observations[row], np.concatenate(env.frames))
            following, reward, *_ = env.step(one.actions[row])
            assert np.array_equal(one.next_observations[row], following)
            assert one.rewards[row] == pytest.approx(reward)
        assert np.array_equal(data.observations[m * kept : (m + 1) * kept], one.observations[:])
    path = save_dataset(data, tmp_path / ("whole.npz" if alone else "episodes"))
    again = saferl.load_dataset(path)
    first = 0 if not capacity else 2  # that layout knows nothing from before an episode's first row
    for name in ("observations", "next_observations", "actions", "rewards"):
        ours, theirs = (getattr(one, name)[first:kept] for one in (data, again))
        assert np.array_equal(ours, theirs), name
    run = saferl.train("drq_bc", again, steps=2, members=1, settings=SMALL | {"batch_size": 4},
                       out=tmp_path / "again", progress=False)  # fmt: skip
    assert run.agent.updates == 2


def test_what_pixels_cannot_do():
    with pytest.raises(SaferlError, match="price costs with cost_penalty"):
        make("sac", cost_limit=1.0)
    with pytest.raises(SaferlError, match="use reptile on pixels"):
        make("moorl", meta_step="gradient")


def test_padding_is_drawn_for_pixels_alone():
    """On vectors the fields for pixels change nothing."""
    from . import plain

    agents = [plain.make("sac"), plain.make("sac", pad=9, features=3, channels=[2])]
    for agent in agents:
        agent.update(plain.make_batch(agent))
    one, two = (agent.state_dict() for agent in agents)
    assert all(torch.equal(one[key], two[key]) for key in one)
