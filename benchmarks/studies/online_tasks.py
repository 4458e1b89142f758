"""What the study `online` trains: tasks and their data, methods, and the schedule."""

from __future__ import annotations

import functools
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 40.0  # cost of an episode, where there is a limit
RESERVE = 0.5  # of the limit, kept back by the guard for what stopping costs
MEDIUM = 400.0  # cartpole: the behaviour is SAC at the first evaluation above this return
ROWS = 10_000  # transitions of the cartpole sets
RATES = {name: 1e-3 for name in ("actor_lr", "critic_lr", "temperature_lr", "value_lr")}
WIDE = {"hidden": [64, 64], "critic_hidden": [64, 64], "batch_size": 128}


@dataclass(frozen=True)
class Task:
    """An environment, its data and the scale of the trainings."""

    env: str
    data: str
    steps: int  # environment steps
    utd: int  # critic steps per environment step
    pretraining: int  # updates on the data, of methods that begin with them
    random_steps: int
    evaluations: int  # while acting
    methods: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)


SPARSE = {"entropy_backup": False}
ROBOT = {"steps": 8000, "utd": 1, "pretraining": 4000, "random_steps": 1000, "evaluations": 4,
         "methods": ("limits", "limits_guarded", "online", "moorl", "moorl_norm", "iql",
                     "moorl_guarded", "rlpd", "cal_ql", "wsrl", "one_buffer", "mixed", "blocks",
                     "moorl_limit", "online_limit", "rlpd_limit")}  # fmt: skip
