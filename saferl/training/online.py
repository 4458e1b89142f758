"""Hybrid training: members act in environments of their own and learn from both sources.

The first ``offline_steps`` of a run's steps are updates on the dataset alone; each of the others
acts once in every member's environment and then makes the updates that are due, which is ``utd``
critic steps per environment step (`saferl.agents.shared.online`). Without a dataset it is plain
online training.

Resuming. A checkpoint holds the seed of each running episode and the actions taken in it. A resumed
run resets the environment with that seed and takes the same actions again, so it stands where it
stood, in any environment that its seed and the actions determine. Where another observation comes
back, that member begins a new episode, and the run says so.

A guard (`saferl.safety.Shield`) per member may stand between what the policy proposes and what is
done; rows hold what was done. A checkpoint holds its state.

An environment that fails ends the call of `OnlineEngine.run` before the step; the rest is in order.
After a resume, the member it belongs to begins a new episode, since the old one would fail again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError, one_line
from saferl.io import part
from saferl.replay import MixedSampler, SharedBuffer, online_buffer_class
from saferl.rng import MemberRandom, Stream
from saferl.rollout import EnvironmentFailed, VectorEnv
from saferl.training.engine import Engine

SEEDS = 1_000_003  # between the first episodes of two members of neighbouring seeds
EPISODE = ("return", "cost", "length")


class OnlineEngine(Engine):
    """One environment per member: each step acts once in each, then makes the updates due.

    Args:
        agent: an online-capable one (`Agent.online`).
        vector_env: an environment for each member.
        steps: of the whole run.
        offline: rows of a dataset, or None.
        names: of the members, for messages.
        guard: makes the guard of a member from its policy, a function of raw observations
            ``[N, O]`` with an attribute ``spec``; None: no guard.
        say: receives messages for the user.
        kind: how updates run, "eager" or "compile".

    Raises:
        SaferlError: the environments' spaces are not the agent's; nothing to learn from.
    """

    def __init__(
        self,
        agent: Any,
        vector_env: VectorEnv,
        steps: int,
        offline: SharedBuffer | None = None,
        names: Sequence[str] | None = None,
        guard: Callable[[Any], Any] | None = None,
        say: Callable[[str], None] = lambda line: None,
        kind: str = "eager",
    ):
        c, seeds = agent.config, agent.seeds
        self.vector_env, self.say, self.names = (
            vector_env,
            say,
            names or [f"seed={s}" for s in seeds],
        )
        self.acting = steps - c.offline_steps  # environment steps of the run
        if c.offline_steps and offline is None:
            raise SaferlError("offline_steps update on a dataset: pass --dataset")
        if self.acting < 0:
            raise SaferlError(
                f"offline_steps = {c.offline_steps} is more than the {steps} steps of the run: "
                "train for more --steps, or set it lower"
            )
        self.online = online_buffer_class(agent.spec)(
            agent.spec, c.online_capacity or max(1, self.acting), seeds, agent.device, True,
            agent.batch_extras(c),
        )  # fmt: skip
        self.mixed = MixedSampler(c, offline, self.online, seeds)
        super().__init__(agent, self.mixed, kind)
        self.random = MemberRandom(seeds, agent.device, stream=Stream.ACTING)
        self.policy = agent.behaviour()
        self.steps = 0  # of the run
        self.budget = np.array(agent.column("exploration_budget"))
        self.spent = np.zeros(len(seeds))  # cost of all that was done in the environment
        self.exploring = self.spent < self.budget
        if offline is None and not self.exploring.all():
            raise SaferlError(
                "an exploration_budget of 0 leaves nothing to learn from: pass --dataset"
            )
        for m in np.flatnonzero(~self.exploring):
            say(f"member {self.names[m]} does not act: its exploration_budget is 0")
        self.proposals = [_Proposal(agent.spec) for _ in seeds]
        self.guards = [_complete(guard(proposal)) for proposal in self.proposals] if guard else []
        limited = any(getattr(one, "cost_limit", None) is not None for one in self.guards)
        if np.isfinite(self.budget).any() or agent.uses_costs() or limited:
            self._need_costs()
        vector_env.begin(np.array([(seed * SEEDS) % 2**31 for seed in seeds]))
        vector_env.episode[:] = -1
        # Of running episodes.
        self.actions = np.zeros(
            (len(seeds), vector_env.horizon, vector_env.spaces.action_dim), np.float32
        )
        self.episodes = np.zeros((len(seeds), 3))  # return, cost, length so far
        self.finished = np.zeros((len(seeds), 4))  # their sums since the last reading, and count
        self.replaced = np.zeros((len(seeds), 2))  # since the last reading, and steps
        self.last = np.zeros((len(seeds), 4))  # their means at the last reading; 1 once known

    def _need_costs(self) -> None:
        """Refuse an environment whose first step reports no cost, before the run begins."""
        vector_env = self.vector_env
        vector_env.begin(0)
        vector_env.start(0, 0)
        vector_env.step(vector_env.act(lambda rows: self._uniform(0.5), len(vector_env.envs)))
        if not vector_env.has_costs:
            raise SaferlError(
                f"{vector_env.name} reports no cost, which a cost limit (a guard's too), a "
                "cost penalty and an exploration budget need: wrap it in saferl.envs.CostWrapper"
            )

    # Acting --------------------------------------------------------------------------------------

    def run(self, steps: int) -> int:
        """``steps`` steps of the run; fewer where an environment or a guard fails (`failure`)."""
        for done in range(steps):
            if self.steps < self.agent.config.offline_steps:
                self.mixed.pretraining = True
                self.steps += 1
                self._update()
                continue
            self.mixed.pretraining = False
            if self.exploring.any() and not self._act():
                return done
            self.steps += 1
            made = self.mixed.count_env_step()
            for _ in range(self._due(made) - self._due(made - 1)):
                if self.mixed.ready():
                    self._update()
        return steps

    def _due(self, steps: int) -> int:
        """Updates that belong to the first ``steps`` environment steps."""
        c = self.agent.config
        learning = steps - max(c.random_steps, c.start_steps)
        return int(max(0, learning) * c.updates_per_step + 1e-9)

    def _act(self) -> bool:
        """One step in the environment of each member that explores; whether all went well."""
        vector_env = self.vector_env
        try:
            for m in np.flatnonzero(self.exploring & ~vector_env.running):
                vector_env.start(m, int(vector_env.episode[m]) + 1)
                if self.guards:
                    self.guards[m].reset()
        except EnvironmentFailed as error:
            self._fail(error)
            return False
        drawn = self.random.state_dict()
        guarded = [guard.state_dict() for guard in self.guards]
        proposed = vector_env.act(self._choose, len(vector_env.envs))
        which = np.flatnonzero(vector_env.running)
        before, elapsed = vector_env.observations.copy(), vector_env.elapsed.copy()
        try:
            actions = self._guarded(proposed, which) if self.guards else proposed
            self.actions[which, elapsed[which]] = actions[which]
            ended = vector_env.step(actions)
        except EnvironmentFailed as error:
            # What the others did in this step is not in the buffer: they do it again.
            vector_env.observations[:], vector_env.elapsed[:] = before, elapsed
            self.random.load_state_dict(drawn)
            for guard, state in zip(self.guards, guarded):
                guard.load_state_dict(state)
            self._fail(error)
            return False
        if self.guards:
            changed = (actions[which] != proposed[which]).reshape(len(which), -1).any(1)
            self.replaced[which] += np.stack([changed, np.ones(len(which))], 1)
        self._store(which, before, actions, ended)
        return True

    def _guarded(self, proposed: np.ndarray, which: np.ndarray) -> np.ndarray:
        """What the guards of the members ``which`` let through."""
        actions = proposed.copy()
        for m in which:
            self.proposals[m].action = proposed[m]
            try:
                actions[m] = self.guards[m](self.vector_env.observations[m])
            except Exception as error:
                raise self.vector_env.failure(m, f"the guard raised {one_line(error)}") from error
        return self.vector_env.spaces.clip(actions)

    def _fail(self, error: EnvironmentFailed) -> None:
        failed = error.index
        self.vector_env.running[failed] = False
        self.online.cut(failed)
        self.episodes[failed] = 0
        self.failure = SaferlError(f"{error} (member {self.names[failed]})")

    def _choose(self, observations: np.ndarray) -> Tensor:
        if self.mixed.env_steps < self.agent.config.random_steps:
            return self._uniform(self.random.uniform(1, self.agent.spec.action_dim).cpu())
        rows = torch.from_numpy(observations).to(self.agent.device)
        return self.policy.sample(rows, self.random)

    def _uniform(self, part: Tensor | float) -> Tensor:
        """Actions ``[M, 1, A]`` so far along from the lowest to the highest."""
        spec = self.agent.spec
        low, high = (torch.tensor(b) for b in (spec.action_low, spec.action_high))
        return (low + (high - low) * part).expand(len(self.names), 1, -1)

    def _store(
        self, which: np.ndarray, before: np.ndarray, actions: np.ndarray, ended: np.ndarray
    ) -> None:
        """What the members ``which`` did goes to their buffers, their books and their budgets."""
        vector_env = self.vector_env
        over = ~vector_env.running[which]
        if self.guards:
            for m, end in zip(which, over):
                self.guards[m].observe(vector_env.costs[m], end)
        self.online.append(
            which, over, before[which], actions[which], vector_env.rewards[which],
            vector_env.observations[which], vector_env.terminals[which], vector_env.costs[which],
        )  # fmt: skip
        self.episodes[which] += np.stack(
            [vector_env.rewards[which], vector_env.costs[which], np.ones(len(which))], 1
        )
        self.spent[which] += vector_env.costs[which]
        for m in ended:
            self.online.finish_episode(m, int(self.episodes[m, 2]))
            self.finished[m, :3] += self.episodes[m]
            self.finished[m, 3] += 1
            self.episodes[m] = 0
        for m in which[self.spent[which] >= self.budget[which]]:
            self.exploring[m] = vector_env.running[m] = False
            self.online.cut(m)
            self.say(
                f"member {self.names[m]} stops exploring at step {self.steps + 1}: it has spent a "
                f"cost of {self.spent[m]:g} of its exploration_budget of {self.budget[m]:g}; "
                "updates go on with what it has"
            )

    # Reading and keeping -------------------------------------------------------------------------

    def read(self) -> dict[str, np.ndarray]:
        """Metrics as in `Engine`, and what exploring cost and brought.

        ``exploration_cost``: cost of all environment steps so far; ``train_return``, ``train_cost``
        and ``train_length``: means of the episodes that ended since the last reading;
        ``guard_changed``: share of the steps since then at which a guard chose another action;
        ``exploring``: 0 once the exploration budget is spent.
        """
        means = super().read()
        some = self.finished[:, 3] > 0
        if some.any():
            self.last[some] = self.finished[some] / self.finished[some, 3:]
            self.finished[:] = 0
            if self.last[:, 3].all():
                means |= {f"train_{name}": self.last[:, i].copy() for i, name in enumerate(EPISODE)}
        if self.guards and self.replaced[:, 1].all():
            means["guard_changed"] = self.replaced[:, 0] / self.replaced[:, 1]
            self.replaced[:] = 0
        if self.vector_env.has_costs:
            means["exploration_cost"] = self.spent.copy()
        if np.isfinite(self.budget).any():
            means["exploring"] = self.exploring.astype(float)
        return means

    def state_dict(self) -> dict[str, Tensor]:
        vector_env, state = self.vector_env, super().state_dict()
        for name, array in {
            "spent": self.spent, "exploring": self.exploring, "episodes": self.episodes,
            "finished": self.finished, "last": self.last, "replaced": self.replaced,
            "actions": self.actions, "episode": vector_env.episode, "elapsed": vector_env.elapsed,
            "running": vector_env.running, "observations": vector_env.observations,
        }.items():  # fmt: skip
            state[f"acting.{name}"] = torch.from_numpy(array.copy())
        if self.guards:
            guards = [guard.state_dict() for guard in self.guards]
            for name in guards[0]:
                state[f"guard.{name}"] = torch.stack([guard[name] for guard in guards])
        state["acting.random"] = self.random.state_dict()["state"]
        state["steps"] = torch.tensor(self.steps)
        state["acted"] = torch.tensor(self.mixed.env_steps)
        state["has_costs"] = torch.tensor(self.vector_env.has_costs)
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        super().load_state_dict(state)
        vector_env, acting = self.vector_env, part(state, "acting.")
        self.random.load_state_dict({"state": acting.pop("random")})
        self.steps, self.mixed.env_steps = int(state["steps"]), int(state["acted"])
        vector_env.has_costs = bool(state["has_costs"])
        values = {name: tensor.numpy().copy() for name, tensor in acting.items()}
        own = ("spent", "exploring", "episodes", "finished", "last", "replaced", "actions")
        for name in own:
            setattr(self, name, values[name])
        vector_env.episode[:] = values["episode"]
        vector_env.elapsed[:], vector_env.observations[:] = (
            values["elapsed"],
            values["observations"],
        )
        same = np.zeros(len(self.names), bool)
        for m in np.flatnonzero(values["running"]):
            same[m] = self._replay(m, int(values["elapsed"][m]), values["observations"][m])
            if not same[m]:
                self.online.cut(m)
                self.episodes[m] = 0
                self.say(
                    f"{vector_env.name} does not come back to where it was from its seed and "
                    f"the same actions: member {self.names[m]} begins a new episode"
                )
        vector_env.running[:] = same
        guards = part(state, "guard.")
        for m, guard in enumerate(self.guards):
            guard.load_state_dict({name: value[m] for name, value in guards.items()})

    def _replay(self, member: int, elapsed: int, observation: np.ndarray) -> bool:
        """Replay ``elapsed`` steps of an episode; whether the observation is the same."""
        vector_env = self.vector_env
        vector_env.running[:] = False
        try:
            vector_env.start(member, int(vector_env.episode[member]))
            for step in range(elapsed):
                vector_env.step(self.actions[:, step])
                if not vector_env.running[member]:
                    return False
        except EnvironmentFailed:
            return False
        return np.array_equal(vector_env.observations[member], observation)

    def close(self) -> None:
        self.vector_env.close()


class _Proposal:
    """Stub policy that returns the action already sampled."""

    def __init__(self, spec: Any):
        self.spec = spec
        self.action: Any = None

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        return self.action[None]


def _complete(guard: Any) -> Any:
    """``guard``, checked for the methods of a `Shield` that `OnlineEngine` calls."""
    for name in ("__call__", "reset", "observe", "state_dict", "load_state_dict"):
        if not hasattr(guard, name):
            raise SaferlError(
                f"guard returned a {type(guard).__name__} without {name}: it must "
                "return a saferl.safety.Shield around its policy, or an object with its methods"
            )
    return guard
