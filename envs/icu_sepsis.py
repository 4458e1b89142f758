"""ICU-Sepsis: treating sepsis in an intensive care unit, built from real MIMIC-III stays.

Choudhary, Gupta and Thomas, "ICU-Sepsis: A Benchmark MDP Built from Real Medical Data", RLC 2024,
arXiv:2406.05646. The tables come with the authors' package (``pip install "saferl[icu]"``, MIT
licence), whose code is not run. They are for comparing methods, not for clinical conclusions.

States 0 … 712 are groups of patients, 713 is death, 714 survival, 715 is never reached. An action
is a dose of fluid and of vasopressor over four hours, each none (0) or a quartile of the doses
given (1 … 4): ``action = 5 · fluid + vasopressor``. The reward is 1 on survival, so the return is
the chance to survive.

A pair (state, action) is admissible if clinicians chose it more than 20 times: the true support.
Under ``strategy="mean"`` any other action does what a random admissible one does; under
``"terminate"`` the patient dies.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from scipy import sparse

from saferl.data import Card, Dataset
from saferl.errors import SaferlError, unknown
from saferl.evaluation.exact import TabularTask
from saferl.models.mdp import TabularMDP, mixture, sample_episodes

ENVS = {
    "saferl/ICUSepsis-v0": {},
    "saferl/ICUSepsisTerminate-v0": {"strategy": "terminate"},
    "saferl/ICUSepsisLevels-v0": {"actions": "levels"},
    "saferl/ICUSepsisTerminateLevels-v0": {"strategy": "terminate", "actions": "levels"},
}
"""Registered ids and what differs in them from `ICUSepsisEnv`'s defaults."""
HORIZON = 500
"""Steps after which an episode is truncated; the clinicians' last 9.2 steps on average."""
STATES, ACTIONS, LEVELS = 716, 25, 5
DEATH, SURVIVAL = 713, 714

FEATURES = (
    "gender", "mechanical_ventilation", "max_dose_vasopressor", "readmission", "age", "weight",
    "gcs", "heart_rate", "sys_bp", "mean_bp", "dia_bp", "resp_rate", "temperature", "fio2",
    "potassium", "sodium", "chloride", "glucose", "magnesium", "calcium", "hb", "wbc", "platelets",
    "ptt", "pt", "ph", "pao2", "paco2", "base_excess", "hco3", "lactate", "sofa", "sirs",
    "shock_index", "pao2_fio2", "cumulated_balance", "spo2", "bun", "creatinine", "sgot", "sgpt",
    "bilirubin", "inr", "input_total", "input_4h", "output_total", "output_4h",
)  # fmt: skip
"""The 47 columns, standardised by the package's authors (z-scores, of logarithms from spo2 on)."""
OGSRL13 = (
    "gender", "readmission", "age", "mechanical_ventilation", "gcs", "fio2", "pao2", "pao2_fio2",
    "bilirubin", "output_4h", "output_total", "input_total", "spo2",
)  # fmt: skip
"""The 13 columns that OGSRL (Yan et al., NeurIPS 2025) uses of its own cohort."""
DOSES = ("max_dose_vasopressor", "input_total", "input_4h")
"""Columns that tell the doses given in the same four hours, and so nearly the action."""

OBSERVATIONS = ("index", "features", "ogsrl13")
STRATEGIES = ("mean", "terminate")
BEHAVIOURS = ("clinician", "clinician-admissible", "random")
COSTS = {
    "sofa10": "1 per step with a SOFA score of 10 or more (severe organ failure)",
    "sofa8": "1 per step with a SOFA score of 8 or more",
    "urine": "1 per step with less urine in four hours than the cohort's mean of logarithms",
    "spo2": "1 per step with an oxygen saturation 1.5 standard deviations below the mean",
    "vasopressor": "1 per step with a vasopressor dose in the upper two quartiles",
    "inadmissible": "1 per step with an action that clinicians chose 20 times or fewer",
}


@dataclass(frozen=True)
class Tables:
    """The package's arrays, without the 103 MB of rewards: the reward is 1 on reaching 714.

    Attributes:
        transitions: ``[716 · 25, 716]`` sparse, row ``25 · state + action``.
        initial: ``[716]``. clinician: ``[716, 25]``, how often clinicians choose each action; 12 %
            of their steps are not admissible.
        admissible: ``[716, 25]`` bool. features: ``[716, 47]``. sofa: ``[716]`` mean SOFA scores.
    """

    transitions: sparse.csr_array
    initial: np.ndarray
    clinician: np.ndarray
    admissible: np.ndarray
    features: np.ndarray
    sofa: np.ndarray

    @property
    def terminal(self) -> np.ndarray:
        """``[716]`` bool: death, survival and the state after them."""
        return np.arange(STATES) >= DEATH


