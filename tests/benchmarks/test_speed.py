"""The study `speed`: the floor, the parts at a toy scale, verdicts. Timings are made by hand."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from benchmarks import workers
from benchmarks.speed import bounds, engines, floors, tables, throughput
from saferl.registry import agent_class, names
from saferl.replay import Batch
from saferl.spec import Spec

# The floor ---------------------------------------------------------------------------------------

COUNTED = ("bc", "discrete_bc", "td3_bc", "iql", "sac", "cql", "discrete_cql", "a2pr")


def test_counts_of_one_pass():
    # 5 rows through 3 → 4 → 2, two networks: by hand.
    forward = 2 * 5 * (12 + 8)
    assert floors.Pass((3, 4, 2), 5, 2).total() == forward
    assert floors.Pass((3, 4, 2), 5, 2, weights=True).total() == 2 * forward + 2 * 5 * 8
    assert floors.Pass((3, 4, 2), 5, 2, inputs=1).total() == forward + 2 * 5 * (8 + 4)
    assert floors.Pass((3, 4), 5, weights=True).total() == 2 * 5 * 12


def under_a_limit(agent: str, o: int, a: int, config) -> list[floors.Pass]:
    """What the cost critic adds (and A2PR's V of costs)."""
    rows, k = config.batch_size, getattr(config, "policy_interval", 1)
    critic = (o + a, *(config.critic_hidden or config.hidden), 1)
    target, trained = floors.Pass(critic, rows, 2), floors.Pass(critic, rows, 2, True)
    through = floors.Pass(critic, rows, 2, inputs=a, every=k)
    if agent == "sac":
        return [target, trained, through]
    after = [floors.Pass(critic, rows, 2)] * 2  # at (s', a') and (s, a), Qc stepped
    value = floors.Pass((o, *config.value_hidden, 1), rows, weights=True)
    return [target, trained, *after, value, through, floors.Pass(critic, rows, 2, every=k)]


@pytest.mark.parametrize(
    ("agent", "limit", "own"),
    [(agent, None, True) for agent in COUNTED]
    + [("sac", None, False), ("a2pr", 10.0, True), ("sac", 10.0, True)],
)
def test_an_update_multiplies_what_the_floor_counts(agent, limit, own):
    """Product for product; so no gradient of a parameter is formed that nothing uses."""
    o, a, rows = 7, 3, 64
    cls = agent_class(agent)
    layers = {"hidden": [32, 24], "critic_hidden": [32, 16, 24], "value_hidden": [32, 8],
              "vae_hidden": [48, 40], "batch_size": rows, "samples": 4}  # fmt: skip
    layers |= {} if limit is None else {"cost_limit": limit}
    layers |= {} if own else {"critic_hidden": []}  # the critics' layers are the actor's
    config = cls.make_config({k: v for k, v in layers.items() if hasattr(cls.Config(), k)})
    bounds_of_actions = () if cls.discrete else ((-1.0,) * a, (1.0,) * a)
    learner = cls(Spec(o, a, cls.discrete, *bounds_of_actions, horizon=50), config, [0])
    batch = Batch(
        torch.randn(1, rows, o),
        torch.randint(a, (1, rows)) if cls.discrete else torch.rand(1, rows, a) * 2 - 1,
        torch.randn(1, rows),
        None if limit is None else torch.rand(1, rows),
        torch.randn(1, rows, o),
        torch.zeros(1, rows),
    )
    learner.update(batch)
    expected, extra = 0.0, [] if limit is None else under_a_limit(agent, o, a, config)
    for p in [*floors.passes(agent, o, a, config), *extra]:
        seen = p.total()
        if (p.weights or p.inputs) and p.sizes[-1] == 1 and p.rows == rows:
            # The gradient at the last hidden layer of a critic is formed element by element (but
            # not where many actions go through at once).
            seen -= p.networks * p.rows * p.sizes[-2]
        expected += seen / p.every
    assert floors.counted(lambda: learner.update(batch)) == expected  # two: actors alternate
    count = floors.multiply_adds(agent, o, a, config) + sum(p.total() / p.every for p in extra)
    assert 0.95 * count < expected < 1.05 * count


def test_agents_without_a_list_are_counted():
    assert floors.counted(lambda: torch.ones(2, 3) @ torch.ones(3, 5)) == 30
    with pytest.raises(KeyError):
        floors.passes("unheard_of", 3, 2, agent_class("bc").Config())


def test_the_rate_of_a_product(monkeypatch):
    monkeypatch.setitem(floors.PRODUCT, "cpu", 32)
    ticks = iter(range(100))
    product = floors.Product("fp32", "cpu")
    assert product.rate(lambda: float(next(ticks))) == 32**3  # one tick each
    assert torch.allclose(product.out, product.a @ product.b)


# Throughput --------------------------------------------------------------------------------------


class InProcess:
    """The worker's handlers without a process."""

    def __init__(self):
        self.ours = engines.Ours("cpu")

    def __call__(self, do, **arguments):
        return json.loads(json.dumps(getattr(self.ours, do)(**arguments)))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setitem(floors.PRODUCT, "cpu", 64)
    monkeypatch.setattr(throughput.Bench, "ours", lambda self, **_: InProcess())
    options = argparse.Namespace(
        device="cpu", clock="wall", quick=True, full=False, rounds=2, seconds=1
    )
    return throughput.Bench(options, None)


def document(**parts):
    common_fields = {"command": "x", "date": "2026", "clock": "wall"}
    return {
        "machine": {"cpu": "C", "gpu": None, "amx": False},
        "quick": True,
        "parts": {name: {"rows": rows} | common_fields for name, rows in parts.items()},
    }


def test_every_part_runs_and_is_reported(bench, monkeypatch, tmp_path):
    """In one process and with the eager engine; a GPU runs the same code."""
    monkeypatch.setattr(throughput, "KINDS", ("eager", "cuda_graph"))
    beside = [bench.beside("a2pr"), bench.beside("bc")]
    assert set(beside[0]["sides"]) >= {"saferl", "plain"}
    assert "plain" not in beside[1]["sides"]
    for row in beside:
        assert set(row["sides"]) | set(row["missing"]) >= {"saferl", "saferl bf16", "d3rlpy",
                                                            "d3rlpy compile"}  # fmt: skip
        assert all(side["ms"] > side["update_ms"] > 0 for side in row["sides"].values())
    matrix = bench.matrix("discrete_bc")
    cells = {(c["kind"], c["precision"], c["members"]): c for c in matrix["rows"]}
    assert len(cells) == 2 * 2 * 3
    for (kind, precision, members), cell in cells.items():
        if kind == "cuda_graph":
            assert "GPU" in cell["missing"]
        if (kind, precision) == ("eager", "fp32"):
            assert cell["ms_per_member"] == cell["ms"] / members
            assert cell["multiply_adds"] == members * cells["eager", "fp32", 1]["multiply_adds"]
            assert cell["over_floor"] > 1
    long = bench.long("td3_bc", 2)
    run = long["rows"][0]
    assert run["minutes_per_million"] == pytest.approx(run["seconds"] * 1e6 / 60)
    assert 0 < run["sampling_share"] < 1 and 0 < run["logging_share"] < 1
    assert run["estimated_bytes"] > 0 and run["engine"] == "eager"
    assert run["memory_bytes"] >= 0 and run["resident_bytes"] >= 0
    assert run["profile"]["operations"] > 10 and run["profile"]["bound_by"]

    found = document(beside=beside, matrix=[matrix], long=[long])
    text = tables.report(found)
    for word in ("plain", "eager ms", "d3rlpy has no a2pr", "needs a GPU", "bound by"):
        assert word in text
    tables.plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", names("agents"))
def test_every_agent_can_be_timed(name):
    """Its products are counted, and it runs on the engine; drq_bc from pixels."""
    task = engines.Task(name, {"rows": 2000, "observation_dim": 5, "action_dim": 2}, "eager",
                        quick=True)  # fmt: skip
    subject = engines.Subject.of(task, "cpu")
    count, source = subject.multiply_adds(name)
    assert count > 0 and source in ("from the layer sizes", "torch's counter")
    assert subject.run(2) > 0
    assert subject.engine.agent.updates >= 2


def test_what_fails_is_a_line(bench):
    assert "missing" in bench.ours()("make", key="x", agent="nothing", data=bench.data)
    broken = throughput.attempt("x", bench.long, "nothing", 1)
    assert "nothing" in broken["rows"][0]["missing"]

    def ends(agent):
        raise RuntimeError("worker ended\nwith status 1")

    failed = throughput.attempt("x", ends, "bc")
    assert failed == {"agent": "bc", "failed": "with status 1"}
    for part in throughput.PARTS:
        assert "failed: with status 1: bc" in tables.report(document(**{part: [failed]}))


def test_comparison_of_sides():
    ours, other = [(1.0, 9.0), (2.0, 8.0), (1.0, 1.0)], [(10.0, 10.0), (5.0, 10.0), (1.0, 3.0)]
    found = throughput.compare(other, ours, [5.0, 5.0, 1.0], split=True)
    assert found["ms"] == 15 and found["update_ms"] == 10
    assert found["over_ours"] == 2 and found["over_ours_spread"] == [1.5, 2]
    assert found["update_over_ours"] == 1.25
    assert found["over_floor"] == 2 and found["over_floor_spread"] == [2, 3]
    assert found["sampling_share"] == 0.5
    assert "sampling_share" not in throughput.compare(other, ours, [5.0] * 3, split=False)


def side(**values):
    numbers = {"over_ours": 1.0, "update_over_ours": 1.0, "sampling_share": 0.01, "over_floor": 1.7}
    return numbers | values


def test_verdicts_on_a_cpu():
    row = {
        "agent": "cql",
        "sides": {
            "saferl": side(),
            "saferl bf16": side(update_over_ours=0.3),
            "plain": side(update_over_ours=2.0),
            "d3rlpy": side(over_ours=1.1),
        },
    }
    words = [line.split(":")[0] for line in tables.beside_verdicts(row, amx=False)]
    assert words == ["MISSED", "met", "met", "met"]  # 0.15 of the plain one's
    row["sides"]["saferl bf16"] = side(update_over_ours=0.92)
    lines = tables.beside_verdicts(row, amx=False)
    assert lines[1].startswith(
        "MISSED: cql: update of saferl bf16 / of the plain implementation 0.46"
    )
    row["agent"], row["sides"]["plain"] = "a2pr", side(update_over_ours=1 / 0.86)
    row["sides"]["saferl compile"] = side(update_over_ours=0.95)
    lines = tables.beside_verdicts(row, amx=False)
    assert lines[1].startswith("met: a2pr: update of saferl compile / of")
    assert lines[0].startswith("MISSED: a2pr: update of saferl / of the plain implementation 0.86")
    assert lines[2].startswith("not on this machine: a2pr: update of saferl bf16 / of")
    row["sides"]["plain"] = side(update_over_ours=1 / 0.84)
    assert tables.beside_verdicts(row, amx=False)[0].startswith("met")
    assert tables.beside_verdicts({"agent": "a2pr", "sides": {}}, False) == [
        "MISSED: a2pr was not measured"
    ]


def test_verdicts_on_long_runs():
    run = {
        "side": "saferl", "precision": "fp32", "members": 16, "minutes_per_million": 14.0,
        "logging_share": 0.015, "sampling_share": 0.02, "memory_bytes": 105, "estimated_bytes": 100,
    }  # fmt: skip
    rows = [run, run | {"precision": "bf16"}, {"side": "d3rlpy", "members": 1}]
    found = document(long=[{"agent": "a2pr", "rows": rows}])
    found["quick"] = False
    words = [line.split(":")[0] for line in tables.verdicts(found)]
    assert words == ["MISSED", "met"]  # minutes are of GPUs
    found["machine"]["gpu"] = "G"
    words = [line.split(":")[0] for line in tables.verdicts(found)]
    assert words == ["met", "MISSED", "met"]
    run["memory_bytes"] = 80
    assert tables.verdicts(found)[-1].startswith("MISSED")
    found["quick"] = True
    assert tables.verdicts(found) == []


@pytest.mark.parametrize(
    ("products", "others", "floor", "cuda", "bound"),
    [
        (600, 100, 0.5e-3, True, "arithmetic"),
        (600, 100, 0.1e-3, True, "products too small for the full rate"),
        (200, 500, 0.1e-3, True, "memory (element-wise passes)"),
        (100, 100, 0.1e-3, True, "launches"),
        (100, 100, 0.1e-3, False, "the interpreter"),
    ],
)
def test_what_bounds_an_update(products, others, floor, cuda, bound):
    """Microseconds per update, in two updates of 1 ms."""
    work = [("sm90_xmma_gemm_f32", 2 * products, 20), ("vectorized_elementwise", 2 * others, 60)]
    found = bounds.breakdown(work, 2, 4, 1e-3, floor, cuda)
    assert found["bound_by"] == bound
    assert found["share"]["products"] == pytest.approx(products / 1000)
    assert found["share"]["idle"] == pytest.approx(1 - (products + others) / 1000)
    assert (found["operations"], found["launches"]) == (40, 2)


def test_products_are_told_from_other_kernels():
    for name in ("aten::baddbmm", "aten::mm", "ampere_sgemm_128x64_nn", "nvjet_hsh_128x256",
                 "void cutlass::Kernel<x>", "gemvx::kernel"):  # fmt: skip
        assert bounds.is_product(name)
    for name in ("aten::comm", "aten::sum", "vectorized_elementwise_kernel", "triton_poi_fused_0"):
        assert not bounds.is_product(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_the_gpu_benchmark_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        throughput.STUDY.run(["--device", "cuda"])
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "no CUDA GPU is here: run this on a machine that has one\n")


@pytest.mark.slow
@pytest.mark.timeout(900)  # it compiles
def test_the_command_runs_and_keeps_parts(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "speed", "--quick", "--no-peer", "--agents",
               "td3_bc", "--out", str(tmp_path), "--parts"]  # fmt: skip
    for part in ("long", "beside"):
        subprocess.run([*command, part], check=True, capture_output=True, cwd=workers.ROOT)
    command[command.index("td3_bc")] = "bc"
    subprocess.run([*command, "beside"], check=True, capture_output=True, cwd=workers.ROOT)
    written = json.loads((tmp_path / "speed.json").read_text())
    assert set(written["parts"]) == {"long", "beside"}
    assert [row["agent"] for row in written["parts"]["beside"]["rows"]] == ["bc", "td3_bc"]
    assert all(row["sides"]["saferl"]["ms"] > 0 for row in written["parts"]["beside"]["rows"])
    assert {"machine", "versions", "data"} <= set(written)
    assert "td3_bc" in (tmp_path / "speed.md").read_text()
