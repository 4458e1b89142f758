"""Engines: the same updates run in other ways, and what a device lacks."""

from __future__ import annotations

import pytest
import torch

from saferl.errors import SaferlError
from saferl.nn import compute_in
from saferl.rng import MemberRandom
from saferl.training import engine as engines
from saferl.training.engine import Engine, check_precision, pick_engine
from tests.agents.plain import make
from tests.conformance.test_agents import Setup, agent_class

CPU = torch.device("cpu")


def engine(kind: str = "eager", name: str = "td3_bc", **settings) -> Engine:
    setup = Setup(agent_class(name), **settings)
    return Engine(setup.agent, setup.buffer, kind)


def test_auto_is_eager_on_the_cpu_and_recorded_on_a_gpu():
    assert pick_engine("auto", CPU) == "eager"
    assert pick_engine("auto", torch.device("cuda")) == "cuda_graph"


def test_what_the_device_lacks_is_said_in_a_line(monkeypatch):
    with pytest.raises(SaferlError, match="unknown engine 'compiled': did you mean 'compile'"):
        pick_engine("compiled", CPU)
    with pytest.raises(SaferlError, match="cuda_graph needs a GPU but the run is on cpu: use auto"):
        pick_engine("cuda_graph", CPU)
    monkeypatch.setattr(engines.shutil, "which", lambda name: None)
    with pytest.raises(SaferlError, match=r"needs a C\+\+ compiler"):
        pick_engine("compile", CPU)


def test_bf16_is_refused_where_it_would_be_emulated(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    check_precision("fp32", CPU)
    with pytest.raises(SaferlError, match="bf16 needs a CPU with AVX512-BF16 or AMX.*use fp32"):
        check_precision("bf16", CPU)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    check_precision("bf16", CPU)
    with pytest.raises(SaferlError, match="unknown precision 'fp16'"):
        Setup(agent_class("bc"), precision="fp16")


class Replayed:
    """A CUDA graph's stand-in: nothing happens when it is recorded, all when it is replayed."""

    made: list[int]

    def __init__(self, engine: Engine, size: int):
        self.engine, self.size = engine, size
        Replayed.made.append(size)

    def replay(self) -> None:
        for _ in range(self.size):
            self.engine._update()


@pytest.mark.parametrize("name, settings", [("td3_bc", {"policy_interval": 3}), ("iql", {})])
def test_blocks_make_every_update_once(monkeypatch, name, settings):
    """Whatever the interval of actor updates, blocks follow the sequence that eager follows."""
    Replayed.made = []
    monkeypatch.setattr(engines, "Recorded", Replayed)
    blocks, plain = engine(name=name, **settings), engine(name=name, **settings)
    blocks.kind = "cuda_graph"
    for steps in (7, 130, 1, 64):
        blocks.run(steps)
        plain.run(steps)
    assert blocks.agent.updates == plain.agent.updates == 202
    expected = plain.agent.state_dict()
    for key, tensor in blocks.agent.state_dict().items():
        assert torch.equal(tensor, expected[key]), key
    ours, theirs = blocks.read(), plain.read()
    assert all((ours[key] == theirs[key]).all() for key in theirs)
    # One graph for each place in the interval and each length.
    places = settings.get("policy_interval", 1)
    assert sorted(Replayed.made) == [1] * min(2, places) + [20] * places


def test_metrics_are_means_since_the_last_read():
    one, two = engine(), engine()
    one.run(4)
    values = [two.agent.update(two.buffer.sample(16)) for _ in range(4)]
    means = one.read()
    for key in ("critic_loss", "actor_loss"):  # the actor's is there in two updates of four
        expected = torch.stack([v[key] for v in values if key in v]).mean(0)
        torch.testing.assert_close(torch.from_numpy(means[key]), expected)
    assert one.read() == {}


def test_noted_draws_are_drawn_again():
    plain, noted = MemberRandom((3, 4)), MemberRandom((3, 4))
    with noted.noting() as requests:
        first = [noted.normal(2, 3), noted.uniform(4), noted.integers(10, 5)]
    again = noted.draw(requests)
    with noted.handing_out(again):
        handed = [noted.normal(2, 3), noted.uniform(4), noted.integers(10, 5)]
    expected = [plain.normal(2, 3), plain.uniform(4), plain.integers(10, 5)]
    assert all(torch.equal(a, b) for a, b in zip(first, expected))
    expected = [plain.normal(2, 3), plain.uniform(4), plain.integers(10, 5)]
    assert all(torch.equal(a, b) and torch.equal(b, c) for a, b, c in zip(again, handed, expected))


@pytest.mark.parametrize("name", ["td3_bc", "cql", "a2pr"])
def test_bf16_products_and_float32_everything_else(name):
    """Products are rounded to 8 bits; weights, losses and the policy are not."""
    settings = {"name": name, "hidden": [32, 32]}
    exact, rounded = engine("eager", **settings), engine("eager", precision="bf16", **settings)
    exact.run(20)
    rounded.run(20)
    for key, tensor in rounded.agent.state_dict().items():
        assert tensor.dtype != torch.bfloat16, key
    ours, theirs = rounded.read(), exact.read()
    # What rounding may leave as it is: Adam's first steps, which take signs, and shares of rows.
    coarse = {"temperature"} if name == "cql" else {"advantageous_share", "cloned_share"}
    for key in theirs:
        assert ours[key] == pytest.approx(theirs[key], rel=0.05, abs=0.05), key
        assert key in coarse or (ours[key] != theirs[key]).any(), key
    # The policy is computed in float32 from float32 weights.
    rounded.agent.load_state_dict(exact.agent.state_dict())
    rows = torch.randn(3, 5, 3)
    assert torch.equal(rounded.agent.policy()(rows), exact.agent.policy()(rows))


def test_precision_reaches_the_blocks_of_many_actions():
    """CQL's penalty runs through `ManyActions`, whose sums over blocks stay in float32."""
    exact, rounded = make("cql", samples=3), make("cql", samples=3)
    rows = torch.randn(2, 50, 3)
    actions = torch.rand(2, 50, 4, 2)
    gradients = []
    for agent, dtype in ((exact, None), (rounded, torch.bfloat16)):
        with compute_in(dtype):
            values = agent.critic.many(rows, actions)
        assert values.dtype == torch.float32
        parameters = list(agent.critic.parameters())
        gradients.append(torch.autograd.grad(values.square().sum(), parameters))
    for one, two in zip(*gradients):
        assert two.dtype == torch.float32
        assert not torch.equal(one, two)
        assert (one - two).norm() < 0.03 * one.norm()
