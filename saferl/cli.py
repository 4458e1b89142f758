"""The command line: ``saferl train|evaluate|inspect|list|check|report|collect|split|merge``.

Heavy imports happen inside the commands, so that ``saferl --help`` answers at once. A `SaferlError`
becomes one line and exit status 2; Ctrl-C exits with 130 after a checkpoint was written.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, NoReturn

from saferl import __version__
from saferl.errors import SaferlError
from saferl.runs.config import RunConfig, check_option
from saferl.runs.config import options as run_options

# The embedded default, for neither --dataset nor --env: minutes on two cores.
EMBEDDED_DATASET = "saferl/hopper-velocity-mixed-v0"
EMBEDDED_COST_LIMIT = 40.0  # an episode of the data costs three times as much on average
EMBEDDED_SETTINGS = {"hidden": [64, 64]}  # of any agent
EMBEDDED_AGENT = "bc_safe"
EMBEDDED_AGENT_SETTINGS = {
    "best_fraction": 0.1, "batch_size": 256, "normalize_observations": True
}  # fmt: skip

# Options of earlier versions, accepted with a line that names the present one.
RENAMED = {"--cost-limits": "--cost-limit", "--output": "--out"}
LISTS = ("--cost-limit",)  # take several numbers in a row


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    try:
        given = sys.argv[1:] if arguments is None else arguments
        options = _parser().parse_args(_spelled_out(given))
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


def _spelled_out(arguments: Sequence[str]) -> list[str]:
    """Arguments with one value per option: ``--cost-limit 20 40 bc`` → twice the option, and bc.

    An option that takes several numbers would otherwise swallow the words after them. Earlier
    spellings are replaced, with a warning.
    """
    found: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in RENAMED:
            print(f"saferl: {name} is called {RENAMED[name]}: use that", file=sys.stderr)
            name = RENAMED[name]
            word = name + equals + value
        if name not in LISTS or equals:
            found.append(word)
            continue
        values = [rest.pop(0)] if rest else []
        while values and rest and _is_number(rest[0]):
            values.append(rest.pop(0))
        found += [f"{name}={value}" for value in values] or [name]
    return found


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty path")
    return Path(text)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
    _run_options(p)
    p.add_argument("--out", type=_path, help="run folder (default: runs/AGENT-DATASET)")
    p.add_argument("--resume", type=Path, metavar="RUN", help="continue a run folder")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    p.add_argument("--memory-map", type=_path, metavar="FILE", help="buffer in a file, not memory")
    p.add_argument("--quiet", action="store_true", help="no progress, no table")
    p.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved settings and where each comes from; train nothing",
    )

    p = command("evaluate", _evaluate, "Play episodes with a run's policies and judge cost limits.")
    p.add_argument("path", type=Path, metavar="RUN")
    p.add_argument("--env", help="default: the run's")
    p.add_argument("--episodes", type=int, default=20, help="per member")
    _limit_option(p, "judge by this cost per episode instead of the run's limits")
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

    p = command("check", _check, "Check an agent, environment, dataset or guardian of your own.")
    p.add_argument("name", help="as registered: see docs/extend")

    p = command("report", _report, "Write one HTML report of one or more runs.")
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    p.add_argument("--out", type=_path, help="default: report.html in the first run")

    p = command("split", _split, "Write each member of a run as a run folder of its own.")
    p.add_argument("path", type=Path, metavar="RUN")
    p.add_argument("--out", type=_path, required=True, metavar="DIR",
                   help="receives member-0, …; is the run folder itself with --member")  # fmt: skip
    p.add_argument("--member", type=int, help="this one alone, counted from 0")

    p = command("merge", _merge, "Write the members of several runs as one run folder.")
    p.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    p.add_argument(
        "--out", type=_path, required=True, metavar="DIR", help="the run folder to write"
    )

    p = command("collect", _collect, "Roll out a run's policy, or random actions, into a dataset.")
    p.add_argument("source", metavar="RUN|random")
    p.add_argument("--out", type=_path, help="file to write (.npz or .hdf5)")
    p.add_argument("output", nargs="?", type=Path, help=argparse.SUPPRESS)  # its earlier place
    p.add_argument("--env", help="default: the run's")
    p.add_argument("--steps", type=int, default=100_000, help="transitions, whole episodes")
    p.add_argument("--member", type=int, help="which member of the run acts (default: 0)")
    p.add_argument("--gathered", action="store_true", help="write what the run's members gathered "
                   "while they learned instead (of all, or of --member)")  # fmt: skip
    p.add_argument("--deterministic", action="store_true", help="the policy's mode, no sampling")
    p.add_argument("--seed", type=int, default=0, help="of the first episode")
    _machine(p)
    return parser


def _run_options(parser: argparse.ArgumentParser) -> None:
    """The options of a run, from the fields of `RunConfig`.

    Their defaults are None here: --resume has to tell what was given.
    """
    for name, spec in run_options().items():
        flag = _flag(name, spec)
        text = spec.metadata["help"] + _default_in_words(name, spec)
        if name == "agent":
            parser.add_argument("agent", nargs="?", help=text)
        elif name == "dataset_options":
            _dataset_options(parser)
        elif name == "cost_limits":
            _limit_option(parser, text)
        elif name == "settings":
            parser.add_argument(flag, action="append", default=[], dest=name, help=text,
                                metavar=spec.metadata["metavar"])  # fmt: skip
        else:
            kind = int if "int" in str(spec.type) else str
            parser.add_argument(flag, type=kind, dest=name, help=text,
                                metavar=spec.metadata["metavar"])  # fmt: skip


def _flag(name: str, spec: Field[Any]) -> str:
    return spec.metadata["flag"] or "--" + name.replace("_", "-")


def _default_in_words(name: str, spec: Field[Any]) -> str:
    if name == "agent":
        return f" (default: {EMBEDDED_AGENT} on the bundled default, else {spec.default})"
    if name == "dataset":
        return " (default: a bundled one, if --env is not set either)"
    shown = spec.metadata["shown"] or spec.default
    plain = shown in (None, (), MISSING)
    return "" if plain else f" (default: {shown})"


def _limit_option(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--cost-limit", type=float, action="append", default=[], metavar="LIMIT",
                        dest="cost_limits", help=text)  # fmt: skip


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

    check_option("threads", count)
    torch.set_num_threads(count)


def _train(given: argparse.Namespace) -> None:
    from saferl.evaluation.results import RunResults
    from saferl.training import resume, train

    place: dict[str, Any] = {
        "device": given.device, "memory_map": given.memory_map, "progress": not given.quiet,
    }  # fmt: skip
    if given.resume is not None:
        _refuse_beside_resume(given)
        run = resume(given.resume, steps=given.steps, engine=given.engine, **place)
    else:
        config = _asked(given)
        if given.print_config:
            print(_resolved_in_words(config))
            return
        run = train(config, out=given.out, **place)
    if not given.quiet:
        if run.evaluation is not None:
            print(f"\n{RunResults.read(run.path).text()}")
        print(f"\nrun folder: {run.path}")
        print(f"next: saferl evaluate {run.path} | saferl report {run.path}")


def _asked(given: argparse.Namespace) -> RunConfig:
    """The configuration that the options of `train` make."""
    from saferl.runs.settings import parse_settings

    values = {
        name: value
        for name in run_options()
        if (value := getattr(given, name, None)) not in (None, [])
    }
    values["settings"] = parse_settings(given.settings)
    values["dataset_options"] = _loader_options(given)
    if given.dataset is None and given.env is None:
        values["dataset"] = EMBEDDED_DATASET
        values.setdefault("cost_limits", [EMBEDDED_COST_LIMIT])
        values["settings"] = EMBEDDED_SETTINGS | values["settings"]
        if given.agent is None:
            values["agent"] = EMBEDDED_AGENT
            values["settings"] = EMBEDDED_AGENT_SETTINGS | values["settings"]
    return RunConfig(**values)


def _refuse_beside_resume(given: argparse.Namespace) -> None:
    """Raise `SaferlError` for an option that a run that goes on takes from its record."""
    refused = []
    for name, spec in run_options().items():
        if not spec.metadata["resumable"] and getattr(given, name, None) not in (None, []):
            refused.append("AGENT" if name == "agent" else _flag(name, spec))
    refused += ["--dataset-option"] * bool(given.dataset_option) + ["--column"] * bool(given.column)
    refused += ["--out"] * (given.out is not None) + ["--print-config"] * given.print_config
    if refused:
        raise SaferlError(
            f"--resume takes {', '.join(refused)} from the run's config.yaml: only --steps, "
            "--device, --engine and --memory-map can be given; to change more start another run"
        )


def _resolved_in_words(config: RunConfig) -> str:
    """The record of a run as YAML, with the source of each of the agent's settings."""
    import yaml

    from saferl.training.setup import Inputs
    from saferl.training.train import prepare

    resolved, _ = prepare(config, Inputs(env=config.env))
    record = resolved.run.to_dict()
    settings = resolved.run.agent_settings
    del record["settings"]
    lines = [yaml.safe_dump(record, sort_keys=False, allow_unicode=True).rstrip(), "settings:"]
    for key, value in settings.items():
        text = yaml.safe_dump({key: value}, default_flow_style=True, width=10_000).strip("{}\n ")
        lines.append(f"  {text:44} # {resolved.sources[key]}")
    return "\n".join(lines)


