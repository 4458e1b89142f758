"""What the members of a run gathered in their environments, as a `Dataset`.

data = saferl.gathered("runs/sac-…")        # all members, one after the other
saferl.save_dataset(data, "online.hdf5")
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.io import part
from saferl.registry import agent_class
from saferl.replay import RowLayout, online_buffer_class
from saferl.runs.config import OBJECT
from saferl.runs.folder import RunFolder
from saferl.spec import Spec


def gathered(run: str | Path, member: int | None = None) -> Dataset:
    """The rows of the last checkpoint, in the order in which they happened, in raw units.

    To rounding where the agent's units are others (normalised observations, scaled rewards, actions
    outside [-1, 1]). An episode that was still running ends in a timeout. Costs are None where the
    environment reported none. Pixels are `Frames`, or whole images for a run without a dataset,
    which does not know of stacks.

    Args:
        run: folder of a run whose agent acts.
        member: only this one's, counted from 0; None: all.

    Raises:
        SaferlError: not such a run, no such member, or nothing gathered yet.
    """
    folder = RunFolder(run)
    state, header = folder.load()
    own = part(state, "engine.buffer.online.")
    if not own:
        raise SaferlError(f"{run} gathered no rows: its agent learns from a dataset alone")
    members = len(header["seeds"])
    if member is not None and not 0 <= member < members:
        raise SaferlError(f"no member {member}: {run} has {members}, counted from 0")
    cls, spec = agent_class(header["agent"]), Spec.from_dict(header["spec"])
    kept, width = own["rows"].shape[1:]
    extras = cls.batch_extras(cls.make_config(header["config"]))
    costs = RowLayout(spec, True, extras).width == width
    buffer = online_buffer_class(spec)(spec, kept, header["seeds"], "cpu", costs, extras)
    buffer.load_state_dict(own)
    orders = [buffer.order(m) for m in (range(members) if member is None else [member])]
    for _, ends in orders:
        ends[-1:] = True
    index, last = map(np.concatenate, zip(*orders))
    if not len(last):
        raise SaferlError(f"{run} has not acted yet: there are no rows")
    fields = buffer.history(index, last)
    terminals = fields["terminals"].astype(bool)
    known = costs and bool(state["engine.has_costs"])
    config = folder.config()
    bounds = {"action_low": spec.action_low, "action_high": spec.action_high}
    return Dataset.from_arrays(
        observations=fields["observations"],
        actions=fields["actions"] if spec.discrete else spec.raw_actions(fields["actions"]),
        rewards=spec.raw_rewards(fields["rewards"]),
        terminals=terminals,
        timeouts=last & ~terminals,
        next_observations=fields["next_observations"],
        costs=fields["costs"] if known else None,
        id=f"{folder.path.name}-online",
        env_id=config.env if config.env != OBJECT else None,
        horizon=spec.horizon or None,
        origin=f"gathered by {header['agent']} while it learned, {header['step']} steps",
        clip_actions=True,
        **({"n_actions": spec.action_dim} if spec.discrete else bounds),
    )
