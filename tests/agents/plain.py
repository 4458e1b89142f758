"""What the tests of agents share: small agents and batches, toys, and plain references.

A reference is written from the equations with ``torch.nn.functional`` and ordinary autograd, for
one member and one critic at a time, in float64. It shares no code with the agents but the random
stream.

The last part is A2PR and CQL as one writes them for one network at a time, which the agents are
timed against (`benchmarks/speed/throughput.py`): `torch.nn.Linear`, a module per critic,
`torch.optim.Adam` as it comes and `backward`, in the structure of the public single-file
implementations (the authors' for A2PR, CORL's for CQL) and with none of saferl's code.
`tests/agents/test_plain.py` shows that an update is the agent's. Every draw there goes through
``self.normal`` and ``self.uniform``, functions of a shape.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform

from saferl.agents.shared.agent import Agent
from saferl.data import Dataset
from saferl.registry import agent_class
from saferl.replay import Batch, ReplayBuffer
from saferl.rng import MemberRandom
from saferl.spec import Spec
from saferl.training.engine import Engine

MEMBERS = (5, 6)  # seeds
OBS, A, B = 3, 2, 7  # observation and action components, rows
T = 20  # steps of an episode


def make(which: str | type[Agent], members=MEMBERS, horizon: int | None = None, **settings):
    """A small agent, by name or class; ``settings`` are its configuration.

    Episodes are `T` steps long for those given by class, of unknown length for others.
    """
    cls = agent_class(which) if isinstance(which, str) else which
    if horizon is None:
        horizon = 0 if isinstance(which, str) else T
    bounds = () if cls.discrete else (1.0,) * A
    size = 4 if cls.discrete else A
    spec = Spec(OBS, size, cls.discrete, tuple(-b for b in bounds), bounds, horizon=horizon)
    return cls(spec, cls.make_config({"hidden": [8, 8]} | settings), members)


def make_batch(agent, seed: int = 0, rows: int = B, costs: bool = False) -> Batch:
    """Random transitions, a third of them terminal."""
    random = torch.Generator().manual_seed(seed)
    shape = (agent.members, rows)

    def normal(*tail: int) -> Tensor:
        return torch.randn(*shape, *tail, generator=random)

    return Batch(
        observations=normal(OBS),
        actions=(
            torch.randint(agent.spec.action_dim, shape, generator=random)
            if agent.discrete
            else normal(A).tanh()
        ),
        rewards=normal(),
        costs=normal().abs() if costs else None,
        next_observations=normal(OBS),
        terminals=(torch.rand(shape, generator=random) < 1 / 3).to(torch.get_default_dtype()),
    )


def member_of(batch: Batch, m: int) -> Batch:
    """One member's rows, without the member axis."""
    return batch.map(lambda field: field[m])


