"""Exact values of policies, and of the best ones, where an environment is a table."""

from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch

import saferl
from saferl.evaluation.exact import TabularTask, exact_frontier, exact_values, tabular_task
from saferl.evaluation.report import write_report
from saferl.evaluation.results import RunResults
from saferl.models.mdp import TabularMDP


class Ladder(gymnasium.Env):
    """From the foot, action 1 climbs: reward 2 and cost 1 a step, two steps. Action 0 leaves: 1, 0.

    The state after the first climb offers the same; the best return is 4 at a cost of 2.
    """

    observation_space = gymnasium.spaces.Box(0, 2, (1,), np.float32)
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        reward, cost = (2.0, 1.0) if action else (1.0, 0.0)
        self.state = self.state + 1 if action else 2
        return np.full(1, self.state, np.float32), reward, self.state == 2, False, {"cost": cost}

    def tabular(self):
        transitions = np.zeros((3, 2, 3))
        transitions[:, 0, 2] = 1
        transitions[0, 1, 1] = transitions[1, 1, 2] = transitions[2, 1, 2] = 1
        climbs = np.tile([0.0, 1.0], (3, 1))
        mdp = TabularMDP(
            transitions, 1 + climbs, np.array([1.0, 0, 0]), np.array([False, False, True]),
            {"height": climbs}, np.array([[True, True], [True, False], [True, True]]),
        )  # fmt: skip
        return TabularTask(mdp, np.arange(3, dtype=np.float32)[:, None], "height")


if "LadderTest-v0" not in gymnasium.registry:
    gymnasium.register("LadderTest-v0", entry_point=Ladder, max_episode_steps=5)
LADDER = "tests.evaluation.test_exact:LadderTest-v0"


class Climbs:
    """Member m climbs from states below m."""

    members = 3

    def __call__(self, observations):
        return (observations[..., 0] < torch.arange(3)[:, None]).long()


def test_exact_values_are_those_of_long_play():
    task = tabular_task(LADDER)
    exact = exact_values(task, Climbs())
    assert exact == {"return": [1, 3, 4], "cost": [0, 1, 2], "ood_rate": [0, 0, 0.5]}
    result = saferl.evaluate(Climbs(), LADDER, 3)
    assert result.matrix().mean(1).tolist() == exact["return"]
    assert result.matrix("costs").mean(1).tolist() == exact["cost"]


def test_the_frontier_is_the_best_mixture_at_each_budget():
    frontier = np.array(exact_frontier(tabular_task(LADDER), points=5))
    # Mixtures of leaving (0, 1) with one climb (1, 3), then of that with two (2, 4).
    np.testing.assert_allclose(frontier[:, 0], [0, 0.5, 1, 1.5, 2], atol=1e-4)
    np.testing.assert_allclose(frontier[:, 1], [1, 2, 3, 3.5, 4], atol=1e-3)


def test_an_environment_that_is_no_table_has_none():
    assert tabular_task("CartPole-v1") is None


def test_doses_have_the_exact_values_of_their_levels():
    pytest.importorskip("icu_sepsis", reason="needs icu-sepsis", exc_type=ImportError)
    from saferl.envs import icu_sepsis as icu

    numbers = np.random.default_rng(0).integers(25, size=icu.STATES)
    whole, doses = (tabular_task(lambda o=o: icu.ICUSepsisEnv(actions=o, observation="index"))
                    for o in ("discrete", "levels"))  # fmt: skip

    def choose(observations):
        return numbers[np.asarray(observations[..., 0], int)]

    def dose(observations):
        return 1.2 * icu.dose_levels()[choose(observations)]  # beyond the bounds, which clip it

    assert exact_values(whole, choose) == exact_values(doses, dose)
    assert whole.cost == "sofa10" and whole.observations.shape == (icu.STATES, 1)


def test_a_model_of_every_pair_predicts_the_truth():
    """Every pair of the ladder is logged, so the agent's own table is the environment's."""
    env, rows = Ladder(), []
    for first, second in [(0, None), (1, 0), (1, 1)] * 10:
        env.reset()
        for state, action in enumerate((first, second)):
            if action is not None:
                following, reward, ended, _, info = env.step(action)
                rows.append(([state], action, reward, ended, False, following, info["cost"]))
    columns = [np.array(column) for column in zip(*rows)]
    dataset = saferl.Dataset.from_arrays(*columns, id="ladder", env_id=LADDER, n_actions=2)
    settings = {"model": "tabular", "hidden": [4], "episodes": 4, "horizon": 3, "cost_limit": 1.0,
                "margin_models": 0, "guardian": "count", "clone_updates": 0}  # fmt: skip
    agent = saferl.make_agent("discrete_ogsrl", dataset, members=6, **settings)
    agent.fit(dataset, lambda line: None)
    returns, costs = agent.predict(3)
    exact = exact_values(tabular_task(LADDER), agent.policy())
    assert len(set(exact["return"])) > 1
    assert returns.tolist() == [[value] * 3 for value in exact["return"]]
    assert costs.tolist() == [[value] * 3 for value in exact["cost"]]
    anywhere = saferl.make_agent("discrete_ogsrl", dataset, starts="any", **settings)
    assert anywhere.predict(3) is None
    assert saferl.make_agent("discrete_bc", dataset).predict(3) is None


def test_a_run_in_a_table_is_reported_with_its_frontier(tmp_path):
    arrays = {"observations": np.zeros((12, 1)), "actions": np.arange(12) % 2,
              "rewards": 1.0 + np.arange(12) % 2, "terminals": np.ones(12, bool),
              "timeouts": np.zeros(12, bool), "costs": np.arange(12) % 2.0}  # fmt: skip
    dataset = saferl.Dataset.from_arrays(**arrays, id="ladder", env_id=LADDER, n_actions=2)
    run = saferl.train("discrete_bc", dataset, steps=3, members=2, settings={"hidden": [4]},
                       out=tmp_path / "run", eval_episodes=2, progress=False)  # fmt: skip
    found = saferl.evaluate_run(
        run.path, dataset=dataset, episodes=2, cost_limits=[1.0], guard=True, alpha=0.4,
        progress=False, say=lambda line: None,
    )  # fmt: skip
    known = found.known
    for rows, values in (
        (found.evaluation.at(), known.values),
        (found.guarded[0], known.guards[0].values),
    ):
        assert values["exact_return"] == rows.matrix().mean(1).tolist()
        assert values["exact_cost"] == rows.matrix("costs").mean(1).tolist()
    assert found.frontier[0][0] == pytest.approx(0, abs=1e-4) and found.frontier[-1] == [2, 4]
    assert "exact" in found.text()
    page = write_report(run.path).read_text()
    assert "exact return" in page and "Black: the best return of any policy" in page
    assert RunResults.read(run.path).frontier == found.frontier
