"""IQL, fine-tuned: agents/iql.py on a dataset first and then on the dataset and its own rows.

The losses do not change; the policy acts by sampling. By default the dataset and the member's rows
are drawn from as one buffer, as CORL's fine-tuning does. Give ``offline_steps``, or begin with the
networks of an `iql` run (``--from RUN``).

The actor's rate is constant, as in the authors' configuration for fine-tuning (ikostrikov,
implicit_q_learning). Deviation from CORL: there it falls along a cosine to 0 at the end of the
updates on the dataset, and rises along the same cosine from there.
"""

from __future__ import annotations

from dataclasses import dataclass

from .iql import IQL, IQLConfig
from .shared.online import OnlineConfig


@dataclass(frozen=True)
class IQLFinetuneConfig(OnlineConfig, IQLConfig):
    """Defaults: `iql`'s, and CORL's one buffer for both sources."""

    share_rule: str = "proportional"
    random_steps: int = 0
    actor_decay_steps: int = 0


class IQLFinetune(IQL):
    Config = IQLFinetuneConfig
    config: IQLFinetuneConfig
    online = True
    per_member = IQL.per_member | {"exploration_budget"}
