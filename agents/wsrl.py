"""WSRL (Zhou et al. 2025, arXiv 2412.07762): online SAC from pre-trained networks, no data kept.

    saferl train cal_ql --dataset ID --steps N --set offline_steps=N …    pre-training
    saferl train wsrl --env ID --from runs/cal_ql-ID                      fine-tuning

The pre-trained policy acts for ``start_steps`` steps without an update; these rows re-calibrate the
critics. From then on an update takes K = 4 critic steps on an ensemble of 10, each towards the
least of 2 target critics drawn with replacement, and one step of the policy and of α on all 4
batches, towards the least of the ensemble. Losses are those of agents/sac.py. Optimisers
go on from the pre-trained state; layers and critics are those of the run that it starts from.

Deviation from the authors' code (zhouzypaul/wsrl): σ depends on the state in all tasks (there not
in AntMaze), and AntMaze's largest of 10 actions in the target is not there.
"""

from __future__ import annotations

from dataclasses import dataclass

from .sac import SAC, SACConfig


@dataclass(frozen=True)
class WSRLConfig(SACConfig):
    """Defaults: the authors'."""

    actor_lr: float = 1e-4
    temperature_lr: float = 1e-4
    inner_steps: int = 4  # K, critic steps per update
    critics: int = 10
    target_critics: int = 2
    target_replacement: bool = True
    actor_steps: str = "all"
    actor_layer_norm: bool = True
    critic_layer_norm: bool = True
    entropy_backup: bool = False
    init: str = "xavier"
    log_std_min: float = -20.0
    scale_log_std: bool = True
    offline_share: float = 0.0
    random_steps: int = 0
    start_steps: int = 5000  # environment steps of the pre-trained policy before the first update


class WSRL(SAC):
    Config = WSRLConfig
    config: WSRLConfig
    pretrained = True
