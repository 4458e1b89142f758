"""OGSRL: offline guarded safe RL (Yan et al., NeurIPS 2025, arXiv 2505.16242).

Before training a model T̂, r̂, ĉ and a guardian ĝ(s, a) ∈ {0, 1} (1: not supported by the data) are
fitted to logged episodes. Training then sees the model alone, and solves for π

    maximise E Σ γ^t r̂   subject to   E Σ γ_c^t ĉ ≤ c̄ - ε̄   and   V_ĝ = E Σ_{t<H} γ^t ĝ ≤ β γ^H

One update plays N episodes of H steps in T̂. With A_k the advantages of reward and costs, each by a
critic V_k of its own, w_t = 1 while an episode goes on, ρ = π_new / π and J_k the plain discounted
sums of whole episodes, it steps π by one of

- ``cpo``     g = ∇ Σ wρÂ_r / Σ w, b = ∇ 1/N Σ wργ_k^t A_k, c = J_k - d_k with J_k a running mean,
              for the limit k with the largest (J_k - d_k) / (J_k + d_k), while the line search
              sees to the others (`saferl.agents.ogsrl.trust_region`);
- ``trpo``    the same without a constraint;
- ``ppo_lag`` λ_k by its multiplier, then clipped PPO steps on (Â_r - Σ λ_k Â_k) / (1 + Σ λ_k)

(Â: standardised; J_k never is), and then V_k by regression on A_k + V_k. Episodes that end are not
bootstrapped from, those that H cuts are. ``ood_mode`` says what an unsupported step does; where it
ends the episode it is charged b(s), the behaviour cost-to-go.

ε̄ is the 90 % quantile, over models fitted to resampled episodes that T̂ and π never saw, of the
excess of π's cost there over its cost in T̂; it follows π during training.

Where the paper and its code differ the paper is followed; docs/agents/ogsrl.md lists what is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from saferl.errors import SaferlError
from saferl.models import Model
from saferl.nn import CategoricalActor, GaussianActor
from saferl.nn.policies import gaussian_log_prob, sample_categorical
from saferl.replay import Batch
from saferl.rng import MemberRandom
from saferl.safety.limits import relative_excess

from ..shared.agent import Metrics
from .guarded import Guarded
from .simulate import Rollout, Rows, advantages, discounting, simulate, standardise
from .trust_region import (
    RECOVERY,
    Surrogates,
    conjugate_gradient,
    cpo_step,
    curvature,
    gradient,
    line_search,
    trpo_step,
)

TRIES = 15
"""Of the line search: the shortest step is 0.04 of the longest."""


class _Learner(Guarded):
    def learn(self, batch: Batch) -> Metrics:
        """One update from episodes simulated in the model; the logged batch is not used."""
        if self.world.starts is None:
            raise SaferlError("the agent is not fitted: call fit(dataset, say) before it learns")
        names = self.limits.names
        rollout = self._simulate(self.models[0])
        values = self._values(rollout)
        signals = self._signals(rollout)
        found = advantages(
            signals, values, rollout.alive, rollout.ended, self._discounts, self.config.gae
        )
        totals = self._totals(rollout, signals, values)
        steps = rollout.alive.sum((1, 2))
        metrics = {
            "predicted_return": rollout.rewards.sum(-1).mean(-1),
            "ood_rate": rollout.ood.sum((1, 2)) / steps,
            "predicted_length": steps / rollout.alive.shape[1],
        }
        if "ood" in names:
            metrics["ood_value"] = totals[:, 1 + names.index("ood")]
        if "cost" in names:
            cost = totals[:, -1]
            if len(self.models) > 1:
                other = self._simulate(self.models[1 + self.key])
                beyond = self._values(other)
                totals_there = self._totals(other, self._signals(other), beyond)
                self.limits.observe(self.key, totals_there[:, -1] - cost)
            metrics["predicted_cost"] = cost / self.limits.unit
            metrics["margin"] = self.limits.margin() / self.limits.unit
        step = self._ppo if self.config.optimiser == "ppo_lag" else self._trust_region
        metrics |= step(rollout, found, totals[:, 1:])
        return metrics | self._regress(rollout, found + values[:, :, :-1])

    def _simulate(self, model: Model) -> Rollout:
        c, known = self.config, None

        def decide(states: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
            nonlocal known
            rows = self._rows(states, allowed)
            if known is None or rows.lookup is None:
                known = self._distribution(rows.observations, rows.allowed)
            return self._decide(rows.pick(known))

        return simulate(
            model, self.world, c.episodes, c.horizon, self.random, decide,
            absorb=self.absorbs, mask=self.mask,
        )  # fmt: skip

    def _rows(self, states: Tensor, allowed: Tensor | None) -> Rows:
        """Network inputs of states ``[M, B]`` or ``[M, B, O]`` and of the mask there."""
        c, world = self.config, self.world
        index = None
        if world.states is None:
            seen = states
        elif len(world.states) > c.episodes * c.horizon:
            seen = world.states[states]
        else:
            seen, index = world.states.expand(self.members, -1, -1), states
            allowed = world.permitted.expand(self.members, -1, -1) if self.mask else None
        return Rows((seen - self._mean) / self._std, allowed, index)

    @torch.no_grad()
    def _signals(self, rollout: Rollout) -> Tensor:
        """``[M, N, H, K]``: the agent's reward, then the cost of each constraint.

        An unsupported step that ends the episode earns nothing more, and is charged the behaviour
        policy's cost-to-go. Otherwise leaving the data would avoid the cost.
        """
        c, spec, ood, counted = self.config, self.spec, rollout.ood, rollout.alive
        costs = {"ood": ood, "cost": rollout.costs.sum(-1)}
        if self.absorbs:
            counted = counted * (1 - ood)
            if self.limited:
                rows = self._rows(rollout.states[:, :, :-1].flatten(1, 2), None)
                rest = rows.pick(self.cost_to_go(rows.observations))
                costs["cost"] = costs["cost"] + ood * rest.view_as(ood)
        reward = spec.reward_scale * rollout.rewards + spec.reward_shift * counted
        if c.ood_mode == "penalty":
            # At every step from the unsupported one to H, as a sum at that step.
            powers = discounting(self._discounts[..., :1], c.horizon, ood)[..., 0]
            reward = reward - c.ood_penalty * ood * powers.cumsum(-1).flip(-1)
        return torch.stack([reward, *(costs[name] for name in self.limits.names)], -1)

    @torch.no_grad()
    def _values(self, rollout: Rollout) -> Tensor:
        """V of every state and of the last, ``[M, N, H + 1, K]``."""
        rows = self._rows(rollout.states.flatten(1, 2), None)
        values = rows.pick_last(self.critic(rows.observations)).movedim(1, -1)
        return values.unflatten(1, rollout.states.shape[1:3])

    def _totals(self, rollout: Rollout, signals: Tensor, values: Tensor) -> Tensor:
        """J ``[M, K]``: discounted sums of episodes, means over N.

        Where H cuts an episode the critics add the rest. The count of unsupported steps has no
        rest, because its budget covers H steps.
        """
        powers = discounting(self._discounts, self.config.horizon, signals)
        within = (signals * powers).sum(2).mean(1)
        tail = (rollout.open[..., None] * values[:, :, -1]).mean(1)
        tail = torch.cat((tail[:, :1], tail[:, 1:].clamp_min(0)), 1)
        if "ood" in self.limits.names:
            tail[:, 1 + self.limits.names.index("ood")] = 0
        return within + tail * self._discounts[:, 0] ** self.config.horizon

    def _trust_region(self, rollout: Rollout, found: Tensor, totals: Tensor) -> Metrics:
        c, parameters = self.config, list(self.actor.parameters())
        rows, weight, actions = self._steps(rollout)
        reward = standardise(found[..., :1].flatten(1, 2), weight)[..., 0]
        count, steps = rollout.alive.shape[1], weight.sum(1)
        powers = discounting(self._discounts, c.horizon, found)[..., 1:]
        costs = (powers * found[..., 1:] * rollout.alive[..., None]).flatten(1, 2)  # [M, B, C]
        with torch.no_grad():
            old = self._distribution(rows.observations, rows.allowed)
            old_log_prob = self._log_prob(old, actions, rows.lookup)

        def surrogates() -> Surrogates:
            now = self._distribution(rows.observations, rows.allowed)
            ratio = (self._log_prob(now, actions, rows.lookup) - old_log_prob).exp()
            return Surrogates(
                (weight * ratio * reward).sum(1) / steps,
                (ratio[..., None] * costs).sum(1) / count,
                (weight * rows.pick(self._divergence(old, now))).sum(1) / steps,
            )

        start = surrogates()
        g = gradient(start.reward, parameters, retain_graph=True)
        some = max(1, round(c.curvature_share * count)) * c.horizon
        fewer, share = rows.first(some), weight[:, :some]
        near = self._distribution(fewer.observations, fewer.allowed)
        divergence = fewer.pick(self._divergence(tuple(x.detach() for x in near), near))
        divergence = (share * divergence).sum(1) / share.sum(1)
        product = curvature(divergence, parameters, c.damping)
        inverse_g = conjugate_gradient(product, g, c.cg_iterations)
        metrics = {}
        if c.optimiser == "cpo":  # under the tightest of the limits, member by member
            excess = self.limits.excess(totals, c.smoothing)
            budget = self.limits.tightened()
            worst = relative_excess(excess + budget, budget).argmax(1, keepdim=True)
            chosen = excess.gather(1, worst)
            b = gradient(start.costs.gather(1, worst)[:, 0], parameters)
            inverse_b = conjugate_gradient(product, b, c.cg_iterations)
            step, case = cpo_step(g, b, chosen[:, 0], inverse_g, inverse_b, c.kl)
            acted = torch.zeros_like(excess, dtype=torch.bool)
            self.limits.integrate(c.integral, acted.scatter_(1, worst, (case != RECOVERY)[:, None]))
            # The others may rise to their limits; one that is broken waits for its turn.
            allowed = torch.where(excess > 0, torch.inf, -excess)
            allowed.scatter_(1, worst, (-chosen).clamp_min(0))
            gains = chosen[:, 0] <= 0
            metrics["recovery"] = (case == RECOVERY).float()
        else:
            step = trpo_step(g, inverse_g, c.kl)
            allowed, gains = torch.zeros_like(totals), torch.ones_like(steps, dtype=torch.bool)
        taken = line_search(surrogates, parameters, step, allowed, gains, c.kl, TRIES)
        return metrics | {"step_share": taken.scale, "kl": taken.divergence}

    def _ppo(self, rollout: Rollout, found: Tensor, totals: Tensor) -> Metrics:
        c, steps = self.config, rollout.alive.sum((1, 2))
        rows, weight, actions = self._steps(rollout)
        self.multipliers.update(relative_excess(totals, self.limits.tightened()))
        price = self.multipliers.value().masked_fill(self.limits.budget.isinf(), 0.0)
        scaled = standardise(found.flatten(1, 2), weight)
        paid = (scaled[..., 1:] * price[:, None]).sum(-1)
        advantage = (scaled[..., 0] - paid) / (1 + price.sum(1, keepdim=True))
        with torch.no_grad():
            old = self._distribution(rows.observations, rows.allowed)
            old_log_prob = self._log_prob(old, actions, rows.lookup)
        for _ in range(c.epochs):
            now = self._distribution(rows.observations, rows.allowed)
            ratio = (self._log_prob(now, actions, rows.lookup) - old_log_prob).exp()
            clipped = ratio.clamp(1 - c.clip, 1 + c.clip)
            gain = torch.minimum(ratio * advantage, clipped * advantage)
            self.minimise(self.actor_optimizer, -(weight * gain).sum(1) / steps)
        with torch.no_grad():
            now = self._distribution(rows.observations, rows.allowed)
            kl = (weight * rows.pick(self._divergence(old, now))).sum(1) / steps
        prices = {f"multiplier_{name}": price[:, j] for j, name in enumerate(self.limits.names)}
        return prices | {"kl": kl}

    def _regress(self, rollout: Rollout, targets: Tensor) -> Metrics:
        """Steps of the critics towards targets ``[M, N, H, K]``."""
        rows, weight, _ = self._steps(rollout)
        targets = targets.flatten(1, 2).mT
        for _ in range(self.config.critic_updates):
            error = (rows.pick_last(self.critic(rows.observations)) - targets).square() * weight[
                :, None
            ]
            loss = error.sum(-1) / weight.sum(1, keepdim=True)  # [M, K]
            self.minimise(self.critic_optimizer, loss.sum(1))
        return {"critic_loss": loss.detach().sum(1)}

    def _steps(self, rollout: Rollout) -> tuple[Rows, Tensor, Tensor]:
        """The steps of a rollout in one axis of N · H, their weights w and actions."""
        allowed = None if rollout.allowed is None else rollout.allowed.flatten(1, 2)
        rows = self._rows(rollout.states[:, :, :-1].flatten(1, 2), allowed)
        return rows, rollout.alive.flatten(1), rollout.actions.flatten(1, 2)


class OGSRL(_Learner):
    """Continuous actions: a diagonal Gaussian with one σ per component."""

    def _make_actor(self, init: MemberRandom) -> Any:
        spec = self.spec
        actor = GaussianActor(init, spec.observation_dim, spec.action_dim, self.config.hidden)
        nn.init.constant_(actor.log_std, self.config.log_std)
        low, high = torch.tensor((spec.action_low, spec.action_high), device=self.device)
        self._center, self._half_range = (high + low) / 2, (high - low) / 2
        return actor

    def _distribution(self, observations: Tensor, allowed: Tensor | None) -> tuple[Tensor, ...]:
        return self.actor.mode(observations), self.actor.log_std.clamp(*self.actor.bounds)

    def _log_prob(
        self, distribution: tuple[Tensor, ...], actions: Tensor, index: Tensor | None = None
    ) -> Tensor:
        mean, log_std = distribution
        return gaussian_log_prob((actions - mean) * (-log_std).exp(), log_std)

    def _divergence(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        (mean, log_std), (new_mean, new_log_std) = old, new
        spread = (2 * log_std).exp() + (mean - new_mean).square()
        return (new_log_std - log_std + 0.5 * spread * (-2 * new_log_std).exp() - 0.5).sum(-1)

    def _decide(self, distribution: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        mean, log_std = distribution
        # As drawn for the density, within bounds for the model.
        drawn = mean + log_std.exp() * self.random.normal(*mean.shape[1:])
        return drawn, drawn.clamp(-1, 1) * self._half_range + self._center


class DiscreteOGSRL(_Learner):
    """Discrete actions: a softmax."""

    discrete = True

    def _make_actor(self, init: MemberRandom) -> Any:
        spec = self.spec
        return CategoricalActor(init, spec.observation_dim, spec.action_dim, self.config.hidden)

    def _distribution(self, observations: Tensor, allowed: Tensor | None) -> tuple[Tensor, ...]:
        if self.mask:
            return (self.actor(observations, allowed),)
        return (self.actor(observations),)

    def _log_prob(
        self, distribution: tuple[Tensor, ...], actions: Tensor, index: Tensor | None = None
    ) -> Tensor:
        if index is None:
            return distribution[0].gather(-1, actions[..., None]).squeeze(-1)
        # Not by way of all actions of each row.
        return distribution[0].flatten(1).gather(1, index * self.spec.action_dim + actions)

    def _divergence(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        return (old[0].exp() * (old[0] - new[0])).sum(-1)

    def _decide(self, distribution: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        actions = sample_categorical(distribution[0], self.random)
        return actions, actions
