"""Speed of one update: ours, d3rlpy's and the arithmetic's floor, in one run.

    python benchmarks/throughput.py

Two processes with one thread each, ours and d3rlpy's, run blocks of updates in turn (A B A B …) on
the same synthetic data with equal networks, so that whatever else the machine does meets both. An
update is what a user waits for: drawing a batch from the replay buffer, then one gradient step.

The floor is the time that the multiply-adds of an update's matrix products would take at the rate
of a 1024³ float32 product, measured in our process in every round. Counted per network and pass of
B rows through layers (in_l, out_l), with E networks side by side:

    forward                        E · B · Σ_l in_l · out_l
    gradient of weights            the same
    gradient of hidden units       the same without the first layer
    gradient of an input action    E · B · A · out_1

Element-wise work (activations, Adam, Polyak averages, random numbers) is not in it.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import common

MATMUL = 1024
BLOCK_SECONDS = 0.3
DATA = {"rows": 100_000, "observation_dim": 17, "action_dim": 6}  # HalfCheetah's shapes
NETWORKS = {
    "bc": (256, 256),
    "td3_bc": (256, 256),
    "iql": (256, 256),
    "cql": (256, 256, 256),
}
TARGETS = {"td3_bc": 1.5, "iql": 1.5, "cql": 1.2}  # peer's time / ours, at least
SAMPLING_TARGET = 0.03  # of an update, at most
FLOOR_TARGETS = {"cql": 2.5}  # update / floor, at most


# The floor -----------------------------------------------------------------------------------


def forward(sizes: Sequence[int], rows: int, networks: int = 1) -> int:
    """Multiply-adds of a forward pass of ``networks`` perceptrons of widths ``sizes``."""
    return networks * rows * sum(i * o for i, o in pairwise(sizes))


def backward_inputs(
    sizes: Sequence[int], rows: int, networks: int = 1, wanted_inputs: int = 0
) -> int:
    """Gradients of hidden units, and of ``wanted_inputs`` components of the input."""
    return forward(sizes[1:], rows, networks) + networks * rows * wanted_inputs * sizes[1]


def step(sizes: Sequence[int], rows: int, networks: int = 1) -> int:
    """Forward pass and gradients of all weights."""
    return 2 * forward(sizes, rows, networks) + backward_inputs(sizes, rows, networks)


def multiply_adds(
    agent: str, observation_dim: int, action_dim: int, hidden: Sequence[int], batch: int = 256
) -> float:
    """Multiply-adds of one update, a mean where updates alternate; two critics, N = 10 in CQL."""
    o, a = observation_dim, action_dim
    actor, critic, value = (o, *hidden, a), (o + a, *hidden, 1), (o, *hidden, 1)
    if agent == "bc":
        return step(actor, batch)
    # The actor's loss through critics whose own weights stay: forward, then back to the action.
    through = [
        forward(critic, batch, e) + backward_inputs(critic, batch, e, wanted_inputs=a)
        for e in (1, 2)
    ]
    target = forward(critic, batch, 2)
    if agent == "td3_bc":
        every = forward(actor, batch) + target + step(critic, batch, 2)
        return every + (step(actor, batch) + through[0]) / 2
    if agent == "iql":
        values = forward(value, batch) + step(value, batch)
        return values + target + step(critic, batch, 2) + step(actor, batch)
    if agent == "cql":
        actor = (o, *hidden, 2 * a)  # mean and log σ
        policies = step(actor, batch) + forward(actor, batch)  # π at s, and at s'
        rows = batch * (3 * 10 + 1)  # the penalty's actions and the logged one, all at s
        # The first layer's product with s is needed once per state, that with a for every action.
        first = 2 * hidden[0] * (batch * o + rows * a)
        rest = (*hidden, 1)
        penalty = 2 * first + 2 * forward(rest, rows, 2) + forward(rest, rows, 2)
        return policies + through[1] + target + penalty
    raise ValueError(f"no count for {agent}")


# Our process ---------------------------------------------------------------------------------


class Ours:
    """Sample and update, as in `saferl.training.engine.Engine`."""

    def prepare(self, agent: str, settings: dict[str, Any], data: dict[str, int]) -> None:
        from saferl.data import Dataset
        from saferl.data.buffer import ReplayBuffer
        from saferl.registry import agent_class
        from saferl.spec import Spec
        from saferl.training.engine import Engine

        bounds = (1.0,) * data["action_dim"]
        arrays = common.synthetic(**data)
        arrays["rewards"] = arrays["rewards"][:, 0]
        dataset = Dataset.from_arrays(
            **arrays, id="synthetic", action_low=tuple(-b for b in bounds), action_high=bounds
        )
        cls = agent_class(agent)
        config = cls.make_config(settings)
        spec = Spec.from_dataset(dataset, config)
        self.agent = cls(spec, config, [0])
        self.buffer = ReplayBuffer.from_dataset(dataset, spec, [0])
        Engine(self.agent, self.buffer)  # whatever it sets up for its process holds here too

    def block(self, updates: int, clock: str) -> tuple[float, float]:
        """Seconds spent on sampling and on updating in ``updates`` updates."""
        now = common.CLOCKS[clock]
        agent, buffer, rows = self.agent, self.buffer, self.agent.config.batch_size
        sampling = updating = 0.0
        for _ in range(updates):
            start = now()
            batch = buffer.sample(rows)
            middle = now()
            agent.update(batch)
            sampling += middle - start
            updating += now() - middle
        return sampling, updating

    def matmul(self, clock: str) -> float:
        """Seconds of a 1024³ float32 product, the median of five."""
        import torch

        now = common.CLOCKS[clock]
        a, b = torch.randn(2, MATMUL, MATMUL).unbind(0)
        out = torch.empty(MATMUL, MATMUL)
        times = []
        for _ in range(5):
            start = now()
            torch.mm(a, b, out=out)
            times.append(now() - start)
        return statistics.median(times)


def serve() -> None:
    import torch

    torch.set_num_threads(1)
    ours = Ours()
    common.serve(
        {
            "prepare": ours.prepare,
            "block": ours.block,
            "matmul": ours.matmul,
            "versions": lambda: common.versions(["saferl", "torch", "numpy"]),
        }
    )


# Measurement ---------------------------------------------------------------------------------


def measure(
    agent: str, ours: common.Worker, peer: common.Worker, rounds: int, clock: str
) -> dict[str, Any]:
    """One row of the table: medians over rounds; all times in milliseconds per update."""
    hidden = NETWORKS[agent]
    settings = common.settings_of(agent, hidden) | {
        "normalize_observations": False,  # noise is standard already, and the peer's takes time
        "normalize_rewards": False,
    }
    for worker in (ours, peer):
        worker("prepare", agent=agent, settings=settings, data=DATA)
        worker("block", updates=4, clock=clock)
    seconds = sum(ours("block", updates=10, clock=clock)) / 10
    updates = 2 * max(1, round(BLOCK_SECONDS / seconds / 2))  # even: TD3+BC's updates alternate
    count = multiply_adds(agent, DATA["observation_dim"], DATA["action_dim"], hidden)
    rows = []
    for _ in range(rounds):
        matmul = ours("matmul", clock=clock)
        (our_sampling, our_update), (its_sampling, its_update) = (
            [1e3 * s / updates for s in worker("block", updates=updates, clock=clock)]
            for worker in (ours, peer)
        )
        floor = 1e3 * matmul * count / MATMUL**3
        rows.append(
            {
                "ours_sampling_ms": our_sampling,
                "ours_update_ms": our_update,
                "peer_sampling_ms": its_sampling,
                "peer_update_ms": its_update,
                "gflops": 2e-9 * MATMUL**3 / matmul,
                "floor_ms": floor,
                "ours_ms": our_sampling + our_update,
                "peer_ms": its_sampling + its_update,
                "ratio": (its_sampling + its_update) / (our_sampling + our_update),
                "update_ratio": its_update / our_update,
                "sampling_share": our_sampling / our_update,
                "over_floor": our_update / floor,
                "peer_over_floor": its_update / floor,
            }
        )
    columns = {name: sorted(row[name] for row in rows) for name in rows[0]}
    result = {"agent": agent, "hidden": list(hidden), "batch_size": settings["batch_size"]}
    result |= {"updates_per_block": updates, "rounds": rounds, "multiply_adds": count}
    result |= {name: statistics.median(values) for name, values in columns.items()}
    # The spread: the middle 80 % of the rounds' own ratios.
    cut = rounds // 10
    for name in ("ratio", "over_floor"):
        values = columns[name]
        result[f"{name}_spread"] = [values[cut], values[-1 - cut]]
    return result


def verdicts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """One line per target."""
    lines = []

    def say(what: str, value: float, target: float, least: bool) -> None:
        met = value >= target if least else value <= target
        sign = "≥" if least else "≤"
        lines.append(f"{'met' if met else 'MISSED'}: {what} {value:.3g} (target {sign} {target:g})")

    for row in rows:
        agent = row["agent"]
        if agent in TARGETS:
            say(f"{agent}: d3rlpy's sample + update / ours", row["ratio"], TARGETS[agent], True)
            say(f"{agent}: sampling / update", row["sampling_share"], SAMPLING_TARGET, False)
        if agent in FLOOR_TARGETS:
            say(f"{agent}: update / floor", row["over_floor"], FLOOR_TARGETS[agent], False)
    return lines


def report(rows: Sequence[dict[str, Any]]) -> str:
    heads = ["agent", "hidden", "ours ms", "d3rlpy ms", "ratio", "80 % of rounds", "update only",
             "sampling", "floor ms", "update / floor", "d3rlpy / floor"]  # fmt: skip
    body = [
        [
            row["agent"],
            "×".join(map(str, row["hidden"])),
            f"{row['ours_ms']:.2f}",
            f"{row['peer_ms']:.2f}",
            f"{row['ratio']:.2f}",
            "{:.2f} – {:.2f}".format(*row["ratio_spread"]),
            f"{row['update_ratio']:.2f}",
            f"{100 * row['sampling_share']:.1f} %",
            f"{row['floor_ms']:.2f}",
            f"{row['over_floor']:.2f}",
            f"{row['peer_over_floor']:.2f}",
        ]
        for row in rows
    ]
    return common.table(heads, body)


def plot(rows: Sequence[dict[str, Any]], path: Path, note: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    names = [row["agent"] for row in rows]
    places = range(len(rows))
    series = [("d3rlpy 2.8.1", "peer_ms", "#9aa5b1"), ("saferl", "ours_ms", "#1f6fb2"),
              ("floor of the arithmetic", "floor_ms", "#e0a030")]  # fmt: skip
    for offset, (label, key, colour) in zip((-0.27, 0.0, 0.27), series):
        values = [row[key] for row in rows]
        bars = left.bar([p + offset for p in places], values, 0.26, label=label, color=colour)
        left.bar_label(bars, [f"{v:.3g}" for v in values], fontsize=7, padding=1)
    left.set(yscale="log", ylabel="ms per sample + update", xticks=list(places), xticklabels=names)
    left.set_ylim(top=left.get_ylim()[1] * 3)
    left.legend(fontsize=8, frameon=False, loc="upper left")

    ratios = [row["ratio"] for row in rows]
    spans = [[r - row["ratio_spread"][0] for r, row in zip(ratios, rows)],
             [row["ratio_spread"][1] - r for r, row in zip(ratios, rows)]]  # fmt: skip
    right.errorbar(places, ratios, spans, fmt="o", capsize=4, color="#1f6fb2",
                   label="median, 80 % of rounds")  # fmt: skip
    aims = [(p, TARGETS[name]) for p, name in zip(places, names) if name in TARGETS]
    right.plot(*zip(*aims), "_", markersize=26, color="#c0392b", label="target") if aims else None
    right.axhline(1, color="grey", linewidth=0.8)
    right.set(ylabel="d3rlpy's time / ours", xticks=list(places), xticklabels=names, ylim=(0, None))
    right.set_xlim(-0.5, len(rows) - 0.5)
    right.legend(fontsize=8, frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"One thread, batch 256, HalfCheetah's shapes; {note}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--agents", nargs="+", choices=sorted(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--rounds", type=int, default=31, help="blocks of each side")
    parser.add_argument(
        "--clock",
        choices=sorted(common.CLOCKS),
        default="wall",
        help="cpu: time on the processor, for a machine that is busy with other work",
    )
    parser.add_argument(
        "--peer-python", help="an interpreter with d3rlpy; else .venv-peers is made"
    )
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the results")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve()

    import sys

    here = Path(__file__).parent
    rows = []
    with (
        common.Worker(sys.executable, here / "throughput.py", "--serve") as ours,
        common.Worker(common.peer_python(options.peer_python), here / "peer_d3rlpy.py") as peer,
    ):
        versions = {"ours": ours("versions"), "peer": peer("versions")}
        for agent in options.agents:
            print(f"{agent} …", file=sys.stderr, flush=True)
            rows.append(measure(agent, ours, peer, options.rounds, options.clock))
    machine = common.machine()
    document = {
        "command": common.command(),
        "date": common.now(),
        "machine": machine,
        "versions": versions,
        "clock": options.clock,
        "data": DATA,
        "rows": rows,
        "verdicts": verdicts(rows),
    }
    common.write_json(options.out / "throughput.json", document)
    plot(rows, options.out / "throughput.png", f"{machine['cpu']}, {document['date']}")
    gflops = statistics.median(row["gflops"] for row in rows)
    rate = f"1024³ float32 product: {gflops:.1f} GFLOP/s on one thread of {machine['cpu']}"
    lines = "\n".join(f"- {line}" for line in document["verdicts"])
    source = f"`{document['command']}`, {document['date']}, {options.clock} clock. {rate}."
    text = f"{report(rows)}\n\n{source}\n\n{lines}\n"
    (options.out / "throughput.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
