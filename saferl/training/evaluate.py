"""Evaluating a run folder: its policies as they are and under a guard, and what is known besides.

`evaluate_run` writes into the folder

- ``evaluation.csv``: a row per member and episode; those of earlier training steps are kept;
- ``guarded-….csv``: the same of the policies under each guard;
- ``evaluation.json``: the guardian, what the agent's own model predicts, and exact values with the
  best possible ones where the environment is a table (`saferl.evaluation.results.Known`),

which `saferl.evaluation.write_report` shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saferl.data import load_dataset
from saferl.errors import SaferlError
from saferl.evaluation import Evaluation, Evaluator
from saferl.evaluation.evaluate import NO_COST
from saferl.evaluation.exact import exact_frontier, exact_values, tabular_task
from saferl.evaluation.results import Guard, Known, RunResults, Values
from saferl.rollout import Env
from saferl.runs.config import OBJECT, RunConfig
from saferl.runs.folder import RunFolder
from saferl.safety.guardians.fitting import fit_guardian, guardian_for, split
from saferl.safety.limits import check_limit
from saferl.safety.shield import Shield
from saferl.training.train import load_agent

GUARDIAN = "knn"  # where the agent has none of its own
GUARDIAN_ROWS = 10_000
"""Logged rows it is fitted to: enough to tell who leaves the data, few enough to ask every step."""
CALIBRATION = 0.2  # share of episodes that it is calibrated by
SEED = 20_000  # of the first episode, apart from those of training and its evaluations


def evaluate_run(
    run: str | Path,
    *,
    env: Env | None = None,
    dataset: Any = None,
    episodes: int = 20,
    cost_limits: Sequence[float] | None = None,
    seed: int = SEED,
    step: int | None = None,
    guardian: str = "auto",
    alpha: float = 0.1,
    guard: bool = False,
    fallback: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
    say: Callable[[str], None] = print,
) -> RunResults:
    """Play episodes with all members of a run and write what came of it into the run folder.

    Args:
        run: its folder.
        env: to play in; the run's if None.
        dataset: the run's, for a guardian, where `train` was given an object.
        episodes: per member.
        cost_limits: expected cost per episode to judge by; the run's if None. Members that were
            trained for a limit are judged by their own.
        seed: of the first episode. step: of the checkpoint; the last if None.
        guardian: counts the steps that the data do not support: "auto" is the one that the agent
            learned under, else `GUARDIAN`; another name of `make_guardian` is fitted like that to
            the run's dataset (`GUARDIAN_ROWS` rows of four fifths of the episodes, calibrated by
            the others); "none".
        alpha: share of supported steps that a guardian fitted here may flag.
        guard: play all episodes again under a `Shield`, which replaces actions that the guardian
            does not support.
        fallback: run folder whose policy acts in their place, instead of the best supported action.
            Then the shield also keeps the cost limits, one after the other, as budgets: once one is
            spent the fallback acts to the end of the episode.
        device: of the policies. progress: show progress. say: takes lines for the user.

    Returns:
        What the folder holds now; ``print(result.text())`` is the table.

    Raises:
        SaferlError: anything that the caller can mend, in one line.
    """
    folder = RunFolder(run)
    config = folder.config()
    limits = None if cost_limits is None else [check_limit(limit) for limit in cost_limits]
    env = env or (None if config.env == OBJECT else config.env)
    if env is None:
        raise SaferlError("the run names no environment: pass --env ID")
    if fallback is not None and not guard:
        raise SaferlError("a fallback acts under a guard only: pass --guard")
    agent = load_agent(run, step, device)
    step = folder.steps()[-1] if step is None else step
    largest = folder.card().get("summary", {}).get("cost_max")
    for limit in limits or ():
        if largest is not None and limit > largest:
            say(
                f"warning: the cost limit {limit:g} binds on no logged episode: the largest cost "
                f"of one is {largest:g}; is it in the unit of an episode?"
            )
    counting, described = _guardian(agent, folder, dataset, guardian, alpha, say)
    policy, task = agent.policy(), tabular_task(env)
    plans = _guards(guard, fallback, config, limits, agent.members)
    makers = [_shields(policy, counting, fallback, budgets, device) for _, budgets, _ in plans]
    with Evaluator(env, agent.members, episodes) as evaluator:
        ran = evaluator.run(policy, seed, progress, counting)
    bare = Evaluation.from_episodes(ran, step)
    if limits and bare.costs is None:
        raise SaferlError(NO_COST)
    values: Values = {}
    if (predicted := agent.predict(episodes)) is not None:
        for name, found in zip(("return", "cost"), predicted):
            if found is not None:
                values[f"predicted_{name}"] = found.mean(1).tolist()
    frontier: list[list[float]] = []
    if task is not None:
        values |= _exact(exact_values(task, policy))
        frontier = exact_frontier(task)

    guards: list[Guard] = []
    guarded: list[Evaluation] = []
    for (name, budgets, kept), shields in zip(plans, makers):
        rows = [
            _alone(env, shield, m, episodes, seed, step, progress, counting)
            for m, shield in enumerate(shields())
        ]
        exact: Values = {}
        if task is not None and budgets[0] is None:  # else what it does depends on the past
            found = [_exact(exact_values(task, shield)) for shield in shields()]
            exact = {key: [one[key][0] for one in found] for key in found[0]}
        file_name = name.replace(", ", "-").replace(" ", "-") + ".csv"
        guards.append(Guard(name, file_name, kept, exact))
        guarded.append(Evaluation.concatenate(rows))

    for one, result in zip(guards, guarded):
        result.write(folder.path / one.file)
    file = folder.path / "evaluation.csv"
    if file.exists() and len(earlier := Evaluation.read(file).until(step - 1)):
        bare = Evaluation.concatenate([earlier, bare])
    Known(step, limits, described, values, frontier, guards).write(folder.path)
    bare.write(file)
    for stale in set(folder.path.glob("guarded*.csv")) - {folder.path / g.file for g in guards}:
        stale.unlink()
    return RunResults.read(folder.path)


def _guardian(
    agent: Any,
    folder: RunFolder,
    dataset: Any,
    name: str,
    alpha: float,
    say: Callable[[str], None],
) -> tuple[Any, str | None]:
    """The guardian that counts, calibrated, and what to call it."""
    if name == "none":
        return None, None
    if name == "auto" and agent.guardian is not None:
        kind = type(agent.guardian).__name__
        return agent.guardian, f"the agent's own ({kind}, alpha {float(agent.guardian.alpha):.3g})"
    try:
        dataset = _dataset(folder, dataset)
        train, held = split(dataset, CALIBRATION)
        made = guardian_for(GUARDIAN if name == "auto" else name, dataset)
        fit_guardian(made, train, held, alpha, say, GUARDIAN_ROWS)
    except SaferlError as error:
        if name != "auto":
            raise
        say(f"no OOD rate: {error}")
        return None, None
    kind, rows = type(made).__name__, len(made.rows)
    return made, f"{kind} of {rows} rows of {dataset.card.id}, alpha {float(made.alpha):.3g}"


def _dataset(folder: RunFolder, dataset: Any) -> Any:
    """The dataset of the run, for a guardian."""
    config = folder.config()
    if dataset is None:
        if config.dataset is None:
            raise SaferlError("the run learned online, so there are no data for a guardian")
        if config.dataset == OBJECT:
            raise SaferlError(
                "the run was started with a Python object as dataset, which a guardian needs: "
                f"saferl.evaluate_run({str(folder.path)!r}, dataset=…)"
            )
        dataset = load_dataset(config.dataset, **config.dataset_options)
    if folder.card().get("fingerprint") != dataset.fingerprint:
        raise SaferlError(f"{dataset.card.id} holds other data than the run was trained on")
    return dataset


def _guards(
    guard: bool,
    fallback: Any,
    config: RunConfig,
    limits: Sequence[float] | None,
    members: int,
) -> list[tuple[str, list[float | None], float | None]]:
    """Name, budget of each member, and the budget if it is one for all, of each guard."""
    if not guard:
        return []
    if fallback is None:
        return [("guarded", [None] * members, None)]
    own = [member.group.cost_limit for member in config.who]
    if None not in own:
        return [("guarded", own, None)]
    limits = config.cost_limits if limits is None else limits
    if not limits:
        return [("guarded", [None] * members, None)]
    return [(f"guarded, limit {limit:g}", [limit] * members, limit) for limit in limits]


def _shields(
    policy: Any, guardian: Any, fallback: Any, budgets: Sequence[float | None], device: str
) -> Callable[[], list[Shield]]:
    """Makes a shield around each member's policy."""
    if guardian is None and budgets[0] is None:
        raise SaferlError(
            "there is nothing to guard by: take a --guardian, or pass cost limits and a --fallback"
        )
    acting = None if fallback is None else load_agent(fallback, device=device).policy()

    def make() -> list[Shield]:
        shields = []
        for m, budget in enumerate(budgets):
            taking = acting and acting.member(m if m < acting.members else 0)
            shields.append(Shield(policy.member(m), guardian, taking, budget))
        return shields

    return make


def _alone(
    env: Env, shield: Shield, member: int, episodes: int, seed: int, step: int, progress: bool,
    guardian: Any,
) -> Evaluation:  # fmt: skip
    """The episodes of one guarded member."""
    with Evaluator(env, 1, episodes) as evaluator:
        ran = evaluator.run(shield, seed, progress, guardian)
    rows = Evaluation.from_episodes(ran, step)
    return dataclasses.replace(rows, members=np.full(len(rows), member))


def _exact(values: dict[str, list[float]]) -> Values:
    return {f"exact_{name}": found for name, found in values.items()}
