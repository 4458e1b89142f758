"""BCQ-Lag: batch-constrained Q-learning whose actor pays for costs at a price set by a controller.

A comparator of the DSRL benchmark (Liu et al. 2023, arXiv 2306.09303): BCQ (Fujimoto et al. 2019,
arXiv 1812.02900) with the PID Lagrangian of Stooke et al. (2020, arXiv 2007.03964), as OSRL builds
it. A VAE of the logged actions proposes â, and a perturbation f of bounded reach φ moves it:

    p_f(s, â) = clip(â + φ tanh f(s, â), ±1),    â = decode(s, clip(ε, ±½)),   ε ~ N(0, 1)

Critics of reward Q and of cost Qc are two groups of two networks, e = (g, k); targets Q̄, Q̄c, f̄ are
Polyak averages; a'_1 … a'_n = p_f̄(s', â'_j). With q the limit as a discounted budget
(`saferl.safety.limits.convert`), one update is, in order:

    1. L_E  = mean (decode(s, μ + ς ε) - a)² - β ½ mean (1 + log ς² - μ² - ς²)       step VAE
       m_j  = λ min_g min_k Q̄(s', a'_j) + (1 - λ) max_g min_k Q̄(s', a'_j)
    2. L_Q  = Σ_e mean (Q_e(s, a) - [r + γ (1 - terminal) max_j m_j])²               step Q
       n_j  = λ max_g max_k Q̄c(s', a'_j) + (1 - λ) min_g max_k Q̄c(s', a'_j)
    3. L_Qc = Σ_e mean (Qc_e(s, a) - [c + γ_c (1 - terminal) max_j n_j])²            step Qc
       p    = p_f(s, â);   e = mean max_e Qc_e(s, p) - q
    4. I   ← relu(I + e);  κ = relu(kp relu(e) + ki I + kd relu(e - e_before))
    5. L_π  = -mean min_e Q_e(s, p) + κ e                                            step f alone
       Q̄, Q̄c, f̄ ← τ (Q, Qc, f) + (1 - τ) (Q̄, Q̄c, f̄)

Deviations from OSRL, each a defect there or a matter of size:
- costs take the *larger* network wherever rewards take the smaller. OSRL takes the smaller for both
  (in the groups, in the mixture of groups and in the actor's loss), which is optimistic about cost;
- terminals end the bootstrapping of costs as well, and time-outs end neither;
- both critics are given the same a'_j; f has ReLU units (OSRL: tanh);
- the policy is deterministic: it decodes ε = 0, the middle of the prior. OSRL acts on a random ε,
  as `Policy.sample` does here.
OSRL's own behaviour is not offered as a switch: it needs time-outs that the buffer does not hold.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from saferl.nn import MLP, VAE, QEnsemble, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom
from saferl.safety.multipliers import Multipliers

from .shared.agent import Metrics
from .shared.constraint import costs_of
from .shared.limited import Limited, LimitedConfig

GROUPS = (2, 2)  # groups of critics, networks in a group
PRIOR_CLIP = 0.5


@dataclass(frozen=True)
class BCQLagConfig(LimitedConfig):
    """Defaults: OSRL's."""

    vae_hidden: tuple[int, ...] = (400, 400)  # of the VAE's encoder and of its decoder
    actor_lr: float = 1e-3
    critic_lr: float = 1e-3
    vae_lr: float = 1e-3
    perturbation: float = 0.05  # φ, half action ranges
    samples: int = 10  # n, next actions per row
    pessimism: float = 0.75  # λ, weight of the pessimistic group in a target
    kl_weight: float = 0.5  # β of the VAE's divergence
    cost_discount: float = 0.99  # γ_c, per environment step
    multiplier_kp: float = 0.1  # gain of the excess e in κ
    multiplier_ki: float = 0.003  # of its integral
    multiplier_kd: float = 0.001  # of its rise
    tau: float = 0.005  # Polyak rate of the targets per update


class Perturbation(nn.Module):
    """p_f(s, â)."""

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        reach: float,
    ):
        super().__init__()
        self.mlp = MLP(init, (observation_dim + action_dim, *hidden, action_dim))
        self.reach = reach

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:
        """``[M, B, O], [M, B, A]`` to ``[M, B, A]``."""
        shift = self.mlp(observations, actions)[:, 0].tanh()
        return (actions + self.reach * shift).clamp(-1, 1)


class BCQActor(nn.Module):
    """A VAE's action, perturbed."""

    def __init__(self, vae: VAE, perturbation: Perturbation):
        super().__init__()
        self.vae, self.perturbation = vae, perturbation

    def act(self, observations: Tensor, noise: Tensor) -> Tensor:
        """``[M, B, O]`` and ε ``[M, B, Z]`` to ``[M, B, A]``; the gradient is that of f alone."""
        with torch.no_grad():
            proposed = self.vae.decode(observations, noise.clamp(-PRIOR_CLIP, PRIOR_CLIP))
        return self.perturbation(observations, proposed)

    def mode(self, observations: Tensor) -> Tensor:
        return self.act(
            observations, observations.new_zeros(*observations.shape[:-1], self.vae.latent_dim)
        )

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        return self.act(observations, random.normal(observations.shape[1], self.vae.latent_dim))


