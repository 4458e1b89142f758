"""What a run is: one frozen, typed object.

`saferl.train`, the command line, ``config.yaml``, `saferl.resume` and sweeps are views of
`RunConfig`: an option's default, range and help stand here and nowhere else.

    config = RunConfig(agent="td3_bc", dataset="d4rl/hopper-medium-v2", members=5)
    run = saferl.train(config)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saferl.errors import SaferlError, unknown

OBJECT = "a Python object"  # stands in config.yaml for a Dataset or environment that has no name
MOST_THREADS = 1024  # torch crashes on numbers that no machine has
FORMAT = 2  # of config.yaml; `saferl.runs.upgrade` reads earlier ones

Values = dict[str, Any]


@dataclass(frozen=True)
class Member:
    """One of the policies that a run trains side by side: a seed and its own settings.

    ``values``: of the per-member fields that the run varies, e.g. ``{"cost_limit": 20.0}``. Names
    are printed from members and never read back.
    """

    seed: int
    values: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise SaferlError(f"a seed is a whole number from 0 to 2^63 - 1, got {self.seed!r}")

    def __str__(self) -> str:
        return " ".join(filter(None, [self.group.label, f"seed={self.seed}"]))

    @property
    def group(self) -> Group:
        """What it has in common with members of other seeds."""
        limit = self.values.get("cost_limit")
        others = {key: value for key, value in self.values.items() if key != "cost_limit"}
        own = limit if limit is not None and math.isfinite(limit) else None
        return Group(_words(self.values), own, _words(others))

    def to_dict(self) -> Values:
        return {"seed": self.seed, **({"values": dict(self.values)} if self.values else {})}


@dataclass(frozen=True)
class Group:
    """Members that differ by their seeds alone.

    ``cost_limit``: the limit that they were trained for, by which they are judged; None for none.
    ``family``: the label without the limit, shared by groups that differ by their limits alone.
    """

    label: str = ""
    cost_limit: float | None = None
    family: str = ""


def groups_of(members: Sequence[Member]) -> list[Group] | None:
    """The group of each member; None where all are of one."""
    groups = [member.group for member in members]
    return groups if len(set(groups)) > 1 else None


def plain(value: Any) -> str:
    """A setting's value in words, all its digits kept: 20.0 → "20", 1000001.0 → "1000001"."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _words(values: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={plain(value)}" for key, value in values.items())


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float = math.inf,
    flag: str | None = None,
    metavar: str | None = None,
    shown: str | None = None,
    resumable: bool = False,
) -> Any:
    """A field of `RunConfig`.

    Args:
        low, high: bounds of a number; without ``low`` it is not checked.
        flag: spelling on the command line, ``--field-name`` if None.
        metavar: of the command line's help. shown: default in words, where None means something.
        resumable: whether a run that goes on may be given another value.
    """
    metadata = {
        "help": help, "low": low, "high": high, "flag": flag, "metavar": metavar,
        "shown": shown, "resumable": resumable,
    }  # fmt: skip
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's result; what does not (device, folder) is given to `train`.

    As a user writes it ``members`` is a count and ``settings`` may hold a list of values for a
    per-member field; `saferl.runs.settings.resolve` turns it into the run's record, in which
    ``members`` is a tuple of `Member`, ``settings`` has a value for every field of the agent that
    all members share, and every interval is a number.

    Raises:
        SaferlError: a count below 1, a negative interval or limit.
    """

    agent: str = option("td3_bc", "a registered agent, see `saferl list agents`")
    dataset: str | None = option(None, "id or file of logged transitions")
    dataset_options: Values = option({}, "option of the dataset's loader, e.g. size=20000",
                                     flag="--dataset-option", metavar="KEY=VALUE")  # fmt: skip
    env: str | None = option(
        None, "environment to evaluate in, and to act in for online-capable agents"
    )
    steps: int = option(20_000, "updates per member; environment steps for agents that act online",
                        low=1, resumable=True)  # fmt: skip
    members: int | tuple[Member, ...] = option(3, "seeds trained side by side", low=1)
    seed: int = option(0, "of the first member; the others follow", low=0)
    cost_limits: tuple[float, ...] = option(
        (), "expected undiscounted cost per episode, in user units", low=0, flag="--cost-limit",
        metavar="LIMIT",
    )  # fmt: skip
    settings: Values = option({}, "hyper-parameter; VALUE,VALUE trains members for each",
                              flag="--set", metavar="KEY=VALUE")  # fmt: skip
    eval_interval: int | None = option(
        None, "steps between evaluations; 0: at the end only", low=0, shown="a fifth of the steps"
    )
    eval_episodes: int = option(10, "episodes per member and evaluation", low=1)
    log_interval: int | None = option(
        None, "steps between readings of the metrics", low=0, shown="a hundredth of the steps"
    )
    checkpoint_interval: int | None = option(
        None, "steps between checkpoints", low=0, shown="the evaluation interval"
    )
    keep_checkpoints: int = option(2, "so many of the last stay on disk", low=1, metavar="N")
    engine: str = option("auto", "auto, eager, compile or cuda_graph", resumable=True)
    precision: str = option("fp32", "fp32, or bf16 where the device has it")
    threads: int = option(1, "CPU threads of torch", low=1, high=MOST_THREADS)
    start_from: str | None = option(
        None, "begin with the networks of a run, e.g. an offline one", flag="--from", metavar="RUN"
    )
    guard: str | None = None  # OBJECT where a guard stands between policy and environment

    def __post_init__(self) -> None:
        object.__setattr__(self, "cost_limits", tuple(self.cost_limits))
        for spec in dataclasses.fields(self):
            value = getattr(self, spec.name)
            if spec.metadata.get("low") is None:
                continue
            for number in value if spec.name == "cost_limits" else (value,):
                if isinstance(number, (int, float)):
                    check_option(spec.name, number)

    # The record of a run that is resolved.

    @property
    def who(self) -> tuple[Member, ...]:
        """The members of a resolved run."""
        assert isinstance(self.members, tuple), "resolve the configuration first"
        return self.members

    @property
    def seeds(self) -> list[int]:
        """The seed of each member."""
        return [member.seed for member in self.who]

    @property
    def names(self) -> list[str]:
        """The name of each member, to be printed."""
        return [str(member) for member in self.who]

    @property
    def agent_settings(self) -> Values:
        """Settings of the agent: fields that the run varies hold a list, one value per member."""
        varied = self.who[0].values
        return self.settings | {key: [member.values[key] for member in self.who] for key in varied}

    @property
    def intervals(self) -> dict[str, int]:
        """Steps between two logs, evaluations and checkpoints."""
        return {
            "log": self.log_interval or 1,
            "eval": self.eval_interval or self.steps,
            "checkpoint": self.checkpoint_interval or self.steps,
        }

    def replace(self, **fields: Any) -> RunConfig:
        """A copy with other values; an unknown field is an error that names the nearest one."""
        valid = [spec.name for spec in dataclasses.fields(self)]
        for name in fields:
            if name not in valid:
                raise unknown("option", name, valid)
        return dataclasses.replace(self, **fields)

    def to_dict(self) -> Values:
        """Plain values for ``config.yaml``."""
        values: Values = {"format": FORMAT}
        for spec in dataclasses.fields(self):
            values[spec.name] = _plain(getattr(self, spec.name))
        if isinstance(self.members, tuple):
            values["members"] = [_plain(member.to_dict()) for member in self.members]
            del values["seed"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The inverse of `to_dict`; raises `SaferlError` for what is no run's record."""
        if values.get("format", FORMAT) != FORMAT:
            raise SaferlError(
                f"the run's config.yaml has format {values['format']!r}, this version reads up to "
                f"{FORMAT}: upgrade saferl"
            )
        values = {key: value for key, value in values.items() if key != "format"}
        members = values.get("members")
        for spec in dataclasses.fields(cls):
            value = values.get(spec.name, spec.default)
            whole = type(spec.default) is int and spec.name != "members"
            if whole and type(value) is not int:
                raise SaferlError(
                    f"the run's config.yaml has {spec.name}: {value!r}, which is no whole number: "
                    "restore the file or start another run"
                )
        try:
            if isinstance(members, list):
                values["members"] = tuple(Member(**member) for member in members)
            return cls().replace(**values)
        except TypeError as error:
            raise SaferlError(
                "the run's config.yaml is damaged (its members are not a list of seed and values): "
                "restore the file or start another run"
            ) from error


def options(kind: type = RunConfig) -> dict[str, dataclasses.Field[Any]]:
    """The fields that users set, by name."""
    return {spec.name: spec for spec in dataclasses.fields(kind) if spec.metadata}


def check_option(name: str, number: float) -> None:
    """Raise `SaferlError` where a number is not in the range of an option of `RunConfig`."""
    bounds = options()[name].metadata
    if name == "cost_limits":
        if not 0 <= number < math.inf:
            raise SaferlError(f"a cost limit is a number of 0 or more per episode, got {number!r}")
    elif number < bounds["low"]:
        unit = " steps" if name.endswith("_interval") else ""
        raise SaferlError(f"{name} must be {bounds['low']} or more{unit}, got {number}")
    elif number > bounds["high"]:
        raise SaferlError(f"{name} must be {bounds['high']} or less, got {number}")


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML and JSON."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value
