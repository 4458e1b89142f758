"""EpiCare's baseline policies, their episodes at thousands of patients at once, and datasets.

``load_dataset("saferl/epicare-1-smart-v0")`` is what the benchmark's agents are trained on, here
simulated at each load; `simulate` and `statistics` score a policy as the paper's tables do. The
task itself: `saferl.envs.epicare`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np

from saferl.data import Card, Dataset
from saferl.errors import SaferlError, unknown

from .epicare import (
    ADVERSE_REWARD,
    ADVERSE_THRESHOLD,
    DISEASES,
    ENVIRONMENTS,
    REMISSION_REWARD,
    SYMPTOM_COST,
    SYMPTOMS,
    TREATMENTS,
    VARIANTS,
    VISITS,
    History,
    Patients,
    check_treatments,
    check_whole,
    world,
)

POLICIES = ("random", "smart", "soc", "oracle")
SIZE = 100_000
"""Transitions of a dataset whose size is not given."""
CHUNK = 8192  # patients simulated side by side; bounds the memory

# Baselines --------------------------------------------------------------------------------------


@cache
def expected_rewards(environment: int) -> np.ndarray:
    """``[disease, treatment]``: the reward of one visit, with the −64, as the baselines believe it.

    As in the released code the symptom cost is that of the means before the sigmoid. Probabilities
    of adverse events come from 131 072 draws of a fixed seed, to a standard error below 4e-4.
    """
    w, random = world(environment), np.random.default_rng(environment)
    threshold = np.log(ADVERSE_THRESHOLD / (1 - ADVERSE_THRESHOLD))
    adverse = np.zeros((DISEASES, TREATMENTS))
    for disease in range(DISEASES):
        noise = random.standard_normal((2**17, SYMPTOMS), np.float32)
        draws = w.means[disease] + noise @ w.factors[disease].T.astype(np.float32)
        extreme = draws[(draws > threshold - w.effects.max()).any(1)]  # the others cannot count
        for treatment in range(TREATMENTS):
            above = (extreme + w.effects[treatment] > threshold).any(1)
            adverse[disease, treatment] = above.sum() / len(draws)
    return (
        w.remission * REMISSION_REWARD
        + adverse * ADVERSE_REWARD
        - w.treatment_costs
        - SYMPTOM_COST * w.means.sum(1)[:, None]
    )


class Baseline:
    """The benchmark's own policies, for all patients of a simulation.

    - ``random``: uniform.
    - ``smart``: a fixed distribution, a softmax over the treatments' prior expected rewards in
      which the most likely is 8 times as likely as the least (a clinical trial's design).
    - ``soc``, standard of care: the treatment of highest value, values starting at the prior
      expected reward and moving by ``soc_alpha`` towards each reward seen; treatments that raise a
      symptom above 0.8 are avoided if any others are left.
    - ``oracle``: the treatment of highest expected reward in the hidden disease.

    The paper's tables use ``soc_alpha=0.8``; the released class has 0.5.
    """

    def __init__(self, name: str, environment: int, soc_alpha: float = 0.8):
        if name not in POLICIES:
            raise unknown("EpiCare policy", name, POLICIES)
        if not 0 <= soc_alpha <= 1:
            raise SaferlError(f"soc_alpha must lie between 0 and 1, got {soc_alpha}")
        self.name, self.soc_alpha = name, soc_alpha
        self.world, expected = world(environment), expected_rewards(environment)
        self.prior = self.world.initial @ expected  # [16]
        self.best = expected.argmax(1)  # of each disease
        logits = np.zeros(TREATMENTS)
        if name == "smart":
            below = self.prior.max() - self.prior
            logits = -np.log(8) * below / below.max()
        self.probabilities = np.exp(logits) / np.exp(logits).sum()

    def start(self, count: int) -> None:
        self._values = np.tile(self.prior, (count, 1))

    def choose(self, patients: Patients) -> np.ndarray:
        """Treatments ``[B]`` int64."""
        if self.name == "oracle":
            return self.best[patients.disease]
        if self.name != "soc":
            return patients.random.choice(TREATMENTS, patients.count, p=self.probabilities)
        high = patients.symptoms > 0.8
        worsens = high.astype(float) @ (self.world.effects > 0).T.astype(float) > 0
        worsens[worsens.all(1)] = False
        return np.where(worsens, -np.inf, self._values).argmax(1)

    def learn(self, treatments: np.ndarray, rewards: np.ndarray) -> None:
        rows = np.arange(len(treatments))
        old = self._values[rows, treatments]
        self._values[rows, treatments] = old + self.soc_alpha * (rewards - old)


# Episodes ---------------------------------------------------------------------------------------

Policy = str | Callable[[np.ndarray], Any]


def simulate(
    environment: int,
    policy: Policy,
    episodes: int,
    seed: int = 0,
    *,
    history: int = 8,
    last_actions: int = 1,
    soc_alpha: float = 0.8,
) -> dict[str, np.ndarray]:
    """Transitions of whole episodes, one episode after another, N rows in all.

    ``policy`` is the name of a `Baseline`, or a function from observations ``[B, O]`` float32 (see
    `History`) to treatments ``[B]``. The result depends on the arguments only.

    Returns:
        ``observations``, ``next_observations`` [N, O] float32, ``actions`` [N] int64, ``rewards``
        [N] float64 without the −64, and ``adverse``, ``dense``, ``remission``, ``ended`` [N] bool.

    Raises:
        SaferlError: an unknown policy or environment, fewer than 1 episode, an argument out of
            range, treatments that are not whole numbers from 0 to 15, one for each patient.
    """
    chunks = _chunks(environment, policy, episodes, seed, history, last_actions, soc_alpha)
    parts = list(chunks)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _chunks(
    environment: int, policy: Policy, episodes: int, seed: int, history: int, last_actions: int,
    soc_alpha: float,
) -> Iterator[dict[str, np.ndarray]]:  # fmt: skip
    check_whole("episodes", episodes, 1)
    check_whole("seed", seed, 0)
    where = world(environment)
    baseline = None if callable(policy) else Baseline(policy, environment, soc_alpha)
    chosen = len(POLICIES) if baseline is None else POLICIES.index(policy)
    random = np.random.default_rng([seed, environment, chosen])
    for first in range(0, episodes, CHUNK):
        count = min(CHUNK, episodes - first)
        patients, past = Patients(where, count, random), History(count, history, last_actions)
        past.start(patients.reset())
        if baseline is not None:
            baseline.start(count)
        columns: dict[str, list[np.ndarray]] = {}
        running, alive = np.ones(count, bool), []
        while running.any():
            before = past.observation()
            if baseline is not None:
                treatments = baseline.choose(patients)
            else:
                assert not isinstance(policy, str)
                treatments = check_treatments(policy(before), count)
            visit = patients.step(treatments)
            past.add(treatments, patients.symptoms)
            if baseline is not None:
                baseline.learn(treatments, visit.scored())
            row = {
                "observations": before,
                "actions": treatments.astype(np.int64),
                "rewards": visit.rewards,
                "next_observations": past.observation(),
                "adverse": visit.adverse,
                "dense": visit.dense,
                "remission": visit.remission,
                "ended": visit.ended,
            }
            for name, values in row.items():
                columns.setdefault(name, []).append(values)
            alive.append(running)
            running = running & ~visit.ended
        kept = np.stack(alive, axis=1)  # [B, visits]: picks a patient's visits in their order
        yield {name: np.stack(values, axis=1)[kept] for name, values in columns.items()}


def statistics(episodes: dict[str, np.ndarray]) -> dict[str, float]:
    """What the benchmark reports of `simulate`'s result, as means over episodes.

    ``return`` and ``remission`` as published (return with the −64, times 100/64);
    ``adverse_events`` per episode; ``adverse_rate``, the published one, of which an episode that
    ends in an adverse event counts 1/length; ``dense_cost`` and ``length`` per episode.
    """
    ends = np.flatnonzero(episodes["ended"])
    lengths, count = np.diff(ends, prepend=-1), len(ends)
    adverse = episodes["adverse"]
    total = episodes["rewards"].sum() + ADVERSE_REWARD * adverse.sum()
    return {
        "return": float(total / count * 100 / REMISSION_REWARD),
        "remission": float(episodes["remission"].sum() / count),
        "adverse_events": float(adverse.sum() / count),
        "adverse_rate": float((adverse[ends] / lengths).mean()),
        "dense_cost": float(episodes["dense"].sum() / count),
        "length": float(lengths.mean()),
    }


# Datasets ---------------------------------------------------------------------------------------


def ids() -> list[str]:
    """Names of the datasets, without their ``saferl/``."""
    return [
        "-".join(filter(None, ("epicare", str(number), policy, variant, "v0")))
        for number in ENVIRONMENTS
        for policy in POLICIES
        for variant in VARIANTS
    ]


def load(
    name: str,
    size: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    *,
    episodes: int | None = None,
    history: int = 8,
    last_actions: int = 1,
    soc_alpha: float = 0.8,
    clip_actions: bool = False,
    **overrides: Any,
) -> Dataset:
    """Logged episodes of a `Baseline`, simulated at each load (100 000 rows take about a second).

    Args:
        name: ``epicare-{1..8}-{random,smart,soc,oracle}[-dense|-published]-v0``. Without a variant
            the cost is 1 at an adverse event; ``dense``: 1 at a visit with a symptom above 0.9;
            ``published``: the adverse cost, and its −64 in the reward as well, as in the paper.
        size: transitions, 100 000 by default; the last episode is cut there and its last row marked
            as a timeout. episodes: so many whole episodes instead (the paper's are 131 072).
        seed: 0 or more; the same arguments give the same data.
        history, last_actions: the observation, see `History`; others than the defaults leave the
            card without an environment: evaluate with a function that makes one.
        soc_alpha: see `Baseline`. progress, clip_actions: without effect here.
        overrides: fields of the `Card` to replace.

    Raises:
        SaferlError: an unknown name or card field, ``size`` and ``episodes`` both given, or an
            argument out of range.
    """
    match = re.fullmatch(r"epicare-(\d)-([a-z]+)(?:-([a-z]+))?-v0", name)
    if name not in ids():
        raise unknown("EpiCare dataset", name, ids())
    assert match is not None  # every known id has this form
    number, policy, variant = int(match[1]), match[2], match[3] or ""
    cost, penalty = VARIANTS[variant]
    if size is not None and episodes is not None:
        raise SaferlError("give the size of an EpiCare dataset or its episodes, not both")
    for what, value in (("size", size), ("episodes", episodes)):
        if value is not None:
            check_whole(what, value, 1)
    standard = (history, last_actions) == (8, 1)
    card = Card(
        id=f"saferl/{name}",
        env_id=f"saferl/EpiCare{number}{variant.title()}-v0" if standard else None,
        n_actions=TREATMENTS,
        horizon=VISITS,
        reference_returns=(0.0, REMISSION_REWARD),
        reference_source="EpiCare, whose returns are times 100/64",
        licence="Apache-2.0",
        origin=f"generated by saferl's port of EpiCare (Hargrave et al., 2024) with its {policy} "
        "policy; not EpiCare's own files",
        notes=(
            f"cost: {'an adverse event' if cost == 'adverse' else 'a symptom above 0.9'}; an "
            f"adverse event {'also takes 64 from' if penalty else 'does not change'} the reward "
            "(published scores are of the reward that it takes 64 from)",
            "the eighth visit is a terminal",
            f"observation: symptoms of {history} visits and {last_actions} last treatments",
        ),
    ).replace(**overrides)

    wanted, rows, parts = size or SIZE, 0, []
    most = episodes or wanted  # an episode has one row at least
    for part in _chunks(number, policy, most, seed, history, last_actions, soc_alpha):
        parts.append(part)
        rows += len(part["rewards"])
        if episodes is None and rows >= wanted:
            break
    stop = rows if episodes else wanted
    data = {key: np.concatenate([part[key] for part in parts])[:stop] for key in parts[0]}
    timeouts = np.zeros(stop, bool)
    timeouts[-1] = not data["ended"][-1]
    return Dataset.from_arrays(
        data["observations"],
        data["actions"],
        data["rewards"] + (ADVERSE_REWARD * data["adverse"] if penalty else 0.0),
        terminals=data["ended"],
        timeouts=timeouts,
        next_observations=data["next_observations"],
        costs=data[cost],
        card=card,
        clip_actions=clip_actions,
    )
