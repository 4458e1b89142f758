"""A2PR and CQL as one writes them for one network at a time: what the agents are timed against.

Written from the equations with `torch.nn.Linear`, a module per critic, `torch.optim.Adam` as it
comes and `backward`, in the structure of the public single-file implementations (the authors' for
A2PR, CORL's for CQL) and with none of saferl's code. `tests/agents/test_plain.py` shows that an
update is the agent's; `benchmarks/throughput.py` times it.

Every draw goes through ``self.normal`` and ``self.uniform``, functions of a shape.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform


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
