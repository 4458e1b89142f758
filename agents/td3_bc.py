"""TD3+BC (Fujimoto and Gu 2021, arXiv 2106.06860): TD3 with a cloning term in the actor's loss.

With targets π̄, Q̄ (Polyak averages), a' = clip(π̄(s') + clip(σ ε, ±c), ±1), ε ~ N(0, 1):

    y       = r + γ (1 - terminal) min_e Q̄_e(s', a')
    L_Q     = Σ_e mean (Q_e(s, a) - y)²                                  every update
    λ       = α / mean |Q_1(s, π(s))|                                    no gradient through λ
    L_π     = -λ mean Q_1(s, π(s)) + mean (π(s) - a)²                    every policy_interval-th
    Q̄, π̄   ← τ (Q, π) + (1 - τ) (Q̄, π̄)                                after the actor's step

The actor's step sees the critics after their step of the same update. Actions live in [-1, 1].

Deviations: none known from the authors' code (sfujim/TD3_BC) and CORL's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saferl.nn import DeterministicActor, QEnsemble, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .shared.agent import Agent, AgentConfig, Metrics


@dataclass(frozen=True)
class TD3BCConfig(AgentConfig):
    """Defaults: the authors' for all D4RL locomotion datasets."""

    normalize_observations: bool = True
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    alpha: float = 2.5  # weight of the value term; larger imitates less
    policy_noise: float = 0.2  # σ of the target action's noise, half action ranges
    noise_clip: float = 0.5  # c, half action ranges
    policy_interval: int = 2  # critic updates per actor update
    tau: float = 0.005  # Polyak rate of the targets per actor update


class TD3BC(Agent[TD3BCConfig]):
    Config = TD3BCConfig
    per_member = frozenset({"alpha", "discount", "policy_noise"})

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        self.actor = DeterministicActor(init, o, a, c.hidden)
        self.critic = QEnsemble(init, o, a, c.hidden, 2)
        self.actor_target = self.target_of(self.actor)
        self.critic_target = self.target_of(self.critic)
        self.actor_optimizer = self.adam(self.actor, lr=c.actor_lr)
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)

    def update_key(self, update: int) -> bool:
        """Whether actor and targets are stepped."""
        return update % self.config.policy_interval == 0

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        with torch.no_grad():
            noise = self.random.normal(*batch.actions.shape[1:]) * self.scalar("policy_noise", 2)
            noise = noise.clamp_(-c.noise_clip, c.noise_clip)
            next_actions = (self.actor_target(batch.next_observations) + noise).clamp_(-1, 1)
            next_q = self.critic_target(batch.next_observations, next_actions).amin(1)
            target = batch.rewards + self.scalar("discount") * (1 - batch.terminals) * next_q
        q = self.critic(batch.observations, batch.actions)
        critic_loss = (q - target[:, None]).square().mean(-1).sum(1)
        self.minimise(self.critic_optimizer, critic_loss)
        metrics = {"critic_loss": critic_loss.detach(), "q": q.detach().mean((1, 2))}

        if self.key:
            actions = self.actor(batch.observations)
            policy_q = self.critic(batch.observations, actions, 1, frozen=True)[:, 0]
            weight = self.scalar("alpha", 0) / policy_q.detach().abs().mean(-1)
            cloning = (actions - batch.actions).square().mean((1, 2))
            actor_loss = cloning - weight * policy_q.mean(-1)
            self.minimise(self.actor_optimizer, actor_loss)
            polyak(self.critic_target, self.critic, c.tau)
            polyak(self.actor_target, self.actor, c.tau)
            metrics |= {"actor_loss": actor_loss.detach(), "cloning_loss": cloning.detach()}
        return metrics
