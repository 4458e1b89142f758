"""Our updates beside those of published code, from the same weights, batches and random numbers.

    git clone https://github.com/ltlhuuu/A2PR
    git clone https://github.com/corl-team/CORL
    python -m benchmarks published --a2pr A2PR --corl CORL      # minutes

A2PR's own code, and CORL's TD3+BC, IQL, CQL, Cal-QL and ReBRAC. Each class is built and stepped as
it is, on a bundled dataset; what its file imports for other purposes (d4rl, wandb) is replaced by
empty modules. Reported is how far apart the weights are. ReBRAC's file also needs jax, flax, optax
and chex; without them its rows are left out, and the command says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from unittest import mock

from benchmarks import report
from benchmarks.data import dataset_of
from benchmarks.runner import one_thread
from benchmarks.study import Study, add

DATASET = "saferl/hopper-velocity-medium-v0"
READ_AT = (1, 2, 10, 100, 1000)  # updates
EMPTY = ("d4rl", "gym", "pyrallis", "wandb")  # imported there, and of no use here
SOURCES = {
    "a2pr": "https://github.com/ltlhuuu/A2PR",
    "corl": "https://github.com/corl-team/CORL",
}


def load(path: Path) -> ModuleType:
    """A file of published code as a module."""
    path = path.resolve()
    spec = importlib.util.spec_from_file_location(f"published_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with imports_of(path.parent):
        sys.modules[spec.name] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def imports_of(folder: Path) -> Iterator[None]:
    """Modules are found in a folder, others are empty, and neither leaves a trace."""
    before = set(sys.modules)
    empty = {name: mock.MagicMock() for name in EMPTY if name not in before}
    sys.modules.update(empty)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            module = sys.modules[name]
            # A folder without __init__.py has no file, but a path.
            where = [getattr(module, "__file__", None), *getattr(module, "__path__", ())]
            if name in empty or any(str(x).startswith(str(folder)) for x in where):
                del sys.modules[name]


class Published:
    """One implementation beside our agent.

    Attributes:
        agent: the name of ours.
        source, file: where the code is.
        needs: modules that its file cannot do without, beside torch.
        settings: ours, where their defaults are others.
        theirs: their agent.
    """

    agent: str
    source: str
    file: str
    settings: ClassVar[dict[str, Any]] = {}
    needs: tuple[str, ...] = ()

    def __init__(self, folder: Path, data: Any, config: Any):
        self.config, self.sizes = config, (data.observation_dim, data.action_dim)
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
            self.theirs = self.build(load(folder / self.file))

    def build(self, module: ModuleType) -> Any:
        raise NotImplementedError

    def networks(self) -> dict[str, list[Any]]:
        """Their modules for each of our networks, in the order of an ensemble."""
        raise NotImplementedError

    def usable(self, batch: Any) -> Any:
        """The batch that both are given."""
        return batch

    def step(self, batch: list[Any], random: Any) -> None:
        """One update on ``[s, a, r, s', terminal]``, or with the return-to-go behind them."""
        self.theirs.train(batch)

    def others(self, ours: Any) -> list[tuple[str, Any, Any]]:
        """What is not a layer: a name, their parameter, our view of it."""
        return []

    def pairs(self, ours: Any) -> list[tuple[str, Any, Any]]:
        """The name of a network, their parameter, and our view of it."""
        from torch import nn

        found = self.others(ours)
        for name, modules in self.networks().items():
            own = _layers_of(getattr(ours, name))
            linear = [m for part in modules for m in part.modules() if isinstance(m, nn.Linear)]
            for layer, (weight, bias) in zip(linear, own, strict=True):
                found += [(name, layer.weight, weight.T), (name, layer.bias, bias)]
        return found


def _layers_of(net: Any) -> list[tuple[Any, Any]]:
    """Weights ``[in, out]`` and biases of the first member of one of our networks, as views."""

    def layers(mlp: Any, element: int = 0) -> list[tuple[Any, Any]]:
        return [(w[0, element], b[0, element, 0]) for w, b in zip(mlp.weights, mlp.biases)]

    if not hasattr(net, "decoder"):
        return [pair for element in range(net.mlp.ensemble) for pair in layers(net.mlp, element)]
    # A2PR's: the authors' heads of μ and log ς are the halves of our layer.
    z, (*first, (weight, bias)) = net.latent_dim, layers(net.encoder)
    heads = [(weight[:, :z], bias[:z]), (weight[:, z:], bias[z:])]
    return [*first, *heads, *layers(net.decoder)]


class AuthorsA2PR(Published):
    agent, source, file = "a2pr", "a2pr", "A2PR.py"

    def build(self, module: ModuleType) -> Any:
        values = {k: getattr(self.config, k) for k in ("alpha", "mask", "vae_weight", "discount")}
        return module.A2PR(*self.sizes, 1.0, "cpu", **values)

    def networks(self) -> dict[str, list[Any]]:
        names = "actor", "critic", "value", "vae", "actor_target", "critic_target"
        return {name: [getattr(self.theirs, name)] for name in names}

    def step(self, batch: list[Any], random: Any) -> None:
        s, a, r, s2, terminal = batch
        buffer = mock.Mock(**{"sample.return_value": [s, a, r, s2, 1 - terminal]})
        with drawing(random):
            self.theirs.train(buffer, len(s))


@contextlib.contextmanager
def drawing(random: Any) -> Iterator[None]:
    """``torch.randn_like`` gives our numbers."""
    import torch

    def numbers(like: Any) -> Any:
        return random.normal(*like.shape)[0]

    with mock.patch.object(torch, "randn_like", numbers):
        yield


def with_adam(rate: float, *modules: Any) -> list[Any]:
    """Each module and its optimiser, as CORL's classes take them."""
    from torch.optim import Adam

    return [x for module in modules for x in (module, Adam(module.parameters(), lr=rate))]


class CorlTD3BC(Published):
    agent, source, file = "td3_bc", "corl", "algorithms/offline/td3_bc.py"

    def build(self, module: ModuleType) -> Any:
        parts = [module.Actor(*self.sizes, 1.0), *(module.Critic(*self.sizes) for _ in range(2))]
        return module.TD3_BC(1.0, *with_adam(3e-4, *parts))

    def networks(self) -> dict[str, list[Any]]:
        t = self.theirs
        return {
            "actor": [t.actor], "critic": [t.critic_1, t.critic_2],
            "actor_target": [t.actor_target],
            "critic_target": [t.critic_1_target, t.critic_2_target],
        }  # fmt: skip

    def step(self, batch: list[Any], random: Any) -> None:
        with drawing(random):
            self.theirs.train(batch)


class CorlIQL(Published):
    agent, source, file = "iql", "corl", "algorithms/offline/iql.py"

    def build(self, module: ModuleType) -> Any:
        o, a = self.sizes
        parts = module.GaussianPolicy(o, a, 1.0), module.TwinQ(o, a), module.ValueFunction(o)
        return module.ImplicitQLearning(1.0, *with_adam(3e-4, *parts))

    def networks(self) -> dict[str, list[Any]]:
        t = self.theirs
        return {
            "actor": [t.actor], "critic": [t.qf.q1, t.qf.q2], "value": [t.vf],
            "critic_target": [t.q_target.q1, t.q_target.q2],
        }  # fmt: skip

    def others(self, ours: Any) -> list[tuple[str, Any, Any]]:
        return [("actor", self.theirs.actor.log_std, ours.actor.log_std[0, 0])]

    def step(self, batch: list[Any], random: Any) -> None:
        """Their ``.float()`` keeps the precision."""
        import torch

        dtype = torch.get_default_dtype()
        with mock.patch.object(torch.Tensor, "float", lambda tensor: tensor.to(dtype)):
            self.theirs.train(batch)


class CorlCQL(Published):
    agent, source, file = "cql", "corl", "algorithms/offline/cql.py"
    name = "ContinuousCQL"

    def build(self, module: ModuleType) -> Any:
        c, (o, a), depth = self.config, self.sizes, len(self.config.critic_hidden)
        critics = [module.FullyConnectedQFunction(o, a, True, depth) for _ in range(2)]
        actor = module.TanhGaussianPolicy(o, a, 1.0)
        return getattr(module, self.name)(
            *with_adam(c.critic_lr, *critics), *with_adam(c.actor_lr, actor), target_entropy=-a,
            policy_lr=c.actor_lr, qf_lr=c.critic_lr, bc_steps=c.bc_steps, cql_alpha=c.weight,
            cql_max_target_backup=c.max_backup,
        )  # fmt: skip

    def networks(self) -> dict[str, list[Any]]:
        t = self.theirs
        return {
            "actor": [t.actor], "critic": [t.critic_1, t.critic_2],
            "critic_target": [t.target_critic_1, t.target_critic_2],
        }  # fmt: skip

    def others(self, ours: Any) -> list[tuple[str, Any, Any]]:
        t = self.theirs
        return [
            ("actor", t.actor.log_std_multiplier.constant, ours.actor.multiplier[0, 0, 0]),
            ("actor", t.actor.log_std_offset.constant, ours.actor.offset[0, 0, 0]),
            ("temperature", t.log_alpha.constant, ours.log_temperature[0]),
        ]

    def step(self, batch: list[Any], random: Any) -> None:
        """They draw for π(s), a', u, π(·|s) and π(·|s'), each apart; we draw in one piece."""
        import torch
        from torch.distributions import normal

        c, (rows, a) = self.config, batch[1].shape
        backups = c.samples if c.max_backup else 1
        noise = random.normal(rows, 1 + 2 * c.samples + backups, a)[0]
        uniform = random.uniform(rows, c.samples, a)[0].mul_(2).sub_(1)
        mine, here, there, ahead = noise.split([1, c.samples, c.samples, backups], 1)
        parts = iter((mine[:, 0], ahead if c.max_backup else ahead[:, 0], here, there))

        def draw(shape: Any, dtype: Any, device: Any) -> Any:
            part = next(parts)
            assert part.shape == shape
            return part

        with (
            mock.patch.object(normal, "_standard_normal", draw),
            mock.patch.object(torch.Tensor, "uniform_", lambda into, *bounds: into.copy_(uniform)),
        ):
            self.theirs.train(batch)


class CorlCalQL(CorlCQL):
    agent, file, name = "cal_ql", "algorithms/finetune/cal_ql.py", "CalQL"
    settings: ClassVar[dict[str, Any]] = {"hidden": [256, 256, 256]}


class CorlReBRAC(Published):
    """JAX functions of weights, which are kept in torch layers between updates.

    Without LayerNorm, which theirs has behind the ReLU and ours before it. Their actor is stepped
    in every second update from the second on, as ours is; their loop begins with the first.
    """

    agent, source, file = "rebrac", "corl", "algorithms/offline/rebrac.py"
    needs = ("jax", "flax", "optax", "chex")
    settings: ClassVar[dict[str, Any]] = {
        "critic_layer_norm": False, "batch_size": 256, "actor_beta": 0.05, "critic_beta": 0.01,
    }  # fmt: skip

    def build(self, module: ModuleType) -> Any:
        from torch import nn

        def layers(*sizes: int) -> nn.Sequential:
            return nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(sizes)))

        (o, a), hidden = self.sizes, self.config.hidden
        self.nets = {
            name: [layers(o, *hidden, a)] if name.startswith("actor") else
                  [layers(o + a, *hidden, 1) for _ in range(2)]
            for name in ("actor", "critic", "actor_target", "critic_target")
        }  # fmt: skip
        self.states: tuple[Any, Any] | None = None
        self.updates = 0
        return module

    def networks(self) -> dict[str, list[Any]]:
        return self.nets

    def usable(self, batch: Any) -> Any:
        """Rows without a next action, which their loader leaves out, give way to another row."""
        import torch

        known = (batch.extras["has_next_action"] + batch.terminals)[0] > 0
        rows = torch.where(known, torch.arange(len(known)), int(known.nonzero()[0]))
        return batch.map(lambda field: field[:, rows])

    def step(self, batch: list[Any], random: Any) -> None:
        import jax
        import torch

        c, module = self.config, self.theirs
        s, a, r, s2, terminal, next_a, _ = (x.squeeze(-1) for x in batch)
        jax.config.update("jax_enable_x64", s.dtype == torch.float64)
        names = "states", "actions", "rewards", "next_states", "dones", "next_actions"
        fields = {k: jax.numpy.asarray(x.numpy())
                  for k, x in zip(names, (s, a, r, s2, terminal, next_a))}  # fmt: skip
        if self.states is None:
            self.states = self._start()
        actor, critic = self.states
        noise = jax.numpy.asarray(random.normal(*a.shape)[0].numpy())
        self.updates += 1
        common = {
            "key": jax.random.PRNGKey(0), "actor": actor, "critic": critic, "batch": fields,
            "gamma": c.discount, "metrics": mock.MagicMock(), "actor_bc_coef": c.actor_beta,
            "critic_bc_coef": c.critic_beta, "tau": c.tau, "policy_noise": c.policy_noise,
            "noise_clip": c.noise_clip,
        }  # fmt: skip
        with mock.patch.object(jax.random, "normal", lambda key, shape: noise):
            if self.updates % c.policy_interval == 0:
                _, *states, _ = module.update_td3(normalize_q=c.normalize_q, **common)
            else:
                _, *states, _ = module.update_td3_no_targets(**common)
        self.states = tuple(states)
        self._read()

    def _start(self) -> tuple[Any, Any]:
        import optax

        module, c = self.theirs, self.config
        size, depth = c.hidden[0], len(c.hidden)
        nets = (
            module.DetActor(self.sizes[1], size, False, depth),
            module.EnsembleCritic(size, 2, False, depth),
        )
        kinds = module.ActorTrainState, module.CriticTrainState
        return tuple(
            kind.create(
                apply_fn=net.apply, tx=optax.adam(learning_rate=rate),
                params=self._params(name), target_params=self._params(f"{name}_target"),
            )
            for kind, net, name, rate in zip(
                kinds, nets, ("actor", "critic"), (c.actor_lr, c.critic_lr)
            )
        )  # type: ignore[return-value]  # fmt: skip

    def _params(self, name: str) -> Any:
        """Weights of torch layers as flax names them."""
        import jax.numpy as jnp
        import numpy as np

        columns = [[(x.weight.T, x.bias) for x in net] for net in self.nets[name]]
        found = {}
        for number, each in enumerate(zip(*columns)):
            arrays = [np.stack([part.detach().numpy() for part in parts]) for parts in zip(*each)]
            if name.startswith("actor"):
                arrays = [array[0] for array in arrays]
            kernel, bias = map(jnp.array, arrays)
            found[f"Dense_{number}"] = {"kernel": kernel, "bias": bias}
        return {"params": found if name.startswith("actor") else {"VmapCritic_0": found}}

    def _read(self) -> None:
        """Their weights into the torch layers."""
        import numpy as np
        import torch

        assert self.states is not None
        for state, name in zip(self.states, ("actor", "critic")):
            for params, target in ((state.params, name), (state.target_params, f"{name}_target")):
                layers = params["params"].get("VmapCritic_0", params["params"])
                for e, net in enumerate(self.nets[target]):
                    for number, layer in enumerate(net):
                        part = layers[f"Dense_{number}"]
                        kernel, bias = np.array(part["kernel"]), np.array(part["bias"])
                        if name == "critic":
                            kernel, bias = kernel[e], bias[e]
                        layer.weight.data.copy_(torch.from_numpy(kernel).T)
                        layer.bias.data.copy_(torch.from_numpy(bias))