@cache
def tables() -> Tables:
    """Read the arrays, once per process (about a second).

    Raises:
        SaferlError: the package ``icu-sepsis`` is not installed, or has no such arrays.
    """
    # The package is located, not imported: importing it pulls in the legacy gym. By its metadata,
    # because a script of the user's called icu_sepsis.py hides the module.
    try:
        package = metadata.distribution("icu-sepsis")
    except metadata.PackageNotFoundError:
        raise SaferlError('ICU-Sepsis needs its tables: pip install "saferl[icu]"') from None
    folder = Path(str(package.locate_file("icu_sepsis"))) / "envs" / "assets"
    try:
        with np.load(folder / "dynamics.npz", allow_pickle=False) as file:
            dense = file["tx_mat"].reshape(STATES * ACTIONS, STATES)
            transitions = sparse.csr_array(dense)
            del dense
            initial, clinician = file["d_0"], file["expert_policy"]
            features, sofa = file["state_cluster_centers"], file["sofa_scores"]
        lines = (folder / "admissible_actions.txt").read_text().split("\n")
        counts = [int(word) for word in lines[0].split()]
        admissible = np.zeros((STATES, ACTIONS), bool)
        for state, (count, line) in enumerate(zip(counts, lines[1:], strict=False)):
            actions = [int(word) for word in line.split()]
            if len(actions) != count:
                raise ValueError(f"state {state} has {len(actions)} actions, not {count}")
            admissible[state, actions] = True
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise SaferlError(
            f'the tables of icu-sepsis cannot be read ({error}): pip install --force-reinstall "'
            'saferl[icu]"'
        ) from error
    admissible[DEATH:] = False
    for array in (transitions.data, initial, clinician, admissible, features, sofa):
        array.flags.writeable = False  # one copy for all
    return Tables(transitions, initial, clinician, admissible, features, sofa)


