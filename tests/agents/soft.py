"""Plain soft actor-critic updates of one member, written from the equations of agents/sac.py."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Normal, TanhTransform

from saferl.rng import MemberRandom

from .reference import MEMBERS, Net, adam, descend, member_of, nets


class Plain:
    """The networks of ``member``, and `update`, under the agent's settings."""

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
