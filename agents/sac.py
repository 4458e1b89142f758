"""Soft Actor-Critic (Haarnoja et al. 2018, arXiv 1812.05905), the online agent.

With noise-free targets Q̄ (Polyak average), a' ~ π(·|s'), p ~ π(·|s), H̄ = -dim(a):

    y       = r - κ c + γ (1 - terminal) [min_e Q̄_e(s', a') - α log π(a'|s')]
    L_Q     = Σ_e mean (Q_e(s, a) - y)²
    L_π     = mean [α log π(p|s) - min_e Q_e(s, p)]
    L_α     = -log α · mean (log π(p|s) + H̄)
    Q̄      ← τ Q + (1 - τ) Q̄

κ (``cost_penalty``) is ours: a fixed price per unit of cost, 0 by default. With one κ per member,
one run gives behaviours from fast and costly to slow and safe.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from saferl.data.buffer import Batch
from saferl.nn import QEnsemble, TanhGaussianActor, polyak
from saferl.rng import MemberRandom

from .base import Agent, AgentConfig, Metrics


@dataclass(frozen=True)
class SACConfig(AgentConfig):
    """Defaults: the authors' second version."""

    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    temperature_lr: float = 3e-4
    initial_temperature: float = 1.0  # α at the start
    tau: float = 0.005  # Polyak rate of the target critics per update
    critics: int = 2  # ensemble size E
    cost_penalty: float = 0.0  # κ, reward units per unit of cost
    random_steps: int = 5000  # environment steps of uniform actions before learning starts


class SAC(Agent):
    Config = SACConfig
    variants = frozenset({"discount", "cost_penalty"})

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        self.actor = TanhGaussianActor(init, o, a, c.hidden, log_std_min=-5.0)
        self.critic = QEnsemble(init, o, a, c.hidden, c.critics)
        self.critic_target = self.target_of(self.critic)
        start = torch.full((self.members,), float(c.initial_temperature)).log()
        self.log_temperature = nn.Parameter(start.to(self.device))
        self.actor_optimizer = self.adam(self.actor, lr=c.actor_lr)
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)
        self.temperature_optimizer = self.adam(self.log_temperature, lr=c.temperature_lr)

    def learn(self, batch: Batch) -> Metrics:
        rows, a = batch.rewards.shape[1], self.spec.action_dim
        noise, next_noise = self.random.normal(2, rows, a).unbind(1)
        temperature = self.log_temperature.detach().exp()[:, None]

        with torch.no_grad():
            next_actions, next_log_prob = self.actor.squash(
                *self.actor(batch.next_observations), next_noise
            )
            next_q = self.critic_target(batch.next_observations, next_actions).amin(1)
            rewards = batch.rewards
            if batch.costs is not None:
                rewards = rewards - self.scalar("cost_penalty") * batch.costs
            target = rewards + self.scalar("discount") * (1 - batch.terminals) * (
                next_q - temperature * next_log_prob
            )
        q = self.critic(batch.observations, batch.actions)
        critic_loss = (q - target[:, None]).square().mean(-1).sum(1)
        self.minimise(self.critic_optimizer, critic_loss)

        actions, log_prob = self.actor.squash(*self.actor(batch.observations), noise)
        policy_q = self.critic(batch.observations, actions, frozen=True).amin(1)
        actor_loss = (temperature * log_prob - policy_q).mean(-1)
        self.minimise(self.actor_optimizer, actor_loss)

        entropy = -log_prob.detach().mean(-1)
        temperature_loss = self.log_temperature * (entropy + a)  # H̄ = -a
        self.minimise(self.temperature_optimizer, temperature_loss)
        polyak(self.critic_target, self.critic, self.config.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "q": q.detach().mean((1, 2)),
            "entropy": entropy,
            "temperature": temperature[:, 0],
        }
