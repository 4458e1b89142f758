"""RLPD (Ball et al. 2023, arXiv 2302.02948): SAC with a dataset, made fast by three switches.

Every batch is half the dataset's and half the member's own. An update takes K = 20 critic steps on
an ensemble of 10 with LayerNorm, each towards the least of 2 target critics drawn for that step,
and then one step of the policy and of α on the last batch, towards the mean of the ensemble. Losses
are those of agents/sac.py. Deviations from the authors' code (ikostrikov/rlpd): the temperature's
loss is -log α (log π + H̄), theirs α (-log π - H̄); losses are sums over the ensemble, theirs means;
terminals of sparse Adroit data are as recorded, which they erase.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sac import SAC, SACConfig


@dataclass(frozen=True)
class RLPDConfig(SACConfig):
    """Defaults: the authors' for D4RL locomotion; configs/ has AntMaze and Adroit."""

    inner_steps: int = 20  # K, critic steps per update
    critics: int = 10
    target_critics: int = 2
    actor_value: str = "mean"
    actor_steps: str = "last"
    critic_layer_norm: bool = True
    target_entropy: float = -0.5
    init: str = "xavier"
    log_std_min: float = -20.0


class RLPD(SAC):
    Config = RLPDConfig
    config: RLPDConfig
    needs_dataset = True
