"""Measure the snapshots of `make_behaviours.py` and pack those that the bundled datasets use.

    python -m benchmarks.tools.pack_behaviours behaviours/ hopper halfcheetah walker2d

The folder may hold several trainings of a robot, each in a folder of its own.

Every snapshot of every member plays ``--episodes`` episodes with sampled actions. Then, per robot,

- expert: the highest mean return;
- medium: of the members without a cost penalty, the snapshot whose return is nearest to 40 % of
  the expert's;
- mixed: ``--spread`` policies spread over the (cost, return) plane, chosen one after the other as
  the one farthest from those chosen (both axes scaled to [0, 1]), beginning with the expert, with
  equal shares, plus 5 % of random steps.

Weights are stored as float16 in ``envs/behaviours/<robot>.safetensors``, and what was measured,
with the float16 weights, in ``envs/behaviours/behaviours.json``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saferl.envs import bundled
from saferl.evaluation import collect_transitions

COMMAND = "python -m benchmarks.tools.make_behaviours {robot} --penalties {penalties} --seed {seed}"
MEDIUM = 0.4  # of the expert's return
RANDOM_SHARE = 0.05


def candidates(folder: Path, robot: str) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Facts and stacked float16 weights of every member of every snapshot."""
    facts, layers = [], {}
    for file in sorted(folder.rglob(f"{robot}-*.safetensors")):
        tensors = load_file(file)
        with safe_open(file, "pt") as opened:  # without a record: the command's defaults
            made = opened.metadata() or {"penalties": "[0, 1, 2, 4]", "seed": "0"}
        for kind in ("weight", "bias"):
            count = sum(key.startswith("mlp.weights.") for key in tensors)
            for i in range(count):
                # [M, E = 1, in, out] to [M, in, out]
                stacked = tensors[f"mlp.{'weights' if kind == 'weight' else 'biases'}.{i}"][:, 0]
                layers.setdefault(f"{kind}.{i}", []).append(stacked.half())
        step = int(file.stem.split("-")[1])
        penalties, seed = json.loads(made["penalties"]), int(made["seed"])
        words = " ".join(f"{penalty:g}" for penalty in penalties)
        command = COMMAND.format(robot=robot, penalties=words, seed=seed)
        facts += [
            {"command": command, "seed": seed + m, "penalty": float(penalty), "step": step}
            for m, penalty in enumerate(penalties)
        ]
    if not facts:
        raise SystemExit(f"no snapshots of {robot} in {folder}")
    return facts, {key: torch.cat(parts).contiguous() for key, parts in layers.items()}


def measure(robot: str, index: int, episodes: int) -> dict[str, float]:
    """Mean return, cost and length of whole episodes with sampled actions."""
    env_id = bundled.ROBOTS[robot].env_id
    returns, costs, lengths, seed = [], [], [], 0
    while len(returns) < episodes:
        data = collect_transitions(
            bundled.Behaviour(robot, index), env_id, 1, seed=seed, stochastic=True, envs=1
        )
        returns.append(data["rewards"].sum())
        costs.append(data["costs"].sum())
        lengths.append(len(data["rewards"]))
        seed += 1
    return {
        "return": round(float(np.mean(returns)), 1),
        "cost": round(float(np.mean(costs)), 1),
        "length": round(float(np.mean(lengths)), 1),
    }


def spread(facts: list[dict], first: int, count: int) -> list[int]:
    """Indices of ``count`` policies, each the farthest in (cost, return) from those before it."""
    plane = np.array([[fact["cost"], fact["return"]] for fact in facts])
    plane = (plane - plane.min(0)) / (plane.max(0) - plane.min(0))
    chosen = [first]
    while len(chosen) < min(count, len(facts)):
        distance = np.linalg.norm(plane[:, None] - plane[chosen][None], axis=-1).min(1)
        chosen.append(int(distance.argmax()))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("snapshots", type=Path)
    parser.add_argument("robots", nargs="+", choices=sorted(bundled.ROBOTS))
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--spread", type=int, default=12)
    parser.add_argument("--last", type=int, help="ignore snapshots after this step")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = bundled.BEHAVIOURS
    target.mkdir(exist_ok=True)
    manifest_file = target / "behaviours.json"
    manifest = {"licence": "Apache-2.0", "robots": {}}
    if manifest_file.exists():
        manifest = json.loads(manifest_file.read_text())
    for robot in options.robots:
        facts, weights = candidates(options.snapshots, robot)
        commands = dict.fromkeys(fact.pop("command") for fact in facts)
        kept = [i for i, f in enumerate(facts) if not options.last or f["step"] <= options.last]
        facts = [facts[i] for i in kept]
        weights = {key: tensor[kept] for key, tensor in weights.items()}
        with tempfile.TemporaryDirectory() as folder:
            save_file(weights, Path(folder) / f"{robot}.safetensors")
            bundled.BEHAVIOURS = Path(folder)
            for index, fact in enumerate(facts):
                fact |= measure(robot, index, options.episodes)
                print(robot, index, fact, flush=True)
        bundled.BEHAVIOURS = target
        expert = int(np.argmax([fact["return"] for fact in facts]))
        goal = MEDIUM * facts[expert]["return"]
        free = [i for i, fact in enumerate(facts) if fact["penalty"] == 0]
        medium = min(free, key=lambda i: abs(facts[i]["return"] - goal))
        chosen = spread(facts, expert, options.spread)
        stack = chosen + ([medium] if medium not in chosen else [])
        save_file(
            {key: tensor[stack].contiguous() for key, tensor in weights.items()},
            target / f"{robot}.safetensors",
        )
        (target / f"{robot}.safetensors").chmod(0o644)  # save_file makes it private
        share = (1 - RANDOM_SHARE) / len(chosen)
        mixed = [{"policy": stack.index(i), "share": round(share, 6)} for i in chosen]
        manifest["robots"][robot] = {
            "command": "; ".join([*commands, "python -m benchmarks.tools.pack_behaviours …"]),
            "policies": [{"index": k} | facts[i] for k, i in enumerate(stack)],
            "levels": {
                "medium": [{"policy": stack.index(medium), "share": 1.0}],
                "expert": [{"policy": stack.index(expert), "share": 1.0}],
                "mixed": [*mixed, {"policy": None, "share": RANDOM_SHARE}],
            },
        }
        manifest_file.write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
