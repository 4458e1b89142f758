"""EpiCare: treat a hidden disease in at most eight visits; a gymnasium task and a simulator.

A port of the benchmark of Hargrave, Spaeth and Grosenick (NeurIPS 2024, Datasets and Benchmarks) in
numpy: 16 hidden diseases, 16 treatments, 8 symptoms. Where paper and released code differ this
follows the code, without patient modifiers, as for the paper's tables. Eight environments, 1 to 8,
are eight fixed sets of diseases and treatments. Policies and datasets: `saferl.envs.epicare_data`.

One visit, in this order: the treatment's cost; remission with the probability that this treatment
has for this disease (+64, the episode ends); else the disease may change, symptoms are drawn and
cost 0.5 times their sum; a symptom above 0.999 is an adverse event (the episode ends, −64 in the
published reward); the eighth visit is the last. Symptoms lie in (0, 1) and are reported to one
decimal, but the first ones, and those in remission, without rounding.

Published returns are those of the reward *with* the −64, times 100/64. Here the −64 is left out
unless ``penalty=True``, so that reward and cost are separate: the cost of a visit is 1 at an
adverse event (``cost="adverse"``, rare) or where any symptom is above 0.9 (``cost="dense"``).

The eighth visit is a terminal, not a timeout: the task is defined over eight visits, nothing that a
policy is scored on lies behind them, and the default observation, which holds all visits so far,
shows which one it is. EpiCare's own files mark it as a terminal too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

from saferl.errors import SaferlError, unknown

DISEASES, TREATMENTS, SYMPTOMS, VISITS = 16, 16, 8, 8
REMISSION_REWARD = 64.0
ADVERSE_REWARD, ADVERSE_THRESHOLD = -64.0, 0.999
SYMPTOM_COST = REMISSION_REWARD / (2 * VISITS * SYMPTOMS)
DENSE_THRESHOLD = 0.9
COSTS = ("adverse", "dense")
VARIANTS = {  # part of an id → cost, penalty
    "": ("adverse", False),
    "dense": ("dense", False),
    "published": ("adverse", True),
}
ENVIRONMENTS = range(1, 9)


@dataclass(frozen=True, eq=False)
class World:
    """What an environment's seed decides. All arrays are float64 and read-only."""

    means: np.ndarray  # [16, 8] of the symptoms of a disease, before the sigmoid
    factors: np.ndarray  # [16, 8, 8] Cholesky factors of their covariances
    remission: np.ndarray  # [disease, treatment] probability of a cure
    treatment_costs: np.ndarray  # [16]
    effects: np.ndarray  # [treatment, symptom] added before the sigmoid
    transitions: np.ndarray  # [treatment, disease, next disease]
    initial: np.ndarray  # [16] distribution of the first disease

    def __post_init__(self):
        for value in vars(self).values():
            if isinstance(value, np.ndarray):
                value.flags.writeable = False


@cache
def world(environment: int) -> World:
    """Diseases and treatments of environment 1 … 8; raises `SaferlError` for another number."""
    check_whole("environment", environment, 1, len(ENVIRONMENTS))
    # The order and kind of these draws, and numpy's frozen old generator, are those of the released
    # code: only so are its eight environments the published ones.
    random = np.random.RandomState(environment)
    means, covariances = np.zeros((DISEASES, SYMPTOMS)), []
    remission = np.zeros((DISEASES, TREATMENTS))
    for disease in range(DISEASES):
        means[disease] = random.uniform(0.0, 2.0, SYMPTOMS)
        deviations = np.sort(random.uniform(1.0, 2.0, SYMPTOMS))[::-1]
        axes, _ = np.linalg.qr(random.normal(0.0, 1.0, (SYMPTOMS, SYMPTOMS)))
        covariances.append(axes * deviations**2 @ axes.T)
    for treatment in range(TREATMENTS):
        # The code draws a set of one disease and overwrites it: each treatment cures one disease.
        random.choice(DISEASES, size=random.randint(1, 2), replace=False)
        disease = random.randint(0, DISEASES)
        remission[disease, treatment] = random.uniform(0.8, 1.0)
    for disease in np.flatnonzero(~remission.any(1)):
        treatment = random.randint(0, TREATMENTS)
        remission[disease, treatment] = random.uniform(0.8, 1.0)

    costs, modifiers = np.zeros(TREATMENTS), np.zeros((TREATMENTS, DISEASES))
    effects = np.zeros((TREATMENTS, SYMPTOMS))
    for treatment in range(TREATMENTS):
        costs[treatment] = random.uniform(1.0, REMISSION_REWARD / (2 * VISITS))
        affected = random.choice(SYMPTOMS, size=random.randint(1, SYMPTOMS), replace=False)
        effects[treatment, affected] = [random.uniform(-2.0, 1.0) for _ in affected]
        modifiers[treatment] = random.uniform(0.5, 1.5, DISEASES)

    base = np.zeros((DISEASES, DISEASES))
    for i in range(DISEASES):
        for j in range(DISEASES):
            if i != j and random.rand() < 1 / DISEASES:
                base[i, j], base[j, i] = random.uniform(0.01, 0.2), random.uniform(0.01, 0.2)
    np.fill_diagonal(base, 1.0 - base.sum(1))
    transitions = base * modifiers[:, None, :]
    transitions /= transitions.sum(-1, keepdims=True)

    factors = np.linalg.cholesky(np.stack(covariances))
    return World(means, factors, remission, costs, effects, transitions, _initial(base))


