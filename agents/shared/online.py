"""Settings of agents that act in an environment while they learn.

A run of such an agent takes rows from a dataset, from the environments that its members act in, or
from both (`saferl.training.online`). Where the rows of an update come from is decided once; an
update may be made of several critic steps (``inner_steps`` of SAC and its relatives), and is then a
block of one source. The update-to-data ratio counts critic steps per environment step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from saferl.errors import SaferlError, unknown

from .config import AgentConfig, at_least, between, member_values

SAMPLING = ("mixed", "block", "alternate")
SHARES = ("constant", "annealed", "proportional")


@dataclass(frozen=True)
class OnlineConfig(AgentConfig):
    """Fields of online-capable agents."""

    utd: float = 0.0  # critic steps per environment step; 0: one update per step
    sampling: str = "mixed"  # a share of every batch; block, alternate: one source per update
    offline_share: float = 0.5  # of rows (mixed), or of updates in the long run (block)
    share_rule: str = "constant"  # annealed: to final_share; proportional: to the rows of each
    final_share: float = 0.0  # of the annealed share, reached after anneal_steps
    anneal_steps: int = 0  # environment steps
    offline_steps: int = 0  # offline pre-training updates, of the steps of the run
    random_steps: int = 5000  # environment steps of uniform actions, before the first update
    start_steps: int = 0  # environment steps before learning starts
    online_capacity: int = 0  # rows of the online buffer per member; 0: every step of the run
    exploration_budget: float = math.inf  # largest exploration cost of the run, per member

    def __post_init__(self):
        for name, known in (("sampling", SAMPLING), ("share_rule", SHARES)):
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        for name, least in {
            "anneal_steps": 0, "offline_steps": 0, "random_steps": 0,
            "start_steps": 0, "online_capacity": 0,
        }.items():  # fmt: skip
            at_least(self, name, least)
        between(self, "offline_share", 0, 1)
        between(self, "final_share", 0, 1)
        if not 0 <= self.utd < math.inf:
            raise SaferlError(f"utd is above 0, or 0 for one update per step, got {self.utd:g}")
        for budget in member_values(self, "exploration_budget"):
            if not budget >= 0:
                raise SaferlError(
                    "exploration_budget is a cost of 0 or more per member (inf for none), got "
                    f"{budget:g}"
                )
        if self.share_rule == "annealed" and not self.anneal_steps:
            raise SaferlError("an annealed share needs anneal_steps, 1 or more environment steps")
        if self.sampling != "block" and isinstance(self.offline_share, tuple):
            raise SaferlError(
                "offline_share can differ between members only with sampling=block: mixed batches "
                "of one run have one share, and alternate has half"
            )

    @property
    def updates_per_step(self) -> float:
        """Updates per environment step."""
        return self.utd / self.critic_steps if self.utd else 1.0

    @property
    def critic_steps(self) -> int:
        """Critic steps per update."""
        return 1
