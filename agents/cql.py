"""Conservative Q-Learning (Kumar et al. 2020, arXiv 2006.04779), continuous actions.

Soft actor-critic with a penalty that lowers Q on proposed actions and raises it on logged ones.
With targets Q̄ (Polyak average), p ~ π(·|s), ℓ = log π(p|s), temperature κ = e^k entropy_multiplier
and N draws each of u ~ U(-1, 1)^d, b ~ π(·|s'), q ~ π(·|s), all valued at s:

    c       = [Q(s,u_j) + d log 2,  Q(s,b_j) - log π(b_j|s'),  Q(s,q_j) - log π(q_j|s)]     3N terms
    gap_e   = mean clip(T logsumexp(c / T) - Q_e(s, a), gap_min, gap_max)
    y       = r + γ (1 - terminal) min_e Q̄_e(s', a'),   a' ~ π(·|s')
              max_backup: max over N draws a' of min_e Q̄_e(s', a');  entropy_backup: -κ log π(a'|s')
    L_Q     = Σ_e mean (Q_e(s, a) - y)² + Σ_e w gap_e                             fixed weight
              Σ_e mean (Q_e(s, a) - y)² + Σ_e α' w (gap_e - τ)                    lagrange
    L_α'    = -½ Σ_e α' w (gap_e - τ),   α' = clip(e^z, 0, 1e6)                   z is stepped
    L_π     = mean [κ ℓ - min_e Q_e(s, p)];  first bc_steps: mean [κ ℓ - log π(a|s)]
    L_k     = -k · mean (ℓ + H̄),   H̄ = target_entropy · d
    Q̄      ← τ_soft Q + (1 - τ_soft) Q̄

Without ``importance_sampling``, c = [Q(s,u_j), Q(s,a), Q(s,b_j), Q(s,q_j)], which is near CQL(ρ).
All losses are those of the parameters before the update, so the order of the steps changes nothing.
Densities and proposed actions carry no gradient in L_Q: the critics' loss moves critics alone.

``critic_layer_norm`` and ``actor_layer_norm`` are switches that CORL's code has not.

Deviations from CORL's cql.py, otherwise followed:
- every critic has ``critic_hidden`` layers (CORL's second critic ignores the configured depth);
- log π(a|s) in the warm-up is that of the logged action (CORL returns a fresh sample's);
- logged actions are clipped to ±0.999 in that density alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saferl.nn import QEnsemble, TanhGaussianActor, orthogonal, polyak, torch_default, xavier
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .shared.agent import Agent, AgentConfig, Metrics


@dataclass(frozen=True)
class CQLConfig(AgentConfig):
    """Defaults: CORL's for D4RL locomotion."""

    hidden: tuple[int, ...] = (256, 256, 256)  # units of the actor's hidden layers
    critic_hidden: tuple[int, ...] = (256, 256, 256)  # units of each critic's hidden layers
    normalize_observations: bool = True
    actor_lr: float = 3e-5
    critic_lr: float = 3e-4
    temperature_lr: float = 3e-5  # of k; CORL: the actor's
    multiplier_lr: float = 3e-4  # of z; CORL: the critics'
    critics: int = 2  # ensemble size E
    tau: float = 0.005  # τ_soft, Polyak rate of the target critics per update
    weight: float = 10.0  # w of the penalty
    samples: int = 10  # N
    temperature: float = 1.0  # T of the logsumexp
    importance_sampling: bool = True
    lagrange: bool = False  # learn α' so that the gap approaches target_gap
    target_gap: float = 1.0  # τ, in units of Q
    initial_multiplier: float = 1.0  # z at the start: log α'
    gap_min: float = -math.inf  # clip of each row's gap, in units of Q
    gap_max: float = math.inf
    max_backup: bool = False
    entropy_backup: bool = False
    bc_steps: int = 0  # updates in which the actor clones
    automatic_entropy: bool = True  # False: κ = entropy_multiplier
    target_entropy: float = -1.0  # H̄ per action component, nats
    entropy_multiplier: float = 1.0
    actor_layer_norm: bool = False
    critic_layer_norm: bool = False
    orthogonal_init: bool = True  # of the critics; False: torch's, last layer Xavier with gain 0.01
    log_std_multiplier: float = 1.0  # trained m of log σ = m f(s) + c, at the start
    log_std_offset: float = -1.0  # trained c, at the start


