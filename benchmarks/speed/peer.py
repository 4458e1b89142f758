"""The peer's side of the benchmarks: d3rlpy 2.8.1, run by `Worker` in an environment of its own.

The study `speed` asks for `prepare` and `block`, `scores` for `train`. saferl is not imported.
"""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from typing import Any

import numpy as np
import structlog
import torch

from benchmarks import workers

warnings.filterwarnings("ignore")  # the peer's own deprecations are not ours to report
structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
torch.set_num_threads(1)

with contextlib.redirect_stderr(io.StringIO()):  # it imports gym, which prints a plea to upgrade
    import d3rlpy
    from d3rlpy.algos import BCConfig, CQLConfig, IQLConfig, TD3PlusBCConfig
    from d3rlpy.dataset import MDPDataset, TransitionMiniBatch
    from d3rlpy.models.encoders import VectorEncoderFactory
    from d3rlpy.preprocessing import StandardObservationScaler


def make(
    agent: str,
    settings: dict[str, Any],
    scaler: Any = None,
    device: str = "cpu:0",
    compiled: bool = False,
) -> Any:
    """The peer's agent with our hyper-parameters; every name on the right is ours.

    ``compiled`` is its compile option, which acts on a GPU alone.
    """
    encoder = VectorEncoderFactory(hidden_units=list(settings["hidden"]))
    shared = {
        "batch_size": settings["batch_size"],
        "observation_scaler": scaler,
        "compile_graph": compiled,
    }
    if agent == "bc":
        config = BCConfig(
            learning_rate=settings["lr"],
            policy_type="deterministic",
            encoder_factory=encoder,
            **shared,
        )
        return config.create(device=device)
    shared |= {
        "gamma": settings["discount"],
        "tau": settings["tau"],
        "n_critics": 2,
        "actor_learning_rate": settings["actor_lr"],
        "critic_learning_rate": settings["critic_lr"],
        "actor_encoder_factory": encoder,
        "critic_encoder_factory": encoder,
    }
    if agent == "td3_bc":
        config = TD3PlusBCConfig(
            alpha=settings["alpha"],
            target_smoothing_sigma=settings["policy_noise"],
            target_smoothing_clip=settings["noise_clip"],
            update_actor_interval=settings["policy_interval"],
            **shared,
        )
    elif agent == "iql":
        config = IQLConfig(
            expectile=settings["expectile"],
            weight_temp=settings["beta"],
            max_weight=settings["advantage_clip"],
            value_encoder_factory=encoder,
            **shared,
        )
    elif agent == "cql":
        config = CQLConfig(
            temp_learning_rate=settings["temperature_lr"],
            alpha_learning_rate=0.0,  # no Lagrange multiplier
            initial_alpha=1.0,
            conservative_weight=settings["weight"],
            n_action_samples=settings["samples"],
            **shared,
        )
    else:
        raise ValueError(f"no {agent}")
    return config.create(device=device)


class Speed:
    """Sample and update, as in the body of d3rlpy's own `fitter`, without its logging.

    ``key`` tells agents apart that take turns; one key holds one agent.
    """

    def __init__(self) -> None:
        self.subjects: dict[str, tuple[Any, MDPDataset, int]] = {}

    def prepare(
        self,
        agent: str,
        settings: dict[str, Any],
        data: dict[str, int],
        key: str = "",
        device: str = "cpu:0",
        compiled: bool = False,
    ) -> None:
        arrays = workers.synthetic(**data)
        buffer = MDPDataset(
            arrays["observations"],
            arrays["actions"],
            arrays["rewards"],
            arrays["terminals"].astype(np.float32),
            arrays["timeouts"].astype(np.float32),
        )
        learner = make(agent, settings, None, device, compiled)
        learner.create_impl((data["observation_dim"],), data["action_dim"])
        self.subjects[key] = learner, buffer, settings["batch_size"]

    def drop(self) -> None:
        self.subjects.clear()

    def block(self, updates: int, clock: str, key: str = "") -> tuple[float, float]:
        """Seconds spent on sampling and on updating in ``updates`` updates."""
        now = workers.CLOCKS[clock]
        learner, buffer, rows = self.subjects[key]
        sampling = updating = 0.0
        for _ in range(updates):
            start = now()
            batch = buffer.sample_transition_batch(rows)
            middle = now()
            learner.update(batch)
            sampling += middle - start
            updating += now() - middle
        start = now()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return sampling, updating + now() - start


def train(
    agent: str,
    data: str,
    policy: str,
    steps: int,
    seed: int,
    reward_scale: float,
    settings: dict[str, Any],
) -> dict[str, float]:
    """Train on the arrays of the file ``data`` and write the policy as TorchScript to ``policy``.

    Updates are d3rlpy's; batches are drawn here, uniformly with replacement as d3rlpy draws them.
    Its own buffer would leave out the last step of every episode that times out (it has no
    next_observations), and takes most of the time with networks this small.
    """
    with np.load(data) as file:
        arrays = {name: file[name] for name in file.files}
    d3rlpy.seed(seed)
    random = np.random.default_rng(seed)
    observations, actions = arrays["observations"], arrays["actions"]
    rewards = (arrays["rewards"] * np.float32(reward_scale))[:, None].astype(np.float32)
    terminals = arrays["terminals"][:, None].astype(np.float32)
    ones = np.ones((settings["batch_size"], 1), np.float32)
    scaler = None
    if settings["normalize_observations"]:  # (s - mean) / (std + 1e-3), as ours
        mean, std = observations.mean(0, np.float64), observations.std(0, np.float64)
        scaler = StandardObservationScaler(mean=mean, std=std)
    learner = make(agent, settings, scaler)
    learner.create_impl(observations.shape[1:], actions.shape[1])
    start = time.perf_counter()
    for _ in range(steps):
        rows = random.integers(len(observations), size=settings["batch_size"])
        batch = TransitionMiniBatch(
            observations=observations[rows],
            actions=actions[rows],
            rewards=rewards[rows],
            next_observations=arrays["next_observations"][rows],
            next_actions=actions[rows],  # no agent here reads it
            terminals=terminals[rows],
            intervals=ones,
            transitions=[],
        )
        learner.update(batch)
    seconds = time.perf_counter() - start
    learner.save_policy(policy)
    return {"seconds": seconds}


if __name__ == "__main__":
    speed = Speed()
    workers.serve(
        {
            "prepare": speed.prepare,
            "block": speed.block,
            "drop": speed.drop,
            "train": train,
            "precision": torch.get_float32_matmul_precision,
            "versions": lambda: workers.versions(["d3rlpy", "torch", "numpy", "gymnasium"]),
        }
    )
