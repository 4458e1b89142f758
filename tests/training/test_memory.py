"""What a run needs in memory, said before it begins, against what is counted while it runs."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import saferl
from saferl.errors import SaferlError
from saferl.registry import agent_class, names
from saferl.replay import ReplayBuffer, buffer_class
from saferl.spec import Spec
from saferl.training import memory
from saferl.training.memory import Estimate, Ledger, announce, estimate, is_out_of_memory
from tests.conformance.test_agents import Setup, make_config
from tests.conftest import point_dataset

ROOT = Path(__file__).parents[2]
MIB = 2**20
CONTINUOUS = Spec(11, 3, action_low=(-1.0,) * 3, action_high=(1.0,) * 3, horizon=20)
DISCRETE = Spec(11, 4, discrete=True, horizon=20)
PIXELS = dataclasses.replace(CONTINUOUS, observation_dim=900, image=(9, 10, 10), frame_stack=3)


def spec_of(cls) -> Spec:
    return DISCRETE if cls.discrete else PIXELS if cls.pixels else CONTINUOUS


# Those with shared tables learn them from a dataset first, which the figures here leave out.
@pytest.fixture(params=[name for name in names("agents") if not agent_class(name).shared])
def cls(request):
    return agent_class(request.param)


def test_the_ledger_counts_what_lives():
    with Ledger() as ledger:
        a = torch.zeros(256)
        assert ledger.bytes == 1024
        view = a.view(16, 16)[3:]
        view.add_(1)
        assert ledger.bytes == 1024  # the same storage
        b = a.expand(4, 256).clone()
        assert ledger.bytes == 5 * 1024 == ledger.peak
        del b
        assert (ledger.bytes, ledger.peak) == (1024, 5 * 1024)
        del a
        assert ledger.bytes == 1024  # the view holds it
        del view
        assert ledger.bytes == 0
        out = torch.empty(0)
        torch.ones(256, out=out)
        assert ledger.bytes == 1024  # it has grown
        parameter = torch.nn.Parameter(torch.zeros(256))
        hidden = (parameter * 2).exp()  # autograd keeps the result of exp alone
        assert ledger.bytes == 3 * 1024
        del hidden
        assert ledger.bytes == 2 * 1024


def test_sixteen_members_are_within_a_tenth(cls):
    config = make_config(cls, hidden=[32, 32], batch_size=32)
    expected = estimate(cls, spec_of(cls), config, 16, rows=1000)
    with Ledger() as ledger:
        agent = cls(spec_of(cls), config, 16)
        extras = cls.batch_extras(config)
        buffer = buffer_class(spec_of(cls))(spec_of(cls), 1000, range(16), extras=extras)
        buffer.size = buffer.capacity
        for _ in range(4):
            agent.update(buffer.sample(agent.batch_rows))
        assert expected.total == pytest.approx(ledger.peak, rel=0.1)
        assert expected.buffer == buffer.nbytes
        # What persists is exact but for counters, which do not grow with the members.
        assert 0 <= ledger.bytes - expected.buffer - 16 * expected.state < 400
    if agent_class("bc") is cls:
        assert expected.fixed < 100  # nothing else but counters


def test_persistent_bytes_are_those_of_state_and_gradients(cls):
    one, two = Setup(cls, (0,)), Setup(cls, (0, 1))
    sizes = []
    for setup in (one, two):
        setup.train(2)
        tensors = {
            key: tensor
            for key, tensor in setup.agent.state_dict().items()
            if not key.startswith("random.")  # in the generators, not in tensors
        }
        for value in vars(setup.agent).values():  # limits in other units are not in the state
            listed = value if isinstance(value, list) else [value]  # MOORL's copy is a list
            tensors |= {id(one): one for one in listed if isinstance(one, torch.Tensor)}
            if isinstance(value, torch.nn.Module):
                tensors |= {id(buffer): buffer for buffer in value.buffers()}
        gradients = [
            parameter.grad
            for value in vars(setup.agent).values()
            if isinstance(value, torch.optim.Optimizer)
            for parameter in value.param_groups[0]["params"]
        ]
        storages = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for tensor in [*tensors.values(), *gradients]
            if tensor is not None
        }
        sizes.append(sum(storages.values()))
    setup = one
    found = estimate(cls, setup.spec, setup.agent.config, 2, rows=64)
    assert found.state == sizes[1] - sizes[0]


def test_an_update_needs_more_with_more_rows(cls):
    small, large = (
        estimate(cls, spec_of(cls), make_config(cls, batch_size=size), 4, rows=100)
        for size in (64, 256)
    )
    assert small.state == large.state
    assert small.work < large.work


def test_the_delayed_update_is_in_the_peak():
    """The actor's step of every second update takes more than the critic's alone."""
    cls = agent_class("td3_bc")
    config = make_config(cls, hidden=[64, 64], batch_size=64)

    class Never(cls):
        def update_key(self, update):
            return False

    assert cls(CONTINUOUS, config).update_key(2)
    found, without = (estimate(c, CONTINUOUS, config, 2, rows=10) for c in (cls, Never))
    assert found.each > without.each
    late = make_config(cls, hidden=[64, 64], batch_size=64, policy_interval=50)
    assert estimate(cls, CONTINUOUS, late, 2, rows=10).each == found.each


def test_rows_of_their_own_count_per_member_and_a_file_not_at_all():
    cls = agent_class("sac")
    config = make_config(cls)
    shared = estimate(cls, CONTINUOUS, config, 4, 1000)
    own = estimate(cls, CONTINUOUS, config, 4, 0, own_rows=1000)
    mapped = estimate(cls, CONTINUOUS, config, 4, 1000, memory_map=True)
    costless = estimate(cls, CONTINUOUS, config, 4, 1000, costs=False)
    rows = ReplayBuffer(CONTINUOUS, 1000, [0]).rows.nbytes
    assert shared.buffer == rows and own.buffer == mapped.buffer == 0
    assert own.state == mapped.state + rows and own.total == mapped.total + 4 * rows
    assert shared.total == mapped.total + rows
    assert costless.buffer == rows - 4000


def test_settings_that_differ_between_members_are_estimated():
    cls = agent_class("td3_bc")
    config = make_config(cls, alpha=[1.0, 1.0, 5.0, 5.0])
    found = estimate(cls, CONTINUOUS, config, (0, 1, 0, 1), 100)
    assert found.members == 4 and found.settings == 2
    plain = estimate(cls, CONTINUOUS, make_config(cls), 4, 100)
    assert 0 <= found.each - plain.each < 1000  # the values themselves


def test_an_agent_that_fits_first_is_estimated_with_what_it_fitted():
    base = agent_class("bc")

    class Fitting(base):
        def fit(self, dataset, say):
            say("fitting")
            self.rows = torch.zeros(self.members, len(dataset), 100)

        def learn(self, batch):
            return super().learn(batch) | {"rows": self.rows.sum((1, 2))}

    config = make_config(base)
    data = point_dataset()
    spec = data.spec(config)
    plain = estimate(base, spec, config, 2, 100, dataset=data)
    found = estimate(Fitting, spec, config, 2, 100, dataset=data)
    assert found.state - plain.state == 400 * len(data)


def test_nothing_random_is_drawn():
    cls = agent_class("a2pr")

    class Global(cls):
        def learn(self, batch):
            torch.rand(3)
            return super().learn(batch)

    torch.manual_seed(3)
    before = torch.get_rng_state()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    estimate(Global, CONTINUOUS, make_config(cls), 4, 100)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def example(members=16, settings=1, buffer=300 * MIB) -> Estimate:
    return Estimate(members, torch.device("cpu"), buffer, 100, 40 * MIB, 18 * MIB, settings)


def test_lines():
    assert example().line(22 * 1024 * MIB) == (
        "memory: 1.2 GiB for 16 members (buffer 300.0 MiB + 58.0 MiB each) of 22.0 GiB free on cpu"
    )
    shared = dataclasses.replace(example(1), buffer=0, fixed=2 * MIB)
    assert shared.line(100 * MIB) == (
        "memory: 60.0 MiB for 1 member (2.0 MiB shared + 58.0 MiB each) of 100.0 MiB free on cpu"
    )
    assert example().peak() is None  # counted by CUDA's allocator alone


@pytest.mark.parametrize("members", [1, 2, 5, 16])
def test_what_is_said_to_fit_fits(members):
    found = example()
    need = dataclasses.replace(found, members=members).total
    assert found.fits(need) == members and found.fits(need - 1) == members - 1
    dataclasses.replace(found, members=members).check(need)
    with pytest.raises(SaferlError):
        dataclasses.replace(found, members=members).check(need - 1)


@pytest.mark.parametrize(
    ("found", "free", "message"),
    [
        (example(), 1000, "16 members need 1.2 GiB but 1000.0 MiB is free on cpu: 12 members fit "
                          "(--members 12)"),
        (example(), 400, "16 members need 1.2 GiB but 400.0 MiB is free on cpu: 1 member fits "
                         "(--members 1)"),
        (example(12, 3), 900, "12 members need 996.0 MiB but 900.0 MiB is free on cpu: 10 members "
                              "fit (--members 3 with 3 settings each)"),
        (example(12, 3), 420, "12 members need 996.0 MiB but 420.0 MiB is free on cpu: 2 members "
                              "fit: give fewer of the 3 settings at once"),
        (example(1), 100, "1 member needs 358.0 MiB but 100.0 MiB is free on cpu, and the replay "
                          "buffer alone takes 300.0 MiB: train on fewer rows (Dataset.subset, "
                          "--dataset-option size=N) or pass --memory-map FILE"),
        (example(2, buffer=MIB), 50, "2 members need 117.0 MiB but 50.0 MiB is free on cpu: not "
                                     "even one fits: lower batch_size or the sizes of hidden "
                                     "layers with --set"),
    ],
)  # fmt: skip
def test_a_run_that_does_not_fit_says_how_many_members_do(found, free, message):
    with pytest.raises(SaferlError) as caught:
        found.check(free * MIB)
    assert str(caught.value) == message


def test_the_need_is_said_before_it_is_judged(monkeypatch):
    cls = agent_class("bc")
    arguments = cls, CONTINUOUS, make_config(cls), 4, 100, "cpu", "fp32"
    lines = []
    need = announce(lines.append, *arguments)
    assert need == estimate(*arguments)
    assert len(lines) == 1 and lines[0].startswith("memory: ") and "4 members" in lines[0]
    monkeypatch.setattr(memory, "free_memory", lambda device: need.total - 1)
    with pytest.raises(SaferlError, match=r"4 members need .*: 3 members fit \(--members 3\)"):
        announce(lines.append, *arguments)
    assert len(lines) == 2


def test_a_run_that_does_not_fit_makes_no_environments(monkeypatch, tmp_path):
    """As many as members, each of which may take seconds."""
    monkeypatch.setattr(memory, "free_memory", lambda device: MIB)

    def env():
        pytest.fail("an environment was made")

    with pytest.raises(SaferlError, match="members need"):
        saferl.train("bc", point_dataset(), env=env, steps=1, members=50, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_out_of_memory_says_how_many_members_fit(monkeypatch):
    # Held: 300 + 16 · 40 MiB. With the 100 that are free, 740 MiB are left for members of 58.
    monkeypatch.setattr(memory, "free_memory", lambda device: 100 * MIB)
    assert str(example().out_of_memory(1200, "runs/a")) == (
        "out of memory on cpu at step 1200 with 16 members of 58.0 MiB: 12 members fit "
        "(--members 12); or take members out of runs/a with `saferl split`, and continue each by "
        "itself"
    )
    # If all should have fitted, one less is the most that can be promised.
    monkeypatch.setattr(memory, "free_memory", lambda device: 10_000 * MIB)
    assert "15 members fit (--members 15)" in str(example().out_of_memory(0))
    assert str(example(1).out_of_memory(0, "runs/a")).endswith(
        "not even one fits: lower batch_size or the sizes of hidden layers with --set"
    )


def test_memory_that_runs_out_before_the_first_update_is_one_line(monkeypatch, tmp_path):
    def fails(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(ReplayBuffer, "from_dataset", fails)
    with pytest.raises(SaferlError, match="out of memory on cpu at step 0 with 2 members"):
        saferl.train(
            "bc", point_dataset(), steps=1, members=2, out=tmp_path / "run", progress=False
        )
    assert not (tmp_path / "run").exists()


def test_failed_allocations_are_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(SaferlError("out of memory"))


def test_a_probe_that_does_not_fit_is_one_line():
    cls = agent_class("bc")

    class Huge(cls):
        def learn(self, batch):
            torch.empty(2**60, dtype=torch.uint8)

    with pytest.raises(SaferlError, match=r"1 member of Huge needs more than the .* free on cpu"):
        estimate(Huge, CONTINUOUS, make_config(cls), 4, 100)

    class Wrong(cls):
        def learn(self, batch):
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        estimate(Wrong, CONTINUOUS, make_config(cls), 4, 100)


RESIDENT = """
import gc, torch
from saferl.replay import ReplayBuffer
from saferl.registry import agent_class
from saferl.spec import Spec
from saferl.training.memory import estimate

