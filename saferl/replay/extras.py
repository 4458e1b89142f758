"""Extra columns of a batch, beside its transitions: an agent names those it needs.

    class Mine(Agent):
        @classmethod
        def batch_extras(cls, config):
            return (NextActions(), Window(8))

    batch.extras["next_actions"]                      # [M, B, A]

A buffer stores what an extra computes from whole episodes and hands it out with each batch; nothing
else of the library knows of it. A third party's extra is a subclass of `Extra`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError
from saferl.spec import Spec

Fields = dict[str, Tensor]
Gather = Callable[[int], tuple[dict[str, Tensor], Tensor]]


class Extra:
    """Further fields of a batch, computed once from whole episodes.

    All arrays are in the agent's units (`Spec`). Subclasses are small frozen objects.
    """

    name: ClassVar[str]

    @property
    def looks_back(self) -> bool:
        """Whether it has fields that need other rows of the episode."""
        return type(self).window_fields is not Extra.window_fields

    def width(self, spec: Spec) -> int:
        """Floats that are stored for a row."""
        raise NotImplementedError

    def of_episode(self, actions: np.ndarray, rewards: np.ndarray, complete: bool) -> np.ndarray:
        """What is stored for the n rows of an episode, ``[n, width]``.

        Args:
            actions: ``[n, A]`` in [-1, 1], or ``[n, 1]`` of whole numbers. rewards: ``[n]``.
            complete: False for rows whose end is not known: a trailing fragment of a dataset, or an
                episode that is still running.
        """
        raise NotImplementedError

    def of_running(self, actions: np.ndarray, rewards: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """What is stored for the newest rows of n running episodes, ``[n, width]``.

        ``steps`` ``[n]``: rows of the episode before this one.
        """
        each = [
            self.of_episode(actions[i : i + 1], rewards[i : i + 1], False)
            for i in range(len(rewards))
        ]
        return np.concatenate(each)

    def fields(self, stored: Tensor, spec: Spec) -> Fields:
        """Fields of a batch, ``[M, B, …]`` each, from what is stored ``[M, B, width]``."""
        raise NotImplementedError

    def window_fields(self, stored: Tensor, gather: Gather) -> Fields:
        """Fields that need other rows of the episode; most extras have none."""
        return {}


class NextActions(Extra):
    """The logged action at s', ``next_actions`` ``[M, B, A]`` (discrete ``[M, B]`` int64).

    The last row of an episode has none: there ``has_next_action`` ``[M, B]`` is 0 and the row's own
    action stands in.
    """

    name = "next_actions"

    def width(self, spec: Spec) -> int:
        return (1 if spec.discrete else spec.action_dim) + 1

    def of_episode(self, actions: np.ndarray, rewards: np.ndarray, complete: bool) -> np.ndarray:
        next_actions = np.concatenate([actions[1:], actions[-1:]])
        known = np.ones((len(actions), 1), np.float32)
        known[-1:] = 0
        return np.concatenate([next_actions, known], 1)

    def fields(self, stored: Tensor, spec: Spec) -> Fields:
        actions = stored[..., :-1]
        if spec.discrete:
            actions = actions.squeeze(-1).long()
        return {"next_actions": actions, "has_next_action": stored[..., -1]}


class ReturnsToGo(Extra):
    """G_t = r_t + γ G_{t+1}, ``returns_to_go`` ``[M, B]``; 0 after the episode's last step.

    Where every reward of an episode is ``failure_reward`` G is failure_reward / (1 - γ), the return
    of an episode that fails for ever (Cal-QL, arXiv 2303.05479, on sparse rewards). Rows whose
    episode has no known end have G = -inf.

    Raises:
        SaferlError: a failure reward with a discount of 1.
    """

    name = "returns_to_go"

    def __init__(self, discount: float, failure_reward: float = -math.inf):
        if discount == 1 and math.isfinite(failure_reward):
            raise SaferlError("failure_reward needs a discount below 1")
        self.discount, self.failure_reward = discount, failure_reward

    def width(self, spec: Spec) -> int:
        return 1

    def of_episode(self, actions: np.ndarray, rewards: np.ndarray, complete: bool) -> np.ndarray:
        if not complete:
            return np.full((len(rewards), 1), -np.inf, np.float32)
        if (rewards == np.float32(self.failure_reward)).all():
            return np.full((len(rewards), 1), self.failure_reward / (1 - self.discount), np.float32)
        from scipy.signal import lfilter  # slow to import, and few agents need it

        backwards = rewards[::-1].astype(np.float64)
        found = lfilter([1.0], [1.0, -self.discount], backwards)[::-1]
        return found.astype(np.float32)[:, None]

    def fields(self, stored: Tensor, spec: Spec) -> Fields:
        return {self.name: stored[..., 0]}


class Window(Extra):
    """The last ``length`` steps of the episode, the row's own last, for sequence models.

    Fields ``window_observations`` ``[M, B, L, O]``, ``window_actions`` ``[M, B, L, A]`` (discrete
    ``[M, B, L]``), ``window_rewards`` and ``window_mask``, ``[M, B, L]`` each. The mask is 1 where
    a step is there and 0 before the episode began; it is 0 as well for steps that a full online
    buffer has overwritten.

    Raises:
        SaferlError: a length below 1.
    """

    name = "window"

    def __init__(self, length: int):
        if length < 1:
            raise SaferlError(f"a window has 1 or more steps, got {length}")
        self.length = int(length)

    def width(self, spec: Spec) -> int:
        return 1  # steps since the episode began

    def of_episode(self, actions: np.ndarray, rewards: np.ndarray, complete: bool) -> np.ndarray:
        return self._age(np.arange(len(rewards)))

    def of_running(self, actions: np.ndarray, rewards: np.ndarray, steps: np.ndarray) -> np.ndarray:
        return self._age(steps)

    def _age(self, steps: np.ndarray) -> np.ndarray:
        """Steps since the episode began, as many as a window can look back."""
        return np.minimum(steps, self.length - 1).astype(np.float32)[:, None]

    def fields(self, stored: Tensor, spec: Spec) -> Fields:
        return {}

    def window_fields(self, stored: Tensor, gather: Gather) -> Fields:
        found, present = gather(self.length)
        steps = torch.arange(self.length - 1, -1, -1, device=stored.device)
        mask = present * (steps <= stored).to(present.dtype)  # stored [M, B, 1]: steps before
        return {f"window_{name}": field for name, field in found.items()} | {"window_mask": mask}


def of_dataset(
    extras: tuple[Extra, ...],
    actions: np.ndarray,
    rewards: np.ndarray,
    episodes: np.ndarray,
) -> np.ndarray:
    """What all extras store for the rows of a dataset, ``[N, sum of widths]`` float32.

    ``episodes``: ``[E, 2]``, first row and the one after the last of each complete episode; rows
    after the last of them are a fragment.
    """
    spans = [(int(start), int(stop), True) for start, stop in episodes]
    last = spans[-1][1] if spans else 0
    if last < len(rewards):
        spans.append((last, len(rewards), False))
    return np.concatenate(
        [
            np.concatenate(
                [
                    extra.of_episode(actions[start:stop], rewards[start:stop], complete)
                    for extra in extras
                ],
                1,
            )
            for start, stop, complete in spans
        ]
    ).astype(np.float32)
