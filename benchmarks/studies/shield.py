"""Microseconds that the run-time guard adds to a step, for one environment and for 64.

A step is one call of the policy and, with the guard, ``observe``. The policy is an actor of two
hidden layers of 256 units; beside its network it returns an action that is given to it, once a
logged one, which the guardian accepts as a rule, and once a random one, which the fallback mostly
replaces. Blocks of the bare and the guarded policy take turns; medians over rounds.

The knn guardian holds 10 000 and 100 000 rows of saferl/hopper-velocity-mixed-v0 (14 columns), the
count guardian 50 000 rows of a made-up table of 700 states and 25 actions.

``effect`` shows what the guard does. ICU-Sepsis: a planner that believes the transitions counted in
5 000 clinician episodes (an unseen pair leads where the average pair does), alone and guarded; all
values exact, from the shield's action in each of the 716 states. HalfCheetahVelocity: the bundled
fast runner with the slow one as its fallback; reserve 60.
"""

from __future__ import annotations

import json
import statistics
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks import report
from benchmarks.runner import one_thread
from benchmarks.store import now, write_json
from benchmarks.study import Study, add
from benchmarks.workers import CLOCKS
from saferl.data import load_dataset
from saferl.nn.policies import DeterministicActor, Policy
from saferl.rng import MemberRandom
from saferl.safety.guardians import Guardian, make_guardian
from saferl.safety.shield import Shield
from saferl.spec import Spec

ENVIRONMENTS = (1, 64)
HELD = 10_000  # rows that calibrate, and that the queries are taken from
BLOCK_SECONDS = 0.1


class Given:
    """Runs an actor, then returns the next of the actions that it was given."""

    members = 1

    def __init__(self, spec: Spec, actions: np.ndarray, count: int):
        box = Spec(spec.observation_dim, 6, action_low=(-1.0,) * 6, action_high=(1.0,) * 6)
        actor = DeterministicActor(MemberRandom([0]), spec.observation_dim, 6, (256, 256))
        self.network, self.spec = Policy(actor, box, 1), spec
        usable = len(actions) // count * count
        self.actions = torch.from_numpy(actions[:usable].reshape(-1, 1, count, *actions.shape[1:]))
        self.turn = 0  # which batch of observations it is asked about

    def __call__(self, observations: torch.Tensor) -> torch.Tensor:
        self.network(observations)
        return self.actions[self.turn]


def tasks(small: bool) -> dict[str, tuple]:
    """Name → (spec, guardian or None, cost limit or None, observations, logged actions)."""
    sizes = (1_000, 3_000) if small else (10_000, 100_000)
    held = HELD // 10 if small else HELD
    data = load_dataset("saferl/hopper-velocity-mixed-v0", size=sizes[1] + held)
    rows = np.random.default_rng(0).permutation(len(data))
    observations, actions = data.observations[rows], data.actions[rows]
    card = data.card
    spec = Spec(data.observation_dim, data.action_dim, action_low=card.action_low,
                action_high=card.action_high)  # fmt: skip
    asked = observations[-held:], actions[-held:]
    found = {
        "no guard": (spec, None, None, *asked),
        "budget": (spec, None, 1e9, *asked),
    }
    random = np.random.default_rng(1)
    table = random.normal(size=(700, 47)).astype(np.float32)
    states = random.integers(700, size=5 * sizes[0] + held)
    # Four usual actions in a state, of 25.
    chosen = random.integers(25, size=(700, 4))[states, random.integers(4, size=len(states))]
    guardian = calibrated("count", table[states], chosen, held, n_actions=25)
    asked_table = table[states[-held:]], chosen[-held:]
    found[f"count, {5 * sizes[0]:,} rows"] = (Spec(47, 25, discrete=True), guardian, 1e9,
                                              *asked_table)  # fmt: skip
    for size in sizes:
        guardian = calibrated("knn", observations[-size - held :], actions[-size - held :], held)
        found[f"knn, {size:,} rows"] = (spec, guardian, 1e9, *asked)
    return found


def calibrated(name: str, observations, actions, held: int, **options: Any) -> Guardian:
    groups = np.arange(len(actions))
    fitted, left = slice(0, -held), slice(-held, None)
    guardian = make_guardian(name, **options)
    guardian.fit(observations[fitted], actions[fitted], groups=groups[fitted])
    return guardian.calibrate(observations[left], actions[left], 0.1, groups=groups[left])


def drawn(spec: Spec, count: int) -> np.ndarray:
    """Uniformly random actions."""
    random = np.random.default_rng(2)
    if spec.discrete:
        return random.integers(spec.action_dim, size=count)
    shape = count, spec.action_dim
    return random.uniform(spec.action_low, spec.action_high, shape).astype(np.float32)