KINDS: tuple[type[Published], ...] = (
    AuthorsA2PR, CorlTD3BC, CorlIQL, CorlCQL, CorlCalQL, CorlReBRAC,
)  # fmt: skip


def compare(
    kind: type[Published], folder: Path, size: int | None, updates: int, precision: str
) -> list[dict[str, Any]]:
    """How far apart the weights of each network are, of how far they have moved."""
    import torch

    from saferl.registry import agent_class
    from saferl.replay import make_buffer
    from saferl.rng import MemberRandom

    cls, data = agent_class(kind.agent), dataset_of(DATASET, size)
    config = cls.make_config(kind.settings)
    spec = data.spec(config)
    dtype = getattr(torch, precision)
    torch.set_default_dtype(dtype)
    try:
        ours, published, first = cls(spec, config, [0]), kind(folder, data, config), []
        for _, parameter, own in published.pairs(ours):
            parameter.data = own.detach().to(dtype, copy=True)
            first.append(parameter.data.clone())
        buffer = make_buffer(data, spec, [0], extras=cls.batch_extras(config))
        random, rows = MemberRandom([0], stream=1), []
        for update in range(1, updates + 1):
            batch = buffer.sample(config.batch_size).map(lambda field: field.to(dtype))
            batch = published.usable(batch)
            fields = [batch.observations, batch.actions, batch.rewards[..., None],
                      batch.next_observations, batch.terminals[..., None]]  # fmt: skip
            fields += [extra[..., None] for extra in batch.extras.values()]
            published.step([field[0] for field in fields], random)
            ours.update(batch)
            if update not in READ_AT and update != updates:
                continue
            apart: dict[str, list[float]] = {}
            for (name, parameter, own), start in zip(published.pairs(ours), first):
                sums = apart.setdefault(name, [0.0, 0.0])
                sums[0] += float((own.detach() - parameter.data).square().sum())
                sums[1] += float((parameter.data - start).square().sum())
            ratios = {n: (d / m) ** 0.5 if m else None for n, (d, m) in apart.items()}
            rows.append({"agent": kind.agent, "file": f"{kind.source}/{kind.file}",
                         "precision": precision, "updates": update, "apart": ratios})  # fmt: skip
        return rows
    finally:
        torch.set_default_dtype(torch.float32)