class Net:
    """A copy of one perceptron out of an `MLP`, as a chain of ordinary linear layers."""

    def __init__(self, mlp: nn.Module, member: int, element: int = 0):
        self.layers = [
            (
                w[member, element].detach().T.clone().requires_grad_(),
                b[member, element, 0].detach().clone().requires_grad_(),
            )
            for w, b in zip(mlp.weights, mlp.biases)
        ]
        self.norms = [  # scale and offset of each hidden layer's LayerNorm, where there is one
            tuple(x[member, element, 0].detach().clone().requires_grad_() for x in pair)
            for pair in zip(mlp.scales, mlp.offsets)
        ]

    def __call__(self, *inputs: Tensor) -> Tensor:
        x = torch.cat(inputs, -1)
        for i, (weight, bias) in enumerate(self.layers[:-1]):
            x = F.linear(x, weight, bias)
            if self.norms:
                x = F.layer_norm(x, x.shape[-1:], *self.norms[i])
            x = F.relu(x)
        return F.linear(x, *self.layers[-1])

    def parameters(self) -> list[Tensor]:
        return [tensor for pair in (*self.layers, *self.norms) for tensor in pair]

    def copy(self) -> Net:
        twin = Net.__new__(Net)
        twin.layers = [(w.detach().clone(), b.detach().clone()) for w, b in self.layers]
        twin.norms = [(w.detach().clone(), b.detach().clone()) for w, b in self.norms]
        return twin

    @torch.no_grad()
    def follow(self, source: Net, rate: float) -> None:
        """Polyak average, written out."""
        for own, new in zip(self.parameters(), source.parameters()):
            own.copy_(rate * new.detach() + (1 - rate) * own)

    def assert_is(self, mlp: nn.Module, member: int, element: int = 0) -> None:
        for (w, b), weight, bias in zip(self.layers, mlp.weights, mlp.biases):
            torch.testing.assert_close(weight[member, element].T, w, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(bias[member, element, 0], b, rtol=1e-9, atol=1e-11)
        for (w, b), scale, offset in zip(self.norms, mlp.scales, mlp.offsets, strict=True):
            torch.testing.assert_close(scale[member, element, 0], w, rtol=1e-9, atol=1e-11)
            torch.testing.assert_close(offset[member, element, 0], b, rtol=1e-9, atol=1e-11)


def nets(ensemble: nn.Module, member: int) -> list[Net]:
    """One `Net` per ensemble element."""
    return [Net(ensemble.mlp, member, e) for e in range(ensemble.mlp.ensemble)]


def adam(*networks: Net | Tensor, lr: float) -> torch.optim.Adam:
    tensors = []
    for network in networks:
        tensors += network.parameters() if isinstance(network, Net) else [network]
    return torch.optim.Adam(tensors, lr=lr, foreach=False)


def descend(optimizer: torch.optim.Adam, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward(inputs=optimizer.param_groups[0]["params"])
    optimizer.step()


def gradients(agent) -> dict[str, list[Tensor]]:
    """The last update's gradients of each network and free parameter."""
    found = {}
    for name, value in vars(agent).items():
        if isinstance(value, nn.Parameter):
            found[name] = [value.grad]
        elif isinstance(value, nn.Module):
            found[name] = [p.grad for p in value.parameters()]
    return {name: grads for name, grads in found.items() if any(g is not None for g in grads)}


def affected(name: str, before: dict, after: dict, updates: int = 1, **common) -> set[str]:
    """Networks whose gradient in the last of ``updates`` differs between two configurations."""
    results = []
    for settings in (before, after):
        agent = make(name, **common, **settings)
        for i in range(updates):
            agent.update(make_batch(agent, seed=i))
        results.append(gradients(agent))
    one, two = results
    assert one.keys() == two.keys()
    return {key for key in one if any(not torch.equal(a, b) for a, b in zip(one[key], two[key]))}


def moved(agent, batch: Batch) -> set[str]:
    """Networks and free parameters that one update changes."""

    def parts() -> dict[str, list[Tensor]]:
        return {
            name: [p.detach().clone() for p in tensors]
            for name, value in vars(agent).items()
            if isinstance(value, (nn.Module, nn.Parameter))
            for tensors in [[value] if isinstance(value, nn.Parameter) else value.parameters()]
        }

    before = parts()
    agent.update(batch)
    after = parts()
    return {k for k in before if any(not torch.equal(a, b) for a, b in zip(before[k], after[k]))}


# Agents under a cost limit -----------------------------------------------------------------------


def costly(agent, seed: int = 0, rows: int = B) -> Batch:
    return make_batch(agent, seed, rows, costs=True)


def bare(dataset: Dataset) -> Dataset:
    """Without costs."""
    return Dataset(**dataset._arrays() | {"costs": None}, card=dataset.card)


def gradients_by_part(agent) -> dict[str, list[Tensor]]:
    """The last update's gradients, by network and its first part (or free parameter)."""
    found: dict[str, list[Tensor]] = {}
    for name, value in vars(agent).items():
        if isinstance(value, nn.Parameter):
            if value.grad is not None:
                found[name] = [value.grad]
        elif isinstance(value, nn.Module):
            for key, parameter in value.named_parameters():
                if parameter.grad is not None:
                    found.setdefault(f"{name}.{key.split('.')[0]}", []).append(parameter.grad)
    return found


def differing(one, two) -> set[str]:
    """Parts whose last gradients differ between two agents."""
    mine, theirs = gradients_by_part(one), gradients_by_part(two)
    assert mine.keys() == theirs.keys()
    return {k for k in mine if any(not torch.equal(a, b) for a, b in zip(mine[k], theirs[k]))}


def ends(cls) -> tuple[Batch, Batch]:
    """For both members, the rows of `walk` that end in a terminal, and those that time out."""
    dataset = walk()
    spec = dataset.spec(cls.Config())
    buffer = ReplayBuffer.from_dataset(dataset, spec, MEMBERS)
    return tuple(
        buffer.gather(torch.from_numpy(np.flatnonzero(flags)).expand(len(MEMBERS), -1))
        for flags in (dataset.terminals, dataset.timeouts)
    )


def walk(episodes: int = 8) -> Dataset:
    """Random rows in episodes of four steps, which end in a terminal and in a time-out in turn."""
    rng = np.random.default_rng(0)
    n = 4 * episodes
    last = np.arange(n) % 4 == 3
    odd = np.arange(n) // 4 % 2 == 1
    return Dataset.from_arrays(
        rng.normal(size=(n, OBS)), rng.uniform(-1, 1, (n, A)), rng.normal(size=n), last & odd,
        last & ~odd, rng.normal(size=(n, OBS)), costs=rng.random(n), horizon=4, id="walk",
        action_low=(-1.0,) * A, action_high=(1.0,) * A,
    )  # fmt: skip


def elsewhere(batch: Batch) -> Batch:
    """The same transitions with other successors."""
    return batch._replace(next_observations=batch.next_observations + 1)


def toy(episodes: int = 120, reward=lambda a: (a + 1) / 2, low: float = -1.0) -> Dataset:
    """Ten steps, each paying (a + 1) / 2 and costing relu(a)²; the states say nothing.

    Logged actions are uniform on [low, 1]. The best policy under a limit L is a = √(L / 10) in
    every step.
    """
    rng = np.random.default_rng(0)
    n = episodes * 10
    s, a, following = rng.normal(size=(n, 1)), rng.uniform(low, 1, (n, 1)), rng.normal(size=(n, 1))
    return Dataset.from_arrays(
        s, a, reward(a[:, 0]), np.zeros(n), np.arange(n) % 10 == 9, following,
        costs=np.maximum(a[:, 0], 0) ** 2, action_low=(-1.0,), action_high=(1.0,), horizon=10,
        id="toy",
    )  # fmt: skip


def constant(action: float = 0.8) -> Dataset:
    """The toy whose logged action is always the same."""
    dataset = toy(20)
    actions = np.full_like(dataset.actions, action)
    return Dataset(**dataset._arrays() | {"actions": actions}, card=dataset.card)


def trained(cls, dataset: Dataset, updates: int, members=(5,), **settings):
    """The agent after a run on a dataset, and the means of its metrics over the last fifth."""
    config = cls.make_config({"hidden": [24, 24], "batch_size": 64, "reward_scale": 1} | settings)
    dataset = cls.prepare(dataset, config)
    spec = dataset.spec(config)
    agent = cls(spec, config, members)
    agent.fit(dataset, lambda line: None)
    buffer = ReplayBuffer.from_dataset(dataset, spec, agent.seeds)
    buffer.restrict(agent.rows(dataset))
    engine = Engine(agent, buffer)
    engine.run(updates - updates // 5)
    engine.read()
    engine.run(updates // 5)
    return agent, engine.read()


def actions_of(policy, rows: int = 41) -> Tensor:
    """What a policy of one observation does over the toy's states, ``[M, rows]``."""
    states = torch.linspace(-2, 2, rows).view(1, -1, 1).expand(policy.members, -1, -1)
    return policy(states)[..., 0]


# Soft actor-critics ------------------------------------------------------------------------------


class PlainSAC:
    """Soft actor-critic updates of one member, from the equations of agents/sac.py.

    The networks of ``member``, and `update`, under the agent's settings.
    """

    def __init__(self, agent, member: int):
        c = self.c = agent.config
        self.member, self.components = member, agent.spec.action_dim
        self.actor, self.critics = Net(agent.actor.mlp, member), nets(agent.critic, member)
        self.scale = []  # m and c of log σ = m f(s) + c
        if c.scale_log_std:
            both = agent.actor.multiplier, agent.actor.offset
            self.scale = [x[member, 0].detach().clone().requires_grad_() for x in both]
        self.targets = [q.copy() for q in self.critics]
        self.log_temperature = torch.tensor(math.log(c.initial_temperature), requires_grad=True)
        self.random = MemberRandom(MEMBERS, stream=1)
        self.actor_optimizer = self.optimizer(self.actor, *self.scale, lr=c.actor_lr)
        self.critic_optimizer = self.optimizer(*self.critics, lr=c.critic_lr)
        self.temperature_optimizer = self.optimizer(self.log_temperature, lr=c.temperature_lr)

    def optimizer(self, *networks, lr: float) -> torch.optim.Optimizer:
        return adam(*networks, lr=lr)

    def normal(self, rows: int) -> Tensor:
        return self.random.normal(rows, self.components)[self.member]

    def draw(self, s: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_std = self.actor(s).chunk(2, -1)
        if self.scale:
            log_std = self.scale[0] * log_std + self.scale[1]
        normal = Normal(mean, log_std.clamp(self.c.log_std_min, 2).exp())
        raw = normal.mean + normal.stddev * noise
        slope = TanhTransform().log_abs_det_jacobian(raw, raw.tanh())
        return raw.tanh(), (normal.log_prob(raw) - slope).sum(-1)

    def critic_loss(self, batch) -> Tensor:
        s, a, r, cost, s2, terminal, _ = batch
        c, alpha = self.c, self.log_temperature.exp().detach()
        with torch.no_grad():
            a2, log_a2 = self.draw(s2, self.normal(len(s)))
            values = torch.stack([q(s2, a2)[:, 0] for q in self.targets])
            if c.target_critics:
                if c.target_replacement:
                    chosen = self.random.integers(c.critics, c.target_critics)[self.member]
                else:
                    order = self.random.uniform(c.critics)[self.member].argsort(descending=True)
                    chosen = order[: c.target_critics]
                values = values[chosen]
            ahead = values.min(0).values
            if c.entropy_backup:
                ahead = ahead - alpha * log_a2
            price = 0 if cost is None else c.cost_penalty * cost
            y = r - price + c.discount * (1 - terminal) * ahead
        return sum(((q(s, a)[:, 0] - y) ** 2).mean() for q in self.critics)

    def actor_loss(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the log densities ``[rows]`` without a gradient."""
        p, log_p = self.draw(s, self.normal(len(s)))
        values = torch.stack([q(s, p)[:, 0] for q in self.critics])
        value = values.min(0).values if self.c.actor_value == "min" else values.mean(0)
        alpha = self.log_temperature.exp().detach()
        return (alpha * log_p - value).mean(), log_p.detach()

    def improve(self, s: Tensor) -> None:
        loss, log_p = self.actor_loss(s)
        descend(self.actor_optimizer, loss)
        target = self.c.target_entropy * self.components
        descend(self.temperature_optimizer, -self.log_temperature * (log_p + target).mean())

    def follow(self) -> None:
        for target, critic in zip(self.targets, self.critics):
            target.follow(critic, self.c.tau)

    def update(self, batch) -> None:
        c, whole = self.c, member_of(batch, self.member)
        for k in range(c.inner_steps):
            part = whole
            if c.fresh_batches:
                rows = slice(k * c.batch_size, (k + 1) * c.batch_size)
                part = whole.map(lambda field, rows=rows: field[rows])
            descend(self.critic_optimizer, self.critic_loss(part))
            if c.actor_steps == "each" or k == c.inner_steps - 1:
                self.improve((whole if c.actor_steps == "all" else part).observations)
            self.follow()

    def assert_is(self, agent) -> None:
        m = self.member
        self.actor.assert_is(agent.actor.mlp, m)
        if self.scale:
            torch.testing.assert_close(agent.actor.multiplier[m, 0], self.scale[0])
            torch.testing.assert_close(agent.actor.offset[m, 0], self.scale[1])
        torch.testing.assert_close(agent.log_temperature[m], self.log_temperature)
        for e, (critic, target) in enumerate(zip(self.critics, self.targets)):
            critic.assert_is(agent.critic.mlp, m, e)
            target.assert_is(agent.critic_target.mlp, m, e)


# What agents are timed against -------------------------------------------------------------------


class Buffer:
    """Transitions as one tensor per field; a batch is one gather per field."""

    def __init__(self, *fields: Tensor):
        self.fields = fields

    def sample(self, rows: int) -> list[Tensor]:
        index = torch.randint(len(self.fields[0]), (rows,), device=self.fields[0].device)
        return [field[index] for field in self.fields]


def perceptron(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i, o in pairwise(sizes):
        layers += [nn.Linear(i, o), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Critic(nn.Module):
    """Q(s, a) ``[…, 1]``."""

    def __init__(self, observation_dim: int, action_dim: int, hidden: tuple[int, ...]):
        super().__init__()
        self.net = perceptron(observation_dim + action_dim, *hidden, 1)

    def forward(self, s: Tensor, a: Tensor) -> Tensor:
        return self.net(torch.cat((s, a), -1))


class Plain:
    """What the two share."""

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device)

    @staticmethod
    def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @staticmethod
    def follow(target: nn.Module, source: nn.Module, rate: float) -> None:
        for slow, fast in zip(target.parameters(), source.parameters()):
            slow.data.copy_(rate * fast.data + (1 - rate) * slow.data)


class A2PR(Plain):
    """One member of A2PR (arXiv 2405.19909, and the authors' code); its actor clones ã or a.

    Args:
        config: hyper-parameters under the names of `saferl.agents.a2pr.A2PRConfig`.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: Any, device: Any = "cpu"):
        super().__init__(device)
        c, o, a = config, observation_dim, action_dim
        self.config, self.latent_dim, self.updates = c, 2 * a, 0
        self.actor = nn.Sequential(perceptron(o, *c.hidden, a), nn.Tanh()).to(device)
        self.critics = nn.ModuleList(Critic(o, a, c.critic_hidden) for _ in range(2)).to(device)
        self.value = perceptron(o, *c.value_hidden, 1).to(device)
        encoder = perceptron(o + a, *c.vae_hidden, 2 * self.latent_dim)
        decoder = nn.Sequential(perceptron(o + self.latent_dim, *c.vae_hidden, a), nn.Tanh())
        self.vae = nn.ModuleDict({"encoder": encoder, "decoder": decoder}).to(device)
        self.actor_target = copy.deepcopy(self.actor)
        self.critic_targets = copy.deepcopy(self.critics)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=c.actor_lr)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=c.critic_lr)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=c.value_lr)
        self.vae_optimizer = torch.optim.Adam(self.vae.parameters(), lr=c.vae_lr)

    def reconstruct(self, s: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Actions decoded from a draw of the posterior, its mean and its standard deviation."""
        mean, log_std = self.vae["encoder"](torch.cat((s, a), 1)).chunk(2, 1)
        std = log_std.clamp(-4, 15).exp()
        latent = mean + std * self.normal(*mean.shape)
        return self.vae["decoder"](torch.cat((s, latent), 1)), mean, std

    def update(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminal: Tensor) -> None:
        """``s, s2 [B, O]``, ``a [B, A]``, ``r, terminal [B, 1]``."""
        c = self.config
        self.updates += 1
        with torch.no_grad():
            noise = (self.normal(*a.shape) * c.policy_noise).clamp(-c.noise_clip, c.noise_clip)
            a2 = (self.actor_target(s2) + noise).clamp(-1, 1)
            ahead = c.discount * (1 - terminal)
            y = r + ahead * torch.min(*(critic(s2, a2) for critic in self.critic_targets))
        q1, q2 = (critic(s, a) for critic in self.critics)
        self.step(self.critic_optimizer, F.mse_loss(q1, y) + F.mse_loss(q2, y))

        with torch.no_grad():
            online = r + ahead * torch.min(*(critic(s2, a2) for critic in self.critics))
            value_target = torch.min(online, y)
        v = self.value(s)
        self.step(self.value_optimizer, F.mse_loss(v, value_target))
        v = v.detach()

        decoded, mean, std = self.reconstruct(s, a)
        with torch.no_grad():
            advantage = self.critics[0](s, a) - v
        error = (c.vae_weight * (advantage > 0) * (decoded - a) ** 2).mean()
        divergence = -0.5 * (1 + torch.log(std**2) - mean**2 - std**2).mean()
        self.step(self.vae_optimizer, error + c.kl_weight * divergence)

        if self.updates % c.policy_interval:
            return
        p = self.actor(s)
        q = self.critics[0](s, p)
        candidate, _, _ = self.reconstruct(s, p)
        with torch.no_grad():
            candidate_advantage = self.critics[0](s, candidate) - v
            gate = c.mask * ((candidate_advantage >= 0) | (advantage > 0))
        clone = torch.where(candidate_advantage >= advantage, candidate, a)
        weight = c.alpha / q.abs().mean().detach()
        self.step(self.actor_optimizer, (gate * (p - clone) ** 2).mean() - weight * q.mean())
        for target, critic in zip(self.critic_targets, self.critics):
            self.follow(target, critic, c.tau)
        self.follow(self.actor_target, self.actor, c.tau)


class Policy(nn.Module):
    """CQL's tanh Gaussian, with a trained multiplier and offset of log σ."""

    def __init__(self, observation_dim: int, action_dim: int, config: Any, normal: Any):
        super().__init__()
        self.net = perceptron(observation_dim, *config.hidden, 2 * action_dim)
        self.multiplier = nn.Parameter(torch.tensor(config.log_std_multiplier))
        self.offset = nn.Parameter(torch.tensor(config.log_std_offset))
        self.normal = normal

    def forward(self, s: Tensor, draws: int = 0) -> tuple[Tensor, Tensor]:
        """Actions ``[B, A]`` and their log densities ``[B]``; ``[B, draws, …]`` if any."""
        if draws:
            s = s.unsqueeze(1).repeat(1, draws, 1)
        mean, log_std = self.net(s).chunk(2, -1)
        log_std = (self.multiplier * log_std + self.offset).clamp(-20, 2)
        gaussian, squash = Normal(mean, log_std.exp()), TanhTransform()
        raw = mean + gaussian.stddev * self.normal(*mean.shape)
        action = squash(raw)
        density = gaussian.log_prob(raw) - squash.log_abs_det_jacobian(raw, action)
        return action, density.sum(-1)


class CQL(Plain):
    """One member of CQL(H) with a fixed weight (arXiv 2006.04779) in the way of CORL.

    Args:
        config: hyper-parameters under the names of `saferl.agents.cql.CQLConfig`; the switches of
            other variants are not read.
    """

    def __init__(self, observation_dim: int, action_dim: int, config: Any, device: Any = "cpu"):
        super().__init__(device)
        c, o, a = config, observation_dim, action_dim
        self.config, self.action_dim = c, a
        self.actor = Policy(o, a, c, lambda *shape: self.normal(*shape)).to(device)
        self.critics = nn.ModuleList(Critic(o, a, c.critic_hidden) for _ in range(2)).to(device)
        self.critic_targets = copy.deepcopy(self.critics)
        self.log_temperature = torch.zeros((), device=device, requires_grad=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=c.actor_lr)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), lr=c.critic_lr)
        self.temperature_optimizer = torch.optim.Adam([self.log_temperature], lr=c.temperature_lr)

    def update(self, s: Tensor, a: Tensor, r: Tensor, s2: Tensor, terminal: Tensor) -> None:
        """``s, s2 [B, O]``, ``a [B, A]``, ``r, terminal [B, 1]``."""
        c, n = self.config, self.config.samples
        p, log_p = self.actor(s)
        entropy = (log_p - self.action_dim).detach().mean()
        temperature_loss = -self.log_temperature * entropy
        temperature = self.log_temperature.exp().detach()
        q1, q2 = (critic(s, p).squeeze(1) for critic in self.critics)
        actor_loss = (temperature * log_p - torch.min(q1, q2)).mean()

        with torch.no_grad():
            a2, _ = self.actor(s2)
            ahead = torch.min(*(critic(s2, a2) for critic in self.critic_targets))
            y = r + c.discount * (1 - terminal) * ahead
        uniform = 2 * self.uniform(len(s), n, self.action_dim) - 1
        here, log_here = (x.detach() for x in self.actor(s, n))
        there, log_there = (x.detach() for x in self.actor(s2, n))
        repeated = s.unsqueeze(1).repeat(1, n, 1)
        loss = 0.0
        for critic in self.critics:
            logged = critic(s, a)
            proposed = torch.cat(
                (
                    critic(repeated, uniform).squeeze(-1) + self.action_dim * math.log(2),
                    critic(repeated, there).squeeze(-1) - log_there,
                    critic(repeated, here).squeeze(-1) - log_here,
                ),
                1,
            )
            gap = torch.logsumexp(proposed / c.temperature, 1) * c.temperature - logged.squeeze(1)
            loss = loss + F.mse_loss(logged, y) + c.weight * gap.mean()

        self.step(self.temperature_optimizer, temperature_loss)
        self.step(self.actor_optimizer, actor_loss)
        self.step(self.critic_optimizer, loss)
        for target, critic in zip(self.critic_targets, self.critics):
            self.follow(target, critic, c.tau)


KINDS = {"a2pr": A2PR, "cql": CQL}
