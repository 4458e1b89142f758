"""Bullet-Safety-Gym and Safety-Gymnasium: stand-ins with their habits, and the packages if present.

The stand-ins are packages in a temporary folder with the parts of the interface that the adapters
touch, and with what the real ones do wrong: see the module's text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import random
import sys
import warnings
from importlib.util import find_spec

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from saferl.data.sources import dsrl
from saferl.envs import adapters
from saferl.errors import SaferlError
from saferl.registry import make_env

BULLET, SAFETY = "SafetyCarRun-v0", "SafetyPointGoal1-v0"

BULLET_INIT = f"""
import gymnasium
gymnasium.register(
    "{BULLET}", entry_point="bullet_safety_gym.builder:Builder", max_episode_steps=200,
    kwargs={{"agent": "Car", "options": {{"size": 1}}}},
)
"""

BULLET_BUILDER = """
import os, random, sys
import gymnasium
import numpy as np

os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())  # as its redirection of C streams

class Agent:
    speed = np.zeros(2)

    def apply_action(self, action):
        self.speed = np.array(action)

class Physics:
    rotor = np.zeros(2)  # follows the action one step late

    def __init__(self, env):
        self.env = env

    def stepSimulation(self):
        self.env.place = self.env.place + 0.05 * (self.env.agent.speed + self.rotor)
        self.rotor = self.env.agent.speed

class Builder(gymnasium.Env):
    def __init__(self, agent, options):
        assert agent == "Car" and options.pop("size") == 1
        os.fstat(sys.stdout.fileno())
        self.agent, self.bc = Agent(), Physics(self)
        self.obstacle = random.random() + np.random.uniform()
        self.place, self.stored = np.zeros(2), None
        low = np.full(4, -1000.0, np.float32)
        self.observation_space = gymnasium.spaces.Box(low, -low, dtype=np.float64)
        one = np.ones(2, np.float32)
        self.action_space = gymnasium.spaces.Box(-one, one, dtype=np.float32)

    def seen(self):
        return np.concatenate([self.place, [self.obstacle, self.drift]])

    def reset(self, seed=None, options=None):  # the seed is ignored
        if self.stored is not None:
            self.place = self.stored
        self.place = self.place + np.random.uniform(-1, 1, 2)
        if self.stored is None:
            self.stored = self.place
        self.drift = np.random.uniform()
        self.bc.stepSimulation()  # with the last episode's action
        return self.seen(), {}

    def step(self, action):
        self.agent.apply_action(action)
        self.bc.stepSimulation()
        self.drift = np.random.uniform()
        action[:] = 0  # as if the array were its own
        info = {"cost": int(self.place[0] > 0.5), "speed": 1}
        return self.seen(), np.float64(1.5), bool(self.place[1] > 5), False, info

    def close(self):
        self.closed = True
"""

SAFETY_INIT = f"""
import dataclasses
from dataclasses import dataclass, field
import gymnasium
import numpy as np
from gymnasium.wrappers.autoreset import AutoResetWrapper
from gymnasium.wrappers.compatibility import EnvCompatibility
from gymnasium.wrappers.env_checker import PassiveEnvChecker
from gymnasium.wrappers.normalize import NormalizeObservation, NormalizeReward, RunningMeanStd
from gymnasium.wrappers.time_limit import TimeLimit

class Reset(AutoResetWrapper): pass
class Limit(TimeLimit): pass
class Checker(PassiveEnvChecker): pass
class Normal(NormalizeObservation): pass

@dataclass
class Conf:
    sizes: list = field(default_factory=list)

@dataclass(frozen=False)
class Robot:
    name: str = "point"
    conf: Conf = Conf()  # Conf has no hash: refused by Python 3.11
    nothing: dict = None