class BCQLag(Limited[BCQLagConfig]):
    Config = BCQLagConfig
    per_member = frozenset({"cost_limit", "cost_discount", "discount"})

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        self.budget, self.unit = self.limits("discounted")  # q; a cost of 1 per episode
        vae = VAE(init, o, a, c.vae_hidden)
        self.actor = BCQActor(vae, Perturbation(init, o, a, c.hidden, c.perturbation))
        networks = GROUPS[0] * GROUPS[1]
        self.critic = QEnsemble(init, o, a, c.hidden, networks)
        self.cost_critic = QEnsemble(init, o, a, c.hidden, networks)
        self.perturbation_target = self.target_of(self.actor.perturbation)
        self.critic_target = self.target_of(self.critic)
        self.cost_critic_target = self.target_of(self.cost_critic)
        self.multipliers = Multipliers(
            self.members, kind="pid", lr=c.multiplier_ki, kp=c.multiplier_kp, kd=c.multiplier_kd
        )
        self.vae_optimizer = self.adam(vae, lr=c.vae_lr)
        self.actor_optimizer = self.adam(self.actor.perturbation, lr=c.actor_lr)
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)
        self.cost_optimizer = self.adam(self.cost_critic, lr=c.critic_lr)

    def learn(self, batch: Batch) -> Metrics:
        c, vae = self.config, self.actor.vae
        s, a, costs = batch.observations, batch.actions, costs_of(batch)
        decoded, mean, log_std = vae(s, a, self._noise(s))
        error = (decoded - a).square().mean((1, 2))
        vae_loss = error + c.kl_weight * vae.divergence(mean, log_std).mean((1, 2))
        self.minimise(self.vae_optimizer, vae_loss)

        target, cost_target = self.backups(batch, costs)
        q = self.critic(s, a)
        critic_loss = (q - target[:, None]).square().mean(-1).sum(1)
        self.minimise(self.critic_optimizer, critic_loss)
        cost_q = self.cost_critic(s, a)
        cost_loss = (cost_q - cost_target[:, None]).square().mean(-1).sum(1)
        self.minimise(self.cost_optimizer, cost_loss)

        proposed = self.actor.act(s, self._noise(s))
        value = self.critic(s, proposed, frozen=True).amin(1).mean(-1)
        cost = self.cost_critic(s, proposed, frozen=True).amax(1).mean(-1)
        excess = cost - self.budget
        self.multipliers.update(excess.detach()[:, None])
        price = self.multipliers.value()[:, 0]
        actor_loss = price * excess - value
        self.minimise(self.actor_optimizer, actor_loss)

        polyak(self.critic_target, self.critic, c.tau)
        polyak(self.cost_critic_target, self.cost_critic, c.tau)
        polyak(self.perturbation_target, self.actor.perturbation, c.tau)
        return {
            "vae_loss": vae_loss.detach(),
            "critic_loss": critic_loss.detach(),
            "cost_critic_loss": cost_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "q": q.detach().mean((1, 2)),
            "multiplier": price,
            "cost_estimate": cost.detach() / self.unit,
        }

    @torch.no_grad()
    def backups(self, batch: Batch, costs: Tensor) -> tuple[Tensor, Tensor]:
        """Targets of Q and of Qc, each ``[M, B]``."""
        c, next_observations = self.config, batch.next_observations
        rows = next_observations.repeat_interleave(c.samples, 1)
        noise = self._noise(rows).clamp(-PRIOR_CLIP, PRIOR_CLIP)
        proposed = self.actor.vae.decode(rows, noise)
        actions = self.perturbation_target(rows, proposed).unflatten(1, (-1, c.samples))
        worst = self.critic_target.many(next_observations, actions).unflatten(1, GROUPS).amin(2)
        value = c.pessimism * worst.amin(1) + (1 - c.pessimism) * worst.amax(1)
        worst = (
            self.cost_critic_target.many(next_observations, actions).unflatten(1, GROUPS).amax(2)
        )
        cost = c.pessimism * worst.amax(1) + (1 - c.pessimism) * worst.amin(1)
        not_done = 1 - batch.terminals
        return (
            batch.rewards + self.scalar("discount") * not_done * value.amax(-1),
            costs + self.scalar("cost_discount") * not_done * cost.amax(-1),
        )

    def _noise(self, observations: Tensor) -> Tensor:
        return self.random.normal(observations.shape[1], self.actor.vae.latent_dim)