class Fidelity(Study):
    name = "published"

    def options(self, parser: ArgumentParser) -> None:
        for name, address in SOURCES.items():
            add(parser, f"--{name}", None, f"a clone of {address}", type=Path)
        add(parser, "--updates", 100)
        add(parser, "--size", None, "transitions of the dataset (default 100 000)", type=int)

    def check(self, parser: ArgumentParser, options: Namespace) -> None:
        for kind in () if options.report else KINDS:
            check(parser, getattr(options, kind.source), kind)

    def measure(self, options: Namespace) -> dict[str, Any]:
        one_thread()
        rows = []
        for kind in KINDS:
            folder = getattr(options, kind.source)
            if absent := [name for name in kind.needs if importlib.util.find_spec(name) is None]:
                print(f"{kind.agent} is left out: pip install {' '.join(absent)}", file=sys.stderr)
                continue
            for precision in ("float64", "float32"):
                rows += compare(kind, folder, options.size, options.updates, precision)
                told = f"{kind.agent} {precision}: {rows[-1]['apart']}"
                print(told, file=sys.stderr, flush=True)
        return self.header(options) | {"rows": rows}

    def report(self, content: dict[str, Any]) -> str:
        names = list(dict.fromkeys(name for row in content["rows"] for name in row["apart"]))
        table = []
        for row in content["rows"]:
            cells = [row["apart"].get(name, "") for name in names]
            cells = ["–" if x is None else x and f"{x:.1e}" for x in cells]
            table.append([row["agent"], row["file"], row["precision"], row["updates"], *cells])
        heads = ["agent", "published code", "precision", "updates", *names]
        return (
            "# Our updates and published code\n\nBoth begin with the same weights and get the same "
            f"batches of 256 of {DATASET} and the same random numbers. Distance of the weights of "
            "both, of the distance that they have moved; –: not moved yet. Rounding is all that "
            "may be in it: some 1e-15 in float64 and 1e-7 in float32, more where little has moved "
            "(targets), and much more once a row lies on the other side of a threshold for one of "
            "the two (an advantage of 0, a ReLU), which in float32 happens within 100 updates.\n\n"
            f"{report.table(heads, table)}\n\n`{content['command']}`, {content['date']}, one "
            f"thread of {content['machine']['cpu']}.\n"
        )


STUDY = Fidelity()


def check(parser: ArgumentParser, folder: Path | None, kind: type[Published]) -> None:
    if folder is None or not (folder / kind.file).is_file():
        parser.error(f"--{kind.source} must be a clone of {SOURCES[kind.source]}")
