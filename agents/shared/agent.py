"""The contract of an agent, and what all agents share.

An agent is a class with a frozen `Config`, a `build` that makes networks and optimisers for M
members, a `learn(batch)` that is pure tensor arithmetic (no reads to the host, no logging), and an
`actor` that becomes the exported policy. What an update does besides what every update does depends
on its number through `update_key` alone, so that engines can compile or record it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError, unknown
from saferl.nn import PRECISIONS, Policy, compute_in
from saferl.replay import Batch, Extra
from saferl.rng import MemberRandom, Stream
from saferl.safety.limits import no_costs
from saferl.spec import Spec

from .config import AgentConfig, check, convert, member_values

Metrics = dict[str, Tensor]  # name → [M], on the device
ConfigT = TypeVar("ConfigT", bound=AgentConfig)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Agent(Generic[ConfigT]):
    """M members of one method, trained as one batch.

    Args:
        spec: sizes and units of the task.
        config: an instance of the class's `Config`. A field named in `per_member` may hold one
            value per member.
        members: seeds, one per member, or a count n for the seeds 0 … n-1.
        device: where everything lives.
        precision: of the products of networks in `update`, "fp32" or "bf16"; weights, losses and
            the policy stay in float32.

    Raises:
        SaferlError: the task's actions or observations are not those that the method is for; a
            per-member value where none is possible; a number of values that differs from the
            number of members; an unknown precision.
    """

    Config: ClassVar[type[Any]] = AgentConfig
    discrete: ClassVar[bool] = False  # the action space the method is for
    per_member: ClassVar[frozenset[str]] = frozenset()  # fields that may differ between members
    pixels: ClassVar[bool | None] = False  # whether it learns from pixels; None: vectors as well
    needs_costs: ClassVar[bool] = False  # whether it cannot learn from data without costs
    needs_dataset: ClassVar[bool] = True  # whether an environment alone is not enough
    pretrained: ClassVar[bool] = False  # whether it is meant to begin with another run's networks
    online: ClassVar[bool] = False  # also learns in an environment; its Config is an OnlineConfig
    # Prefixes of state keys whose tensors all members share; every other has the member axis first.
    shared: ClassVar[frozenset[str]] = frozenset()
    # Earlier names of settings, and of parts of the state, to the present ones.
    renamed_settings: ClassVar[dict[str, str]] = {}
    renamed_state: ClassVar[dict[str, str]] = {}
    actor: Any  # a module that becomes the exported policy
    guardian: Any = None  # the calibrated guardian that it learns under, if any

    def __init__(
        self,
        spec: Spec,
        config: ConfigT,
        members: int | Sequence[int] = 1,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
    ):
        self.spec = spec
        self.config: ConfigT = config
        if precision not in PRECISIONS:
            raise unknown("precision", precision, PRECISIONS)
        self.precision = precision
        self.seeds = tuple(range(members)) if isinstance(members, int) else tuple(members)
        self.members = len(self.seeds)
        self.device = torch.device(device)
        if spec.discrete != self.discrete:
            kind = "discrete" if spec.discrete else "continuous"
            raise SaferlError(
                f"{type(self).__name__} is for {'discrete' if self.discrete else 'continuous'} "
                f"actions but the task's are {kind}: `saferl list` shows which agent takes which"
            )
        if self.pixels is not None and bool(spec.image) != self.pixels:
            kinds = ("pixels", "vectors") if self.pixels else ("vectors", "pixels")
            raise SaferlError(
                f"{type(self).__name__} learns from {kinds[0]} but the task's observations are "
                f"{kinds[1]}: `saferl list` shows which agent takes which"
            )
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            varies = isinstance(value, tuple) and not isinstance(field.default, tuple)
            if varies and len(value) != self.members:
                raise SaferlError(
                    f"{field.name} has {len(value)} values for {self.members} members"
                )
        self.updates = 0
        self.key: Any = self.update_key(0)
        self.random = MemberRandom(self.seeds, self.device, Stream.UPDATE)
        self.build(MemberRandom(self.seeds, "cpu", Stream.INIT))
        for module in vars(self).values():
            if isinstance(module, nn.Module):
                module.to(self.device)

    @classmethod
    def rename_settings(cls, values: Mapping[str, Any], warn: bool = True) -> dict[str, Any]:
        """Settings under their present names; an earlier name is accepted with a warning."""
        found = {}
        for key, value in values.items():
            if new := cls.renamed_settings.get(key):
                if warn:
                    line = f"{key} of {cls.__name__} is called {new}: use that name"
                    warnings.warn(line, FutureWarning, stacklevel=3)
                key = new
            found[key] = value
        return found

    @classmethod
    def make_config(cls, values: Mapping[str, Any]) -> Any:
        """The frozen config from plain values (YAML, the command line), checked field by field.

        Raises:
            SaferlError: an unknown key (naming the nearest), or a value of the wrong type.
        """
        fields = {field.name: field for field in dataclasses.fields(cls.Config)}
        values = cls.rename_settings(values)
        for key in values:
            if key not in fields:
                raise unknown("config key", key, fields)
        config = cls.Config(**{k: convert(k, v, fields[k].default) for k, v in values.items()})
        check(config, cls.per_member)
        return config

    # What a method provides.

    @classmethod
    def prepare(cls, dataset: Dataset, config: Any) -> Dataset:
        """The `Dataset` that the method trains on: all of it, unless it filters.

        Raises:
            SaferlError: it has no costs and the method needs them.
        """
        if cls.needs_costs and dataset.costs is None:
            raise SaferlError(no_costs(dataset.card.id))
        return dataset

    @classmethod
    def batch_extras(cls, config: Any) -> tuple[Extra, ...]:
        """Columns of a batch that it needs beside the transition (`saferl.replay.extras`)."""
        return ()

    def build(self, init: MemberRandom) -> None:
        """Make networks (on the CPU, from ``init``) and optimisers; set ``self.actor``."""
        raise NotImplementedError

    def rows(self, dataset: Dataset) -> Sequence[np.ndarray] | None:
        """Numbers of the rows of what `prepare` returned that each member draws; None: all."""
        return None

    def fit(self, dataset: Dataset, say: Callable[[str], None]) -> None:
        """What is learned once from the whole `Dataset` before the first update (not on resume)."""

    def update_key(self, update: int) -> Hashable:
        """Key of the control flow of update number ``update`` (from 1), found in ``self.key``.

        Updates of equal key run the same operations, so that engines record each kind once.
        """
        return None

    def learn(self, batch: Batch) -> Metrics:
        """One gradient step on a batch ``[M, B]``; metrics ``[M]`` stay on the device."""
        raise NotImplementedError

    @property
    def batch_rows(self) -> int:
        """Rows of the batch of an update, per member."""
        return self.config.batch_size

    def behaviour(self) -> Policy:
        """The policy that acts, by its ``sample``, while an agent learns in an environment."""
        return self.policy()

    def uses_costs(self) -> bool:
        """Whether it learns something from costs as it is configured."""
        return self.needs_costs

    def predict(self, episodes: int) -> tuple[Tensor, Tensor | None] | None:
        """Returns and costs ``[M, episodes]`` of `policy` in a model that the agent has learned.

        Undiscounted sums of raw rewards and of costs over whole episodes that begin as the logged
        ones do; costs are None where the model has none. None for an agent without a model.
        """
        return None

    # Shared by all agents.

    def update(self, batch: Batch, learn: Callable[[Batch], Metrics] | None = None) -> Metrics:
        """Run one update in the set precision: `learn`, or the function that an engine passes."""
        self.updates += 1
        self.key = self.update_key(self.updates)
        with compute_in(PRECISIONS[self.precision]):
            return (learn or self.learn)(batch)

    def policy(self) -> Policy:
        """The policy from raw observations to raw actions; shares the agent's weights."""
        return Policy(self.actor, self.spec, self.members).to(self.device)

    def scalar(self, name: str, axes: int = 1) -> float | Tensor:
        """A hyper-parameter: a float, or ``[M, 1…]`` with ``axes`` trailing axes if it varies."""
        value = getattr(self.config, name)
        if not isinstance(value, tuple):
            return value
        cache = self.__dict__.setdefault("_scalars", {})
        if (name, axes) not in cache:
            tensor = torch.tensor(value, dtype=torch.float32, device=self.device)
            cache[name, axes] = tensor.view(-1, *(1,) * axes)
        return cache[name, axes]

    def column(self, name: str) -> list[float]:
        """A hyper-parameter of every member."""
        return member_values(self.config, name, self.members)

    @staticmethod
    def target_of(network: ModuleT) -> ModuleT:
        """A frozen copy, to be moved by `polyak`."""
        return copy.deepcopy(network).requires_grad_(False)

    def adam(self, *networks: nn.Module | nn.Parameter, lr: float | Tensor) -> Any:
        """One Adam over stacked parameters: M exact Adams, since losses are summed over members."""
        parameters: list[nn.Parameter] = []
        for network in networks:
            parameters += [network] if isinstance(network, nn.Parameter) else network.parameters()
        recordable = self.device.type == "cuda"  # in a CUDA graph
        return torch.optim.Adam(parameters, lr=lr, fused=True, capturable=recordable)

    @staticmethod
    def decay(optimizer: torch.optim.Adam, rate: float, steps: int) -> None:
        """Set the rate of the next step, on a cosine from ``rate`` to 0 at ``steps``; 0: constant.

        A function of Adam's own counter on the device. The optimiser's rate has to be a tensor, so
        that it can fall without the host.
        """
        group = optimizer.param_groups[0]
        slots = optimizer.state.get(group["params"][0])
        if steps and slots:  # before its first step the rate is that of the start
            phase = (slots["step"].double() / steps).clamp(max=1.0)
            group["lr"].copy_(rate * 0.5 * (1 + torch.cos(math.pi * phase)))

    @staticmethod
    def minimise(optimizer: torch.optim.Optimizer, loss: Tensor, retain: bool = False) -> None:
        """Step on the sum of ``loss`` ``[M]`` with gradients of the optimiser's parameters alone.

        Nothing else receives a gradient, so none is computed to be thrown away, and a parameter
        that the loss does not reach is an error.
        """
        parameters = optimizer.param_groups[0]["params"]
        gradients = torch.autograd.grad(loss.sum(), parameters, retain_graph=retain)
        for parameter, gradient in zip(parameters, gradients):
            parameter.grad = gradient.contiguous()  # fused Adam takes the layout for granted
        optimizer.step()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training depends on, as one flat dictionary of tensors."""
        state = {"updates": torch.tensor(self.updates)}
        for name, value in vars(self).items():
            if isinstance(value, torch.optim.Optimizer):
                for index, slots in value.state_dict()["state"].items():
                    for slot, tensor in slots.items():
                        state[f"{name}.{index}.{slot}"] = tensor
            elif isinstance(value, (nn.Module, MemberRandom)):
                for key, tensor in value.state_dict().items():
                    state[f"{name}.{key}"] = tensor
            elif isinstance(value, nn.Parameter):
                state[name] = value.data
        return {key: tensor.detach() for key, tensor in state.items()}

    def warm_start(self, state: dict[str, Tensor]) -> None:
        """Begin from another agent's `state_dict`, of as many members or of one for all.

        Networks, free parameters and optimisers of the same name and shape are taken over, targets
        included; counters, multipliers and random streams are not, and what the other agent has not
        begins as always.

        Raises:
            SaferlError: other sizes, no actor, or another number of members.
        """
        own, taken = self.state_dict(), {}
        optimizers = tuple(k for k, v in vars(self).items() if isinstance(v, torch.optim.Optimizer))
        skipped = ("random.", "constraint.")
        for key, tensor in state.items():
            optimizer = key.startswith(tuple(f"{name}." for name in optimizers))
            if key == "updates" or key.startswith(skipped) or not (key in own or optimizer):
                continue
            if tensor.dim():
                if len(tensor) not in (1, self.members):
                    raise SaferlError(
                        f"the run to start from has {len(tensor)} members and this one has "
                        f"{self.members}: give it as many, or one that `saferl split` took out"
                    )
                tensor = tensor.expand(self.members, *tensor.shape[1:]).clone()
            if not optimizer and own[key].shape != tensor.shape:
                raise SaferlError(
                    f"{key} is {list(tensor.shape)} in the run to start from and "
                    f"{list(own[key].shape)} here: give both the same hidden layers and critics"
                )
            taken[key] = tensor
        for name in ("actor.", "critic."):
            mine, theirs = ({k for k in keys if k.startswith(name)} for keys in (own, state))
            if mine != theirs:
                kinds = "no" if not theirs else "another kind of"
                raise SaferlError(
                    f"the run to start from has {kinds} {name[:-1]} (in what differs: "
                    f"{', '.join(sorted(mine ^ theirs)[:2])}): start from an agent of SAC's or "
                    "CQL's family, and look at scale_log_std and the two layer_norm fields"
                )
        for name in optimizers:  # whole or not at all: slots belong to parameters by their position
            shapes = [p.shape for p in getattr(self, name).param_groups[0]["params"]]
            slots = {k: v for k, v in taken.items() if k.startswith(f"{name}.")}
            found = {int(k.split(".")[1]) for k in slots}
            fits = found == set(range(len(shapes))) and all(
                v.shape == shapes[int(k.split(".")[1])] for k, v in slots.items() if v.dim()
            )
            if not fits:
                taken = {k: v for k, v in taken.items() if k not in slots}
        self.load_state_dict(own | taken)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned, for an agent of the same spec, config and members."""
        self.updates = int(state["updates"])
        for name, value in vars(self).items():
            own = {k[len(name) + 1 :]: v for k, v in state.items() if k.startswith(f"{name}.")}
            if isinstance(value, torch.optim.Optimizer):
                slots: dict[int, dict[str, Tensor]] = {}
                for key, tensor in own.items():
                    index, slot = key.split(".")
                    slots.setdefault(int(index), {})[slot] = tensor.clone()
                groups = value.state_dict()["param_groups"]
                value.load_state_dict({"state": slots, "param_groups": groups})
            elif isinstance(value, (nn.Module, MemberRandom)):
                value.load_state_dict(own)
            elif isinstance(value, nn.Parameter):
                with torch.no_grad():
                    value.copy_(state[name])