def _check(kind: str, value: Any, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise unknown(kind, str(value), valid)


@cache
def mdp(strategy: str = "mean") -> TabularMDP:
    """The exact `TabularMDP`: rewards, the costs of `COSTS`, admissible pairs as support.

    Raises:
        SaferlError: an unknown strategy, or tables that are missing.
    """
    _check("strategy", strategy, STRATEGIES)
    data = tables()
    transitions = data.transitions
    if strategy == "terminate":
        kept = data.admissible.ravel() | np.repeat(data.terminal, ACTIONS)
        dies = sparse.csr_array(
            (np.ones((~kept).sum()), (np.flatnonzero(~kept), np.full((~kept).sum(), DEATH))),
            shape=transitions.shape,
        )
        transitions = sparse.diags_array(kept.astype(float)) @ transitions + dies
    transitions = sparse.csr_array(transitions)
    rewards = transitions[:, [SURVIVAL]].toarray().reshape(STATES, ACTIONS)
    rewards[data.terminal] = 0.0
    supported = data.admissible | data.terminal[:, None]
    return TabularMDP(transitions, rewards, data.initial, data.terminal, costs(), supported)


@cache
def costs() -> dict[str, np.ndarray]:
    """Cost of each pair, name → ``[716, 25]``: those of `COSTS`, 0 in the terminal states."""
    data = tables()
    column = {name: data.features[:, i] for i, name in enumerate(FEATURES)}
    vasopressor = np.arange(ACTIONS) % LEVELS
    by_state = {
        "sofa10": data.sofa >= 10,
        "sofa8": data.sofa >= 8,
        "urine": column["output_4h"] < 0,
        "spo2": column["spo2"] < -1.5,
    }
    table = {name: np.repeat(flag[:, None], ACTIONS, 1) for name, flag in by_state.items()}
    table["vasopressor"] = np.repeat((vasopressor >= 3)[None], STATES, 0)
    table["inadmissible"] = ~data.admissible
    live = ~data.terminal[:, None]
    return {name: (flag & live).astype(np.float64) for name, flag in table.items()}


def observations(observation: str = "features", doses: bool = True) -> np.ndarray:
    """What an agent sees in each state, ``[716, O]`` float32.

    Args:
        observation: ``"index"`` (one number, 0 … 715), ``"features"`` (47 columns, `FEATURES`) or
            ``"ogsrl13"`` (13 columns, `OGSRL13`).
        doses: keep the columns of `DOSES`. They nearly give the action away (the fluid of the same
            four hours correlates .99 with the action), so a guard or a clone looks better with them
            than it would be on a fresh patient.

    Raises:
        SaferlError: an unknown kind of observation.
    """
    _check("observation", observation, OBSERVATIONS)
    if observation == "index":
        return np.arange(STATES, dtype=np.float32)[:, None]
    names: Sequence[str] = FEATURES if observation == "features" else OGSRL13
    names = [name for name in names if doses or name not in DOSES]
    return tables().features[:, [FEATURES.index(name) for name in names]].astype(np.float32)


def dose_levels() -> np.ndarray:
    """``[25, 2]`` float32 in [-1, 1], (fluid, vasopressor) of each action."""
    levels = np.stack([np.arange(ACTIONS) // LEVELS, np.arange(ACTIONS) % LEVELS], 1)
    return (2 * levels / (LEVELS - 1) - 1).astype(np.float32)


def to_action(doses: Any) -> np.ndarray:
    """(fluid, vasopressor) in [-1, 1], ``[..., 2]``, to the nearest action, ``[...]`` int64.

    Raises:
        SaferlError: not two numbers, or numbers outside of [-1, 1].
    """
    doses = np.asarray(doses, np.float64)
    if doses.shape[-1:] != (2,) or not (np.abs(doses) <= 1 + 1e-6).all():
        raise SaferlError(
            f"a dose action is (fluid, vasopressor), both in -1 … 1; got {doses.tolist()}"
        )
    levels = np.clip(np.floor((doses + 1) / 2 * (LEVELS - 1) + 0.5), 0, LEVELS - 1)
    return (levels[..., 0] * LEVELS + levels[..., 1]).astype(np.int64)


def policy(behaviour: str = "clinician", epsilon: float = 0.0) -> np.ndarray:
    """Probabilities ``[716, 25]`` of a logging policy.

    Args:
        behaviour: ``"clinician"`` as logged; ``"clinician-admissible"``, the same given that the
            action is admissible; ``"random"``, uniform over all 25.
        epsilon: share of ``"random"`` mixed in, drawn at every step.

    Raises:
        SaferlError: an unknown behaviour, or an epsilon outside of 0 … 1.
    """
    _check("behaviour", behaviour, BEHAVIOURS)
    data = tables()
    table = np.full((STATES, ACTIONS), 1 / ACTIONS)
    if behaviour != "random":
        table = data.clinician.copy()
        if behaviour == "clinician-admissible":
            table *= data.admissible
        live = ~data.terminal
        table[live] /= table[live].sum(1, keepdims=True)
    return mixture(mdp(), table, epsilon) if epsilon else table


def make_dataset(
    behaviour: str = "clinician",
    episodes: int = 20_000,
    seed: int = 0,
    *,
    epsilon: float = 0.0,
    strategy: str = "mean",
    observation: str = "features",
    doses: bool = True,
    actions: str = "discrete",
    cost: str = "sofa10",
    **card_fields: Any,
) -> Dataset:
    """Logged episodes of a behaviour, sampled from the exact tables (about a second).

    Args:
        behaviour, epsilon: see `policy`. episodes: whole episodes. seed: 0 or more; the same seed
            gives the same data.
        strategy, observation, doses, actions, cost: as in `ICUSepsisEnv`.
        card_fields: fields of the `Card` to replace.

    The card names the environment to evaluate in where one is registered with these options (see
    `ENVS`); else give a function that makes it: ``lambda: ICUSepsisEnv(observation="ogsrl13")``.

    The reward of the last row tells how an episode ended: 1 survival, 0 death; both are terminals.

    Raises:
        SaferlError: an unknown option, fewer than one episode, missing tables.
    """
    _check("actions", actions, ("discrete", "levels"))
    _check("cost", cost, tuple(COSTS))
    seen = observations(observation, doses)
    log = sample_episodes(mdp(strategy), policy(behaviour, epsilon), episodes, seed, HORIZON)
    states, chosen, next_states = log["states"], log["actions"], log["next_states"]
    mixed = f", {epsilon:g} of the steps random" if epsilon else ""
    options = {"observation": observation, "doses": doses, "actions": actions,
               "strategy": strategy, "cost": cost}  # fmt: skip
    defaults = inspect.signature(ICUSepsisEnv).parameters
    changed = {k: v for k, v in options.items() if v != defaults[k].default}
    env_id = next((name for name, settings in ENVS.items() if settings == changed), None)
    kind: dict[str, Any] = {"n_actions": ACTIONS}
    if actions == "levels":
        kind = {"action_low": (-1.0, -1.0), "action_high": (1.0, 1.0)}
    card = Card(
        id=f"saferl/icu-sepsis-{behaviour}-v0",
        env_id=env_id,
        horizon=HORIZON,
        reference_returns=(0.7801, 0.8751) if strategy == "mean" else (0.0084, 0.8751),
        reference_source="exact survival of the random and the optimal policy",
        licence="MIT (tables of icu-sepsis)",
        origin="sampled by saferl from the ICU-Sepsis tables (Choudhary et al., RLC 2024)",
        notes=(
            f"behaviour {behaviour}{mixed}; {int(episodes)} episodes, seed {seed}",
            f"strategy {strategy}; observation {observation}{'' if doses else ' without doses'}; "
            f"actions {actions}",
            f"cost {cost}: {COSTS[cost]}",
        ),
        **kind,
    ).replace(**card_fields)
    return Dataset.from_arrays(
        observations=seen[states],
        actions=chosen if actions == "discrete" else dose_levels()[chosen],
        rewards=(next_states == SURVIVAL).astype(np.float32),
        terminals=log["terminals"],
        timeouts=log["timeouts"],
        next_observations=seen[next_states],
        costs=costs()[cost][states, chosen],
        card=card,
    )


def outcomes(dataset: Dataset) -> np.ndarray:
    """How each row of an ICU-Sepsis dataset ends: 0 goes on, 1 death, 2 survival; ``[N]`` int64."""
    return dataset.terminals.astype(np.int64) * (1 + (dataset.rewards > 0))


def ids() -> list[str]:
    """Names of the datasets, without their ``saferl/``."""
    return [f"icu-sepsis-{behaviour}-v0" for behaviour in BEHAVIOURS]


def load(name: str, **options: Any) -> Dataset:
    """``load_dataset("saferl/icu-sepsis-clinician-v0", episodes=…, …)``: see `make_dataset`.

    Raises:
        SaferlError: an unknown name, and what `make_dataset` raises.
    """
    if name not in ids():
        raise unknown("ICU-Sepsis dataset", name, ids())
    options.pop("clip_actions", None)  # all actions lie within their bounds
    return make_dataset(name.removeprefix("icu-sepsis-").removesuffix("-v0"), **options)


class ICUSepsisEnv(gymnasium.Env):
    """One patient, one step per four hours.

    Args:
        observation, doses: what is seen, see `observations`.
        actions: ``"discrete"`` (``Discrete(25)``) or ``"levels"`` (``Box``, fluid and vasopressor
            in [-1, 1], rounded to levels; see `to_action`).
        strategy: what an inadmissible action does, ``"mean"`` or ``"terminate"``.
        cost: the one of `COSTS` in ``info["cost"]``; ``info["costs"]`` has all of them.

    The cost of a step is that of the state in which the action is taken. ``info["state"]`` is the
    number of the current state, ``info["admissible"]`` ``[25]`` bool what is admissible in it.

    Raises:
        SaferlError: an unknown option, missing tables, an action outside the table, a step after
            the end.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(
        self,
        observation: str = "features",
        doses: bool = True,
        actions: str = "discrete",
        strategy: str = "mean",
        cost: str = "sofa10",
        render_mode: str | None = None,
    ):
        _check("actions", actions, ("discrete", "levels"))
        _check("cost", cost, tuple(COSTS))
        self._seen = observations(observation, doses)
        self._mdp, self._tables = mdp(strategy), tables()
        self._levels, self._cost = actions == "levels", cost
        self.render_mode = render_mode
        low, high = self._seen.min(0), self._seen.max(0)
        self.observation_space = spaces.Box(low, high, dtype=np.float32)
        self.action_space = (
            spaces.Box(-1.0, 1.0, (2,), np.float32) if self._levels else spaces.Discrete(ACTIONS)
        )
        self._state = SURVIVAL

    def tabular(self) -> TabularTask:
        """The environment as a table, for exact values."""
        levels = (lambda doses: to_action(np.clip(doses, -1, 1))) if self._levels else None
        return TabularTask(self._mdp, self._seen, self._cost, levels)

    def _info(self) -> dict[str, Any]:
        return {"state": self._state, "admissible": self._tables.admissible[self._state].copy()}

    def _draw(self, weights: np.ndarray) -> int:
        sums = np.cumsum(weights)
        drawn = np.searchsorted(sums, self.np_random.random() * sums[-1], side="right")
        return min(int(drawn), len(sums) - 1)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self._state = self._draw(self._tables.initial)
        return self._seen[self._state].copy(), self._info()

    def step(self, action):
        if self._state >= DEATH:
            raise SaferlError("the episode is over: call reset before the next step")
        if self._levels:
            action = int(to_action(action))
        elif not self.action_space.contains(action):
            raise SaferlError(f"actions are whole numbers 0 … {ACTIONS - 1}, got {action!r}")
        pair = self._state, int(action)
        charged = {name: float(table[pair]) for name, table in self._mdp.costs.items()}
        rows, row = self._mdp.transitions, pair[0] * ACTIONS + pair[1]
        part = slice(rows.indptr[row], rows.indptr[row + 1])
        self._state = int(rows.indices[part][self._draw(rows.data[part])])
        info = self._info() | {"cost": charged[self._cost], "costs": charged}
        reward = float(self._state == SURVIVAL)
        return self._seen[self._state].copy(), reward, self._state >= DEATH, False, info