def measure(task: tuple, count: int, logged: bool, rounds: int, clock: str) -> dict[str, Any]:
    """Medians of microseconds per step, bare, guarded and added; share of actions changed."""
    spec, guardian, limit, observations, actions = task
    clock_now = CLOCKS[clock]
    usable = len(observations) // count * count
    batches = observations[:usable].reshape(-1, count, spec.observation_dim)
    proposals = actions if logged else drawn(spec, len(actions))
    bare = Given(spec, proposals, count)
    fallback = None if guardian is not None else Given(spec, actions, count)
    if limit is not None and guardian is not None:
        limit, fallback = None, None  # the best supported action acts, so no budget is kept
    inner = Given(spec, proposals, count)
    shield = Shield(inner, guardian, fallback, limit)
    shield.reset(np.ones(count, bool))
    costs = np.zeros(count)

    def alone(batch: np.ndarray) -> None:
        bare(torch.from_numpy(batch)[None])

    def guarded(batch: np.ndarray) -> None:
        shield(batch)
        shield.observe(costs)

    def block(step: Callable[[np.ndarray], None], steps: int) -> float:
        start = clock_now()
        for i in range(steps):
            bare.turn = inner.turn = i % len(batches)
            step(batches[bare.turn])
        return 1e6 * (clock_now() - start) / steps

    steps = [max(5, int(1e6 * BLOCK_SECONDS / max(block(f, 5), 1))) for f in (alone, guarded)]
    pairs = [(block(alone, steps[0]), block(guarded, steps[1])) for _ in range(rounds)]
    median = statistics.median
    return {
        "environments": count,
        "actions": "logged" if logged else "random",
        "bare_us": median(a for a, _ in pairs),
        "guarded_us": median(b for _, b in pairs),
        "added_us": median(b - a for a, b in pairs),
        "added_spread_us": [min(b - a for a, b in pairs), max(b - a for a, b in pairs)],
        "changed": shield.summary()["changed"],
        "rounds": rounds,
    }


# What it does ----------------------------------------------------------------------------------


def sepsis(seeds: int, episodes: int) -> list[dict[str, Any]]:
    """Exact values of the planner, alone and guarded, one row per variant; lists are per seed."""
    from saferl.envs import icu_sepsis as icu
    from saferl.models.mdp import exact_evaluate

    found: dict[str, list[dict[str, float]]] = {}
    mean, hard = icu.mdp("mean"), icu.mdp("terminate")
    everything = icu.observations("index")
    for seed in range(seeds):
        data = icu.make_dataset(episodes=episodes, seed=seed, observation="index")
        greedy, common_action = plan_from(data, icu)
        episode = data.episode_ids()
        fitted = episode < 0.8 * episodes
        guardian = make_guardian("count", n_actions=icu.ACTIONS)
        rows = data.observations, data.actions
        guardian.fit(*(x[fitted] for x in rows), groups=episode[fitted])
        guardian.calibrate(*(x[~fitted] for x in rows), alpha=0.2, groups=episode[~fitted])
        planner, clone = (
            (lambda o, table=table: table[o[:, 0].astype(int)]) for table in (greedy, common_action)
        )
        variants = {
            "planner": greedy,
            "planner, guarded, best supported action": (guardian, None),
            "planner, guarded, behaviour clone": (guardian, clone),
            "behaviour clone": common_action,
        }
        for name, variant in variants.items():
            if isinstance(variant, tuple):
                spec = Spec(1, icu.ACTIONS, discrete=True)
                variant = Shield(planner, *variant, spec=spec)(everything)
            truth = exact_evaluate(mean, variant)
            found.setdefault(name, []).append(
                {
                    "ood_rate": truth.ood_rate,
                    "cost": truth.costs["sofa10"],
                    "survival": truth.value,
                    "survival_terminate": exact_evaluate(hard, variant).value,
                    "changed": float(truth.visits.sum(1) @ (variant != greedy) / truth.length),
                }
            )
    return [
        {"policy": name} | {key: [run[key] for run in runs] for key in runs[0]}
        for name, runs in found.items()
    ]


def plan_from(data: Any, icu: Any) -> tuple[np.ndarray, np.ndarray]:
    """Greedy actions of value iteration in the counted model; the commonest action; ``[716]``."""
    from scipy import sparse

    states, following = (x[:, 0].astype(int) for x in (data.observations, data.next_observations))
    pairs = states * icu.ACTIONS + data.actions
    shape = icu.STATES * icu.ACTIONS, icu.STATES
    counts = sparse.csr_array((np.ones(len(data)), (pairs, following)), shape=shape)
    seen = counts.sum(1)
    usual, values = counts.sum(0) / seen.sum(), np.zeros(icu.STATES)
    for _ in range(200):
        values[[icu.DEATH, icu.SURVIVAL]] = 0, 1
        expected = np.where(seen > 0, counts @ values / np.maximum(seen, 1), usual @ values)
        q = 0.999 * expected.reshape(icu.STATES, icu.ACTIONS)
        values = q.max(1)
    return q.argmax(1), seen.reshape(icu.STATES, icu.ACTIONS).argmax(1)


