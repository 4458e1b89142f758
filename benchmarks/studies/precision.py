"""Returns of one agent trained in fp32 and in bf16, on the same data.

    python benchmarks/precision.py                      # td3_bc, a few minutes of one core

Both runs differ in ``precision`` alone: same seeds, batches, noise and first weights. Rounded
products send training another way soon, so what is compared is what comes out: the last policies of
all members play the same episodes. The data are the package's own, not D4RL's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
from scores import EVALUATION_SEED, dataset_of, facts_of
from scores_report import NOT_D4RL, compare

LAYERS = ("hidden", "critic_hidden", "value_hidden", "vae_hidden")


def returns_of(options: argparse.Namespace, data: Any, precision: str) -> tuple[np.ndarray, float]:
    """Returns ``[members, episodes]`` of the last policies, and the seconds of training."""
    import dataclasses

    import saferl
    from saferl.evaluation import rollout
    from saferl.registry import agent_class

    fields = {field.name for field in dataclasses.fields(agent_class(options.agent).Config)}
    settings = {name: options.hidden for name in LAYERS if name in fields}
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        run = saferl.train(
            options.agent,
            data,
            steps=options.steps,
            members=options.members,
            settings=settings | {"batch_size": options.batch_size},
            out=Path(folder) / "run",
            device="cpu",
            precision=precision,
            eval_interval=0,
            progress=False,
        )
        seconds = time.process_time() - start
    played = rollout(run.policy(), data.card.env_id, options.episodes, seed=EVALUATION_SEED)
    print(f"{precision}: {played.returns.mean(1).round()}, {seconds:.0f} s", file=sys.stderr)
    return played.returns, seconds


def report(document: dict[str, Any]) -> str:
    rows = [
        [name, f"{side['mean']:.0f}", ", ".join(f"{r:.0f}" for r in side["member_means"]),
         f"{side['score']:.1f}", f"{side['cpu_seconds']:.0f}"]
        for name, side in document["sides"].items()
    ]  # fmt: skip
    low, high = document["difference_interval"]
    settings, facts = document["settings"], document["data"]
    difference = "holds 0" if low <= 0 <= high else "DOES NOT hold 0"
    return (
        f"## {settings['agent']} in fp32 and bf16 on {settings['dataset']}\n\n"
        + common.table(["precision", "mean return", "members", "score", "CPU s"], rows)
        + f"\n\nbf16 - fp32: {document['difference']:.0f}, 95 % interval {low:.0f} to {high:.0f}, "
        f"which {difference} ({settings['members']} members, {settings['episodes']} episodes each; "
        f"the data's mean return is {facts['mean_return']:.0f}, their best "
        f"{facts['best_return']:.0f}). {settings['steps']} updates of {settings['batch_size']} "
        f"transitions, layers of {settings['hidden'][0]} units. Few members make the interval "
        f"wide: no difference was shown, which is not equality. {NOT_D4RL}\n\n"
        f"`{document['command']}`, {document['date']}, one thread of "
        f"{document['machine']['cpu']}.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agent", default="td3_bc")
    parser.add_argument("--dataset", default="saferl/hopper-velocity-mixed-v0")
    parser.add_argument("--size", type=int, help="transitions (default: all)")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--episodes", type=int, default=20, help="of each member")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    options = parser.parse_args()

    import torch

    torch.set_num_threads(1)
    data = dataset_of(options.dataset, options.size)
    found = {precision: returns_of(options, data, precision) for precision in ("fp32", "bf16")}
    difference, low, high = compare(found["bf16"][0], found["fp32"][0])
    facts = facts_of(data)
    random, expert = facts["reference_returns"]
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    document = {
        **common.header("mujoco", "gymnasium"),
        "settings": settings,
        "data": facts,
        "sides": {
            name: {
                "mean": float(returns.mean()),
                "member_means": returns.mean(1).tolist(),
                "score": 100 * float(returns.mean() - random) / (expert - random),
                "returns": np.round(returns, 3).tolist(),
                "cpu_seconds": seconds,
            }
            for name, (returns, seconds) in found.items()
        },
        "difference": difference,
        "difference_interval": [low, high],
        "note": NOT_D4RL,
    }
    common.write_json(options.out / "precision.json", document)
    text = report(document)
    (options.out / "precision.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
