"""A2PR (Liu et al. 2024, arXiv 2405.19909): TD3+BC that clones the better of two actions.

Adaptive Advantage-Guided Policy Regularization: the actor imitates the logged action or the VAE's
version of its own action, whichever the critic prefers, and only where one of them beats V. The VAE
is trained to reconstruct the logged actions that do. With targets π̄, Q̄ (Polyak averages), A(·) =
Q_1(s, ·) - v, a' = clip(π̄(s') + clip(σ ε, ±c), ±1) and ε, η ~ N(0, 1), one update is, in order:

    y       = r + γ (1 - terminal) min_e Q̄_e(s', a')
    1. L_Q  = Σ_e mean (Q_e(s, a) - y)²                                    step Q
    y_on    = r + γ (1 - terminal) min_e Q_e(s', a')                       Q stepped, same a'
    v       = V(s)                                        before V's step, a constant from here on
    2. L_V  = mean (v - min(y, y_on))²                                     step V
    g       = 1[A(a) > ε_A]
    μ, ς    = encode(s, a);  â = decode(s, μ + ς η)
    3. L_E  = w mean g (â - a)² - β ½ mean (1 + log ς² - μ² - ς²)          step VAE; KL on all rows
    every policy_interval-th update, with p = π(s):
    λ       = α / mean |Q_1(s, p)|                                         no gradient through λ
    ã       = decode(s, μ_p + ς_p η),  μ_p, ς_p = encode(s, p)             VAE stepped
    c       = ã where A(ã) ≥ A(a), else a                                  gradient flows through ã
    κ       = m 1[A(ã) ≥ ε_A or A(a) > ε_A]
    4. L_π  = -λ mean Q_1(s, p) + mean κ (p - c)²                          step π; mean of all rows
    Q̄, π̄   ← τ (Q, π) + (1 - τ) (Q̄, π̄)

Means run over rows and, where there are any, components. Actions live in [-1, 1].

The authors' code (ltlhuuu/A2PR), followed here, is the complete specification. ã is not detached:
the cloning gradient of its rows is 2 κ (p - ã) (I - ∂ã/∂p), which pulls p towards what the VAE
reproduces rather than to ã.

Under a cost limit (``cost_limit``; our extension, not the authors'), P takes the place of Q_1 in
every advantage and in the actor's value term; Qc, y_c, J and the multiplier ρ are those of
agents/shared/constraint.py:

    P(s, ·) = (Q_1(s, ·) - ρ k Qc(s, ·)) / (1 + ρ),   Qc = max_e Qc_e,   k as there
    after 1.  L_Qc = Σ_e mean (Qc_e(s, a) - y_c)²                          step Qc; same a'
    after 2.  L_Vc = mean (Vc(s) - max(y_c, y_c,on))²                      step Vc; Qc stepped
              v = (V(s) - ρ k Vc(s)) / (1 + ρ)                             before V's and Vc's steps
    in 4.     λ = α (1 + ρ) / mean (|Q_1(s, p)| + ρ k |Qc(s, p)|)
    after 4.  step ρ on J = mean Qc(s, p)

An advantage must compare like with like, so the baseline of P is V with its counterpart for costs,
regressed as pessimistically (V on the smaller of two targets, Vc on the larger), and not one V of
the penalised reward: that one would lag behind every move of ρ, and shift all advantages of a batch
to one side while it does. λ divides by sizes that cannot cancel, where |P| would be small wherever
both terms are large. At ρ = 0 both are A2PR's own; without a limit nothing of this is computed.

Deviations: without a limit, none known from that code's updates; docs/agents/a2pr.md has those of
its data and evaluation. Switches it has not: ``guidance`` and ``advantage_threshold`` (ε_A, which
the paper has and the code sets to 0).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from saferl.errors import unknown
from saferl.nn import VAE, DeterministicActor, QEnsemble, VEnsemble, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .shared.agent import Metrics
from .shared.constraint import CostConfig, CostLimited, Weights

GUIDANCE = ("reconstruction", "prior", "data")


@dataclass(frozen=True)
class A2PRConfig(CostConfig):
    """Defaults: those of the authors' command line; their values per dataset are in configs/."""

    hidden: tuple[int, ...] = (256, 256, 256)  # units of the actor's hidden layers
    critic_hidden: tuple[int, ...] = (256, 256, 256, 256)  # of each critic
    value_hidden: tuple[int, ...] = (256, 256, 256, 256)  # of V
    vae_hidden: tuple[int, ...] = (750, 750)  # of the VAE's encoder and of its decoder
    normalize_observations: bool = True
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    vae_lr: float = 1e-3
    alpha: float = 2.5  # weight of the value term; larger imitates less
    mask: float = 0.5  # m, weight of the cloning term on the rows it has
    vae_weight: float = 1.0  # w of the VAE's reconstruction
    kl_weight: float = 0.5  # β of the VAE's divergence
    advantage_threshold: float = 0.0  # ε_A, in units of the (scaled) discounted return
    guidance: str = "reconstruction"  # ã; "prior": decode(s, clip(η, ±½)); "data": no ã
    policy_noise: float = 0.2  # σ of the target action's noise, half action ranges
    noise_clip: float = 0.5  # c, half action ranges
    policy_interval: int = 2  # critic updates per actor update
    tau: float = 0.005  # Polyak rate of the targets per actor update


