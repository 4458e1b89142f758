"""Everything a run needs before its first update, made in order: task, memory, agent, engine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.io import part
from saferl.registry import agent_class
from saferl.replay import SharedBuffer, make_buffer
from saferl.replay.buffer import silent
from saferl.rollout import Env, Evaluator, VectorEnv
from saferl.runs.config import RunConfig
from saferl.runs.folder import RunFolder
from saferl.safety.limits import limit_warnings
from saferl.spec import Spec
from saferl.training.engine import Engine
from saferl.training.loop import Loop, Run
from saferl.training.memory import announce
from saferl.training.online import OnlineEngine

Start = tuple[dict[str, Tensor], dict[str, Any]]  # state and header of a checkpoint
Say = Callable[[str], None]


@dataclass(frozen=True)
class Inputs:
    """What a run learns from, as objects; a file can hold their names at most."""

    dataset: Dataset | None = None
    env: Env | None = None
    guard: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Place:
    """Where and how a run is executed, which does not change its result."""

    device: torch.device
    memory_map: str | Path | None = None
    progress: bool = True

    def say(self, line: str) -> None:
        """Tell the user."""
        if self.progress:
            print(line, flush=True)


def execute(
    folder: RunFolder, config: RunConfig, inputs: Inputs, place: Place, resumed: bool
) -> Run:
    """Set a run up, train it to its last step and return what it left behind."""
    with contextlib.ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(config.threads)
        return _Setup(folder, config, inputs, place, resumed, stack).run()


class _Setup:
    """The steps of `execute`, which share what the earlier ones have made."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        inputs: Inputs,
        place: Place,
        resumed: bool,
        stack: contextlib.ExitStack,
    ):
        self.folder, self.config, self.inputs, self.place = folder, config, inputs, place
        self.resumed, self.stack, self.say = resumed, stack, place.say
        self.cls = agent_class(config.agent)
        self.settings = self.cls.make_config(config.agent_settings)
        self.loop: Loop | None = None

    def run(self) -> Run:
        rows = self._rows()
        vector_env = self._vector_env()
        start = self._start()
        spec = _spec(rows, vector_env, self.settings, start)
        if vector_env is not None:
            self._compare(vector_env, spec, rows)
        need = self._reserve_memory(spec, rows)
        evaluator = self._evaluator(spec)
        config, device = self.config, self.place.device
        agent = self.cls(spec, self.settings, config.seeds, device, config.precision)
        buffer = self._buffer(agent, spec, rows)
        engine = self._engine(agent, buffer, vector_env)
        if not self.resumed:
            self._begin(agent, rows, start)
        self.loop = Loop(self.folder, config, agent, engine, evaluator, self.place)
        run = self.loop.run(self.resumed)
        if (line := need.peak()) is not None:
            self.say(line)
        return run

    def _rows(self) -> Dataset | None:
        """What the method trains on."""
        dataset = self.inputs.dataset
        if dataset is None:
            if self.place.memory_map is not None:
                raise SaferlError(
                    "--memory-map holds a dataset's rows, and there is no dataset: leave it out"
                )
            return None
        for line in limit_warnings(dataset, self.config.cost_limits):
            self.say(f"warning: {line}")
        return self.cls.prepare(dataset, self.settings)

    def _vector_env(self) -> VectorEnv | None:
        """The environments that members act in, one each."""
        if not self.cls.online:
            return None
        made = VectorEnv(self.inputs.env, len(self.config.who), None)
        self.stack.callback(made.close)
        return made

    def _start(self) -> Start | None:
        """The checkpoint that the run begins from, or for one that is resumed, its own."""
        if not self.config.start_from:
            return None
        return (self.folder if self.resumed else RunFolder(self.config.start_from)).load()

    def _compare(self, vector_env: VectorEnv, spec: Spec, rows: Dataset | None) -> None:
        vector_env.check(spec)
        for line in vector_env.remarks(spec, None if rows is None else rows.card.horizon):
            self.say(f"warning: {line}")

    def _reserve_memory(self, spec: Spec, rows: Dataset | None) -> Any:
        """Say what the run needs and refuse what does not fit; explain a shortage later on."""
        own_rows = 0
        if self.cls.online:
            own_rows = (
                self.settings.online_capacity or self.config.steps - self.settings.offline_steps
            )
        need = announce(
            self.say, self.cls, spec, self.settings, self.config.seeds,
            0 if rows is None else len(rows), self.place.device, self.config.precision,
            costs=rows is None or rows.costs is not None,
            memory_map=self.place.memory_map is not None, own_rows=own_rows, dataset=rows,
        )  # fmt: skip

        def position() -> tuple[int, Path | None]:
            step = self.loop.step if self.loop else 0
            return step, self.folder.path if self.folder.steps() else None

        self.stack.enter_context(need.guarding(position))
        return need

    def _evaluator(self, spec: Spec) -> Evaluator | None:
        """As many environments as members: made once it is known that they fit."""
        if self.inputs.env is None:
            assert self.inputs.dataset is not None
            id = self.inputs.dataset.card.id
            self.say(f"no environment is known for {id}: pass --env to evaluate")
            return None
        config = self.config
        made = Evaluator(self.inputs.env, len(config.who), config.eval_episodes)
        self.stack.enter_context(made)
        made.check(spec)
        return made

    def _buffer(self, agent: Any, spec: Spec, rows: Dataset | None) -> SharedBuffer | None:
        if rows is None:
            return None
        place = self.place
        # Memory that is no file is in the line of `announce` already.
        say = self.say if place.memory_map is not None else silent
        extras = self.cls.batch_extras(self.settings)
        buffer = make_buffer(
            rows, spec, self.config.seeds, place.device, extras, place.memory_map, say
        )
        buffer.restrict(agent.rows(rows))
        return buffer

    def _engine(
        self, agent: Any, buffer: SharedBuffer | None, vector_env: VectorEnv | None
    ) -> Engine:
        config = self.config
        if vector_env is None:
            assert buffer is not None
            return Engine(agent, buffer, config.engine)
        kind = "eager" if config.engine == "auto" else config.engine
        return OnlineEngine(
            agent, vector_env, config.steps, buffer, config.names, self.inputs.guard, self.say, kind
        )

    def _begin(self, agent: Any, rows: Dataset | None, start: Start | None) -> None:
        """What happens once, before the first update; then the run has its folder."""
        settings = self.settings
        if start is not None:
            agent.warm_start(part(start[0], "agent."))
        elif rows is not None:
            agent.fit(rows, self.say)
        if (
            self.cls.online
            and settings.random_steps
            and (start is not None or settings.offline_steps)
        ):
            self.say(
                f"warning: the first {settings.random_steps} environment steps take random "
                "actions, though a policy is there that has learned: --set random_steps=0 lets it "
                "act, and --set start_steps=N before the first update"
            )
        if start is None and self.cls.pretrained:
            self.say(
                f"warning: {self.config.agent} is meant to begin with the networks of another run, "
                "and begins with random ones: give the run with --from"
            )
        self.folder = RunFolder.create(self.folder.path, self.config, self._card())

    def _card(self) -> dict[str, Any]:
        dataset = self.inputs.dataset
        if dataset is None:
            return {}
        return {
            "card": dataset.card.to_dict(),
            "fingerprint": dataset.fingerprint,
            "summary": dataset.summary(),
            "problems": list(dataset.problems),
        }


def _spec(
    rows: Dataset | None, vector_env: VectorEnv | None, settings: Any, start: Start | None
) -> Spec:
    """The task as the agent sees it: a checkpoint's, the dataset's or the environment's."""
    own = None if rows is None else rows.spec(settings)
    if start is not None:
        theirs = Spec.from_dict(start[1]["spec"])
        for name in ("observation_dim", "action_dim", "discrete", "image"):
            if own is not None and getattr(own, name) != getattr(theirs, name):
                assert rows is not None
                raise SaferlError(
                    f"{name} is {getattr(theirs, name)} in the run to start from and "
                    f"{getattr(own, name)} in {rows.card.id}: start from a run on the same task"
                )
        return theirs
    if own is not None:
        return own
    assert vector_env is not None
    if settings.normalize_observations or settings.normalize_rewards:
        raise SaferlError(
            "there is no dataset to normalise by: pass --dataset, or leave out "
            "normalize_observations and normalize_rewards"
        )
    env = vector_env.envs[0]
    spec = Spec.from_spaces(env.observation_space, env.action_space)
    return dataclasses.replace(
        spec,
        horizon=vector_env.known_horizon,
        reward_scale=float(settings.reward_scale),
        reward_shift=float(settings.reward_shift),
    )
