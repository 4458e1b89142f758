"""ReBRAC (Tarasov et al. 2023, arXiv 2305.09836): TD3+BC with a penalty in the target as well.

With targets π̄, Q̄ (Polyak averages), a' = clip(π̄(s') + clip(σ ε, ±c), ±1), ε ~ N(0, 1), a'_D the
logged action at s', n = 1 where it is known, and |·|² the sum of squares over components:

    y       = r + γ (1 - terminal) [min_e Q̄_e(s', a') - β_c n |a' - a'_D|²]
    L_Q     = Σ_e mean (Q_e(s, a) - y)²                                  every update
    λ       = 1 / mean |min_e Q_e(s, π(s))|                              no gradient through λ
    L_π     = mean [β_a |π(s) - a|² - λ min_e Q_e(s, π(s))]              every policy_interval-th
    Q̄, π̄   ← τ (Q, π) + (1 - τ) (Q̄, π̄)                                after L_Q's step, before L_π's

Critics have LayerNorm. The batch needs ``next_actions`` (`saferl.replay.extras`).

Deviations from CORL's rebrac.py, otherwise followed:
- the last row of an episode that timed out is kept, with n = 0; there it is left out;
- the first actor step is in update ``policy_interval``; there it is in the first;
- LayerNorm comes before the ReLU; there it comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from saferl.nn import DeterministicActor, QEnsemble, polyak
from saferl.nn.mlp import uniform
from saferl.replay import Batch, Extra, NextActions
from saferl.rng import MemberRandom

from .shared.agent import Agent, Metrics
from .shared.config import AgentConfig


@dataclass(frozen=True)
class ReBRACConfig(AgentConfig):
    """Defaults: those of CORL's code; β_a and β_c have to be chosen per dataset."""

    batch_size: int = 1024
    hidden: tuple[int, ...] = (256, 256, 256)
    actor_lr: float = 1e-3
    critic_lr: float = 1e-3
    actor_beta: float = 1.0  # β_a, weight of the actor's penalty; smaller imitates less
    critic_beta: float = 1.0  # β_c, weight of the target's penalty, in units of Q; 0: none
    normalize_q: bool = True  # False: λ = 1
    policy_noise: float = 0.2  # σ of the target action's noise, half action ranges
    noise_clip: float = 0.5  # c, half action ranges
    policy_interval: int = 2  # critic updates per actor update
    tau: float = 0.005  # Polyak rate of the targets per actor update
    actor_layer_norm: bool = False
    critic_layer_norm: bool = True


class ReBRAC(Agent[ReBRACConfig]):
    Config = ReBRACConfig
    per_member = frozenset({"actor_beta", "critic_beta", "discount", "policy_noise"})

    @classmethod
    def batch_extras(cls, config: Any) -> tuple[Extra, ...]:
        return (NextActions(),)

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        hidden = uniform(bias=0.1)
        self.actor = DeterministicActor(
            init, o, a, c.hidden, c.actor_layer_norm, hidden, uniform(1e-3)
        )
        self.critic = QEnsemble(init, o, a, c.hidden, 2, c.critic_layer_norm, hidden, uniform(3e-3))
        self.actor_target = self.target_of(self.actor)
        self.critic_target = self.target_of(self.critic)
        self.actor_optimizer = self.adam(self.actor, lr=c.actor_lr)
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)

    def update_key(self, update: int) -> bool:
        """Whether actor and targets are stepped."""
        return update % self.config.policy_interval == 0

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        not_done = 1 - batch.terminals
        with torch.no_grad():
            noise = self.random.normal(*batch.actions.shape[1:]) * self.scalar("policy_noise", 2)
            noise = noise.clamp_(-c.noise_clip, c.noise_clip)
            next_actions = (self.actor_target(batch.next_observations) + noise).clamp_(-1, 1)
            next_q = self.critic_target(batch.next_observations, next_actions).amin(1)
            distance = (next_actions - batch.extras["next_actions"]).square().sum(-1)
            distance = distance * batch.extras["has_next_action"]
            next_q = next_q - self.scalar("critic_beta") * distance
            target_q = batch.rewards + self.scalar("discount") * not_done * next_q
        q = self.critic(batch.observations, batch.actions)
        critic_loss = (q - target_q[:, None]).square().mean(-1).sum(1)
        self.minimise(self.critic_optimizer, critic_loss)
        metrics = {
            "critic_loss": critic_loss.detach(),
            "q": q.detach().mean((1, 2)),
            "next_distance": distance.mean(-1),
        }
        if self.key:
            polyak(self.critic_target, self.critic, c.tau)
            polyak(self.actor_target, self.actor, c.tau)
            actions = self.actor(batch.observations)
            policy_q = self.critic(batch.observations, actions, frozen=True).amin(1)
            cloning = (actions - batch.actions).square().sum(-1).mean(-1)
            value = policy_q.mean(-1)
            if c.normalize_q:
                value = value / policy_q.detach().abs().mean(-1)
            actor_loss = self.scalar("actor_beta", 0) * cloning - value
            self.minimise(self.actor_optimizer, actor_loss)
            metrics |= {"actor_loss": actor_loss.detach(), "cloning_loss": cloning.detach()}
        return metrics