def status(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024

torch.set_num_threads(1)
cls = agent_class("a2pr")
spec, config = Spec(17, 6, action_low=(-1.0,) * 6, action_high=(1.0,) * 6), cls.make_config({})
found = estimate(cls, spec, config, 16, 10_000)
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
base = status("VmRSS")
agent, buffer = cls(spec, config, 16), ReplayBuffer(spec, 10_000, range(16))
buffer.rows.uniform_()
buffer.size = buffer.capacity
for _ in range(6):
    agent.update(buffer.sample(agent.batch_rows))
print(found.total, status("VmHWM") - base)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_a_process_grows_by_the_estimate():
    """Sixteen members of A2PR as published, with every large block given back to the system.

    By default glibc keeps freed blocks below 32 MiB for later and the process holds up to 1.8
    times the tensors' bytes; that reserve is no need, but it is what `top` shows.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}
    output = subprocess.run([sys.executable, "-c", RESIDENT], env=environment, check=True,
                            cwd=ROOT, capture_output=True, text=True).stdout  # fmt: skip
    estimated, grown = map(int, output.split())
    assert estimated == pytest.approx(grown, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_allocator_agrees_on_a_gpu(cls):
    config = make_config(cls, hidden=[256, 256], batch_size=256)
    found = estimate(cls, spec_of(cls), config, 16, 10_000, "cuda")
    agent = cls(spec_of(cls), config, 16, "cuda")
    buffer = ReplayBuffer(spec_of(cls), 10_000, range(16), "cuda")
    buffer.size = buffer.capacity
    for _ in range(4):
        agent.update(buffer.sample(256))
    assert found.total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