TASKS = {
    "cartpole": Task(
        "dmc/cartpole-swingup-v0", "cartpole-medium", 3000, 5, 3000, 500, 3,
        ("online", "meta", "mixed_norm", "mixed_meta", "meta_fast", "moorl_norm", "one_buffer",
         "rlpd", "iql", "cal_ql", "wsrl", "meta_20", "rlpd_20"),
    ),
    "cartpole, random data": Task(
        "dmc/cartpole-swingup-v0", "cartpole-random", 3000, 5, 3000, 500, 3, ("meta", "mixed_norm"),
    ),
    "pointmaze": Task(
        "saferl/PointMaze-Medium-v0", "saferl/pointmaze-medium-planner-v0", 8000, 2, 4000, 1000, 4,
        ("mixed_norm", "online", "iql", "moorl_norm", "rlpd", "cal_ql", "wsrl", "one_buffer",
         "mixed", "blocks", "moorl"), SPARSE,
    ),
    "hopper": Task("saferl/HopperVelocity-v0", "saferl/hopper-velocity-medium-v0", **ROBOT),
    "halfcheetah": Task(
        "saferl/HalfCheetahVelocity-v0", "saferl/halfcheetah-velocity-medium-v0", **ROBOT
    ),
    "cartpole, long": Task(
        "dmc/cartpole-swingup-v0", "cartpole-medium", 6000, 5, 3000, 500, 6,
        ("online", "mixed_norm", "meta", "mixed_meta", "meta_20"),
    ),
    "pointmaze, long": Task(
        "saferl/PointMaze-Medium-v0", "saferl/pointmaze-medium-planner-v0", 24_000, 2, 4000, 1000,
        12, ("mixed_norm", "online", "moorl_norm", "iql"), SPARSE,
    ),
    "cartpole, to the end": Task(
        "dmc/cartpole-swingup-v0", "cartpole-medium", 16_000, 5, 3000, 500, 16,
        ("mixed_norm", "moorl_norm"),
    ),
    "cartpole, sparse": Task(
        "dmc/cartpole-swingup_sparse-v0", "cartpole-sparse", 20_000, 5, 4000, 500, 10,
        ("online", "mixed_norm", "meta_norm"), SPARSE,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """An agent and what is set besides the scale; a list of values is one group of seeds each.

    ``k``: critic steps per update, 0 for as many as the UTD.
    """

    title: str
    agent: str
    own: dict[str, Any] = field(default_factory=dict)
    k: int | None = None
    guard: bool = False


NORM = {"critic_layer_norm": True}
LIMITS = {"cost_limit": [math.inf, LIMIT]}
METHODS = {
    "online": Method("SAC, online only", "sac", {"offline_share": 0.0}),
    "one_buffer": Method("SAC, one buffer", "sac", {"share_rule": "proportional"}),
    "mixed": Method("SAC 50/50", "sac"),
    "mixed_norm": Method("SAC 50/50 + LayerNorm", "sac", NORM),
    "mixed_meta": Method(
        "50/50 batches, K 5", "moorl", {"eta": [1.0, 0.5], "sampling": "mixed"}, 5
    ),
    "meta": Method("MOORL, K 5", "moorl", {"eta": [1.0, 0.5]}, 5),
    "meta_fast": Method("MOORL, K 5, η 0.9", "moorl", {"eta": 0.9}, 5),
    "meta_norm": Method("MOORL, K 5 + LayerNorm", "moorl", {"eta": [1.0, 0.9], **NORM}, 5),
    "meta_20": Method("MOORL, K 20", "moorl", {"eta": [1.0, 0.5]}, 20),
    "blocks": Method("blocks, K 5, η 1: no meta step", "moorl", {"eta": 1.0}, 5),
    "moorl": Method("MOORL, K 5, η 0.5", "moorl", {"eta": 0.5}, 5),
    "moorl_norm": Method("MOORL, K 5, η 0.5 + LayerNorm", "moorl", {"eta": 0.5, **NORM}, 5),
    "rlpd": Method("RLPD, same UTD", "rlpd", {}, 0),
    "rlpd_20": Method("RLPD, UTD 20", "rlpd", {"utd": 20.0}, 20),
    "iql": Method("IQL, fine-tuned", "iql_finetune", {"actor_decay_steps": 0}),
    "cal_ql": Method("Cal-QL", "cal_ql", {"samples": 4}),
    "wsrl": Method("WSRL, from Cal-QL", "wsrl", {}, 0),
    "limits": Method("SAC 50/50 + LayerNorm", "sac", {**LIMITS, **NORM}),
    "limits_guarded": Method("SAC 50/50 + LayerNorm, guard", "sac", {**LIMITS, **NORM}, None, True),
    "online_limit": Method(
        "SAC, online only, limit 40", "sac", {"offline_share": 0.0, "cost_limit": LIMIT}
    ),
    "moorl_limit": Method(
        "MOORL, K 5, η 0.5 + LayerNorm, limit 40", "moorl",
        {"eta": 0.5, "cost_limit": LIMIT, **NORM}, 5,
    ),
    "rlpd_limit": Method("RLPD, same UTD, limit 40", "rlpd", {"cost_limit": LIMIT}, 0),
    "moorl_guarded": Method(
        "MOORL, K 5, η 0.5 + LayerNorm, guard, limit 40",
        "moorl",
        {"eta": 0.5, "cost_limit": LIMIT, **NORM},
        5,
        True,
    ),
}  # fmt: skip
# Of a group of seeds, where the values do not say enough.
VARIANTS = {
    ("meta", "eta=1"): "blocks, K 5, η 1: no meta step",
    ("meta_norm", "eta=1"): "blocks, K 5, η 1 + LayerNorm",
    ("meta_20", "eta=1"): "blocks, K 20, η 1: no meta step",
    ("mixed_meta", "eta=1"): "SAC 50/50",
    ("mixed_meta", "eta=0.5"): "50/50 + slow weights, K 5, η 0.5",
    ("limits", "cost_limit=inf"): "SAC 50/50 + LayerNorm",
    ("limits_guarded", "cost_limit=inf"): "SAC 50/50 + LayerNorm, guard",
}
# Cal-QL as WSRL wants it to begin with: its layers and its ten critics.
BEFORE_WSRL = {"samples": 4, "critics": 10, "actor_layer_norm": True, "critic_layer_norm": True}

# Cheapest and most telling first: what each task is for, then the rest of its methods.
FIRST = (
    ("hopper", ("limits",)),
    ("pointmaze", ("mixed_norm",)),
    ("cartpole", ("online", "meta")),
    ("pointmaze", ("online",)),
    ("cartpole", ("mixed_meta",)),
    ("hopper", ("limits_guarded",)),
    ("cartpole", ("mixed_norm", "meta_fast")),
    ("pointmaze", ("moorl_norm", "iql")),
    ("hopper", ("online", "moorl", "iql")),
    ("halfcheetah", ("limits", "limits_guarded", "online", "moorl", "moorl_norm", "iql")),
    ("cartpole, random data", ("mixed_norm",)),
)


def title_of(method: str, variant: str) -> str:
    """Of a group of seeds; ``variant``: its values as in the members' names."""
    found = VARIANTS.get((method, variant))
    if found or not variant:
        return found or METHODS[method].title
    values = variant.replace("eta=", "η ").replace("cost_limit=", "limit ")
    return f"{METHODS[method].title}, {values}"


def schedule(tasks: list[str], methods: list[str] | None) -> list[tuple[str, str]]:
    """Tasks and methods in the order of work."""
    order = [(task, method) for task, some in FIRST for method in some]
    order += [(task, method) for task, facts in TASKS.items() for method in facts.methods]
    return [
        pair
        for pair in dict.fromkeys(order)
        if pair[0] in tasks and (methods is None or pair[1] in methods)
    ]


def settings_of(task: Task, method: Method) -> dict[str, Any]:
    """The scale, the task's and the method's own, of what its agent has fields for."""
    from saferl.registry import agent_class

    known = agent_class(method.agent).Config
    settings = {k: v for k, v in (WIDE | RATES | task.settings).items() if hasattr(known, k)}
    k = task.utd if method.k == 0 else method.k
    settings |= {"utd": float(task.utd), "random_steps": task.random_steps, **method.own}
    if k:
        settings["inner_steps"] = k
    if method.agent in ("iql_finetune", "cal_ql"):
        settings |= {"offline_steps": task.pretraining, "random_steps": 0}
    if method.agent == "wsrl":
        settings |= {"random_steps": 0, "start_steps": task.random_steps}
    return settings


def passes(agent: str, c: Any) -> dict[str, float]:
    """Passes through one network per critic step and per actor step: forward 1, with gradient 3."""
    e = getattr(c, "critics", 2)
    if agent == "iql_finetune":  # V twice forward and once back, two critics and their targets
        return {"critic": 1 + 3 + e + 3 * e, "actor": 3}
    if agent == "cal_ql":
        n = c.samples
        target = (n if c.max_backup else 1) * e
        return {"critic": 2 + target + 3 * e * (1 + 3 * n), "actor": 3 + 3 * e}
    limits = c.cost_limit if isinstance(c.cost_limit, tuple) else (c.cost_limit,)
    costs = 2 if np.isfinite(limits).any() else 0  # critics of the cost
    return {"critic": 1 + 4 * (e + costs), "actor": 3 + 3 * (e + costs)}


# Environments and data ----------------------------------------------------------------------------


def environment(name: str) -> str | Callable[[], Any]:
    """An id, or for a task of dm_control that has none a function."""
    if name != "dmc/cartpole-swingup_sparse-v0":
        return name
    from saferl.envs.dmc import DMControlEnv

    return functools.partial(DMControlEnv, "cartpole", "swingup_sparse")


@functools.lru_cache(maxsize=2)
def dataset_of(name: str, size: int | None = None) -> Any:
    """A bundled set, or one of cartpole's, made on first use and kept beside the bundled ones."""
    import saferl
    from saferl.data import Dataset, save_dataset
    from saferl.data.sources.fetch import data_dir
    from saferl.rollout import collect_transitions

    if name.startswith("saferl/"):
        return saferl.load_dataset(name, **({"size": size} if size else {}))
    size = size or ROWS
    file = data_dir("online") / f"{name}-{size}.npz"
    if file.exists():
        return saferl.load_dataset(file)
    policy, origin = None, "uniformly random actions"
    if name != "cartpole-random":
        policy, steps = behaviour(file.parent / "cartpole-behaviour")
        origin = f"SAC after {steps} steps of the dense task, acting stochastically"
    env_id = f"dmc/cartpole-swingup{'_sparse' if name == 'cartpole-sparse' else ''}-v0"
    rows = collect_transitions(
        policy, environment(env_id), size, seed=5, stochastic=policy is not None
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    made = Dataset.from_arrays(
        **rows, id=f"online/{name}", env_id=env_id, action_low=(-1.0,), action_high=(1.0,),
        horizon=500, reference_returns=(0.0, 1000.0), reference_source="the range of the returns",
        origin=f"{origin}; made by the study `online`, no published data",
    )  # fmt: skip
    save_dataset(made, file)
    return saferl.load_dataset(file)  # what a rerun reads, to the bit


def behaviour(folder: Path) -> tuple[Any, int]:
    """Cartpole's half-trained policy, and the steps that it took: the first of four seeds."""
    import saferl

    done = folder.with_suffix(".steps")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        fields = {k: v for k, v in (WIDE | RATES).items() if k != "value_lr"}
        run, means = trained_until(
            MEDIUM, folder.with_name("training"), TASKS["cartpole"].env, every=500, most=10_000,
            members=4, episodes=2, settings=fields | {"random_steps": 500, "utd": 5.0},
        )  # fmt: skip
        saferl.split(run.path, folder, int(means.argmax()))
        done.write_text(str(run.evaluation.steps.max()))
    return saferl.load_agent(folder).policy(), int(done.read_text())


def trained_until(
    least: float,
    out: Path,
    env: str | Callable[[], Any],
    *,
    every: int,
    most: int,
    members: int,
    episodes: int,
    settings: dict[str, Any],
) -> tuple[Any, np.ndarray]:
    """SAC from the environment alone, to the first evaluation of a member at ``least`` or above.

    It is evaluated each ``every`` steps, and asked from the second evaluation on. Returns the run
    and the mean returns of its members ``[M]``.

    Raises:
        RuntimeError: none is that good after ``most`` steps.
    """
    import saferl

    shutil.rmtree(out, ignore_errors=True)
    steps = 2 * every
    run = saferl.train(
        "sac", env=env, steps=steps, members=members, seed=77, out=out, settings=settings,
        eval_interval=every, eval_episodes=episodes, progress=False,
    )  # fmt: skip
    while (means := run.evaluation.at(steps).matrix().mean(1)).max() < least:
        print(f"SAC after {steps} steps: {means.round()}", file=sys.stderr, flush=True)
        if steps >= most:
            raise RuntimeError(f"no policy with a return of {least:g} within {steps} steps")
        steps += every
        known = None if isinstance(env, str) else env
        run = saferl.resume(out, env=known, steps=steps, progress=False)
    return run, means


def guard(policy: Any) -> Any:
    """Once half of an episode's limit is spent, no torque to the end of the episode."""
    from saferl.safety import Shield

    size = policy.spec.action_dim

    def stop(observations: np.ndarray) -> np.ndarray:
        return np.zeros((len(observations), size), np.float32)

    return Shield(policy, fallback=stop, cost_limit=LIMIT, reserve=RESERVE * LIMIT)
