"""A vector environment: several copies of one environment that are stepped in lock-step.

Environments are gymnasium's; the cost of a step is ``info["cost"]``, or the third of six returned
values as in Safety-Gymnasium. Observations of any Box, Discrete or Dict space are flattened to
float32 the way ``gymnasium.spaces.flatten`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from saferl.errors import SaferlError, one_line
from saferl.registry import make_env
from saferl.spec import neither_box_nor_discrete

Env = Any  # a gymnasium id, or a function without arguments that makes an environment

HORIZON = 10_000
"""Steps after which an episode is cut where neither caller nor environment sets a limit."""


def check_spaces(env: Env, spec: Any) -> None:
    """Raise `SaferlError` if the environment's spaces are not those of ``spec``.

    ``spec``: anything with ``observation_dim``, ``action_dim`` (number of actions when discrete)
    and ``discrete``: a `Spec` or a `Dataset`. ``env``: id, factory or environment.
    """
    if not isinstance(env, str) and not callable(env):
        check_sizes(_name(env, env), Spaces(env), spec)
        return
    made = make_env(env)
    try:
        check_sizes(_name(env, made), Spaces(made), spec)
    finally:
        made.close()


def check_sizes(name: str, spaces: Spaces, spec: Any) -> None:
    advice = "use the environment that the data come from"
    if spaces.observation_dim != spec.observation_dim:
        raise SaferlError(
            f"{name} has observations of {spaces.observation_dim} numbers, but "
            f"{spec.observation_dim} are expected: {advice}"
        )
    image, space = getattr(spec, "image", ()), spaces.space
    if image and (space.shape, space.dtype) != (image, np.uint8):
        raise SaferlError(
            f"{name} has observations {space.shape} of {space.dtype}, but images {image} of uint8 "
            f"are expected, channels first: {advice}"
        )
    wanted = _actions(spec.discrete, spec.action_dim)
    found = _actions(spaces.discrete, spaces.action_dim)
    if wanted != found:
        if spaces.discrete and spec.discrete and spec.action_dim == spaces.action_dim + 1:
            advice = "where the data's actions count from 1, load them with action_start=1"
        raise SaferlError(f"{name} takes {found}, but {wanted} are expected: {advice}")


def _actions(discrete: bool, size: int) -> str:
    return f"one of {size} discrete actions" if discrete else f"{size} continuous actions"


def _interval(low: Any, high: Any) -> str:
    return f"[{min(low):g}, {max(high):g}]"


def _name(env: Env, made: Any) -> str:
    if isinstance(env, str):
        return env
    spec = getattr(made, "spec", None)
    return spec.id if spec is not None else type(getattr(made, "unwrapped", made)).__name__


class Spaces:
    """Sizes of an environment's spaces and the two conversions."""

    def __init__(self, env: Any):
        from gymnasium import spaces

        if hasattr(env, "num_envs"):
            raise SaferlError(
                "a vector of environments was given: give a function that makes one environment, "
                "and every member gets its own"
            )
        space, action = env.observation_space, env.action_space
        self.observation_dim = int(spaces.flatdim(space))
        self.discrete = isinstance(action, spaces.Discrete)
        if not self.discrete and not isinstance(action, spaces.Box):
            raise SaferlError(neither_box_nor_discrete(action))
        self._box = isinstance(space, spaces.Box)
        self.space, self._flatten = space, spaces.flatten
        if self.discrete:
            self.action_dim, self._start = int(action.n), int(action.start)
        else:
            self.action_dim, self._shape = int(np.prod(action.shape)), action.shape
            self._dtype = action.dtype
            self.low = action.low.astype(np.float32).ravel()
            self.high = action.high.astype(np.float32).ravel()

    def flatten(self, observation: Any) -> np.ndarray:
        if self._box:
            return np.asarray(observation).reshape(-1)
        return np.asarray(self._flatten(self.space, observation))

    def clip(self, actions: np.ndarray) -> np.ndarray:
        """``[B, A]`` float32 inside the Box, or ``[B]`` int64: what is executed and recorded."""
        if self.discrete:
            return actions.astype(np.int64)
        return np.clip(actions.astype(np.float32), self.low, self.high)

    def native(self, action: np.ndarray) -> Any:
        """What the environment takes, whose discrete actions may begin at another number than 0."""
        if self.discrete:
            return int(action) + self._start
        # A copy: an environment may keep or change the array that it is given.
        return action.reshape(self._shape).astype(self._dtype)