class CQL(Agent[CQLConfig]):
    Config = CQLConfig
    per_member = frozenset({"discount", "weight", "target_gap", "temperature"})

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        start = c.log_std_multiplier, c.log_std_offset
        self.actor = TanhGaussianActor(
            init, o, a, c.hidden, final_init=xavier(1e-2), scale_log_std=True, log_std_start=start,
            layer_norm=c.actor_layer_norm,
        )  # fmt: skip
        inits: tuple[Any, Any] = torch_default, xavier(1e-2)
        if c.orthogonal_init:
            inits = orthogonal(), orthogonal(1e-2)
        layer_norm = c.critic_layer_norm
        self.critic = QEnsemble(init, o, a, c.critic_hidden, c.critics, layer_norm, *inits)
        self.critic_target = self.target_of(self.critic)
        self.log_temperature = nn.Parameter(torch.zeros(self.members, device=self.device))  # k
        self.log_multiplier = nn.Parameter(  # z
            torch.full((self.members,), c.initial_multiplier, device=self.device)
        )
        self.actor_optimizer = self.adam(self.actor, lr=c.actor_lr)
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)
        self.temperature_optimizer = self.adam(self.log_temperature, lr=c.temperature_lr)
        self.multiplier_optimizer = self.adam(self.log_multiplier, lr=c.multiplier_lr)

    def update_key(self, update: int) -> bool:
        """Whether the actor clones."""
        return update <= self.config.bc_steps

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        rows, a = batch.rewards.shape[1], self.spec.action_dim
        # Per row: one draw for the actor, N for each proposal from π, and 1 or N for the target.
        backups = c.samples if c.max_backup else 1
        noise = self.random.normal(rows, 1 + 2 * c.samples + backups, a)
        actor_noise = noise[:, :, 0]
        penalty_noise, next_penalty_noise, target_noise = noise[:, :, 1:].split(
            [c.samples, c.samples, backups], 2
        )
        uniform = self.random.uniform(rows, c.samples, a).mul_(2).sub_(1)

        # π at s and s', once each, serves the actor, the target and the penalty. Taking the actor's
        # step first changes nothing for the rest, which only uses these tensors.
        mean, log_std = self.actor(batch.observations)
        with torch.no_grad():
            next_policy = [x.unsqueeze(2) for x in self.actor(batch.next_observations)]
            policy = [x.detach().unsqueeze(2) for x in (mean, log_std)]
            here, here_density = self.actor.squash(*policy, penalty_noise)
            there, there_density = self.actor.squash(*next_policy, next_penalty_noise)
            backup_actions, backup_density = self.actor.squash(*next_policy, target_noise)
        metrics, temperature = self._improve(batch, mean, log_std, actor_noise)

        with torch.no_grad():
            next_q = self.critic_target.many(batch.next_observations, backup_actions).amin(1)
            next_q, best = next_q.max(-1)
            if c.entropy_backup:
                next_q -= temperature * backup_density.gather(-1, best[..., None]).squeeze(-1)
            target = batch.rewards + self.scalar("discount") * (1 - batch.terminals) * next_q

        actions = torch.cat((uniform, there, here, batch.actions.unsqueeze(2)), 2)
        # [M, E, B, 3N + 1]
        values = self.calibrate(self.critic.many(batch.observations, actions), batch)
        proposed, q = values[..., :-1], values[..., -1]
        if c.importance_sampling:
            density = torch.full_like(there_density, -a * math.log(2))
            density = torch.cat((density, there_density, here_density), 2)
            values = proposed - density.unsqueeze(1)
        bellman = (q - target[:, None]).square().mean(-1).sum(1)
        scale = self.scalar("temperature", 3)
        bound = (values / scale).logsumexp(-1, keepdim=True) * scale
        gap = (bound.squeeze(-1) - q).clamp(c.gap_min, c.gap_max).mean(-1)  # [M, E]
        penalty = self._penalty(gap, metrics)
        self.minimise(self.critic_optimizer, bellman + penalty)
        polyak(self.critic_target, self.critic, c.tau)
        return metrics | {
            "critic_loss": bellman.detach(),
            "gap": gap.detach().mean(1),
            "q": q.detach().mean((1, 2)),
            # Negative where the penalty works: unseen actions are valued below logged ones.
            "q_uniform_minus_data": (
                proposed[..., : c.samples].detach().mean((1, 2, 3)) - q.detach().mean((1, 2))
            ),
        }

    def calibrate(self, values: Tensor, batch: Batch) -> Tensor:
        """What the penalty and L_Q see of values at u, b, q and a, ``[M, E, B, 3N + 1]``."""
        return values

    def _improve(
        self, batch: Batch, mean: Tensor, log_std: Tensor, noise: Tensor
    ) -> tuple[Metrics, Tensor]:
        """Steps of π and k; the metrics and the temperature κ ``[M, 1]`` before the step."""
        c = self.config
        actions, log_prob = self.actor.squash(mean, log_std, noise)
        temperature = torch.full_like(self.log_temperature, c.entropy_multiplier)[:, None]
        if c.automatic_entropy:
            temperature = self.log_temperature.detach().exp()[:, None] * temperature
        if self.key:
            objective = self.actor.density(mean, log_std, batch.actions)
        else:
            objective = self.critic(batch.observations, actions, frozen=True).amin(1)
        actor_loss = (temperature * log_prob - objective).mean(-1)
        entropy = -log_prob.detach().mean(-1)
        if c.automatic_entropy:
            target = c.target_entropy * self.spec.action_dim
            self.minimise(self.temperature_optimizer, self.log_temperature * (entropy - target))
        self.minimise(self.actor_optimizer, actor_loss)
        metrics = {
            "actor_loss": actor_loss.detach(),
            "entropy": entropy,
            "temperature": temperature[:, 0],
        }
        return metrics, temperature

    def _penalty(self, gap: Tensor, metrics: Metrics) -> Tensor:
        """Σ_e of the penalty ``[M]`` from the gaps ``[M, E]``; with `lagrange`, steps z."""
        weight = self.scalar("weight")
        if not self.config.lagrange:
            return (weight * gap).sum(1)
        excess = weight * (gap - self.scalar("target_gap"))
        multiplier = self.log_multiplier.exp().clamp(0, 1e6)
        metrics["multiplier"] = multiplier.detach()
        loss = -0.5 * multiplier * excess.detach().sum(1)
        self.minimise(self.multiplier_optimizer, loss)
        return (multiplier.detach()[:, None] * excess).sum(1)
