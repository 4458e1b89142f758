"""The datasets of the studies: bundled ones, and ones rolled out from other people's policies."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workers import ROOT

SHARED_DATA = ROOT / ".." / "shared" / "data"
AGENTS, IMITATION = "rl_trained_agents", "openai_imitation"  # its folders
# Rolled out in equal shares from policies, each with its own action noise: files of DLR-RM's
# rl-trained-agents (MIT), or iterations of the training runs of openai/imitation.
SHARED: dict[str, tuple[str, list[tuple[str, int | None]]]] = {
    "shared/halfcheetah-ppo": ("halfcheetah", [("ppo_HalfCheetah-v3.npz", None)]),
    "shared/hopper-trpo": ("hopper", [("trpo_Hopper-v3.npz", None)]),
    "shared/halfcheetah-medium": ("halfcheetah", [("ppo_HalfCheetah-v3.npz", None)]),
    "shared/hopper-medium": ("hopper", [("ppo_Hopper-v3.npz", None)]),
    "shared/walker2d-medium": ("walker2d", [("log_Walker2d-v1_1.h5", 60)]),
} | {
    f"shared/{robot}-medium-replay": (robot, [(file, i) for i in range(0, 101, 20)])
    for robot, file in (
        ("halfcheetah", "log_HalfCheetah-v1_2.h5"),
        ("hopper", "log_Hopper-v1_4.h5"),
        ("walker2d", "log_Walker2d-v1_1.h5"),
    )
}


class SharedPolicy:
    """A stable-baselines3 actor with a Gaussian of fixed σ, from its exported arrays."""

    members = 1

    def __init__(self, path: Path):
        import torch

        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        self.activation = {"relu": torch.relu, "tanh": torch.tanh}[str(arrays["activation"])]
        self.clip = float(arrays["obs_clip"])
        tensor = {k: torch.from_numpy(v).float() for k, v in arrays.items() if v.dtype.kind == "f"}
        self.mean = tensor["obs_mean"]
        self.std = (tensor["obs_var"] + tensor["obs_eps"]).sqrt()
        names = ("mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2", "action_net")
        self.layers = [(tensor[f"{name}.weight"].T, tensor[f"{name}.bias"]) for name in names]
        self.std_of_action = tensor["log_std"].exp()

    def __call__(self, observations: Any) -> Any:
        x = ((observations - self.mean) / self.std).clamp(-self.clip, self.clip)
        for weight, bias in self.layers[:-1]:
            x = self.activation(x @ weight + bias)
        return x @ self.layers[-1][0] + self.layers[-1][1]

    def sample(self, observations: Any, random: Any) -> Any:
        mean = self(observations)
        return mean + self.std_of_action * random.normal(*mean.shape[1:])


class Snapshot(SharedPolicy):
    """One iteration of a training run of openai/imitation, in the form of its parent."""

    def __init__(self, path: Path, iteration: int):
        import h5py
        import torch

        with h5py.File(path) as file:
            group = file[f"snapshots/iter{iteration:07d}/GaussianPolicy"]

            def read(name: str) -> torch.Tensor:
                return torch.from_numpy(group[name][()]).float()

            layers = (*(f"hidden/FeedforwardNet/layer_{i}" for i in (0, 2)), "out")
            self.layers = [
                (read(f"{layer}/AffineLayer/W"), read(f"{layer}/AffineLayer/b")[0])
                for layer in layers
            ]
            mean = group["obsnorm/Standardizer/mean_1_D"][()]
            variance = group["obsnorm/Standardizer/meansq_1_D"][()] - mean**2
            self.mean = torch.from_numpy(mean).float()
            self.std = torch.from_numpy(np.sqrt(np.maximum(variance, 0)) + 1e-6).float()
            self.std_of_action = read("logstdevs_1_Da").exp()
        self.activation, self.clip = torch.tanh, float("inf")


def rolled_out(name: str, size: int | None) -> Any:
    """A dataset of `SHARED`, from a cache beside the bundled ones."""
    from saferl.data import Card, Dataset, load_dataset, save_dataset
    from saferl.data.sources.fetch import data_dir
    from saferl.envs.bundled import ROBOTS
    from saferl.rollout import collect_transitions

    kind, parts = SHARED[name]
    robot, size = ROBOTS[kind], size or 100_000
    paths = {file: SHARED_DATA / (AGENTS if i is None else IMITATION) / file for file, i in parts}
    digest = hashlib.sha256(repr((parts, size)).encode())
    for path in paths.values():
        digest.update(path.read_bytes())
    cached = data_dir("comparison") / f"{name.split('/')[1]}-{digest.hexdigest()[:16]}.npz"
    if cached.exists():
        return load_dataset(cached)
    runs = []
    for number, (file, iteration) in enumerate(parts):
        path = paths[file]
        policy = SharedPolicy(path) if iteration is None else Snapshot(path, iteration)
        steps = size * (number + 1) // len(parts) - size * number // len(parts)
        runs.append(
            collect_transitions(policy, robot.env_id, steps, 1000 * number, stochastic=True)
        )
    card = Card(
        id=name,
        env_id=robot.env_id,
        action_low=(-1.0,) * robot.action_dim,
        action_high=(1.0,) * robot.action_dim,
        reference_returns=robot.reference_returns,
        reference_source="D4RL",
        licence="MIT",
        origin=f"rolled out by saferl from the policies of {', '.join(paths)}; not D4RL's",
    )
    arrays = {field: np.concatenate([run[field] for run in runs]) for field in Dataset.FIELDS}
    cached.parent.mkdir(parents=True, exist_ok=True)
    save_dataset(Dataset.from_arrays(**arrays, card=card), cached)
    return load_dataset(cached)  # what a rerun reads, to the bit


@functools.lru_cache(maxsize=2)
def dataset_of(name: str, size: int | None = None) -> Any:
    """A dataset by its id, of so many transitions where its loader can choose."""
    import saferl

    if name in SHARED:
        return rolled_out(name, size)
    return saferl.load_dataset(name, **({"size": size} if size else {}))


def facts_of(data: Any) -> dict[str, Any]:
    """What a report needs to know of a dataset."""
    returns, costs = data.episode_returns(), data.episode_costs()
    reference = data.card.reference_returns
    return {
        "fingerprint": data.fingerprint,
        "env": data.card.env_id,
        "origin": data.card.origin,
        "transitions": len(data),
        "episodes": len(returns),
        "mean_return": float(np.mean(returns)),
        "best_return": float(np.max(returns)),
        "mean_cost": None if costs is None else float(np.mean(costs)),
        "reference_returns": None if reference is None else list(reference),
    }
