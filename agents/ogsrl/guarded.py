"""What guarded model-based agents are made of: configuration, budgets, and what is fitted first."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError, unknown
from saferl.models import Model, make_model
from saferl.nn import VEnsemble
from saferl.rng import MemberRandom, Stream
from saferl.runs.settings import parse_options
from saferl.safety.guardians import FeatureMap
from saferl.safety.guardians.fitting import fit_guardian, flat, guardian_for, split
from saferl.safety.limits import check_limit, convert
from saferl.safety.multipliers import Multipliers

from ..shared.constraint import CostConfig, CostLimited
from .limits import Limits, ood_budget, share_leaving
from .simulate import MaskedActor, World, resample, simulate

OPTIMISERS = ("cpo", "trpo", "ppo_lag")
OOD_MODES = ("constraint_absorb", "constraint", "penalty", "mask")
CLONE_BATCH = 256
COMPARED = 5000
"""Logged steps of which a guardian is asked how often they leave the data, or a few more."""
REGRESSION_BATCH, REGRESSION_UPDATES = 512, 400
"""Of the regression of `CostToGo`."""


@dataclass(frozen=True)
class OGSRLConfig(CostConfig):
    """Defaults: GMB-CPO with the released code's sizes; docs/agents/ogsrl.md has the variants."""

    batch_size: int = 1  # logged rows handed to an update, which uses none: it plays episodes
    hidden: tuple[int, ...] = (128, 128)
    optimiser: str = "cpo"  # cpo, trpo or ppo_lag
    episodes: int = 32  # N simulated per update
    horizon: int = 20  # H, steps of a simulated episode
    starts: str = "initial"  # episodes start as logged ones did, or in any logged state (any)
    model: str = "knn"  # T̂: knn, tabular or ensemble
    model_options: str = ""  # of make_model, as in "k=5"
    guardian: str = "knn"  # ĝ: a name of make_guardian, or none
    guardian_options: str = ""  # of make_guardian, as in "bandwidth=0.15 scaling=minmax"
    levels: tuple[int, ...] = ()  # of the factors of a discrete action; none: actions have no order
    alpha: float = 0.1  # share of supported steps that the guardian may flag
    calibration: float = 0.2  # share of episodes kept aside for alpha and for ε̄
    ood_mode: str = "constraint_absorb"  # or constraint, penalty, mask
    ood_probability: float = 0.05  # β, of an unsupported step within H
    ood_penalty: float = 25.0  # of a step after an unsupported one, under ood_mode = penalty
    margin_models: int = 5  # resampled models for ε̄; 0: ε̄ = 0
    smoothing: float = 0.2  # cpo: weight of the latest J in the running mean that c is taken from
    integral: float = 0.05  # cpo: share of each excess that stays in c until it is worked off
    gae: float = 0.95  # λ of the advantages
    kl: float = 0.01  # δ, of a trust-region step
    damping: float = 0.01  # added to the curvature
    cg_iterations: int = 10
    curvature_share: float = 0.5  # of the episodes, for the curvature
    critic_lr: float = 1e-3
    critic_updates: int = 10  # regression steps per update, each on all simulated steps
    multiplier: str = "pid"  # ppo_lag: how λ moves
    multiplier_lr: float = 0.1  # gain of the integral of the relative excess in [-1, 1]
    multiplier_kp: float = 2.0  # gain of the excess itself, without which the policy swings
    multiplier_max: float = 20.0
    actor_lr: float = 1e-3  # ppo_lag, and cloning
    epochs: int = 10  # ppo_lag: steps per update, each on all simulated steps
    clip: float = 0.2  # ppo_lag
    clone_updates: int = 0  # behaviour cloning before the first update
    log_std: float = -0.5  # first log σ of a continuous policy


class CostToGo(nn.Module):
    """Behaviour policy's cost-to-go, by regression on logged episodes.

    It is charged where the policy leaves the support. The policy's own cost critic cannot provide
    it: where the policy always leaves the support, the critic's target would be its own value.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, init: MemberRandom, observation_dim: int, hidden: tuple[int, ...]):
        super().__init__()
        self.net = VEnsemble(init, observation_dim, hidden)
        self.register_buffer("shift", torch.zeros(len(init.generators), 1))
        self.register_buffer("scale", torch.ones(len(init.generators), 1))

    def forward(self, observations: Tensor) -> Tensor:
        """``[M, B, O]`` in the agent's units to ``[M, B]``, 0 or more."""
        return (self.shift + self.scale * self.net(observations)[:, 0]).clamp_min(0)