class EnvironmentFailed(SaferlError):
    """An environment or its guard raised an error, or the environment returned a non-finite value.

    ``index`` is the number of the environment.
    """

    def __init__(self, message: str, index: int):
        super().__init__(message)
        self.index = index


class VectorEnv:
    """Environments stepped together; `start` begins an episode, `step` advances all that run.

    One that fails raises `EnvironmentFailed`, which names it, its episode and the step.

    ``observations`` [B, O] holds the current observation of each environment (the last one
    of an episode stays until the next begins). After `step`, ``rewards``, ``costs``,
    ``terminals`` and ``timeouts`` [B] describe the step of the environments that ran.
    """

    def __init__(self, env: Env, count: int, horizon: int | None):
        self.envs: list[Any] = []
        try:
            for _ in range(count):
                self.envs.append(make_env(env))
            first = self.envs[0]
            self.name, self.spaces = _name(env, first), Spaces(first)
        except BaseException:
            self.close()
            raise
        own = getattr(getattr(first, "spec", None), "max_episode_steps", None)
        own = own or getattr(first, "_max_episode_steps", None)  # a TimeLimit round a bare class
        self.known_horizon = int(horizon or own or 0)  # 0: nobody says
        self.horizon = self.known_horizon or HORIZON
        self.observations = np.zeros((count, self.spaces.observation_dim), np.float32)
        self.rewards, self.costs = np.zeros(count), np.zeros(count)
        self.terminals, self.timeouts = np.zeros(count, bool), np.zeros(count, bool)
        self.running, self.has_costs = np.zeros(count, bool), False
        self.elapsed = np.zeros(count, np.int64)
        self.episode = np.zeros(count, np.int64)
        self.seeds = np.zeros(count, np.int64)  # episode k of a index is reset with its seed + k

    def check(self, spec: Any) -> None:
        """`check_spaces`, and that the actions of ``spec`` lie within the environment's bounds."""
        check_sizes(self.name, self.spaces, spec)
        if spec.discrete:
            return
        low, high = np.float32(spec.action_low), np.float32(spec.action_high)
        slack = 1e-4 * (high - low)
        if (low < self.spaces.low - slack).any() or (high > self.spaces.high + slack).any():
            raise SaferlError(
                f"{self.name} takes actions in {_interval(self.spaces.low, self.spaces.high)}, but "
                f"those of the data lie in {_interval(low, high)}: use the environment that the "
                "data come from, or give the dataset its action_low and action_high"
            )

    def remarks(self, spec: Any, horizon: int | None = None) -> list[str]:
        """A line for each difference that may be meant: actions of ``spec`` that fill less than the
        environment's bounds, episodes of another length than the data's ``horizon``.
        """
        lines = []
        if horizon and self.known_horizon and horizon != self.known_horizon:
            lines.append(
                f"an episode of {self.name} has at most {self.known_horizon} steps, but one of the "
                f"data {horizon}: costs and returns per episode are not the same thing in both"
            )
        if spec.discrete:
            return lines
        width = np.float32(spec.action_high) - np.float32(spec.action_low)
        if (width < 0.99 * (self.spaces.high - self.spaces.low)).any():
            lines.append(
                f"{self.name} takes actions in "
                f"{_interval(self.spaces.low, self.spaces.high)}, but those of the data lie in "
                f"{_interval(spec.action_low, spec.action_high)}, and so will all actions that are "
                "tried"
            )
        return lines

    def begin(self, seeds: int | np.ndarray) -> None:
        """Forget whatever ran before. ``seeds``: one for all, or one per environment."""
        try:
            self.seeds[:] = seeds
        except OverflowError:
            raise SaferlError(f"a seed is a whole number below 2^63, got {seeds}") from None
        self.has_costs = False
        self.running[:] = False

    def start(self, index: int, episode: int) -> None:
        self.episode[index], self.elapsed[index] = episode, 0
        self.running[index] = True
        try:
            observation, _ = self.envs[index].reset(seed=int(self.seeds[index]) + episode)
            self.observations[index] = self.spaces.flatten(observation)
        except Exception as error:
            raise self.failure(index, one_line(error)) from error
        if not np.isfinite(self.observations[index]).all():
            raise self.failure(index, "the first observation is not finite")

    def step(self, actions: np.ndarray) -> np.ndarray:
        """Advance with executed actions ``[B, ...]``; returns the numbers of those that ended."""
        ran = np.flatnonzero(self.running)
        for i in ran:
            self.elapsed[i] += 1
            try:
                result = self.envs[i].step(self.spaces.native(actions[i]))
                if len(result) == 6:  # Safety-Gymnasium
                    observation, reward, cost, terminated, truncated, _ = result
                else:
                    observation, reward, terminated, truncated, info = result
                    cost = info.get("cost")
                self.observations[i] = self.spaces.flatten(observation)
                self.rewards[i] = reward
                self.costs[i] = 0.0 if cost is None else np.asarray(cost, np.float64).item()
            except Exception as error:
                raise self.failure(i, one_line(error)) from error
            self.has_costs |= cost is not None
            self.terminals[i] = terminated
            self.timeouts[i] = not terminated and (truncated or self.elapsed[i] >= self.horizon)
        for what, finite in (
            ("observation", np.isfinite(self.observations[ran]).all(1)),
            ("reward", np.isfinite(self.rewards[ran])),
            ("cost", np.isfinite(self.costs[ran])),
        ):
            if not finite.all():
                index = int(ran[np.argmin(finite)])
                raise self.failure(index, f"the environment returned a non-finite {what}")
        ended = ran[self.terminals[ran] | self.timeouts[ran]]
        self.running[ended] = False
        return ended

    def failure(self, index: int, what: str) -> EnvironmentFailed:
        """What to raise of a index's environment, or of what stands before it, at this step."""
        return EnvironmentFailed(f"{self._where(index)}: {what}", index)

    def _where(self, index: int) -> str:
        episode = int(self.episode[index])
        return (
            f"{self.name}, episode {episode} (reset with seed {self.seeds[index] + episode}), step "
            f"{self.elapsed[index]}"
        )

    def act(self, choose: Callable[[np.ndarray], Any], members: int) -> np.ndarray:
        """Executed actions ``[B, ...]`` of ``choose(observations [M, B / M, O])``."""
        chosen = choose(self.observations.reshape(members, -1, self.spaces.observation_dim))
        if hasattr(chosen, "detach"):
            chosen = chosen.detach().cpu().numpy()
        chosen, count = np.asarray(chosen), len(self.envs)
        wanted = (members, count // members) + (
            () if self.spaces.discrete else (self.spaces.action_dim,)
        )
        if chosen.shape != wanted:
            raise SaferlError(
                f"{self.name}: the policy returned actions of shape {chosen.shape}, "
                f"expected {wanted}"
            )
        chosen = chosen.reshape(count, *wanted[2:])
        if not np.isfinite(chosen[self.running]).all():
            finite = np.isfinite(chosen.reshape(count, -1)).all(1) | ~self.running
            where = self._where(int(np.argmin(finite)))
            raise SaferlError(f"{where}: the policy returned a non-finite action")
        return self.spaces.clip(chosen)

    def close(self) -> None:
        while self.envs:
            self.envs.pop().close()


def policy_function(policy: Any, random: Any = None) -> Callable[[np.ndarray], Any]:
    """numpy ``[M, B, O]`` to actions, on the policy's device and without gradients."""
    import torch

    device = torch.device("cpu")
    if isinstance(policy, torch.nn.Module):
        tensors = [*policy.parameters(), *policy.buffers()]
        device = tensors[0].device if tensors else device
    act = policy if random is None else lambda observations: policy.sample(observations, random)

    @torch.no_grad()
    def choose(observations: np.ndarray) -> Any:
        return act(torch.from_numpy(observations).to(device))

    return choose


def progress_bar(total: int, description: str, unit: str, progress: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=description, unit=unit, disable=not progress)