class Builder(gymnasium.Env):
    def __init__(self, task_id, config):
        assert task_id == "{SAFETY}"
        self.robot, self.config = Robot(), config
        self.robot.conf.sizes.append(1)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float64)
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float64)
        self.random = np.random.RandomState(7)
        int(np.ones(1))

    def seen(self):
        return np.concatenate([self.place, np.ones(2) * len(self.robot.conf.sizes)])

    def reset(self, *, seed=None, options=None):
        int(np.ones(1))
        if seed is not None:
            self.random = np.random.RandomState(seed)
        self.place, self.count = self.random.uniform(size=2), 0
        return self.seen(), {{}}

    def step(self, action):
        assert action.dtype == np.float64
        int(np.ones(1))
        self.count += 1
        self.place = self.place + action
        return self.seen(), 0.5, 2, self.place[0] > 3, self.count >= 7, {{"cost_sum": 2.0}}

gymnasium.register(
    "{SAFETY}", entry_point="safety_gymnasium:Builder", max_episode_steps=1000,
    kwargs=dict(task_id="{SAFETY}", config={{}}),
)
"""

FILES = {
    "pybullet/__init__.py": "",
    "xmltodict/__init__.py": "",
    "bullet_safety_gym/__init__.py": BULLET_INIT,
    "bullet_safety_gym/builder.py": BULLET_BUILDER,
    "safety_gymnasium/__init__.py": SAFETY_INIT,
    "gymnasium_robotics/__init__.py": "",
}


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """The stand-ins, in place of the real packages; everything is as it was afterwards."""
    for name, text in FILES.items():
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "site")
    ours = {name.split("/")[0] for name in FILES}
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in ours}
    specs = dict(gymnasium.registry)
    for task in (BULLET, SAFETY):
        gymnasium.registry.pop(task, None)
    importlib.invalidate_caches()
    yield tmp_path / "site"
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.modules.update(kept)
    gymnasium.registry.clear()
    gymnasium.registry.update(specs)


def play(env, seed, steps=30):
    """Every number of an episode under fixed actions."""
    actions = np.random.default_rng(0).uniform(-1, 1, (steps, *env.action_space.shape))
    rows = [(env.reset(seed=seed)[0], 0.0, 0.0)]
    for action in actions:
        observation, reward, terminated, truncated, info = env.step(action.astype(np.float32))
        rows.append((observation, reward, info["cost"]))
        if terminated or truncated:
            break
    return np.array([np.concatenate([o, [r, c]]) for o, r, c in rows])


def test_bullet_gets_five_plain_values(packages):
    env = adapters.make_bullet(BULLET)
    assert env.observation_space.dtype == np.float32 and env.observation_space.shape == (4,)
    observation, info = env.reset(seed=1)
    assert observation.dtype == np.float32 and info == {}
    action = np.full(2, 0.5, np.float32)
    observation, reward, terminated, truncated, info = env.step(action)
    assert (action == 0.5).all()  # the caller's array is left alone
    assert [type(x) for x in (reward, terminated, truncated, info["cost"])] == [
        float, bool, bool, float,
    ]  # fmt: skip
    assert reward == 1.5 and info["speed"] == 1 and observation.dtype == np.float32
    rows = play(env, 3, 200)
    assert len(set(rows[:, 3])) == len(rows) > 50  # a number of its own at each step
    assert set(rows[:, -1]) == {0.0, 1.0}
    np.testing.assert_array_equal(rows[1:, -1], rows[1:, 0] > 0.5)
    env.close()
    assert env.inner.closed


@pytest.mark.filterwarnings("ignore:.*infinity")
def test_gymnasium_accepts_both(packages):
    for env in (adapters.make_bullet(BULLET), adapters.make_safety_gymnasium(SAFETY)):
        check_env(env, skip_render_check=True)


def test_bullet_repeats_an_episode_whatever_came_before(packages):
    first = adapters.make_bullet(BULLET)
    expected = play(first, 5)
    play(first, 6, 17)
    np.testing.assert_array_equal(play(first, 5), expected)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    other = adapters.make_bullet(BULLET)  # another environment, other global generators
    np.testing.assert_array_equal(play(other, 5), expected)
    assert not np.array_equal(play(other, 6), expected)
    # Two at once do not draw from each other's numbers.
    first.reset(seed=5), other.reset(seed=9)
    actions = np.random.default_rng(0).uniform(-1, 1, (30, 2)).astype(np.float32)
    for row, action in zip(expected[1:], actions):
        np.testing.assert_array_equal(first.step(action)[0], row[:4])
        other.step(-action)
    # Without a seed the environment goes on with numbers of its own.
    starts = [env.reset(seed=seed)[0][0] for env in (first, other) for seed in (4, None, None)]
    assert starts[:3] == starts[3:] and len(set(starts)) == 3


def test_bullet_leaves_the_global_generators_alone(packages):
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    states = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    play(adapters.make_bullet(BULLET), 5)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # noqa: NPY002


def test_bullet_runs_where_the_streams_are_not_files(packages, monkeypatch):
    class Notebook:
        def fileno(self):
            raise OSError("no file")

        def write(self, text):
            pass

        def flush(self):
            pass

    monkeypatch.setattr(sys, "stdout", Notebook())
    play(adapters.make_bullet(BULLET), 0, 2)


def test_horizons_truncate(packages):
    env = adapters.make_bullet(BULLET)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2))[3] for _ in range(200)]
    assert ends == [False] * 199 + [True]
    env.reset(seed=0)
    assert not env.step(np.zeros(2))[3]  # counted anew


def test_safety_gymnasium_gets_five_plain_values(packages):
    env = adapters.make_safety_gymnasium(SAFETY)
    assert env.observation_space.shape == (4,) and env.observation_space.dtype == np.float32
    assert env.action_space.dtype == np.float32
    observation, _ = env.reset(seed=1)
    assert observation.dtype == np.float32 and env.observation_space.contains(observation)
    observation, reward, terminated, truncated, info = env.step(np.array([0.5, 0], np.float32))
    assert (reward, terminated, truncated) == (0.5, False, False)
    assert info == {"cost": 2.0, "cost_sum": 2.0} and type(info["cost"]) is float
    np.testing.assert_array_equal(play(env, 3), play(adapters.make_safety_gymnasium(SAFETY), 3))
    assert len(play(env, 3)) == 8  # the package's own truncation
    env.reset(seed=0)
    assert env.step(np.array([4.0, 0], np.float32))[2]


def test_safety_gymnasium_is_helped_only_while_it_is_imported(packages):
    strict = dataclasses.dataclass
    before = {name for name in sys.modules if name.startswith("gymnasium.wrappers.")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = adapters.make_safety_gymnasium(SAFETY)
        env.reset(seed=0)
        env.step(np.zeros(2))
    assert dataclasses.dataclass is strict
    after = {name for name in sys.modules if name.startswith("gymnasium.wrappers.")}
    assert after <= before and find_spec("gymnasium.wrappers.autoreset") is None
    # Each robot has a default of its own.
    other = adapters.make_safety_gymnasium(SAFETY).inner.robot
    assert env.inner.robot.conf.sizes == other.conf.sizes == [1] and other.nothing is None


def test_tolerant_dataclasses_still_refuse_lists():
    with adapters._older_dataclasses(), pytest.raises(ValueError, match="mutable default"):

        @dataclasses.dataclass
        class Wrong:
            names: list = []  # noqa: RUF008


@contextlib.contextmanager
def registered(ids):
    """As `saferl.envs` registers them, if it has not."""
    added = [name for name in ids if name not in gymnasium.registry]
    for name in added:
        gymnasium.register(name, **adapters.env_ids()[name])
    yield
    for name in added:
        del gymnasium.registry[name]


def test_environments_are_made_by_id(packages):
    names = [f"bullet/{BULLET}", f"safety-gymnasium/{SAFETY}"]
    with registered(names):
        for name, horizon in zip(names, (200, 1000)):
            env = make_env(name)
            assert isinstance(env.unwrapped, adapters.AdaptedEnv)
            assert env.spec.max_episode_steps == env.unwrapped.horizon == horizon
            observation, _ = env.reset(seed=0)
            assert observation.dtype == np.float32
            values = env.step(env.action_space.sample())
            assert len(values) == 5 and "cost" in values[4]


@pytest.mark.parametrize("name, install", [
    (f"bullet/{BULLET}", "pip install --no-deps bullet-safety-gym==1.4.0"),
    (f"safety-gymnasium/{SAFETY}", "pip install --no-deps safety-gymnasium==1.0.0"),
])  # fmt: skip
def test_an_absent_package_says_how_to_install_it(monkeypatch, name, install):
    monkeypatch.setattr(adapters, "find_spec", lambda module: None)
    with registered([name]), pytest.raises(SaferlError, match="not installed") as caught:
        make_env(name)
    assert install in str(caught.value) and "\n" not in str(caught.value)


def test_a_package_that_fails_to_import_is_explained(packages):
    (packages / "safety_gymnasium" / "__init__.py").write_text("import no_such_module")
    with pytest.raises(SaferlError, match=r"cannot be imported .*no_such_module.*pip install"):
        adapters.make_safety_gymnasium(SAFETY)


def test_unknown_tasks_name_the_nearest():
    with pytest.raises(SaferlError, match="did you mean 'SafetyBallRun-v0'"):
        adapters.make_bullet("SafetyBalRun-v0")
    with pytest.raises(SaferlError, match="did you mean 'SafetyPointGoal1-v0'"):
        adapters.make_safety_gymnasium("SafetyPontGoal1-v0")


def test_every_dsrl_task_has_an_environment():
    ids = adapters.env_ids()
    assert len(ids) == 14 + 65 + 6
    for task in dsrl._reference()["tasks"].values():
        prefix = {"bullet": "bullet"}.get(task["group"], "safety-gymnasium")
        if task["env"] and not task["env"].startswith("saferl/"):
            assert ids[f"{prefix}/{task['env']}"]["max_episode_steps"] == task["horizon"]


# The packages themselves ------------------------------------------------------------------------

needs_bullet = pytest.mark.skipif(
    find_spec("bullet_safety_gym") is None, reason="bullet-safety-gym is not installed"
)
needs_safety = pytest.mark.skipif(
    find_spec("safety_gymnasium") is None, reason="safety-gymnasium is not installed"
)
DSRL_BULLET = [name for name in adapters.BULLET_TASKS if "Run" in name or "Circle" in name]
DSRL_SAFETY = [f"Safety{robot}{task}-v0" for robot in ("Point", "Car")
               for task in ("Goal1", "Button2", "Push1", "Circle1")]  # fmt: skip


@pytest.mark.parametrize("task", [
    *(pytest.param(name, marks=needs_bullet) for name in DSRL_BULLET),
    *(pytest.param(name, marks=needs_safety) for name in DSRL_SAFETY),
])  # fmt: skip
def test_real_tasks_fit_dsrl_and_repeat(task):
    facts = dsrl.task(task.removeprefix("Safety").removesuffix("-v0"))
    make = adapters.make_bullet if task in adapters.BULLET_TASKS else adapters.make_safety_gymnasium
    env, other = make(task), make(task)
    assert env.observation_space.shape == (facts["dims"][0],)
    assert env.action_space.shape == (facts["dims"][1],) and env.horizon == facts["horizon"]
    expected = play(env, 5, 40)
    play(other, 9, 23)
    np.testing.assert_array_equal(play(other, 5, 40), expected)
    assert not np.array_equal(play(other, 6, 40)[0], expected[0])
    assert set(expected[:, -1]) <= {0.0, 1.0}
    for made in (env, other):
        made.close()


@needs_safety
@pytest.mark.parametrize("robot", ["Hopper", "HalfCheetah", "Walker2d", "Ant", "Swimmer"])
def test_real_velocity_tasks_are_saferls_own(robot):
    theirs = adapters.make_safety_gymnasium(f"Safety{robot}Velocity-v1")
    ours = make_env(f"saferl/{robot}Velocity-v0")
    rows = [play(env, 3, 200).astype(np.float32) for env in (theirs, ours)]
    np.testing.assert_array_equal(*rows)
