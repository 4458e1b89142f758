"""Samples batches from offline data, online buffers, or both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from saferl.io import part
from saferl.replay.batch import Batch
from saferl.replay.buffer import OnlineBuffer, SharedBuffer
from saferl.rng import MemberRandom, Stream


class Shares(Protocol):
    """What an agent's settings say of the two sources; see `saferl.agents.shared.online`."""

    @property
    def batch_size(self) -> int: ...

    @property
    def sampling(self) -> str: ...

    @property
    def offline_share(self) -> float: ...

    @property
    def share_rule(self) -> str: ...

    @property
    def final_share(self) -> float: ...

    @property
    def anneal_steps(self) -> int: ...


class MixedSampler:
    """Draws the rows of an update by the rules of an `OnlineConfig`, from one buffer or from two.

    An update takes n batches of B rows. In each of them so many rows are the dataset's, the same
    number in all n: `mixed` round(p B), `block` B with probability p and else 0, `alternate` B in
    every second update and 0 in the others. p is ``offline_share``; ``annealed`` it goes linearly
    to ``final_share``, ``proportional`` it is the dataset's part of all rows (and p B is rounded up
    with the probability of its fraction). A member that has no rows of one of the two takes all
    from the other.

    Each member draws from streams of its own, and no row of the other source is touched in a batch
    of a single one.

    Args:
        config: an `OnlineConfig`.
        offline: the dataset's rows, or None.
        online: the members' own.
        seeds: one per member.

    Attributes:
        env_steps: environment steps so far.
        pretraining: whether the next batches are of the dataset alone; set by the engine.
    """

    def __init__(
        self,
        config: Shares,
        offline: SharedBuffer | None,
        online: OnlineBuffer,
        seeds: Sequence[int],
    ):
        self.config, self.offline, self.online = config, offline, online
        self.random = MemberRandom(seeds, stream=Stream.SHARES)
        self.env_steps = 0
        self.pretraining = False
        self.draws = 0
        share = config.offline_share
        self._share = np.array(share if isinstance(share, tuple) else [share] * online.members)

    @property
    def device(self) -> torch.device:
        return self.online.device

    @property
    def on_device(self) -> bool:
        return self.offline is None or self.offline.on_device

    @property
    def streams_of_random(self) -> Sequence[MemberRandom]:
        sources: list[Any] = [self.online] if self.offline is None else [self.online, self.offline]
        return (self.random, *(source.random for source in sources))

    def count_env_step(self) -> int:
        """One more environment step was made; returns how many there are."""
        self.env_steps += 1
        return self.env_steps

    def share(self) -> np.ndarray:
        """p of each member now, ``[M]``."""
        c = self.config
        if c.share_rule == "annealed":
            done = min(1.0, self.env_steps / c.anneal_steps)
            return self._share + done * (c.final_share - self._share)
        if c.share_rule == "proportional" and self.offline is not None:
            return self.offline.size / (self.offline.size + self.online.sizes)
        return self._share

    def ready(self) -> bool:
        """Whether every member has rows to learn from."""
        return self.offline is not None or bool(self.online.sizes.all())

    def _counts(self, rows: int) -> np.ndarray:
        """Rows of the dataset in each batch of ``rows``, ``[M]``."""
        sampling, members = self.config.sampling, self.online.members
        if self.offline is None:
            return np.zeros(members, np.int64)
        if sampling == "mixed":
            # Where few rows are a member's own, rounding to the nearest would never draw one.
            proportional = self.config.share_rule == "proportional"
            up = self.random.uniform().numpy() if proportional else 0.5
            counts = np.floor(self.share() * rows + up).astype(np.int64)
        elif sampling == "block":
            # Drawn also where nothing depends on it: the stream's place is that of the updates.
            uniform = self.random.uniform().numpy()
            counts = rows * (uniform < self.share())
        else:
            counts = np.full(members, rows * (1 - self.draws % 2))
        self.draws += 1
        return np.where(self.pretraining | (self.online.sizes == 0), rows, counts)

    def sample(self, total: int) -> Batch:
        """``[M, total]``: one batch after the other, each with its share of both."""
        rows = min(self.config.batch_size, total)
        n, counts = total // rows, self._counts(rows)
        if (counts == counts[0]).all():
            return self._draw(range(len(counts)), n, rows, int(counts[0]))
        parts, order = [], []
        for count in np.unique(counts):
            members = np.flatnonzero(counts == count).tolist()
            order += members
            parts.append(self._draw(members, n, rows, int(count)))
        back = torch.from_numpy(np.argsort(order)).to(self.online.device)
        whole = Batch.concatenate(parts, 0)
        return whole.map(lambda field: field[back])

    def _draw(self, members: Sequence[int], n: int, rows: int, count: int) -> Batch:
        if count == rows:
            assert self.offline is not None
            return self.offline.sample_of(members, n * rows)
        if count == 0:
            return self._own(members, n * rows)
        assert self.offline is not None
        logged = self.offline.sample_of(members, n * count)
        own = self._own(members, n * (rows - count))
        if n == 1:
            return Batch.concatenate([logged, own], 1)
        cut = [part.map(lambda field: field.unflatten(1, (n, -1))) for part in (logged, own)]
        return Batch.concatenate(cut, 2).map(lambda field: field.flatten(1, 2))

    def _own(self, members: Sequence[int], rows: int) -> Batch:
        """Rows that members gathered, with costs only where the dataset has them too."""
        batch = self.online.sample_of(members, rows)
        known = self.offline is None or self.offline.costs
        return batch if known else batch._replace(costs=None)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"online.{k}": v for k, v in self.online.state_dict().items()}
        if self.offline is not None:
            state |= {f"offline.{k}": v for k, v in self.offline.state_dict().items()}
        state["random"] = self.random.state_dict()["state"]
        state["draws"] = torch.tensor(self.draws)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, buffer in (("online.", self.online), ("offline.", self.offline)):
            if buffer is not None:
                buffer.load_state_dict(part(state, name))
        self.random.load_state_dict({"state": state["random"]})
        self.draws = int(state["draws"])
