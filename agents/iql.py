"""Implicit Q-Learning (Kostrikov, Nair and Levine 2021, arXiv 2110.06169).

Values are learned without asking the critics about any action outside the data. One update, with
Q̄ the Polyak average of the twin critics and |u|-weights w_η(u) = η if u > 0 else 1 - η:

    v'      = V(s')                                       before V's step
    A       = min_e Q̄_e(s, a) - V(s)                     before V's step, reused by the actor
    1. L_V  = mean w_η(A) A²                              step V
    2. L_Q  = ½ Σ_e mean (Q_e(s, a) - [r + γ (1 - terminal) v'])²         step Q
       Q̄   ← τ Q + (1 - τ) Q̄
    3. L_π  = mean [-min(exp(β A), 100) log π(a|s)]       step π, no gradient through A

This is the order of CORL's port. π is a Gaussian with mean tanh f(s) and a σ that does not depend
on the state; its learning rate falls along a cosine to 0 at ``actor_decay_steps``.

Deviations:
- the authors' JAX code steps π before Q and bootstraps from V after its step; CORL, followed here,
  does neither;
- the lower clip of log σ is -20 as in CORL (-5 in the authors' code).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from saferl.nn import GaussianActor, QEnsemble, VEnsemble, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .shared.agent import Agent, AgentConfig, Metrics


@dataclass(frozen=True)
class IQLConfig(AgentConfig):
    """Defaults: the authors' for D4RL locomotion, which also normalise rewards there."""

    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    expectile: float = 0.7  # η; 0.5 evaluates the behaviour, → 1 the best action in the data
    beta: float = 3.0  # inverse temperature of the advantage weights; 0 is cloning
    advantage_clip: float = 100.0  # largest weight exp(β A)
    tau: float = 0.005  # Polyak rate of the target critics per update
    actor_decay_steps: int = 1_000_000  # updates until the actor's cosine reaches 0; 0: constant
    actor_dropout: float = 0.0  # of hidden units, in training only


class IQL(Agent[IQLConfig]):
    Config = IQLConfig
    per_member = frozenset({"expectile", "beta", "discount"})

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        self.actor = GaussianActor(init, o, a, c.hidden)
        self.critic = QEnsemble(init, o, a, c.hidden, 2)
        self.value = VEnsemble(init, o, c.hidden)
        self.critic_target = self.target_of(self.critic)
        rate = torch.tensor(c.actor_lr, device=self.device)
        self.actor_optimizer = self.adam(self.actor, lr=rate)
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)
        self.value_optimizer = self.adam(self.value, lr=c.value_lr)

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        with torch.no_grad():
            next_v = self.value(batch.next_observations)[:, 0]
            target = batch.rewards + self.scalar("discount") * (1 - batch.terminals) * next_v
            target_q = self.critic_target(batch.observations, batch.actions).amin(1)

        v = self.value(batch.observations)[:, 0]
        difference = target_q - v
        advantage = difference.detach()
        expectile = self.scalar("expectile")
        weight = torch.where(advantage > 0, expectile, 1 - expectile)
        value_loss = (weight * difference.square()).mean(-1)
        self.minimise(self.value_optimizer, value_loss)

        q = self.critic(batch.observations, batch.actions)
        critic_loss = (q - target[:, None]).square().mean((1, 2))
        self.minimise(self.critic_optimizer, critic_loss)
        polyak(self.critic_target, self.critic, c.tau)

        weight = (self.scalar("beta") * advantage).exp().clamp_max(c.advantage_clip)
        log_prob = self.actor.log_prob(
            batch.observations, batch.actions, c.actor_dropout, self.random
        )
        actor_loss = -(weight * log_prob).mean(-1)
        self.decay(self.actor_optimizer, c.actor_lr, c.actor_decay_steps)
        self.minimise(self.actor_optimizer, actor_loss)
        return {
            "critic_loss": critic_loss.detach(),
            "value_loss": value_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "q": q.detach().mean((1, 2)),
            "v": v.detach().mean(-1),
            "advantage_weight": weight.mean(-1),
        }
