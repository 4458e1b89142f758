"""The command line: ``saferl train|evaluate|inspect|list|report|collect|split|merge``.

Heavy imports happen inside the commands, so that ``saferl --help`` answers at once. A `SaferlError`
becomes one line and exit status 2; Ctrl-C exits with 130 after a checkpoint was written.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

from saferl import __version__
from saferl.errors import SaferlError

DEFAULT_AGENT = "td3_bc"  # for --dataset: it needs no costs
DEFAULT_STEPS = 20_000
# The embedded default, for neither --dataset nor --env: minutes on two cores.
EMBEDDED_DATASET = "saferl/hopper-velocity-mixed-v0"
EMBEDDED_COST_LIMIT = 40.0  # an episode of the data costs three times as much on average
EMBEDDED_SETTINGS = {"hidden": [64, 64]}  # of any agent
EMBEDDED_AGENT = "bc_safe"
EMBEDDED_AGENT_SETTINGS = {
    "best_fraction": 0.1, "batch_size": 256, "normalize_observations": True
}  # fmt: skip

# Of `train`'s options, those that mean something beside --resume, and what is no option.
RESUMABLE = {"steps", "device", "engine", "memory_map", "quiet"} | {"resume", "command", "run"}
SPELLED = {"agent": "AGENT", "start_from": "--from"}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        options = _parser().parse_args(arguments)
        if options.command is None:
            _parser().print_help()
        else:
            options.run(options)
    except SaferlError as error:
        print(f"saferl: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    return 0


class _Help(argparse.HelpFormatter):
    """Says the default of an option, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        plain = action.default in (None, False, [], argparse.SUPPRESS)
        return (action.help or "") + ("" if plain else " (default: %(default)s)")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line: the usage of a command with many options would bury it."""
        raise SaferlError(f"{message}: see {self.prog} --help")

    def parse_known_args(self, args=None, namespace=None):
        """Nothing is left over: the command that was given names what it does not know."""
        known, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return known, rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="saferl", description="Offline reinforcement learning with safety constraints."
    )
    parser.add_argument("--version", action="version", version=f"saferl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(name: str, function, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text,
            formatter_class=_Help,
        )
        sub.set_defaults(run=function)
        return sub

    p = command("train", _train, "Train an agent; alone, it runs the embedded default.")
    # None stands for the default, so that --resume can tell what was given.
    p.add_argument("agent", nargs="?", help="see `saferl list agents` (default: "
                   f"{EMBEDDED_AGENT} on the bundled default, else {DEFAULT_AGENT})")  # fmt: skip
    p.add_argument(
        "--dataset", help="id or file; the bundled default if neither it nor --env is set"
    )
    p.add_argument("--env", help="environment to evaluate in, and to act in for agents that do")
    p.add_argument("--steps", type=int, help="updates per member; environment "
                   f"steps for agents that act (default: {DEFAULT_STEPS})")  # fmt: skip
    p.add_argument("--members", type=int, help="seeds trained side by side (default: 3)")
    p.add_argument("--seed", type=int, help="of the first member (default: 0)")
    p.add_argument("--cost-limit", type=float, nargs="+", default=[], help="cost per episode")
    p.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                   help="hyper-parameter; VALUE,VALUE trains members for each")  # fmt: skip
    _dataset_options(p)
    p.add_argument("--out", type=Path, help="run folder (default: runs/AGENT-DATASET)")
    p.add_argument("--from", type=Path, metavar="RUN", dest="start_from",
                   help="begin with the networks of a run, e.g. an offline one")  # fmt: skip
    p.add_argument("--resume", type=Path, metavar="RUN", help="continue a run folder")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    p.add_argument("--engine", help="auto (the default), eager, compile or cuda_graph")
    p.add_argument("--precision", help="fp32, or bf16 where the device has it (default: fp32)")
    p.add_argument("--threads", type=int, help="CPU threads of torch (default: 1)")
    p.add_argument("--eval-interval", type=int, help="steps; 0: at the end only (default: 5 times)")
    p.add_argument("--eval-episodes", type=int, help="per member and evaluation (default: 10)")
    p.add_argument("--log-interval", type=int, help="steps (default: 100 times)")
    p.add_argument("--checkpoint-interval", type=int, help="steps (default: eval interval)")
    p.add_argument("--keep-checkpoints", type=int, metavar="N", help="the last N (default: 2)")
    p.add_argument("--memory-map", type=Path, metavar="FILE", help="buffer in a file, not memory")
    p.add_argument("--quiet", action="store_true", help="no progress, no table")

    p = command("evaluate", _evaluate, "Play episodes with a run's policies and judge cost limits.")
    p.add_argument("path", type=Path, metavar="RUN")
    p.add_argument("--env", help="default: the run's")
    p.add_argument("--episodes", type=int, default=20, help="per member")
    p.add_argument("--cost-limits", type=float, nargs="+", help="default: the run's")
    p.add_argument("--seed", type=int, default=20_000, help="of the first episode")
    p.add_argument("--step", type=int, help="checkpoint (default: the last)")
    p.add_argument("--guardian", default="auto", metavar="NAME",
                   help="counts unsupported steps: auto is the agent's own, else knn on the run's "
                        "dataset; kde, count …; none")  # fmt: skip
    p.add_argument("--alpha", type=float, default=0.1,
                   help="share of supported steps that it may flag")  # fmt: skip
    p.add_argument("--guard", action="store_true",
                   help="also play under a guard that replaces unsupported actions")  # fmt: skip
    p.add_argument("--fallback", type=Path, metavar="RUN",
                   help="takes over under --guard, which then keeps the limits")  # fmt: skip
    _machine(p)

    p = command("inspect", _inspect, "Print a dataset's card, distributions, coverage, problems.")
    p.add_argument("dataset", help="id or file")
    _dataset_options(p)
    p.add_argument("--plot", type=Path, default=Path("inspect.png"), help="where the plot goes")

    p = command("list", _list, "List agents, datasets or environments.")
    p.add_argument("what", nargs="?", choices=["agents", "datasets", "environments"])

    p = command("report", _report, "Write one HTML report of one or more runs.")
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    p.add_argument("--output", type=Path, help="default: report.html in the first run")

    p = command("split", _split, "Write each member of a run as a run folder of its own.")
    p.add_argument("path", type=Path, metavar="RUN")
    p.add_argument("--out", type=Path, required=True, metavar="DIR",
                   help="receives member-0, …; is the run folder itself with --member")  # fmt: skip
    p.add_argument("--member", type=int, help="this one alone, counted from 0")

    p = command("merge", _merge, "Write the members of several runs as one run folder.")
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    p.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run folder to write")

    p = command("collect", _collect, "Roll out a run's policy, or random actions, into a dataset.")
    p.add_argument("source", metavar="RUN|random")
    p.add_argument("output", type=Path, help="file to write (.npz or .hdf5)")
    p.add_argument("--env", help="default: the run's")
    p.add_argument("--steps", type=int, default=100_000, help="transitions, whole episodes")
    p.add_argument("--member", type=int, help="which member of the run acts (default: 0)")
    p.add_argument("--gathered", action="store_true", help="write what the run's members gathered "
                   "while they learned instead (of all, or of --member)")  # fmt: skip
    p.add_argument("--deterministic", action="store_true", help="the policy's mode, no sampling")
    p.add_argument("--seed", type=int, default=0, help="of the first episode")
    _machine(p)
    return parser


def _dataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset-option", action="append", default=[], metavar="KEY=VALUE",
                        help="option of the dataset's loader, e.g. size=20000")  # fmt: skip
    parser.add_argument("--column", action="append", default=[], metavar="ROLE=NAME[,NAME]",
                        help="column of a table, e.g. observations=age,pressure")  # fmt: skip


def _loader_options(options) -> dict:
    """Keyword arguments of `load_dataset` from --dataset-option and --column."""
    from saferl.runs.settings import parse_settings

    values = parse_settings(options.dataset_option)
    columns = {}
    for text in options.column:
        role, equals, names = text.partition("=")
        if not equals or not role or not names:
            raise SaferlError(f"--column {text!r} is not ROLE=NAME[,NAME]")
        listed = names.split(",")
        columns[role] = listed if len(listed) > 1 else listed[0]
    return values | ({"columns": columns} if columns else {})


def _machine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")


def _set_threads(count: int) -> None:
    import torch

    if count < 1:
        raise SaferlError("--threads must be 1 or more")
    torch.set_num_threads(count)


def _train(options) -> None:
    from saferl.evaluation.results import RunResults
    from saferl.runs.settings import parse_settings
    from saferl.training import resume, train

    settings = parse_settings(options.set)
    data = _loader_options(options)
    common = {
        "device": options.device,
        "memory_map": options.memory_map,
        "progress": not options.quiet,
    }
    chosen = {
        name: value
        for name in (
            "members", "seed", "engine", "precision", "threads", "out", "start_from",
            "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval",
            "keep_checkpoints",
        )
        if (value := getattr(options, name)) is not None
    }  # fmt: skip
    if options.resume is not None:
        refused = [
            SPELLED.get(name) or "--" + name.replace("_", "-")
            for name, value in vars(options).items()
            if name not in RESUMABLE and value not in (None, [])
        ]
        if refused:
            raise SaferlError(
                f"--resume takes {', '.join(refused)} from the run's config.yaml: only --steps, "
                "--device, --engine and --memory-map can be given; to change more start another run"
            )
        run = resume(options.resume, steps=options.steps, engine=options.engine, **common)
    else:
        agent, dataset, limits = options.agent, options.dataset, options.cost_limit
        if dataset is None and options.env is None:
            dataset, limits = EMBEDDED_DATASET, limits or [EMBEDDED_COST_LIMIT]
            settings = EMBEDDED_SETTINGS | settings
            if agent is None:
                agent, settings = EMBEDDED_AGENT, EMBEDDED_AGENT_SETTINGS | settings
        run = train(
            agent or DEFAULT_AGENT,
            dataset,
            env=options.env,
            steps=DEFAULT_STEPS if options.steps is None else options.steps,
            cost_limits=limits,
            settings=settings,
            dataset_options=data,
            **chosen,
            **common,
        )
    if not options.quiet:
        if run.evaluation is not None:
            print(f"\n{RunResults.read(run.path).text()}")
        print(f"\nrun folder: {run.path}")
        print(f"next: saferl evaluate {run.path} | saferl report {run.path}")


def _evaluate(options) -> None:
    _set_threads(options.threads)
    from saferl.training import evaluate_run

    found = evaluate_run(
        options.path,
        env=options.env,
        episodes=options.episodes,
        cost_limits=options.cost_limits,
        seed=options.seed,
        step=options.step,
        guardian=options.guardian,
        alpha=options.alpha,
        guard=options.guard,
        fallback=options.fallback,
        device=options.device,
    )
    print(f"\n{found.text()}\n\nwrote {options.path / 'evaluation.csv'}")
    print(f"next: saferl report {options.path}")


def _inspect(options) -> None:
    from saferl.data import load_dataset
    from saferl.data.inspect import describe, plot

    dataset = load_dataset(options.dataset, **_loader_options(options))
    print(describe(dataset))
    print(f"plot: {plot(dataset, options.plot)}")


def _list(options) -> None:
    from saferl import registry

    for what in [options.what] if options.what else ["agents", "datasets", "environments"]:
        print(f"{what}:")
        if what == "agents":
            for name in registry.names("agents"):
                cls = registry.agent_class(name)
                kind = "discrete" if cls.discrete else "continuous"
                kind += {True: ", pixels", False: "", None: ", pixels too"}[cls.pixels]
                acts = "acts" if cls.acts else ""
                doc = (sys.modules[cls.__module__].__doc__ or "").strip().splitlines()[0]
                print(f"  {name:14} {kind:11} {acts:5} {doc}")
        elif what == "datasets":
            for prefix in registry.names("datasets"):
                loader = registry.dataset_loader(prefix)
                print(f"  {prefix}/…")
                _print_names(getattr(sys.modules[loader.__module__], "ids", lambda: [])())
        else:
            families: dict[str, list[str]] = {}
            for name in registry.environment_ids():
                prefix, slash, rest = name.rpartition("/")
                families.setdefault(prefix + slash, []).append(rest)
            for prefix, rests in families.items():
                print(f"  {prefix}…" if prefix else "  without a prefix")
                _print_names(rests)


def _print_names(names: list[str]) -> None:
    for line in textwrap.wrap(", ".join(names), 92, break_on_hyphens=False):
        print(f"      {line}")


def _report(options) -> None:
    from saferl.evaluation.report import write_report

    output = options.output or options.runs[0] / "report.html"
    print(write_report(options.runs, output))


def _split(options) -> None:
    from saferl.training import split

    for path in split(options.path, options.out, options.member):
        print(path)


def _merge(options) -> None:
    from saferl.training import merge

    print(merge(options.runs, options.out))


def _collect(options) -> None:
    _set_threads(options.threads)
    from saferl.data import Dataset, save_dataset
    from saferl.evaluation import collect_transitions
    from saferl.runs.folder import RunFolder
    from saferl.training import gathered, load_agent

    policy, env = None, options.env
    if options.gathered:
        dataset = gathered(options.source, options.member)
        save_dataset(dataset, options.output)
        print(f"wrote {options.output}: {dataset}")
        return
    if options.source != "random":
        agent = load_agent(options.source, device=options.device)
        policy = agent.policy().member(options.member or 0)
        env = env or RunFolder(options.source).config()["env"]
    if env is None:
        raise SaferlError("no environment is known: pass --env ID")
    arrays = collect_transitions(
        policy,
        env,
        options.steps,
        options.seed,
        stochastic=policy is not None and not options.deterministic,
        progress=True,
    )
    dataset = Dataset.from_arrays(
        **arrays,
        id=options.output.stem,
        env_id=env,
        origin=f"generated by saferl from {options.source} in {env}",
    )
    save_dataset(dataset, options.output)
    print(f"wrote {options.output}: {dataset}")


if __name__ == "__main__":
    sys.exit(main())