def check_whole(what: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises `SaferlError` unless ``value`` is an integer from ``least`` to ``most``."""
    kind = f"{least} or more" if most is None else f"{least} to {most}"
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, np.integer))
        or value < least
        or (most is not None and value > most)
    ):
        raise SaferlError(f"{what} of EpiCare must be a whole number, {kind}, got {value!r}")


def _initial(base: np.ndarray) -> np.ndarray:
    """Stationary distribution of each communicating class, weighted by the size of the class."""
    reach = np.linalg.matrix_power((base > 0).astype(float), DISEASES) > 0
    initial = np.zeros(DISEASES)
    for members in np.unique(reach, axis=0):
        part, size = base[np.ix_(members, members)], int(members.sum())
        system = np.vstack([part.T - np.eye(size), np.ones(size)])
        target = np.append(np.zeros(size), 1.0)
        initial[members] = np.linalg.lstsq(system, target)[0] * size / DISEASES
    return initial / initial.sum()


# Simulator --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Visit:
    """What one visit of B patients brought; each array ``[B]``."""

    rewards: np.ndarray  # without the −64
    adverse: np.ndarray  # bool: adverse event
    dense: np.ndarray  # bool: a symptom above 0.9
    remission: np.ndarray  # bool
    ended: np.ndarray  # bool

    def costs(self, kind: str) -> np.ndarray:
        """``[B]`` float64 of 0 and 1 for ``"adverse"`` or ``"dense"``."""
        return getattr(self, kind).astype(np.float64)

    def scored(self, penalty: bool = True) -> np.ndarray:
        """The rewards with (as published) or without −64 at an adverse event."""
        return self.rewards + ADVERSE_REWARD * self.adverse if penalty else self.rewards


class Patients:
    """B patients of one environment, all at the same visit.

    ``disease`` [B] int64 is hidden from policies, ``symptoms`` [B, 8] float64 is what they observe.
    ``random`` (a numpy ``Generator``) is read by the same calls at every visit, whatever happens,
    and goes on being read for patients whose episode has ended: the caller ignores those.
    """

    def __init__(self, world: World, count: int, random: np.random.Generator):
        self.world, self.count, self.random = world, count, random
        self._cumulative = world.transitions.cumsum(-1)[..., :-1]

    def _draw_symptoms(self, shift: np.ndarray | float = 0.0) -> np.ndarray:
        world, noise = self.world, self.random.standard_normal((self.count, SYMPTOMS))
        spread = (world.factors[self.disease] @ noise[..., None])[..., 0]
        return 1 / (1 + np.exp(-(world.means[self.disease] + spread + shift)))

    def reset(self) -> np.ndarray:
        """New patients at their first visit; returns ``symptoms``."""
        self.visit = 0
        draw = self.random.random((self.count, 1))
        self.disease = (draw >= self.world.initial.cumsum()[:-1]).sum(1)
        self.symptoms = self._draw_symptoms()
        return self.symptoms

    def step(self, treatments: np.ndarray) -> Visit:
        """Give ``treatments`` [B] (0 … 15)."""
        world, chance = self.world, self.random.random((self.count, 2))
        self.visit += 1
        remission = chance[:, 0] < world.remission[self.disease, treatments]
        passed = chance[:, 1:] >= self._cumulative[treatments, self.disease]
        self.disease = np.where(remission, self.disease, passed.sum(1))
        symptoms = self._draw_symptoms(world.effects[treatments])
        healthy = 0.1 * self.random.random((self.count, SYMPTOMS))
        worst = np.where(remission, 0.0, symptoms.max(1))
        adverse = worst > ADVERSE_THRESHOLD
        rewards = -world.treatment_costs[treatments] + np.where(
            remission, REMISSION_REWARD, -SYMPTOM_COST * symptoms.sum(1)
        )
        self.symptoms = np.where(remission[:, None], healthy, symptoms.round(1))
        ended = remission | adverse | (self.visit >= VISITS)
        return Visit(rewards, adverse, worst > DENSE_THRESHOLD, remission, ended)


class History:
    """The observation of B patients: symptoms of the last visits and one-hot last treatments.

    ``observation()`` is ``[B, 8 · history + 16 · last_actions]`` float32, newest first, zeros where
    nothing happened yet. EpiCare's agents see ``history=8, last_actions=1``, that is every visit's
    symptoms and the last treatment; ``history=1, last_actions=0`` are the current symptoms only.
    """

    def __init__(self, count: int, history: int, last_actions: int):
        check_whole("history", history, 1, VISITS)
        check_whole("last_actions", last_actions, 0, VISITS)
        self._symptoms = np.zeros((count, history, SYMPTOMS), np.float32)
        self._actions = np.zeros((count, last_actions, TREATMENTS), np.float32)

    def start(self, symptoms: np.ndarray) -> None:
        self._symptoms[:], self._actions[:] = 0.0, 0.0
        self._symptoms[:, 0] = symptoms

    def add(self, treatments: np.ndarray, symptoms: np.ndarray) -> None:
        for array, newest in (
            (self._symptoms, symptoms),
            (self._actions, np.eye(TREATMENTS, dtype=np.float32)[treatments]),
        ):
            array[:, 1:] = array[:, :-1].copy()
            array[:, :1] = newest[:, None]  # writes nothing where no actions are kept

    def observation(self) -> np.ndarray:
        count = len(self._symptoms)
        return np.concatenate(
            [self._symptoms.reshape(count, -1), self._actions.reshape(count, -1)], axis=1
        )


def check_treatments(treatments: Any, count: int) -> np.ndarray:
    """``[count]`` integers from 0 to 15, or a `SaferlError`."""
    treatments = np.asarray(treatments)
    if (
        treatments.shape != (count,)
        or treatments.dtype.kind not in "iu"
        or not ((treatments >= 0) & (treatments < TREATMENTS)).all()
    ):
        raise SaferlError(
            f"an EpiCare policy must return {count} whole numbers from 0 to {TREATMENTS - 1}, got "
            f"{treatments.dtype} {treatments.shape}"
        )
    return treatments


# Gymnasium --------------------------------------------------------------------------------------


class EpiCareEnv(gymnasium.Env):
    """``saferl/EpiCare-v0``: one patient.

    Args:
        environment: 1 … 8. cost, penalty: see the module. history, last_actions: see `History`.

    ``info`` carries ``cost``, ``remission``, ``adverse_event``, and ``disease``, the hidden state.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        environment: int = 1,
        cost: str = "adverse",
        penalty: bool = False,
        history: int = 8,
        last_actions: int = 1,
    ):
        if cost not in COSTS:
            raise unknown("EpiCare cost", cost, COSTS)
        self.world, self.cost, self.penalty = world(environment), cost, bool(penalty)
        self._past = History(1, history, last_actions)
        width = SYMPTOMS * history + TREATMENTS * last_actions
        self.observation_space = Box(0.0, 1.0, (width,), np.float32)
        self.action_space = Discrete(TREATMENTS)
        self._ended = True

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self._patient, self._ended = Patients(self.world, 1, self.np_random), False
        self._past.start(self._patient.reset())
        return self._past.observation()[0], {"disease": int(self._patient.disease[0])}

    def step(self, action):
        if self._ended:
            raise SaferlError("this EpiCare episode has ended, or none has begun: call reset()")
        treatments = check_treatments(np.asarray(action)[None], 1)
        visit = self._patient.step(treatments)
        self._past.add(treatments, self._patient.symptoms)
        self._ended = bool(visit.ended[0])
        info = {
            "cost": float(visit.costs(self.cost)[0]),
            "remission": bool(visit.remission[0]),
            "adverse_event": bool(visit.adverse[0]),
            "disease": int(self._patient.disease[0]),
        }
        reward = float(visit.scored(self.penalty)[0])
        return self._past.observation()[0], reward, self._ended, False, info


def env_ids() -> dict[str, dict[str, Any]]:
    """Ids to register with gymnasium, and the arguments that `EpiCareEnv` gets."""
    listed: dict[str, dict[str, Any]] = {"saferl/EpiCare-v0": {}}
    for number in ENVIRONMENTS:
        for variant, (cost, penalty) in VARIANTS.items():
            name = f"saferl/EpiCare{number}{variant.title()}-v0"
            listed[name] = {"environment": number, "cost": cost, "penalty": penalty}
    return listed
