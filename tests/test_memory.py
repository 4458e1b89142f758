"""A million hopper transitions: what loading and the buffer need."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, resource, sys
import h5py, torch, pandas
import saferl
from saferl.replay import ReplayBuffer
from saferl.spec import Spec
from saferl.training.train import make_agent

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

saferl.load_dataset(sys.argv[2])   # code paths warm, so that only data count below
base = resident()
dataset = saferl.load_dataset(sys.argv[1])
agent = make_agent("td3_bc", dataset)
buffer = ReplayBuffer.from_dataset(dataset, agent.spec, [0])
status = open("/proc/self/status").read()  # getrusage would count the parent before exec
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
arrays = [getattr(dataset, name) for name in dataset.FIELDS]
floats = sum(array.size for array in arrays if array is not None) * 4
print(json.dumps({"floats": floats, "buffer": buffer.rows.nbytes, "peak": peak - base}))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="reads Linux's /proc")
def test_a_million_rows(tmp_path):
    import h5py
    import numpy as np

    rng = np.random.default_rng(0)
    for name, n in (("big", 1_000_000), ("small", 2_000)):
        with h5py.File(tmp_path / f"hopper_{name}-v2.hdf5", "w") as file:
            file["observations"] = rng.random((n, 11), np.float32)
            file["next_observations"] = rng.random((n, 11), np.float32)
            file["actions"] = rng.random((n, 3), np.float32)
            file["rewards"] = rng.random(n, np.float32)
            file["terminals"] = np.zeros(n, bool)
            file["timeouts"] = np.arange(1, n + 1) % 1000 == 0
    files = [str(tmp_path / f"hopper_{name}-v2.hdf5") for name in ("big", "small")]
    output = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE, *files], check=True,
                            capture_output=True, text=True).stdout  # fmt: skip
    need = json.loads(output.splitlines()[-1])
    assert need["buffer"] <= 1.3 * need["floats"]
    assert need["peak"] <= 3 * need["floats"], need