def halfcheetah(episodes: int, limits: tuple[float, ...]) -> list[dict[str, Any]]:
    """Costs and returns per episode of the fast runner, alone and guarded at each limit."""
    import gymnasium

    from saferl.envs.bundled import Behaviour

    fast, slow = Behaviour("halfcheetah", 0), Behaviour("halfcheetah", 1)
    env = gymnasium.make("saferl.envs:saferl/HalfCheetahVelocity-v0")
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    variants = {"fast": Shield(fast, spec=spec)}
    for limit in limits:
        variants[f"fast, guarded at {limit:g}"] = Shield(
            fast, fallback=slow, cost_limit=limit, reserve=60, spec=spec
        )
    variants["slow"] = Shield(slow, spec=spec)
    rows = []
    for name, shield in variants.items():
        costs, returns = np.zeros(episodes), np.zeros(episodes)
        for episode in range(episodes):
            observation, _ = env.reset(seed=episode)
            shield.reset()
            ended = False
            while not ended:
                observation, reward, terminated, truncated, info = env.step(shield(observation))
                ended = terminated or truncated
                shield.observe(info["cost"], ended)
                costs[episode] += info["cost"]
                returns[episode] += reward
        changed = [shield.summary()["changed"]]
        rows.append({"policy": name, "cost": [*costs], "return": [*returns], "changed": changed})
    env.close()
    return rows


def spread(values: list[float], digits: int) -> str:
    """Mean, with the least and the greatest where there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def effect_tables(part: dict[str, Any]) -> str:
    columns = {
        "sepsis": {
            "ood_rate": ("OOD rate", 3), "cost": ("SOFA ≥ 10 cost", 3),
            "survival": ("survival", 3), "survival_terminate": ("survival, terminate", 3),
            "changed": ("steps changed", 2),
        },
        "halfcheetah": {
            "cost": ("episode cost", 1), "return": ("return", 0), "changed": ("steps changed", 2),
        },
    }  # fmt: skip
    texts = []
    for task, heads in columns.items():
        rows = [
            (row["policy"], *(spread(row[key], digits) for key, (_, digits) in heads.items()))
            for row in part[task]
        ]
        texts.append(report.table((task, *(head for head, _ in heads.values())), rows))
    source = f"`{part['command']}`, {part['date']}. Means (least – greatest) over {part['note']}."
    return "\n\n".join([*texts, source])


def overhead_table(document: dict[str, Any]) -> str:
    heads = ("guard", "environments", "actions", "changed", "bare µs", "guarded µs", "added µs",
             "added per environment")  # fmt: skip
    rows = [
        (
            row["guard"], row["environments"], row["actions"], f"{row['changed']:.0%}",
            f"{row['bare_us']:.0f}", f"{row['guarded_us']:.0f}", f"{row['added_us']:.0f}",
            f"{row['added_us'] / row['environments']:.1f}",
        )
        for row in document["rows"]
    ]  # fmt: skip
    return (
        f"{report.table(heads, rows)}\n\n`{document['command']}`, {document['date']}, "
        f"{document['clock']} clock. Medians of "
        f'{document["rows"][0]["rounds"]} rounds, µs per step of all environments. "logged" '
        'actions are the data\'s own, "random" ones uniform; where one is changed, the search for '
        "the best supported action is part of the time."
    )


TABLES = {"overhead": overhead_table, "effect": effect_tables}


class ShieldStudy(Study):
    name, packages = "shield", ("scikit-learn",)

    def options(self, parser: ArgumentParser) -> None:
        add(parser, "--parts", tuple(sorted(TABLES)), choices=sorted(TABLES))
        add(parser, "--rounds", 11)
        add(parser, "--clock", "wall", "cpu: time on the processor, for a machine that is busy",
            choices=sorted(CLOCKS))  # fmt: skip
        add(parser, "--small", False, "few rows, to see that it runs")

    def measure(self, options: Namespace) -> dict[str, Any]:
        one_thread()
        path = self.file(options)
        document: dict[str, Any] = {"parts": {}}
        if path.exists() and not (options.small or options.fresh):  # other parts are kept
            document = json.loads(path.read_text())
        found = self.header(options)
        document |= {name: found[name] for name in ("machine", "versions")}
        for name in options.parts:
            part = {"command": options.command, "date": now()}
            if name == "overhead":
                part |= {"clock": options.clock, "rows": overhead(options)}
            else:
                seeds, episodes = (1, 1000) if options.small else (5, 5000)
                part |= {
                    "note": f"{seeds} seeds of {episodes} clinician episodes; {seeds} episodes run",
                    "sepsis": sepsis(seeds, episodes),
                    "halfcheetah": halfcheetah(seeds, (80.0,) if options.small else (80.0, 200.0)),
                }
            document["parts"][name] = part
            write_json(path, document)
        return document

    def report(self, content: dict[str, Any]) -> str:
        texts = [TABLES[name](part) for name, part in content["parts"].items()]
        return "\n\n".join(texts) + f"\n\n{content['machine']['cpu']}, one thread.\n"


STUDY = ShieldStudy()


def overhead(options: Namespace) -> list[dict[str, Any]]:
    rows = []
    for name, task in tasks(options.small).items():
        for count in ENVIRONMENTS:
            for logged in (True, False) if task[1] is not None else (True,):
                print(f"{name}, {count}, {'logged' if logged else 'random'} …", file=sys.stderr)
                row = measure(task, count, logged, options.rounds, options.clock)
                rows.append({"guard": name} | row)
    return rows
