"""Sources: files in the true layouts of D4RL, DSRL and Minari, tables, and what goes wrong."""

import http.server
import socket
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pandas as pd
import pytest

from saferl import io
from saferl.data import Dataset, from_d4rl, from_dataframe, from_minari, load_dataset, to_minari
from saferl.data.sources import d4rl, dsrl, fetch
from saferl.errors import SaferlError

N = 300
REAL = Path(__file__).parents[2] / ".." / "shared" / "data"


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """No test sees the user's caches or the network."""
    monkeypatch.setenv("SAFERL_DATA_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "d4rl"))
    monkeypatch.setenv("DSRL_DATASET_DIR", str(tmp_path / "dsrl"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("SAFERL_D4RL_MIRROR", closed_port())
    monkeypatch.setenv("SAFERL_DSRL_MIRROR", closed_port())
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


def closed_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{s.getsockname()[1]}"


def refused(match, function, *args, **options):
    with pytest.raises(SaferlError, match=match) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def d4rl_arrays(successors=True, timeouts=True, dims=(11, 3)):
    """What a D4RL file of locomotion holds; float64 rewards as in v0."""
    random = np.random.default_rng(0)
    states = random.normal(size=(N + 1, dims[0])).astype(np.float32)
    values = {
        "observations": states[:-1],
        "actions": random.uniform(-1, 1, (N, dims[1])).astype(np.float32),
        "rewards": random.normal(size=N),
        "terminals": np.isin(np.arange(N), [49, 219]),
        "infos/qpos": random.normal(size=(N, 6)),
        "infos/qvel": random.normal(size=(N, 6)),
        "metadata/algorithm": np.bytes_("SAC"),
        "metadata/iteration": np.int64(3),
        "metadata/policy/fc0/weight": random.normal(size=(4, 4)),
    }
    if timeouts:
        values["timeouts"] = np.isin(np.arange(N), [149, 249, 299])
    if successors:
        values["next_observations"] = states[1:]
    return values


def write(path: Path, values: dict, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, value in values.items():
            file.create_dataset(name, data=value, **(options if np.ndim(value) else {}))
    return path


def same(dataset, values, rows=slice(None)):
    for name in ("observations", "actions", "rewards", "terminals"):
        expected = np.asarray(values[name])
        expected = expected.reshape(len(expected), *getattr(dataset, name).shape[1:])[rows]
        np.testing.assert_array_equal(
            getattr(dataset, name), expected.astype(getattr(dataset, name).dtype)
        )


# D4RL -------------------------------------------------------------------------------------------


def test_d4rl_v2_layout(tmp_path):
    values = d4rl_arrays()
    path = write(tmp_path / "d4rl" / "hopper_medium-v2.hdf5", values)
    for dataset in (load_dataset("d4rl/hopper-medium-v2"), load_dataset(path)):
        same(dataset, values)
        np.testing.assert_array_equal(dataset.next_observations, values["next_observations"])
        np.testing.assert_array_equal(dataset.timeouts, values["timeouts"])
        assert dataset.costs is None and dataset.problems == ()
        card = dataset.card
        assert (card.id, card.env_id, card.horizon) == ("d4rl/hopper-medium-v2", "Hopper-v4", 1000)
        assert card.reference_returns == (-20.272305, 3234.3) and card.licence == "CC BY 4.0"
        assert card.action_low == (-1.0,) * 3
        assert dataset.normalised_score(3234.3) == 100
    assert load_dataset("d4rl/hopper-medium-v2", horizon=7).card.horizon == 7


def test_d4rl_v0_layouts_without_successors_and_timeouts(tmp_path):
    values = d4rl_arrays(successors=False)
    write(tmp_path / "d4rl" / "hopper_medium.hdf5", values)
    dataset = load_dataset("d4rl/hopper-medium-v0")
    kept = np.setdiff1d(np.arange(N), [149, 249, 299])
    same(dataset, values, kept)
    assert kept[dataset.timeouts].tolist() == [148, 248, 298]
    live = ~dataset.terminals
    np.testing.assert_array_equal(
        dataset.next_observations[live], values["observations"][kept[live] + 1]
    )
    # Without flags the steps are counted: 100 here, so rows 149 and 249 … as above; 219 + 100 > N.
    values = d4rl_arrays(successors=False, timeouts=False)
    write(tmp_path / "d4rl" / "pen-v0_demos_clipped.hdf5", values)
    dataset = load_dataset("d4rl/pen-human-v0")
    kept = np.setdiff1d(np.arange(N), [149, 299])
    same(dataset, values, kept)
    assert kept[dataset.timeouts].tolist() == [148]
    assert any("every 100th step" in note for note in dataset.card.notes)


def test_d4rl_adroit_actions_are_clipped_and_locomotion_refused(tmp_path):
    values = d4rl_arrays()
    values["actions"][3, 1] = 1.4  # as in the human demonstrations
    path = write(tmp_path / "x.hdf5", values)
    dataset = d4rl.load("door-human-v1", path=path)
    assert dataset.actions[3, 1] == 1 and "actions of 1 of 300 rows were clipped" in str(
        dataset.card.notes
    )
    refused(r"x.hdf5: actions\[3, 1\] is 1.4", d4rl.load, "hopper-medium-v2", path=path)


FAMILIES = ["maze2d-umaze-v1", "antmaze-large-play-v2", "kitchen-mixed-v0", "relocate-cloned-v1"]


@pytest.mark.parametrize("id", [*FAMILIES, "ant-expert-v2", "walker2d-random-v1"])
def test_d4rl_families_load_by_id(tmp_path, id):
    relative = d4rl.card(id).origin.rsplit("/", 1)[-1]
    write(tmp_path / "d4rl" / relative, d4rl_arrays(successors=False))
    dataset = load_dataset(f"d4rl/{id}")
    assert dataset.card.id == f"d4rl/{id}" and len(dataset) == N - 3
    assert d4rl.id_of_file(relative) == id


def test_d4rl_reference_table():
    assert len(d4rl.ids()) == 148
    for id in d4rl.ids():
        card = d4rl.card(id)
        low, high = card.reference_returns
        assert low < high and 100 <= card.horizon <= 1000
        assert card.origin.startswith("http://rail.eecs.berkeley.edu/datasets/offline_rl/")
        assert card.origin.endswith(".hdf5")
    assert d4rl.card("antmaze-umaze-v0").horizon == 700
    assert d4rl.card("maze2d-large-v1").reference_returns == (6.7, 273.99)
    assert d4rl.card("pen-human-longhorizon-v1").horizon == 200


def test_d4rl_objects_of_the_users_package():
    values = {k: v for k, v in d4rl_arrays(successors=False).items() if "metadata" not in k}
    env = SimpleNamespace(
        get_dataset=lambda: values,
        spec=SimpleNamespace(id="my-hopper-v0"),
        ref_min_score=-20.0,
        ref_max_score=3000.0,
        _max_episode_steps=100,
    )
    dataset = from_d4rl(env)
    kept = np.setdiff1d(np.arange(N), [149, 249, 299])
    same(dataset, values, kept)
    assert (dataset.card.id, dataset.card.horizon) == ("d4rl/my-hopper-v0", 100)
    assert dataset.normalised_score(3000) == 100
    env.spec.id = "hopper-medium-v0"
    assert from_d4rl(env).card.env_id == "Hopper-v4"
    same(from_d4rl(values, env_id="Hopper-v4"), values, kept)
    # qlearning_dataset has successors and no timeouts: a seam is where they are not the next row.
    rows = kept[kept < N - 1]
    made = {k: values[k][rows] for k in ("observations", "actions", "rewards", "terminals")}
    made["next_observations"] = values["observations"][rows + 1]
    back = from_d4rl(made, id="hopper-medium-v0")
    assert rows[back.timeouts].tolist() == [148, 248] and back.card.reference_source == "D4RL"
    del values["rewards"]
    refused("lacks rewards; present: observations, actions", from_d4rl, values)
    refused("takes an environment with get_dataset", from_d4rl, 3)


# DSRL -------------------------------------------------------------------------------------------


def dsrl_file(path: Path, dims=(60, 2), episodes=6):
    """gzip, float32, rewards, costs and terminals as columns [N, 1]."""
    random, n = np.random.default_rng(0), 50 * episodes
    values = {
        "observations": random.normal(size=(n, dims[0])).astype(np.float32),
        "next_observations": random.normal(size=(n, dims[0])).astype(np.float32),
        "actions": random.uniform(-1, 1, (n, dims[1])).astype(np.float32),
        "rewards": random.normal(size=(n, 1)).astype(np.float32),
        "costs": (random.uniform(size=(n, 1)) < 0.1).astype(np.float32),
        "terminals": np.zeros((n, 1), bool),
        "timeouts": np.arange(n) % 50 == 49,
    }
    values["next_observations"][:-1] = values["observations"][1:]
    return write(path, values, compression="gzip"), values


def test_dsrl_layout(tmp_path):
    _, values = dsrl_file(tmp_path / "dsrl" / "SafetyPointGoal1Gymnasium-v0-100-2022.hdf5")
    for id in ("OfflinePointGoal1-v0", "OfflinePointGoal1Gymnasium-v0", "PointGoal1"):
        dataset = load_dataset(f"dsrl/{id}")
        same(dataset, values)
        np.testing.assert_array_equal(dataset.costs, values["costs"][:, 0])
    assert dataset.card.id == "dsrl/OfflinePointGoal1Gymnasium-v0"
    assert dataset.card.horizon == 1000 and dataset.card.env_id is None
    assert "cost limits are 20, 40, 80" in dataset.card.notes[0]
    np.testing.assert_allclose(dataset.normalised_score(30.071114857340543), 100)
    assert any("6 episodes, but the published file has 2022" in p for p in dataset.problems)
    assert dsrl.card("HopperVelocity").env_id == "saferl/HopperVelocity-v0"


def test_dsrl_refusals(tmp_path):
    path, values = dsrl_file(tmp_path / "x.hdf5", dims=(12, 2))
    refused("have 12 and 2 columns, dsrl/.* has 60 and 2", dsrl.load, "PointGoal1", path=path)
    del values["costs"]
    path = write(tmp_path / "y.hdf5", values)
    refused("a DSRL file has costs as well", dsrl.load, "PointGoal1", path=path)
    refused("did you mean 'OfflineBallRun-v0'", load_dataset, "dsrl/OfflineBalRun-v0")
    assert len(dsrl.ids()) == 59 and len({dsrl.task(i)["file"] for i in dsrl.ids()}) == 38


# Files and downloads ----------------------------------------------------------------------------


class Server:
    """Files over HTTP with Range; ``cut`` closes the connection after that many bytes."""

    def __init__(self, folder: Path):
        self.cut, self.requests, outer = [], [], self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append((self.path, self.headers.get("Range")))
                path = folder / self.path.lstrip("/")
                if not path.is_file():
                    return self.send_error(404)
                data, start = path.read_bytes(), 0
                tag = f'"{len(data)}-{data[-1]}"'
                wanted = self.headers.get("Range")
                if wanted and self.headers.get("If-Range", tag) == tag:
                    start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                    if start >= len(data):
                        self.send_response(416)
                        self.send_header("Content-Range", f"bytes */{len(data)}")
                        return self.end_headers()
                    self.send_response(206)
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                else:
                    self.send_response(200)
                self.send_header("ETag", tag)
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                stop = start + outer.cut.pop(0) if outer.cut else None
                self.wfile.write(data[start:stop])

            def log_message(self, *args):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(tmp_path, monkeypatch):
    server = Server(tmp_path / "www")
    monkeypatch.setenv("SAFERL_D4RL_MIRROR", server.url + "/")
    monkeypatch.setenv("SAFERL_DSRL_MIRROR", server.url)
    yield server
    server.http.shutdown()
    server.http.server_close()


HOPPER = "gym_mujoco_v2/hopper_medium-v2.hdf5"


def test_download_once_and_verify(tmp_path, server):
    values = d4rl_arrays()
    write(tmp_path / "www" / HOPPER, values)
    same(load_dataset("d4rl/hopper-medium-v2"), values)
    same(load_dataset("d4rl/hopper-medium-v2"), values)
    assert server.requests == [(f"/{HOPPER}", None)]
    kept = tmp_path / "cache" / "d4rl"
    assert sorted(p.name for p in kept.iterdir()) == [
        "hopper_medium-v2.hdf5", "hopper_medium-v2.hdf5.sha256"]  # fmt: skip
    recorded = (kept / "hopper_medium-v2.hdf5.sha256").read_text().split()
    assert recorded == [fetch.sha256(tmp_path / "www" / HOPPER), "hopper_medium-v2.hdf5"]
    with (kept / "hopper_medium-v2.hdf5").open("r+b") as file:
        file.seek(-9, 2)
        file.write(b"x")
    refused("was recorded when it was fetched: delete it", load_dataset, "d4rl/hopper-medium-v2")


def test_download_resumes(tmp_path, server, monkeypatch):
    remote = write(tmp_path / "www" / HOPPER, d4rl_arrays())
    size = remote.stat().st_size
    server.cut = [5000, 7000]  # two interruptions within one call
    load_dataset("d4rl/hopper-medium-v2")
    assert [r[1] for r in server.requests] == [None, "bytes=5000-", "bytes=12000-"]
    target = tmp_path / "cache" / "d4rl" / "hopper_medium-v2.hdf5"
    assert target.read_bytes() == remote.read_bytes()
    # A later call goes on from what an earlier one left …
    target.unlink()
    part = target.with_name(target.name + ".part")
    part.write_bytes(remote.read_bytes()[:9000])
    load_dataset("d4rl/hopper-medium-v2")
    assert server.requests[-1][1] == "bytes=9000-" and target.stat().st_size == size
    # … also when nothing was missing but the last step, and starts over when the file changed.
    target.rename(part)
    load_dataset("d4rl/hopper-medium-v2")
    assert server.requests[-1][1] == f"bytes={size}-" and target.stat().st_size == size
    target.unlink()
    part.write_bytes(b"of another version")
    part.with_name(part.name + ".version").write_text('"old"')
    load_dataset("d4rl/hopper-medium-v2")
    assert target.read_bytes() == remote.read_bytes()
    assert not part.exists()


def test_download_that_keeps_ending_early(tmp_path, server):
    write(tmp_path / "www" / HOPPER, d4rl_arrays())
    server.cut = [5000, 1000, 1000]
    refused("ended early, 7000 bytes are in .*run again to resume", load_dataset,
            "d4rl/hopper-medium-v2")  # fmt: skip
    target = tmp_path / "cache" / "d4rl" / "hopper_medium-v2.hdf5"
    assert not target.exists()  # half a file never passes for a whole one
    load_dataset("d4rl/hopper-medium-v2")
    assert server.requests[-1][1] == "bytes=7000-"


def test_download_refusals(tmp_path, server, monkeypatch):
    refused("answered 404 .*: put the file at .*SAFERL_D4RL_MIRROR", load_dataset,
            "d4rl/hopper-medium-v2")  # fmt: skip
    page = tmp_path / "www" / HOPPER
    page.parent.mkdir(parents=True)
    page.write_text("<html>Sorry</html>")
    refused("is not an HDF5 file", load_dataset, "d4rl/hopper-medium-v2")
    whole = write(tmp_path / "whole.hdf5", d4rl_arrays()).read_bytes()
    page.write_bytes(whole[:-4000])
    refused("is truncated", load_dataset, "d4rl/hopper-medium-v2")
    assert list((tmp_path / "cache" / "d4rl").glob("*.hdf5*")) in (
        [], [tmp_path / "cache/d4rl/hopper_medium-v2.hdf5.part.version"])  # fmt: skip
    page.write_bytes(whole)
    usage = SimpleNamespace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda folder: usage)
        refused("free some space or set SAFERL_DATA_DIR", load_dataset, "d4rl/hopper-medium-v2")
    monkeypatch.setenv("SAFERL_D4RL_MIRROR", "/a/folder")
    refused("must be an http:// or https:// URL", load_dataset, "d4rl/hopper-medium-v2")


def test_no_network_is_told_at_once_with_a_remedy(tmp_path):
    start = time.monotonic()
    text = refused("cannot reach http://127.0.0.1", load_dataset, "d4rl/hopper-medium-v2")
    assert HOPPER in text and str(tmp_path / "cache/d4rl/hopper_medium-v2.hdf5") in text
    text = refused("cannot reach http://127.0.0.1", load_dataset, "dsrl/OfflineCarCircle-v0")
    assert str(tmp_path / "cache/dsrl/SafetyCarCircle-v0-100-1450.hdf5") in text
    refused("put it there", load_dataset, "d4rl/hopper-medium-v2", download=False)
    assert time.monotonic() - start < 5


def test_a_silent_host_is_given_up(monkeypatch):
    release = threading.Event()

    def hang(*arguments, **options):
        release.wait(30)
        raise OSError("given up")

    monkeypatch.setattr(fetch.socket, "create_connection", hang)
    assert fetch.unreachable("http://example.org", seconds=0.1) == "no answer within 0.1 s"
    release.set()


def test_damaged_and_foreign_files(tmp_path):
    path = write(tmp_path / "a.hdf5", d4rl_arrays())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused("is truncated or not an HDF5 file", load_dataset, path)
    path.write_text("hello")
    refused("is truncated or not an HDF5 file", load_dataset, path)
    values = d4rl_arrays()
    del values["rewards"], values["terminals"]
    write(path, values)
    refused("missing keys rewards, terminals; present: .*observations", load_dataset, path)
    values = d4rl_arrays()
    values["observations"][5, 2] = np.nan
    refused("a.hdf5: observations: nan at row 5, column 2", load_dataset, write(path, values))
    values["observations"] = values["observations"][:-1]
    refused("observations have 299 rows", load_dataset, write(path, values))
    (tmp_path / "a.npz").write_bytes(b"PK nothing")
    refused("not a readable .npz", load_dataset, tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", observations=np.zeros(3))
    refused("missing keys actions, rewards, terminals; present: observations", load_dataset,
            tmp_path / "a.npz")  # fmt: skip


def test_not_enough_memory_is_said_before(tmp_path, monkeypatch):
    path = write(tmp_path / "a.hdf5", d4rl_arrays())
    monkeypatch.setattr(io.Path, "read_text", lambda self: "MemAvailable:   1 kB")
    refused("a.hdf5 needs .* GB of memory but 0.0 GB are available", load_dataset, path)


def test_unknown_ids_name_the_nearest(tmp_path):
    refused("did you mean 'hopper-medium-v2'", load_dataset, "d4rl/hoper-medium-v2")
    refused("did you mean 'd4rl/hopper-medium-v2'", load_dataset, "hopper-medium-v2")
    refused("did you mean 'dsrl/OfflineCarRun-v0'", load_dataset, "offlinecarrun-v0")
    refused("unknown dataset family 'd4lr': did you mean 'd4rl'", load_dataset, "d4lr/x")
    refused("no such file", load_dataset, tmp_path / "gone.hdf5")
    refused("is a folder", load_dataset, tmp_path)
    (tmp_path / "a.pkl").touch()
    refused("cannot tell what .pkl holds", load_dataset, tmp_path / "a.pkl")


# Minari -----------------------------------------------------------------------------------------


def minari_dataset(id="test/maze-v0", observations=None, cost=True, actions=None):
    """Two episodes of 4 and 3 steps, written with Minari's own interface."""
    minari = pytest.importorskip("minari")
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    maze = spaces.Dict(
        {
            "observation": spaces.Box(-9, 9, (4,), np.float64),
            "achieved_goal": spaces.Box(-9, 9, (2,), np.float64),
            "desired_goal": spaces.Box(-9, 9, (2,), np.float64),
            "mode": spaces.Discrete(3),
        }
    )
    random, buffers = np.random.default_rng(0), []
    for steps, terminated in ((4, True), (3, False)):
        infos = {"success": np.zeros(steps + 1, bool)}
        if cost:
            infos["cost"] = np.arange(steps + 1.0)
        ends = np.arange(steps) == steps - 1
        states = {k: random.uniform(-1, 1, (steps + 1, *s.shape)) for k, s in maze.items()}
        states["mode"] = np.arange(steps + 1) % 3
        buffers.append(
            EpisodeBuffer(
                observations=states if observations is None else states["observation"],
                actions=random.uniform(-2, 2, (steps, 2)) if actions is None
                else np.arange(steps) % 2,
                rewards=random.normal(size=steps),
                terminations=ends & terminated,
                truncations=ends & (not terminated),
                infos=infos,
            )
        )  # fmt: skip
    with pytest.warns(UserWarning):  # minari asks for author, description …
        dataset = minari.create_dataset_from_buffers(
            id,
            buffers,
            observation_space=maze if observations is None else maze["observation"],
            action_space=spaces.Box(-2, 2, (2,)) if actions is None else actions,
        )
    return dataset, buffers


def test_minari_dictionary_observations_costs_and_card():
    written, (first, second) = minari_dataset()
    written.storage.update_metadata({"ref_min_score": 1.0, "ref_max_score": 3.0})
    dataset = load_dataset("minari/test/maze-v0", env_id="PointMaze_UMaze-v3")
    from gymnasium import spaces

    space = spaces.Dict({k: spaces.Box(-9, 9, (n,)) for k, n in
                         (("observation", 4), ("achieved_goal", 2), ("desired_goal", 2))}
                        | {"mode": spaces.Discrete(3)})  # fmt: skip
    row = 2
    one = {k: v[row] for k, v in first.observations.items()}
    np.testing.assert_allclose(dataset.observations[row], spaces.flatten(space, one), rtol=1e-6)
    one = {k: v[-1] for k, v in second.observations.items()}
    np.testing.assert_allclose(dataset.next_observations[-1], spaces.flatten(space, one), rtol=1e-6)
    assert dataset.costs.tolist() == [1, 2, 3, 4, 1, 2, 3]  # the reset's entry is left out
    assert dataset.terminals.tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert dataset.timeouts.tolist() == [0] * 6 + [1]
    assert dataset.card.id == "minari/test/maze-v0" and dataset.card.action_high == (2.0, 2.0)
    assert dataset.card.env_id == "PointMaze_UMaze-v3" and dataset.normalised_score(2.0) == 50


def test_minari_objects_without_costs_and_with_discrete_actions():
    from gymnasium import spaces

    space = spaces.Discrete(2, start=0)
    source, buffers = minari_dataset("test/d-v0", observations="box", cost=False, actions=space)
    dataset = from_minari(source)
    assert dataset.costs is None and dataset.discrete and dataset.action_dim == 2
    assert dataset.actions.tolist() == [0, 1, 0, 1, 0, 1, 0]
    np.testing.assert_allclose(dataset.rewards[:4], buffers[0].rewards, rtol=1e-6)


def test_minari_export_gives_the_same_dataset_back():
    values = d4rl_arrays()
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    timeouts = values["timeouts"] & (np.arange(N) < 299)  # leaves a fragment
    made = Dataset.from_arrays(
        **{k: values[k] for k in names} | {"timeouts": timeouts}, env_id="Hopper-v4",
        action_low=-1, action_high=1, costs=np.arange(N) % 2, reference_returns=(0, 9),
    )  # fmt: skip
    written = to_minari(made, "test/export-v0")
    assert written.total_episodes == 5 and written.env_spec.id == "Hopper-v4"
    costs = written[0].infos["cost"]
    assert len(costs) == 51 and costs[1:].tolist() == made.costs[:50].tolist()
    back = load_dataset("minari/test/export-v0")
    assert back.fingerprint == made.fingerprint and back.card == made.card
    assert back.fragment == made.fragment == (250, 300)
    refused("already exists", to_minari, made, "test/export-v0")
    to_minari(made.subset(episodes=[0]).with_card(env_id=None), "test/small-v0")
    other = Dataset.from_arrays(
        **{k: values[k] for k in names} | {"next_observations": values["observations"]},
        action_low=-1, action_high=1,
    )  # fmt: skip
    refused("next_observations differ from the next row", to_minari, other, "test/x-v0")


def test_minari_absent_or_malformed():
    start = time.monotonic()
    text = refused("cannot be reached", load_dataset, "minari/D4RL/dor/human-v2")
    assert "did you mean 'D4RL/door/human-v2'" in text
    refused("malformed Minari id 'door'", load_dataset, "minari/door")
    refused("is not at .*Allow the download", load_dataset, "minari/D4RL/pen/human-v2",
            download=False)  # fmt: skip
    refused("takes an id or a MinariDataset", from_minari, 3)
    assert time.monotonic() - start < 5


# Tables -----------------------------------------------------------------------------------------


def patients():
    """Three patients out of order; the second one's record is the last in time."""
    return pd.DataFrame(
        {
            "patient": ["b", "a", "a", "b", "c", "a"],
            "hour": [1, 2, 0, 0, 0, 1],
            "age": [60, 50, 50, 60, 70, 50],
            "lactate": [2.0, 1.2, 1.0, 1.9, 3.0, 1.1],
            "drug": [0, 2, 1, 1, 0, 0],
            "dose": [0.5, 1.0, 0.0, 0.25, 0.75, 0.5],
            "gain": [1.0, 5.0, 3.0, 0.0, -1.0, 4.0],
            "adverse": [0, 1, 0, 1, 0, 0],
            "died": [True, False, False, False, False, False],
        }
    )


COLUMNS = {
    "observations": ["age", "lactate"],
    "actions": "drug",
    "rewards": "gain",
    "costs": "adverse",
    "episode": "patient",
    "time": "hour",
}


def test_table_of_patients():
    dataset = from_dataframe(patients(), COLUMNS, n_actions=4, id="icu")
    assert dataset.rewards.tolist() == [0, 1, 3, 4, 5, -1]  # b, a, c by first appearance, by hour
    assert dataset.observations[:, 0].tolist() == [60, 60, 50, 50, 50, 70]
    assert dataset.discrete and dataset.actions.tolist() == [1, 0, 1, 0, 2, 0]
    assert dataset.action_dim == 4 and dataset.costs.tolist() == [1, 0, 0, 0, 1, 0]
    assert dataset.terminals.tolist() == [0, 1, 0, 0, 1, 1] and dataset.card.id == "icu"
    assert any("3 episodes end with column 'patient' alone" in n for n in dataset.card.notes)
    np.testing.assert_array_equal(dataset.next_observations[2], dataset.observations[3])


def test_table_ends_by_flags_and_timeouts():
    # b died; the records of a and c were cut off: their last rows have no successor.
    columns = COLUMNS | {"terminals": "died", "actions": ["dose"]}
    dataset = from_dataframe(patients(), columns, episode_end="timeout")
    assert dataset.rewards.tolist() == [0, 1, 3, 4]
    assert dataset.terminals.tolist() == [0, 1, 0, 0]
    assert dataset.timeouts.tolist() == [0, 0, 0, 1]
    assert not dataset.discrete and dataset.actions.shape == (4, 1)
    flat = {"observations": "age", "actions": "dose", "rewards": "gain", "timeouts": "died"}
    one = from_dataframe(patients().iloc[::-1], flat)
    assert one.observations.shape == (5, 1) and one.costs is None


def test_csv_parquet_and_default_names(tmp_path):
    frame = patients().rename(columns={
        "patient": "episode", "hour": "time", "age": "observation_age", "lactate": "observation_2",
        "drug": "action", "gain": "reward", "adverse": "cost"})  # fmt: skip
    frame.to_csv(tmp_path / "p.csv", index=False)
    frame.to_parquet(tmp_path / "p.parquet")
    loaded = [load_dataset(tmp_path / name) for name in ("p.csv", "p.parquet")]
    direct = from_dataframe(patients(), COLUMNS)
    assert {d.fingerprint for d in loaded} == {direct.fingerprint}
    assert loaded[0].card.id == "p.csv" and loaded[0].card.env_id is None
    patients().to_csv(tmp_path / "q.csv", index=False)
    mapped = load_dataset(tmp_path / "q.csv", columns=COLUMNS, reference_returns=(0, 1))
    assert mapped.fingerprint == direct.fingerprint and mapped.card.reference_returns == (0, 1)


def test_table_refusals(tmp_path):
    def table(match, frame=None, **changes):
        frame = patients() if frame is None else frame
        refused(match, from_dataframe, frame, COLUMNS | changes)

    table("unknown column for rewards 'gian': did you mean 'gain'", rewards="gian")
    table("unknown role in columns 'reward': did you mean 'rewards'", reward="gain")
    table("no column for actions; map them", actions=None)
    table("no column for terminals, timeouts or episode", episode=None, time=None)
    table("needs episode as well", episode=None, terminals="died")
    table("column 'patient' holds .* values .*b, a, c.*, not numbers", actions="patient")
    table("costs takes one column", costs=["adverse", "gain"])
    broken = patients()
    broken.loc[3, "lactate"] = np.nan
    table(r"column 'lactate', row 3: nan \(1 such values\)", broken)
    broken = patients()
    broken.loc[2, "patient"] = None
    table("column 'patient', row 2: an episode id is missing", broken)
    table(r"terminals\[2\] is 3", terminals="gain", frame=patients())
    table("cast them to float", actions=["drug", "hour"])
    table("the table has no rows", patients().iloc[:0])
    twice = from_dataframe(patients().assign(hour=0), COLUMNS)
    assert any("3 rows have the same 'patient' and 'hour'" in p for p in twice.problems)
    (tmp_path / "bad.csv").write_text('a,b\n1,2\n"3,4\n')
    refused("bad.csv cannot be read as csv", load_dataset, tmp_path / "bad.csv")
    (tmp_path / "bad.parquet").write_text("no")
    refused("bad.parquet cannot be read as parquet", load_dataset, tmp_path / "bad.parquet")
    patients().to_csv(tmp_path / "p.csv")
    refused("p.csv: columns: no column for observations", load_dataset, tmp_path / "p.csv")


# Real rollouts ----------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="shared/data is absent")
def test_real_rollouts_load():
    path = REAL / "berkeley_cs285" / "expert_data_Hopper-v4.npz"
    dataset = load_dataset(path, action_low=-1, action_high=1, clip_actions=True)
    assert dataset.episode_lengths().tolist() == [1000, 1000]
    assert 3500 < dataset.episode_returns().mean() < 4000
    path = REAL / "hand_dapg" / "door-v0_human_demos.npz"
    refused(r"outside \[-1, 1\]", load_dataset, path, action_low=-1, action_high=1)
    dataset = load_dataset(path, action_low=-1, action_high=1, clip_actions=True)
    assert len(dataset.episodes) == 25 and len(dataset) == 6729 - 25