class Guarded(CostLimited[OGSRLConfig]):
    """Models, guardian and budgets; a subclass provides the policy's distribution and `learn`.

    T̂ and the resampled models are `models`, ĝ is `guardian`.
    """

    Config = OGSRLConfig
    renamed_state: ClassVar[dict[str, str]] = {
        "world.outside": "world.flagged",
        "spared": "cost_to_go",
        "replay.*.following": "replay.*.next_index",
        "limits.owed": "limits.integral",
    }
    per_member = frozenset({"discount", "cost_limit"})
    shared = frozenset({"world.", "replay."})

    # What a kind of actions provides; a distribution is a tuple of tensors [M, B, …].

    def _make_actor(self, init: MemberRandom) -> Any:
        raise NotImplementedError

    def _distribution(self, observations: Tensor, allowed: Tensor | None) -> tuple[Tensor, ...]:
        raise NotImplementedError

    def _log_prob(
        self, distribution: tuple[Tensor, ...], actions: Tensor, index: Tensor | None = None
    ) -> Tensor:
        """``[M, B]`` of actions at rows ``index`` ``[M, B]`` of it; None: row by row."""
        raise NotImplementedError

    def _divergence(self, old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> Tensor:
        """KL(old ‖ new) of each row, ``[M, B]``."""
        raise NotImplementedError

    def _decide(self, distribution: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """A drawn action and what it is in raw units."""
        raise NotImplementedError

    # Building and fitting.

    def build(self, init: MemberRandom) -> None:
        c, spec = self.config, self.spec
        self._check()
        limited, guarded = self.limited, c.guardian != "none"
        self.absorbs = guarded and c.ood_mode in ("constraint_absorb", "penalty")
        names = ["ood"] if guarded and c.ood_mode.startswith("constraint") else []
        names += ["cost"] if limited else []
        if c.optimiser == "trpo" and names:
            raise SaferlError(
                "optimiser trpo keeps no limits: take cpo or ppo_lag, or leave out cost_limit and "
                "set guardian=none, ood_mode=penalty or ood_mode=mask"
            )
        if c.optimiser != "trpo" and not names:
            raise SaferlError(
                f"optimiser {c.optimiser} has no limit to keep: set cost_limit, or a guardian with "
                "ood_mode=constraint_absorb, or take trpo"
            )
        guardian = None
        if guarded:
            guardian = guardian_for(c.guardian, spec, c.levels, **parse_options(c.guardian_options))
        self.world = World(guardian)
        actor = self._make_actor(init)
        self.mask = spec.action_dim if guarded and c.ood_mode == "mask" else 0
        self.actor = actor
        if self.mask:
            assert guardian is not None
            self.actor = MaskedActor(actor, guardian, spec)
        self.critic = VEnsemble(init, spec.observation_dim, c.hidden, 1 + len(names))
        self.critic_optimizer = self.adam(self.critic, lr=c.critic_lr)
        if c.optimiser == "ppo_lag":
            self.actor_optimizer = self.adam(self.actor, lr=c.actor_lr)
            self.multipliers = Multipliers(
                self.members, len(names), c.multiplier, c.multiplier_lr, c.multiplier_kp,
                c.multiplier_kd, c.multiplier_max,
            )  # fmt: skip
        if limited and self.absorbs:
            self.cost_to_go = CostToGo(init, spec.observation_dim, c.hidden)
        count = 1 + (c.margin_models if limited else 0)
        models = nn.ModuleList(self._make_model(init, int(limited)) for _ in range(count))
        if c.model == "ensemble":  # one of each member's own
            self.networks = models
        else:
            self.replay = models
        self.limits = Limits(self.members, tuple(names), count - 1)
        discounts = [self.column("discount")]
        discounts += [self.column("cost_discount" if n == "cost" else "discount") for n in names]
        self._discounts = torch.tensor(discounts, device=self.device).T[:, None]  # [M, 1, K]
        size = spec.observation_dim
        self._mean = torch.tensor(spec.observation_mean or (0.0,) * size, device=self.device)
        self._std = torch.tensor(spec.observation_std or (1.0,) * size, device=self.device)

    def _check(self) -> None:
        c = self.config
        for name, value, valid in (
            ("optimiser", c.optimiser, OPTIMISERS),
            ("ood_mode", c.ood_mode, OOD_MODES),
            ("starts", c.starts, ("initial", "any")),
        ):
            if value not in valid:
                raise unknown(name, value, valid)
        if c.ood_mode == "mask" and not self.discrete:
            raise SaferlError("ood_mode=mask needs discrete actions: take constraint_absorb")
        if not 0 < c.ood_probability < 1:
            raise SaferlError(f"ood_probability = {c.ood_probability} is not between 0 and 1")
        if min(c.episodes, c.horizon, c.critic_updates, c.epochs, c.cg_iterations) < 1:
            raise SaferlError("episodes, horizon, critic_updates, epochs, cg_iterations start at 1")
        if min(c.margin_models, c.clone_updates, c.integral, c.damping) < 0:
            raise SaferlError("margin_models, clone_updates, integral and damping are 0 or more")
        if not (c.kl > 0 and 0 < c.curvature_share <= 1 and 0 < c.smoothing <= 1):
            raise SaferlError("kl is above 0, curvature_share and smoothing lie in (0, 1]")

    @property
    def limited(self) -> bool:
        """Whether some member has a finite limit on its cost."""
        return any(limit < np.inf for limit in self.column("cost_limit"))

    def _make_model(self, init: MemberRandom, costs: int) -> Model:
        c, settings = self.config, parse_options(self.config.model_options)
        if self.discrete and c.levels and c.model != "ensemble":
            settings = {"features": FeatureMap(n_actions=c.levels)} | settings
        return make_model(c.model, init, self.spec, costs=costs, **settings)

    @property
    def models(self) -> Any:
        """T̂, and after it the resampled models."""
        return self.networks if self.config.model == "ensemble" else self.replay

    @property
    def guardian(self) -> Any:
        """ĝ, calibrated once the agent is fitted."""
        return self.world.guardian

    def fit(self, dataset: Dataset, say: Callable[[str], None]) -> None:
        """Fit guardian, models and budgets, and clone the behaviour if asked to.

        Raises:
            SaferlError: fewer than two complete episodes; data that guardian or model refuse.
        """
        super().fit(dataset, say)
        c = self.config
        train, held = split(dataset, c.calibration)
        if self.guardian is not None:
            fit_guardian(self.guardian, train, held, c.alpha, say)
            if "ood" in self.limits.names:
                self._compare(held, say)
        random = MemberRandom(self.seeds, self.device, stream=Stream.ACTING)
        for number, model in enumerate(self.models):
            part = train if number == 0 else resample(held, number)
            costs = part.costs if model.costs else np.zeros((len(part), 0))
            model.fit(part, random, costs=costs, say=say if number == 0 else lambda line: None)
        counted = self.discrete and c.model != "ensemble"
        actions = self.spec.action_dim if counted else 0
        self.world.fit(dataset, c.starts, actions, self.models)
        self._budget(max(1, round(float(dataset.episode_lengths().mean()))), say)
        rows = self.spec.observations(np.asarray(train.observations))
        observations = torch.tensor(rows, device=self.device)
        observations = observations.to(self._mean.dtype)
        if self.limited and self.absorbs:
            self._fit_cost_to_go(train, observations)
        if c.clone_updates:
            self._clone(train, observations, say)

    def _compare(self, held: Any, say: Callable[[str], None]) -> None:
        """Report held-out episodes that leave the support more often than β allows."""
        c, step = self.config, max(1, len(held) // COMPARED)
        some = held.subset(episodes=np.arange(0, len(held.episodes), step))
        flagged = self.guardian.is_ood(flat(some.observations), some.actions)
        share = share_leaving(np.asarray(flagged), some.episodes, c.horizon, c.starts)
        if share > c.ood_probability:
            say(
                f"note: {share:.0%} of logged stretches of {c.horizon} steps hold an unsupported "
                f"step, more than ood_probability = {c.ood_probability:g}: the policy has to keep "
                "closer to the data than their own behaviour; if it cannot (ood_value stays above "
                "its budget), raise ood_probability or lower alpha"
            )

    def _fit_cost_to_go(self, train: Any, observations: Tensor) -> None:
        """Regress the logged cost-to-go, which is 0 after the end of an episode."""
        ends = train.terminals | train.timeouts
        discounts = np.array(self.column("cost_discount"))
        found, running = np.empty((len(train), self.members)), np.zeros(self.members)
        for t in range(len(train) - 1, -1, -1):
            running = train.costs[t] + discounts * (0.0 if ends[t] else 1.0) * running
            found[t] = running
        # In float64: hundreds of steps make much of a rounding, which depends on the other members.
        model, kind = self.cost_to_go.double(), observations.dtype
        observations, costs = observations.double(), torch.from_numpy(found).T.to(self.device)
        model.shift.copy_(costs.mean(1, keepdim=True))
        model.scale.copy_(costs.std(1, correction=0, keepdim=True).clamp_min(1e-6))
        random = MemberRandom(self.seeds, self.device, stream=Stream.REGRESSION)
        optimizer = self.adam(model.net, lr=self.config.critic_lr)
        for _ in range(REGRESSION_UPDATES):
            rows = random.integers(len(observations), REGRESSION_BATCH)
            target = (costs.gather(1, rows) - model.shift) / model.scale
            error = model.net(observations[rows])[:, 0] - target
            self.minimise(optimizer, error.square().mean(-1))
        model.to(kind)

    def _budget(self, length: int, say: Callable[[str], None]) -> None:
        """Limits in the units of the estimates; episodes last ``length`` steps."""
        c, columns = self.config, []
        units = [convert(1.0, "discounted", horizon=length, discount=discount)
                 for discount in self.column("cost_discount")]  # fmt: skip
        for name in self.limits.names:
            if name == "ood":
                columns.append([ood_budget(c.ood_probability, discount, c.horizon)
                                for discount in self.column("discount")])  # fmt: skip
            else:
                limits = [check_limit(v, infinite=True) for v in self.column("cost_limit")]
                columns.append([limit * unit for limit, unit in zip(limits, units)])
            numbers = ", ".join(f"{value:.4g}" for value in dict.fromkeys(columns[-1]))
            say(f"budget of {name}: {numbers} per simulated episode")
        if columns:
            self.limits.budget.copy_(torch.tensor(columns).T)
        self.limits.unit.copy_(torch.tensor(units))

    def _clone(self, train: Any, observations: Tensor, say: Callable[[str], None]) -> None:
        """Behaviour cloning by maximum likelihood."""
        spec = self.spec
        actions = torch.tensor(spec.actions(train.actions), device=self.device)
        if self.discrete:
            actions = actions.squeeze(-1).long()
        random = MemberRandom(self.seeds, self.device, stream=Stream.OWN_ROWS)
        optimizer = self.adam(self.actor, lr=self.config.actor_lr)
        for _ in range(self.config.clone_updates):
            rows = random.integers(len(observations), CLONE_BATCH)
            distribution = self._distribution(observations[rows], None)
            loss = -self._log_prob(distribution, actions[rows]).mean(-1)
            self.minimise(optimizer, loss)
        say(f"cloned: negative log-likelihood {float(loss.detach().mean()):.3f}")

    @torch.no_grad()
    def predict(self, episodes: int) -> tuple[Tensor, Tensor | None] | None:
        """See `Agent.predict`; the model is used on unsupported steps too."""
        if self.config.starts != "initial":
            return None  # the states that logged episodes begin in are not kept
        policy, random = self.policy(), MemberRandom(self.seeds, self.device, stream=Stream.SHARES)

        def decide(states: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
            actions = policy(self.world.see(states))
            return actions, actions

        rollout = simulate(self.models[0], self.world, episodes, self.spec.horizon, random, decide)
        costs = rollout.costs.sum((-1, -2)) if self.models[0].costs else None
        return rollout.rewards.sum(-1), costs

    def update_key(self, update: int) -> Hashable:
        """Which resampled model this update compares with."""
        count = self.config.margin_models if self.limited else 0
        return update % count if count else None
