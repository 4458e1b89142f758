"""Cal-QL (Nakamoto et al. 2023, arXiv 2303.05479): CQL that does not push below the data's returns.

agents/cql.py's losses, trained on a dataset first (``offline_steps``) and then on both sources. The
penalty sees, in place of the values at the policy's actions b ~ π(·|s') and q ~ π(·|s),

    max(Q(s, b_j), G(s))   and   max(Q(s, q_j), G(s)),      G_t = r_t + γ G_{t+1}

with G the return-to-go of the row's episode, in training units and 0 after its last step, whether
that is a terminal or a time-out. Values at random actions are not floored. Where every reward of an
episode is ``failure_reward``, which never reached a sparse goal, G is failure_reward / (1 - γ).

Deviations from the authors' code (nakamotoo/Cal-QL):
- rows of an episode that is still running can be drawn, unfloored; there, an episode's rows are
  added when it has ended, and its updates are then made in a burst;
- trajectories are used whole; the authors drop AntMaze's last timed-out row and cut Adroit's
  trajectories at the last success.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.replay import Batch, Extra, ReturnsToGo

from .cql import CQL, CQLConfig
from .shared.online import OnlineConfig


@dataclass(frozen=True)
class CalQLConfig(OnlineConfig, CQLConfig):
    """Defaults: what the authors' tasks have in common; configs/ has the rest of each."""

    hidden: tuple[int, ...] = (256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256, 256)
    normalize_observations: bool = False
    actor_lr: float = 1e-4
    temperature_lr: float = 1e-4
    weight: float = 5.0
    max_backup: bool = True
    random_steps: int = 0
    failure_reward: float = -math.inf  # of every step of an episode that failed; -inf: none does


class CalQL(CQL):
    Config = CalQLConfig
    config: CalQLConfig
    online = True
    per_member = (CQL.per_member - {"discount"}) | {"exploration_budget"}

    @classmethod
    def batch_extras(cls, config: Any) -> tuple[Extra, ...]:
        return (ReturnsToGo(config.discount, config.failure_reward),)

    def calibrate(self, values: Tensor, batch: Batch) -> Tensor:
        if ReturnsToGo.name not in batch.extras:
            raise SaferlError(
                "cal_ql learns from returns-to-go: make the buffer with "
                "extras=CalQL.batch_extras(config)"
            )
        n = self.config.samples
        floor = batch.extras[ReturnsToGo.name][:, None, :, None]
        uniform, policy, logged = values.split([n, 2 * n, 1], -1)
        return torch.cat((uniform, torch.maximum(policy, floor), logged), -1)
