"""Train the behaviour policies of the bundled datasets: SAC at several cost penalties.

    python -m benchmarks.tools.make_behaviours hopper --steps 300000 --out behaviours/

One run trains one member per penalty (the member axis) on ``saferl/<Robot>Velocity-v0`` and saves
the actors of all members every ``--every`` steps to ``<out>/<robot>-<step>.safetensors`` (stacked
weights, float32). `pack_behaviours.py` measures them and packs the chosen ones. A step of four
members takes about 8 ms on one core.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from saferl.agents.sac import SAC, SACConfig
from saferl.registry import make_env
from saferl.rollout import VectorEnv
from saferl.spec import Spec
from saferl.training.online import OnlineEngine

ROBOTS = {"hopper": "Hopper", "halfcheetah": "HalfCheetah", "walker2d": "Walker2d"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("robot", choices=sorted(ROBOTS))
    parser.add_argument("--steps", type=int, default=300_000, help="environment steps per member")
    parser.add_argument("--every", type=int, default=25_000, help="steps between snapshots")
    parser.add_argument("--penalties", type=float, nargs="+", default=[0.0, 1.0, 2.0, 4.0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("behaviours"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    env_id = f"saferl/{ROBOTS[options.robot]}Velocity-v0"
    env = make_env(env_id)
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    config = SACConfig(
        batch_size=options.batch_size,
        hidden=tuple(options.hidden),
        cost_penalty=tuple(options.penalties),
        actor_lr=1e-3,
        critic_lr=1e-3,
        temperature_lr=1e-3,
        initial_temperature=0.2,
    )
    seeds = [options.seed + i for i in range(len(options.penalties))]
    agent = SAC(spec, config, seeds)
    engine = OnlineEngine(agent, VectorEnv(env_id, len(seeds), None), options.steps, say=print)
    options.out.mkdir(parents=True, exist_ok=True)
    log = options.out / f"{options.robot}.jsonl"
    start = time.time()
    for step in range(5_000, options.steps + 1, 5_000):
        engine.run(5_000)
        row = {k: [round(float(x), 3) for x in v] for k, v in engine.read().items()}
        row |= {"step": step, "seconds": round(time.time() - start)}
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(step, row["seconds"], row.get("train_return"), row.get("train_cost"), flush=True)
        if step % options.every == 0:
            weights = {k: v.contiguous() for k, v in agent.actor.state_dict().items()}
            facts = {"penalties": json.dumps(options.penalties), "seed": str(options.seed)}
            save_file(weights, options.out / f"{options.robot}-{step:07d}.safetensors", facts)


if __name__ == "__main__":
    main()
