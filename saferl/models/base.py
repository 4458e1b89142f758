"""Learned models of the environment: what a state-action pair leads to, for rollouts and planning.

All share one interface, batched over members and rows and free of reads to the host:

    step(observations [M, B, O], actions [M, B, A] or [M, B], random)
        -> Step(next_observations [M, B, O], rewards [M, B], costs [M, B, C], terminals [M, B],
                outcomes [M, B])

in raw units. An outcome is 0 where the episode goes on and 1 … K where it ended, for K ways to end
(death, discharge). Three kinds:

- `tabular`: the logged successors of the same pair, with a Dirichlet prior; pairs that were never
  logged borrow those of the nearest pair that was;
- `knn`: the logged successor of one of the k nearest logged pairs;
- `ensemble`: probabilistic neural networks (Chua et al., NeurIPS 2018).

The first two replay logged rows: observation, reward, cost and end of a step come from one row, and
rows that end an episode are replayed like all others. OGSRL (Yan et al., NeurIPS 2025) is `knn`
with k = 1. `validate` tells how far a model is off on episodes that it has not seen. A value
promised by a model that a policy was optimised in is not evidence for the policy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.nn.data_buffers import DataBuffers
from saferl.rng import MemberRandom
from saferl.spec import Spec

BLOCK = 4096
"""Rows that `Model.validate` asks at once, per member."""


class Step(NamedTuple):
    """What a step leads to; for `Model.expect` the means of the same, outcomes ``[M, B, K + 1]``
    probabilities."""

    next_observations: Tensor  # [M, B, O], of the last state where the episode ended
    rewards: Tensor  # [M, B]
    costs: Tensor  # [M, B, C], user units
    terminals: Tensor  # [M, B], 1 where the episode ended
    outcomes: Tensor  # [M, B] int64, 0 goes on, 1 … K how it ended


class Model(DataBuffers):
    """Base of all models. What is learnt is in buffers and parameters, so ``state_dict`` has it.

    Args:
        init: one random stream per member; tells M and initialises networks.
        spec: sizes of the task, and its actions' bounds.
        costs: C, numbers of a step's cost. outcomes: K, ways in which an episode can end.
    """

    def __init__(self, init: MemberRandom, spec: Spec, costs: int = 1, outcomes: int = 1):
        super().__init__()
        if costs < 0 or outcomes < 1:
            raise SaferlError(
                f"costs must be 0 or more and outcomes 1 or more: {costs}, {outcomes}"
            )
        self.spec, self.members = spec, len(init.generators)
        self.costs, self.outcomes = int(costs), int(outcomes)

    # What a kind provides.

    def _fit(self, data: dict[str, Tensor], random: MemberRandom, say: Callable) -> None:
        raise NotImplementedError

    @property
    def fitted(self) -> bool:
        raise NotImplementedError

    def step(self, observations: Tensor, actions: Tensor, random: MemberRandom) -> Step:
        """One sampled transition for each row; the module's docstring has the shapes."""
        raise NotImplementedError

    def expect(self, observations: Tensor, actions: Tensor) -> Step:
        """Means of `step`; the next observation's is given that the episode goes on."""
        raise NotImplementedError

    def log_likelihood(self, data: dict[str, Tensor]) -> Tensor | None:
        """``[M, B]`` log-likelihood of logged steps, NaN for rows left out; None: has none."""
        return None

    # What they share.

    def fit(
        self,
        dataset: Any,
        random: MemberRandom,
        costs: Any = None,
        outcomes: Any = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> Model:
        """Learn from a `Dataset`.

        Args:
            random: a stream that nothing else draws from, for how much a fit draws is not known.
            costs: ``[N]`` or ``[N, C]``; the dataset's own where None.
            outcomes: ``[N]`` whole numbers, 0 … K, above 0 exactly at terminal rows; where None
                every terminal is outcome 1.
            say: receives a line when a long fit ends.

        Raises:
            SaferlError: sizes that differ from the spec's, costs that are missing, outcomes that
                contradict the terminals.
        """
        self._fit(self._data(dataset, costs, outcomes), random, say)
        return self

    def _data(self, dataset: Any, costs: Any, outcomes: Any) -> dict[str, Tensor]:
        found = (dataset.observation_dim, dataset.action_dim, dataset.discrete)
        wanted = (self.spec.observation_dim, self.spec.action_dim, self.spec.discrete)
        if found != wanted:
            raise SaferlError(
                f"the data have (observation size, action size, discrete) {found}, the model was "
                f"made for {wanted}: make it with the data's spec"
            )
        n = len(dataset)
        costs = dataset.costs if costs is None else costs
        if costs is None:
            if self.costs:
                raise SaferlError("the data have no costs: attach with_costs, or take costs=0")
            costs = np.zeros((n, 0))
        costs = np.asarray(costs, np.float32).reshape(n, -1)[:, : self.costs or 0]
        if costs.shape != (n, self.costs):
            raise SaferlError(f"costs have {costs.shape[1]} columns, the model has {self.costs}")
        ends = dataset.terminals.astype(np.int64)
        outcomes = ends if outcomes is None else np.asarray(outcomes, np.int64)
        if outcomes.shape != (n,) or ((outcomes > 0) != dataset.terminals).any():
            raise SaferlError("outcomes must be above 0 at terminal rows and 0 at all others")
        if outcomes.min() < 0 or outcomes.max() > self.outcomes:
            raise SaferlError(f"outcomes must lie in 0 … {self.outcomes}: make the model with more")

        def tensor(array: np.ndarray) -> Tensor:
            return torch.tensor(array, device=self.device)  # copies: a dataset's are read-only

        return {
            "observations": tensor(dataset.observations.reshape(n, -1)).float(),
            "actions": tensor(dataset.actions),
            "rewards": tensor(dataset.rewards),
            "costs": tensor(costs),
            "next_observations": tensor(dataset.next_observations.reshape(n, -1)).float(),
            "outcomes": tensor(outcomes),
            "episodes": tensor(dataset.episode_ids()),
        }

    def _ready(self) -> None:
        if not self.fitted:
            raise SaferlError("the model is not fitted: call fit(dataset, random) first")

    @torch.no_grad()
    def validate(
        self,
        dataset: Any,
        random: MemberRandom,
        costs: Any = None,
        outcomes: Any = None,
        steps: Sequence[int] = (1, 5, 10),
    ) -> dict[str, float]:
        """How far the model is off on episodes it has not seen, averaged over members.

        One step, from the means:

        - ``observation_error``: RMSE over rows that go on, in standard deviations of the data;
          ``observation_error_no_change`` is that of predicting s' = s, to compare with;
        - ``reward_error``, ``cost_error`` (``cost_error_0`` … for several): RMSE;
        - ``terminal_accuracy``: share of rows whose most likely outcome is the logged one;
          ``terminal_rate`` and ``terminal_rate_logged``; ``terminal_log_loss`` in nats;
        - ``log_likelihood``: mean over rows, in nats; not for `knn`. Densities (`ensemble`) and
          probabilities (`tabular`) do not compare.

        For each k of ``steps``, rollouts from the starts of episodes with at least k steps under
        the logged actions: ``rollout_error_k``, RMSE of the k-th next observation in standard
        deviations where neither ended; ``rollout_alive_k``, share that the model has not ended
        before (``…_logged`` for the data); ``rollout_cost_bias_k``, mean of predicted minus logged
        cost summed over the steps that both are alive (first cost).

        Raises:
            SaferlError: not fitted; data that do not fit the model.
        """
        self._ready()
        data = self._data(dataset, costs, outcomes)
        std = data["observations"].std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}

        def add(name: str, values: Tensor) -> None:
            sums[name] = sums.get(name, 0.0) + float(values.double().sum())
            counts[name] = counts.get(name, 0) + values.numel()

        for start in range(0, len(dataset), BLOCK):
            rows = {k: v[start : start + BLOCK] for k, v in data.items()}
            block = {k: v.expand(self.members, *v.shape) for k, v in rows.items()}
            mean = self.expect(block["observations"], block["actions"])
            goes_on = block["outcomes"] == 0
            error = (mean.next_observations - block["next_observations"]) / std
            still = (block["observations"] - block["next_observations"]) / std
            add("observation_error", error[goes_on].square())
            add("observation_error_no_change", still[goes_on].square())
            add("reward_error", (mean.rewards - block["rewards"]).square())
            for j in range(self.costs):
                name = "cost_error" if self.costs == 1 else f"cost_error_{j}"
                add(name, (mean.costs[..., j] - block["costs"][..., j]).square())
            chance = mean.outcomes.gather(-1, block["outcomes"].unsqueeze(-1))
            add("terminal_accuracy", (mean.outcomes.argmax(-1) == block["outcomes"]).float())
            add("terminal_log_loss", -chance.clamp_min(1e-6).log())
            add("terminal_rate", mean.terminals)
            add("terminal_rate_logged", (~goes_on).float())
            likelihood = self.log_likelihood(block)
            if likelihood is not None:
                add("log_likelihood", likelihood[~likelihood.isnan()])
        report = {k: sums[k] / max(counts[k], 1) for k in sums}
        for name in report:
            if "_error" in name:
                report[name] = math.sqrt(report[name])
        return report | self._rollouts(data, std, random, steps)

    def _rollouts(
        self, data: dict[str, Tensor], std: Tensor, random: MemberRandom, steps: Sequence[int]
    ) -> dict[str, float]:
        episodes = data["episodes"]
        first = torch.cat((episodes.new_zeros(1), (episodes.diff() != 0).nonzero()[:, 0] + 1))
        length = torch.cat((first[1:], first.new_tensor([len(episodes)]))) - first
        report: dict[str, float] = {}
        for k in steps:
            start = first[length >= k]
            if not len(start):
                continue
            state = data["observations"][start].expand(self.members, -1, -1)
            alive = torch.ones(state.shape[:2], device=state.device)
            bias = torch.zeros_like(alive)
            for t in range(k):
                before = alive
                row = start + t
                action = data["actions"][row]
                found = self.step(state, action.expand(self.members, *action.shape), random)
                if self.costs:
                    bias = bias + before * (found.costs[..., 0] - data["costs"][row, 0])
                alive = before * (1 - found.terminals)
                state = found.next_observations
            logged = (data["outcomes"][row] == 0).float().expand_as(alive)
            both = (alive * logged) > 0
            error = (state - data["next_observations"][row]) / std
            report[f"rollout_alive_{k}"] = float(alive.mean())
            report[f"rollout_alive_{k}_logged"] = float(logged.mean())
            if both.any():
                report[f"rollout_error_{k}"] = float(error[both].square().mean().sqrt())
            if self.costs:
                report[f"rollout_cost_bias_{k}"] = float(bias.mean())
        return report
