"""DrQ+BC (Lu et al. 2023, arXiv 2206.04779): DrQ-v2 with TD3+BC's cloning term, from pixels.

An encoder f of convolutions belongs to the critics; the actor uses it and never moves it. With
x = f(shift(s)), x' = f(shift'(s')) for two draws of a random shift (pad 4, border repeated), Q̄ the
Polyak average of the critics and their trunk (f has none), ε ~ N(0, 1) drawn for each:

    a'      = clip(π(x') + clip(σ ε', ±c), ±1)
    y       = Σ_{i<n} γ^i r_{t+i} + γ^n (1 - terminal) min_e Q̄_e(x', a')
    L_Q     = Σ_e mean (Q_e(x, a) - y)²                                  step f and Q
    ã       = clip(π(x) + clip(σ ε, ±c), ±1)         x of before that step, no gradient into f;
                                                     clip(·, ±1) passes gradients as they are
    λ       = α / mean |min_e Q_e(x, ã)|                                 no gradient through λ
    L_π     = -λ mean min_e Q_e(x, ã) + mean (ã - a)²                    step π and its trunk
    Q̄      ← τ Q + (1 - τ) Q̄

σ falls linearly from ``noise_start`` to ``noise_end`` over ``noise_steps`` updates. s is a stack of
frames, s' the one n steps later in the same episode. Actions live in [-1, 1].

Deviations: none known from the authors' code (conglu1997/v-d4rl, drqbc). They count iterations, of
which every second one is an update: ``noise_steps`` is half of their 250 000.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saferl.data.dataset import Dataset
from saferl.data.nstep import n_step
from saferl.errors import SaferlError
from saferl.nn import DeterministicActor, QEnsemble, orthogonal, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .shared.agent import Metrics
from .shared.pixels import PixelAgent, PixelConfig

EDGE = 1 - 1e-6  # actions with noise are kept within this


@dataclass(frozen=True)
class DrQBCConfig(PixelConfig):
    """Defaults: the authors' for V-D4RL at 84 pixels."""

    hidden: tuple[int, ...] = (1024, 1024)
    channels: tuple[int, ...] = (32, 32, 32, 32)  # of the convolutions
    strides: tuple[int, ...] = (2, 1, 1, 1)  # of the convolutions
    n_step: int = 3  # n, agent steps
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4  # encoder and critics
    alpha: float = 2.5  # weight of the value term; larger imitates less
    noise_start: float = 1.0  # σ at the start, half action ranges
    noise_end: float = 0.1
    noise_steps: int = 125_000  # updates until σ reaches its end
    noise_clip: float = 0.3  # c, half action ranges
    tau: float = 0.01  # Polyak rate of the targets per update


class DrQBC(PixelAgent[DrQBCConfig]):
    Config = DrQBCConfig
    pixels = True
    per_member = frozenset({"alpha"})

    @classmethod
    def prepare(cls, dataset: Dataset, config: Any) -> Dataset:
        """The dataset's n-step transitions.

        Raises:
            SaferlError: settings that n-step rewards cannot be mapped by, or n below 1.
        """
        if config.n_step < 1:
            raise SaferlError(f"n_step = {config.n_step} must be 1 or more")
        if config.n_step == 1:
            return dataset
        if config.normalize_rewards or config.reward_shift:
            raise SaferlError(
                "normalize_rewards and reward_shift are for single steps: set n_step=1, or use "
                "reward_scale"
            )
        return n_step(dataset, config.n_step, config.discount)

    def build(self, init: MemberRandom) -> None:
        c, a = self.config, self.spec.action_dim
        layers: dict[str, Any] = {"hidden_init": orthogonal(1.0), "final_init": orthogonal(1.0)}
        self.actor, self.critic = self.behind_pixels(
            init,
            DeterministicActor(init, c.features, a, c.hidden, **layers),
            QEnsemble(init, c.features, a, c.hidden, 2, **layers),
        )
        self.critic_target = self.target_of(self.critic)
        self.critic_optimizer = self.adam(*self.moved_by_critics(), lr=c.critic_lr)
        self.actor_optimizer = self.adam(*self.moved_by_actor(), lr=c.actor_lr)

    def deviation(self) -> float | Tensor:
        """σ of this update, by the critics' optimiser's own counter on the device."""
        c = self.config
        slots = self.critic_optimizer.state.get(self.actor.encoder.weights[0])
        if not slots:
            return c.noise_start
        phase = (slots["step"] / max(1, c.noise_steps)).clamp(max=1.0)
        return c.noise_start + (c.noise_end - c.noise_start) * phase

    def explore(self, mean: Tensor, noise: Tensor, deviation: float | Tensor) -> Tensor:
        """Actions with clipped noise, whose clip to the bounds passes gradients."""
        clip = self.config.noise_clip
        actions = mean + (noise * deviation).clamp(-clip, clip)
        return actions + (actions.clamp(-EDGE, EDGE) - actions).detach()

    def learn(self, batch: Batch) -> Metrics:
        c, rows = self.config, batch.rewards.shape[1]
        noise, next_noise = self.random.normal(2, rows, self.spec.action_dim).unbind(1)
        deviation, seen = self.deviation(), self.seen(batch)
        features, next_features = seen.observations, seen.next_observations
        with torch.no_grad():
            next_actions = self.explore(self.actor(next_features), next_noise, deviation)
            next_q = self.critic_target(next_features, next_actions).amin(1)
            target = batch.rewards + c.discount**c.n_step * (1 - batch.terminals) * next_q
        q = self.critic(features, batch.actions)
        critic_loss = (q - target[:, None]).square().mean(-1).sum(1)
        self.minimise(self.critic_optimizer, critic_loss)

        features = features.detach()
        actions = self.explore(self.actor(features), noise, deviation)
        policy_q = self.critic(features, actions, frozen=True).amin(1)
        weight = self.scalar("alpha", 0) / policy_q.detach().abs().mean(-1)
        cloning = (actions - batch.actions).square().mean((1, 2))
        actor_loss = cloning - weight * policy_q.mean(-1)
        self.minimise(self.actor_optimizer, actor_loss)
        polyak(self.critic_target, self.critic, c.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "cloning_loss": cloning.detach(),
            "q": q.detach().mean((1, 2)),
        }