class A2PR(CostLimited[A2PRConfig]):
    Config = A2PRConfig
    per_member = frozenset(
        {"alpha", "mask", "vae_weight", "discount", "cost_limit", "cost_discount", "multiplier_lr"}
    )

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        if c.guidance not in GUIDANCE:
            raise unknown("guidance", c.guidance, GUIDANCE)
        self.actor = DeterministicActor(init, o, a, c.hidden)
        self.critic = QEnsemble(init, o, a, c.critic_hidden, 2)
        self.value = VEnsemble(init, o, c.value_hidden)
        self.vae = VAE(init, o, a, c.vae_hidden)
        self.actor_target = self.target_of(self.actor)
        self.critic_target = self.target_of(self.critic)
        self.actor_optimizer = self.adam(self.actor, lr=c.actor_lr)
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)
        self.value_optimizer = self.adam(self.value, lr=c.value_lr)
        self.vae_optimizer = self.adam(self.vae, lr=c.vae_lr)
        self.build_costs(init, c.critic_hidden, c.critic_lr)
        if self.constraint is not None:
            self.cost_value = VEnsemble(init, o, c.value_hidden)
            self.cost_value_optimizer = self.adam(self.cost_value, lr=c.value_lr)

    def update_key(self, update: int) -> bool:
        """Whether actor and targets are stepped."""
        return update % self.config.policy_interval == 0

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        s, a = batch.observations, batch.actions
        with torch.no_grad():
            noise = (self.random.normal(*a.shape[1:]) * c.policy_noise).clamp_(
                -c.noise_clip, c.noise_clip
            )
            next_actions = (self.actor_target(batch.next_observations) + noise).clamp_(-1, 1)
            next_q = self.critic_target(batch.next_observations, next_actions).amin(1)
            discount = self.scalar("discount") * (1 - batch.terminals)
            target = batch.rewards + discount * next_q
        q = self.critic(s, a)
        critic_loss = (q - target[:, None]).square().mean(-1).sum(1)
        self.minimise(self.critic_optimizer, critic_loss)

        with torch.no_grad():
            next_q = self.critic(batch.next_observations, next_actions).amin(1)
            value_target = torch.minimum(target, batch.rewards + discount * next_q)
            data_q = self.critic(s, a, elements=1)[:, 0]
        v = self.value(s)[:, 0]
        value_loss = (v - value_target).square().mean(-1)
        self.minimise(self.value_optimizer, value_loss)
        v = v.detach()  # before V's step

        weights: Weights | None = None
        cost_metrics: Metrics = {}
        if self.constraint is not None:
            data_cost, cost_v, cost_metrics = self.learn_cost_values(batch, next_actions)
            weights = self.constraint.weights(data_q)
            data_q = penalise(data_q, data_cost, weights)
            v = penalise(v, cost_v, weights)

        advantageous = data_q - v > c.advantage_threshold
        decoded, mean, log_std = self.vae(s, a, self._latent_noise(s))
        error = (advantageous.unsqueeze(-1) * (decoded - a).square()).mean((1, 2))
        divergence = self.vae.divergence(mean, log_std).mean((1, 2))
        vae_loss = self.scalar("vae_weight", 0) * error + c.kl_weight * divergence
        self.minimise(self.vae_optimizer, vae_loss)
        metrics = {
            "critic_loss": critic_loss.detach(),
            "value_loss": value_loss.detach(),
            "vae_loss": vae_loss.detach(),
            "q": q.detach().mean((1, 2)),
            "v": v.mean(-1),
            "advantageous_share": advantageous.to(v).mean(-1),
        } | cost_metrics

        if self.key:
            proposed = self.actor(s)
            policy_q = self.critic(s, proposed, elements=1, frozen=True)[:, 0]
            size = policy_q.detach().abs()
            if weights is not None:
                policy_cost = self.cost_critic(s, proposed)
                policy_q = penalise(policy_q, policy_cost, weights)
                size = penalise(size, -policy_cost.detach().abs(), weights)
            weight = self.scalar("alpha", 0) / size.mean(-1)
            clone, gate, guided = self.guide(s, proposed, a, data_q, v, weights)
            cloning = (gate.unsqueeze(-1) * (proposed - clone).square()).mean((1, 2))
            actor_loss = cloning - weight * policy_q.mean(-1)
            self.minimise(self.actor_optimizer, actor_loss)
            polyak(self.critic_target, self.critic, c.tau)
            polyak(self.actor_target, self.actor, c.tau)
            metrics |= {
                "actor_loss": actor_loss.detach(),
                "cloning_loss": cloning.detach(),
                "cloned_share": (gate > 0).to(v).mean(-1),
                "guided_share": guided.to(v).mean(-1),
            }
            if self.constraint is not None:
                self.cost_critic.follow(c.tau)
                metrics |= self.constraint.step(policy_cost.detach().mean(-1))
        return metrics

    def learn_cost_values(
        self, batch: Batch, next_actions: Tensor
    ) -> tuple[Tensor, Tensor, Metrics]:
        """Step Qc and Vc; Qc(s, a) after and Vc(s) before its step, each ``[M, B]``, constants."""
        target, loss = self.learn_costs(batch, next_actions)
        with torch.no_grad():
            discount = self.scalar("cost_discount")
            online = self.cost_critic.backup(batch, discount, next_actions, online=True)
            data_cost = self.cost_critic(batch.observations, batch.actions)
        v = self.cost_value(batch.observations)[:, 0]
        value_loss = (v - torch.maximum(target, online)).square().mean(-1)
        self.minimise(self.cost_value_optimizer, value_loss)
        metrics = {"cost_critic_loss": loss, "cost_value_loss": value_loss.detach()}
        return data_cost, v.detach(), metrics

    def guide(
        self,
        observations: Tensor,
        proposed: Tensor,
        actions: Tensor,
        data_q: Tensor,
        v: Tensor,
        weights: Weights | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the policy's actions ``[M, B, A]`` are drawn to, and how strongly.

        Args:
            data_q, v: Q_1(s, a), or P(s, a) under a limit, and v, ``[M, B]``, constants.
            weights: those of P under a limit.

        Returns:
            c ``[M, B, A]``, with a gradient through ã; κ ``[M, B]``, m or 0; and whether c is ã.
        """
        threshold = self.config.advantage_threshold
        data_advantage = data_q - v
        cloned = data_advantage > threshold
        if self.config.guidance == "data":
            return actions, cloned * self.scalar("mask"), torch.zeros_like(cloned)
        noise = self._latent_noise(observations)
        if self.config.guidance == "prior":
            with torch.no_grad():
                candidate = self.vae.decode(observations, noise.clamp(-0.5, 0.5))
        else:
            candidate, _, _ = self.vae(observations, proposed, noise, frozen=True)
        with torch.no_grad():
            candidate_q = self.critic(observations, candidate, elements=1)[:, 0]
            if weights is not None:
                cost = self.cost_critic(observations, candidate)
                candidate_q = penalise(candidate_q, cost, weights)
            advantage = candidate_q - v
            guided = advantage >= data_advantage
            gate = (cloned | (advantage >= threshold)) * self.scalar("mask")
        return torch.where(guided.unsqueeze(-1), candidate, actions), gate, guided

    def _latent_noise(self, observations: Tensor) -> Tensor:
        return self.random.normal(observations.shape[1], self.vae.latent_dim)


def penalise(q: Tensor, cost: Tensor, weights: Weights) -> Tensor:
    """P, or its baseline, from values of reward and of cost, each ``[M, B]``."""
    return weights[0] * q - weights[1] * cost
