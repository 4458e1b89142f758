"""dm_control's suite (Tassa et al. 2018, arXiv:1801.00690) behind gymnasium, from states or pixels.

    make_env("dmc/walker-walk-pixels-v0")      uint8 [9, 64, 64]: 3 frames of 64 pixels
    make_env("dmc/walker-walk-pixels84-v0")    uint8 [9, 84, 84]
    make_env("dmc/walker-walk-v0")             all observations as one vector
    record("dmc/walker-walk-pixels-v0", episodes=20).save("walker")     V-D4RL's layout

An action is repeated for two control steps and their rewards are summed, as V-D4RL's data were
collected; an episode has 1000 control steps, so returns lie in [0, 1000]. It ends in a timeout,
except where a task says that nothing follows. Frames are rendered by camera 0 (quadruped: 2), by
OpenGL without a display where there is none.
"""

from __future__ import annotations

import os
import sys
import warnings
from ctypes.util import find_library
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from saferl.data import Card, Dataset
from saferl.data.frames import Frames
from saferl.errors import SaferlError

TASKS = (
    "acrobot-swingup", "ball_in_cup-catch", "cartpole-balance", "cartpole-swingup", "cheetah-run",
    "finger-spin", "hopper-hop", "hopper-stand", "humanoid-run", "humanoid-stand", "humanoid-walk",
    "pendulum-swingup", "quadruped-run", "quadruped-walk", "reacher-easy", "reacher-hard",
    "walker-run", "walker-stand", "walker-walk",
)  # fmt: skip
"""Domain and task, as in the ids; `DMControlEnv` makes the suite's others."""

INSTALL = 'pip install "saferl[dmc]"'


def env_ids() -> dict[str, dict[str, Any]]:
    """Arguments of gymnasium's ``register`` for each id."""
    kinds = {"": {}, "-pixels": {"pixels": 64}, "-pixels84": {"pixels": 84}}
    return {
        f"dmc/{name}{suffix}-v0": {
            "entry_point": "saferl.envs.dmc:DMControlEnv",
            "kwargs": {"domain": name.rpartition("-")[0], "task": name.rpartition("-")[2], **kind},
        }
        for name in TASKS
        for suffix, kind in kinds.items()
    }


def _choose_renderer(needed: bool) -> None:
    """Set MUJOCO_GL, which is read when dm_control is first imported, where nobody has."""
    if "MUJOCO_GL" in os.environ or not sys.platform.startswith("linux"):
        return
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        return  # a window system: dm_control's own choice
    for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if find_library(library):
            os.environ["MUJOCO_GL"] = name
            os.environ.setdefault("PYOPENGL_PLATFORM", name)
            return
    if needed:
        raise SaferlError(
            "pixels need an OpenGL library, and neither EGL nor OSMesa was found: install libegl1 "
            "with libegl-mesa0 (or a GPU's driver) or libosmesa6, or set MUJOCO_GL to what you have"
        )


def _suite(pixels: bool) -> Any:
    _choose_renderer(pixels)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its dependencies, about each other
            from dm_control import suite
    except ImportError as error:
        raise SaferlError(f"dmc/… needs dm_control ({error}): {INSTALL}") from error
    except Exception as error:  # PyOpenGL raises what a missing library happens to cause
        raise SaferlError(
            f"dm_control cannot be imported with MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} "
            f"({type(error).__name__}: {error}): try MUJOCO_GL=egl or osmesa, and install its "
            "library (libegl1, libosmesa6)"
        ) from error
    return suite


