"""Uses saferl as a stranger's typed project does."""

from __future__ import annotations

import numpy as np

import saferl
from saferl.agents import Agent, AgentConfig
from saferl.agents.td3_bc import TD3BC, TD3BCConfig
from saferl.data import Dataset
from saferl.envs import CostWrapper
from saferl.evaluation import Evaluation
from saferl.replay import Batch, ReplayBuffer
from saferl.runs.config import Member, RunConfig
from saferl.safety import CostLimit, Shield
from saferl.safety.guardians import Guardian, make_guardian


def main() -> None:
    dataset: Dataset = saferl.load_dataset("log.hdf5")
    costs: np.ndarray | None = dataset.episode_costs()
    config = RunConfig(agent="td3_bc", steps=1000, members=2, cost_limits=(40.0,))
    run = saferl.train(config, dataset, progress=False)
    evaluation: Evaluation | None = run.evaluation
    assert evaluation is not None and costs is not None
    print(evaluation.text([40.0]), str(Member(0, {"alpha": 2.5})))
    settings = TD3BCConfig(alpha=1.0)
    agent: Agent[TD3BCConfig] = TD3BC(dataset.spec(settings), settings, members=2)
    print(agent.config.alpha + 1.0)
    buffer = ReplayBuffer.from_dataset(dataset, agent.spec, agent.seeds)
    batch: Batch = buffer.sample(agent.batch_rows)
    print(batch.rewards.shape, AgentConfig().discount, CostLimit(40.0, 1000).to("step"))
    guardian: Guardian = make_guardian("knn")
    shield = Shield(agent.policy(), guardian, cost_limit=40, horizon=1000)
    print(shield.summary(), CostWrapper)