def _evaluate(options) -> None:
    _set_threads(options.threads)
    from saferl.training import evaluate_run

    found = evaluate_run(
        options.path,
        env=options.env,
        episodes=options.episodes,
        cost_limits=options.cost_limits or None,
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
            _print_table([_agent_row(name) for name in registry.names("agents")])
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


def _agent_row(name: str) -> tuple[str, ...]:
    from saferl import registry

    cls = registry.agent_class(name)
    kind = "discrete" if cls.discrete else "continuous"
    seen = {True: "pixels", False: "vectors", None: "both"}[cls.pixels]
    doc = (sys.modules[cls.__module__].__doc__ or "").strip().partition("\n")[0]
    return name, kind, seen, "online" if cls.online else "", doc


def _print_table(rows: list[tuple[str, ...]]) -> None:
    """Columns as wide as what is in them; the last one below the others where there is no room."""
    width = min(shutil.get_terminal_size().columns, 120)
    widths = [max(map(len, column)) for column in list(zip(*rows))[:-1]]
    indent = 2 + sum(size + 2 for size in widths)
    below = width - indent < 60
    indent = 6 if below else indent
    for row in rows:
        head = "  " + "".join(f"{text:{size}}  " for text, size in zip(row, widths))
        lines = textwrap.wrap(row[-1], width - indent)
        if below:
            print(head.rstrip())
            head = " " * indent
        for line in lines:
            print(head + line)
            head = " " * indent


def _print_names(names: list[str]) -> None:
    width = min(shutil.get_terminal_size().columns, 120) - 6
    for line in textwrap.wrap(", ".join(names), width, break_on_hyphens=False):
        print(f"      {line}")


def _check(options: argparse.Namespace) -> None:
    from saferl.testing import kind_of, run_checks

    kind, checks, of = kind_of(options.name)
    failed = 0
    for result in run_checks(checks, of):
        failed += not result.passed
        print(f"{'passed' if result.passed else 'FAILED'}  {result.name}", flush=True)
        if result.error:
            print(textwrap.indent(textwrap.fill(result.error, 92), " " * 8))
    if failed:
        raise SaferlError(f"{kind} {options.name}: {failed} of {len(checks)} checks failed")
    print(f"{kind} {options.name}: all {len(checks)} checks passed")


def _report(options) -> None:
    from saferl.evaluation.report import write_report

    output = options.out or options.runs[0] / "report.html"
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
    out = _collect_out(options)
    from saferl.data import Dataset, save_dataset
    from saferl.evaluation import collect_transitions
    from saferl.runs.folder import RunFolder
    from saferl.training import gathered, load_agent

    policy, env = None, options.env
    if options.gathered:
        dataset = gathered(options.source, options.member)
        save_dataset(dataset, out)
        print(f"wrote {out}: {dataset}")
        return
    if options.source != "random":
        agent = load_agent(options.source, device=options.device)
        policy = agent.policy().member(options.member or 0)
        env = env or RunFolder(options.source).config().env
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
        id=out.stem,
        env_id=env,
        origin=f"generated by saferl from {options.source} in {env}",
    )
    save_dataset(dataset, out)
    print(f"wrote {out}: {dataset}")


def _collect_out(options: argparse.Namespace) -> Path:
    if options.output is not None:
        print("saferl: the file to write is given by --out FILE: use that", file=sys.stderr)
    out = options.out or options.output
    if out is None:
        raise SaferlError("name the file to write: --out FILE (.npz or .hdf5)")
    return out


if __name__ == "__main__":
    sys.exit(main())