class DMControlEnv(gymnasium.Env):
    """One task of the suite.

    Args:
        domain, task: such as "walker", "walk".
        pixels: height and width of a frame; 0 observes the state.
        frame_stack: frames in an observation, oldest first; the first is repeated at the start.
        action_repeat: control steps for which an action is held.
        shadows: False renders without shadows and reflections, several times as fast on a CPU.
            The pixels differ: use one setting for data and evaluation.
        camera: None for V-D4RL's.

    Raises:
        SaferlError: dm_control is not installed or cannot render here, or it has no such task.
    """

    # Declared by gymnasium as an attribute of the object.
    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(
        self,
        domain: str,
        task: str,
        pixels: int = 0,
        frame_stack: int = 3,
        action_repeat: int = 2,
        shadows: bool = True,
        camera: int | None = None,
        render_mode: str | None = None,
    ):
        for name, value in (("frame_stack", frame_stack), ("action_repeat", action_repeat)):
            if value < 1:
                raise SaferlError(f"{name} must be 1 or more, got {value}")
        suite = _suite(pixels > 0 or render_mode is not None)
        if (domain, task) not in suite.ALL_TASKS:
            known = ", ".join("-".join(pair) for pair in suite.ALL_TASKS)
            raise SaferlError(f"dm_control has no task {domain}-{task}; it has {known}")
        self.env = suite.load(domain, task, task_kwargs={"random": 0})
        self.pixels, self.action_repeat, self.render_mode = pixels, action_repeat, render_mode
        self.camera = (2 if domain == "quadruped" else 0) if camera is None else camera
        self.flags = None
        if not shadows:
            self.env.physics.model.vis.quality.shadowsize = 0
            self.flags = {"shadow": False, "reflection": False}
        actions = self.env.action_spec()
        self.action_space = Box(
            actions.minimum.astype(np.float32), actions.maximum.astype(np.float32)
        )
        if pixels:
            self.frames = np.zeros((frame_stack, 3, pixels, pixels), np.uint8)
            shape = (3 * frame_stack, pixels, pixels)
            self.observation_space = Box(0, 255, shape, np.uint8)
        else:
            numbers = sum(int(np.prod(part.shape)) for part in self.env.observation_spec().values())
            self.observation_space = Box(-np.inf, np.inf, (numbers,), np.float64)

    def _frame(self, size: int) -> np.ndarray:
        try:
            return self.env.physics.render(
                size, size, self.camera, render_flag_overrides=self.flags
            )
        except Exception as error:  # each backend has its own
            raise SaferlError(
                f"cannot render with MUJOCO_GL={os.environ.get('MUJOCO_GL')!r} "
                f"({type(error).__name__}: {error}): try egl or osmesa"
            ) from error

    def _observe(self, step: Any, first: bool = False) -> np.ndarray:
        if not self.pixels:
            return np.concatenate([np.ravel(part) for part in step.observation.values()])
        frame = self._frame(self.pixels).transpose(2, 0, 1)
        self.frames = np.repeat(frame[None], len(self.frames), 0) if first else np.concatenate(
            [self.frames[1:], frame[None]]
        )  # fmt: skip
        return self.frames.reshape(self.observation_space.shape)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task._random = np.random.RandomState(seed)
        return self._observe(self.env.reset(), first=True), {}

    def step(self, action: np.ndarray):
        reward = 0.0
        for _ in range(self.action_repeat):
            step = self.env.step(action)
            reward += step.reward or 0.0
            if step.last():
                break
        terminated = step.last() and step.discount == 0
        return self._observe(step), reward, terminated, step.last() and not terminated, {}

    def render(self) -> np.ndarray:
        return self._frame(240)

    def close(self) -> None:
        self.env.close()


def record(env: Any, episodes: int, policy: Any = None, seed: int = 0) -> Dataset:
    """Whole episodes of a pixel environment as a dataset whose frames are held once.

    Args:
        env: an id, or a function that makes the environment.
        policy: of one member, whose most likely action is taken; None: uniformly random actions.
        seed: episode k is reset with ``seed + k``.

    ``save_dataset(record(…), folder)`` writes V-D4RL's layout.
    """
    import torch

    from saferl.registry import make_env

    if episodes < 1:
        raise SaferlError(f"episodes must be 1 or more, got {episodes}")
    made, random = make_env(env), np.random.default_rng(seed)
    try:
        inner = made.unwrapped
        if not getattr(inner, "pixels", 0):
            raise SaferlError("record is for pixels: take a dmc/…-pixels-v0 environment")
        low, high = made.action_space.low, made.action_space.high
        columns: tuple[list[Any], ...] = tuple([] for _ in range(7))
        frames, at, start, actions, rewards, terminals, timeouts = columns
        for episode in range(episodes):
            observation, _ = made.reset(seed=seed + episode)
            first, ended = len(frames), False
            frames.append(observation[-3:].copy())
            while not ended:
                if policy is None:
                    action = random.uniform(low, high).astype(np.float32)
                else:
                    raw = torch.from_numpy(observation.reshape(1, 1, -1).astype(np.float32))
                    action = np.clip(policy(raw)[0, 0].cpu().numpy(), low, high)
                at.append(len(frames) - 1)
                observation, reward, terminated, truncated, _ = made.step(action)
                frames.append(observation[-3:].copy())
                actions.append(action)
                rewards.append(reward)
                terminals.append(terminated)
                timeouts.append(truncated and not terminated)
                ended = terminated or truncated
            start += [first] * (len(frames) - first)
    finally:
        made.close()
    rows, held, begins = np.array(at), np.stack(frames), np.array(start)
    stack = len(inner.frames)
    suite_task = "uniformly random actions" if policy is None else "a policy given by the user"
    card = Card(
        id="recorded",
        env_id=env if isinstance(env, str) else None,
        action_low=tuple(low.tolist()),
        action_high=tuple(high.tolist()),
        reference_returns=(0.0, 1000.0),
        reference_source="V-D4RL, whose scores are returns / 10",
        origin=f"recorded by saferl in dm_control with {suite_task}; not V-D4RL data",
        notes=() if inner.flags is None else ("rendered without shadows",),
    )
    return Dataset.from_arrays(
        Frames(held, rows, begins, stack), np.array(actions), np.array(rewards),
        np.array(terminals), np.array(timeouts), Frames(held, rows + 1, begins, stack), card=card,
    )  # fmt: skip
