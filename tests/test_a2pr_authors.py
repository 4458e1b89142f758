"""The benchmark against the authors' code, with a stand-in for that code that learns nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import a2pr_authors
import evidence
from book import Book

DATA = "saferl/hopper-velocity-medium-v0"
TINY = ["--datasets", DATA, "--size", "600", "--updates", "4", "--episodes", "2", "--hidden", "8"]
AGENT = """
import copy
import torch
import torch.nn as nn

def layers(*sizes):
    return [nn.Linear(*pair) for pair in zip(sizes, sizes[1:])]

def with_relu(first, *others):
    return [first, *(module for layer in others for module in (nn.ReLU(), layer))]

class Actor(nn.Sequential):
    def forward(self, states):
        return super().forward(states).tanh()

class A2PR:
    def __init__(self, o, a, max_action, device, alpha, mask, vae_weight, discount):
        wide, latent = (750, 750), 2 * a
        critic = (o + a, *4 * [256], 1)
        self.actor = Actor(*with_relu(*layers(o, *3 * [256], a)))
        self.critic = nn.ModuleList(layers(*critic) + layers(*critic))
        self.value = nn.ModuleList(layers(o, *4 * [256], 1))
        encoder, heads = layers(o + a, *wide), [nn.Linear(750, latent), nn.Linear(750, latent)]
        self.vae = nn.ModuleList([*encoder, *heads, *layers(o + latent, *wide, a)])
        self.actor_target, self.critic_target = copy.deepcopy((self.actor, self.critic))

    def train(self, buffer, rows):
        states, actions, rewards, following, go_on = buffer.sample(rows)
        assert rewards.shape == go_on.shape == (rows, 1) and states.shape == following.shape
        with torch.no_grad():
            self.critic[0].weight += 0.01
        return {"target_Q": float(rewards.mean())}
"""
BUFFER = """
import torch

class ReplayBuffer:
    def __init__(self, *args, scale, shift, max_size):
        assert (scale, shift) == (1, 0)

    def D4RL_convert(self, data):
        self.data = data

    def normalize_states(self):
        states = self.data["observations"]
        return states.mean(0, keepdims=True), states.std(0, keepdims=True) + 1e-3

    def sample(self, rows):
        fields = "observations", "actions", "rewards", "next_observations", "terminals"
        found = [torch.tensor(self.data[name][:rows]).float() for name in fields]
        return [x if x.dim() == 2 else x[:, None] for x in found]
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "authors"
    (folder / "utils").mkdir(parents=True)
    (folder / "A2PR.py").write_text(AGENT)
    (folder / "utils" / "buffer.py").write_text(BUFFER)
    yield folder
    for name in ("A2PR", "utils.buffer", "utils"):
        sys.modules.pop(name, None)


def test_updates_that_differ_are_told(source):
    """The stand-in moves its first critic alone, by another rule."""
    cls, _ = a2pr_authors.authors(source)
    assert str(source) not in sys.path
    rows = a2pr_authors.same_updates(cls, 600, 2, "float32")
    assert [row["updates"] for row in rows] == [1, 2]
    for row in rows:
        assert row["apart"]["critic"] > 0.5
        assert row["apart"]["vae"] is None


def test_pairs_are_the_same_layers(source):
    import torch

    from saferl.registry import agent_class
    from saferl.spec import Spec

    cls, _ = a2pr_authors.authors(source)
    data = evidence.dataset_of(DATA, 600)
    config = agent_class("a2pr").make_config({})
    ours = agent_class("a2pr")(Spec.from_dataset(data, config), config, [0])
    theirs = a2pr_authors.build(cls, data, vars(config), {})
    with torch.no_grad():
        for _, parameter, own in a2pr_authors.pairs(ours, theirs):
            parameter.copy_(own)
    states = torch.randn(5, data.observation_dim)
    torch.testing.assert_close(theirs.actor(states), ours.actor(states[None])[0])


def test_train_resume_and_report(source, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    plan = [*TINY, "--seeds", "2", "--compared", "1", "--out", str(out)]
    monkeypatch.setattr(a2pr_authors.common, "RESULTS", out)
    assert a2pr_authors.main([*plan, "--source", str(source)]) == 0
    content = json.loads((out / "a2pr_authors.json").read_text())
    assert [run["seed"] for run in content["runs"]] == [0, 1] and content["rows"] == []
    settings = content["runs"][0]["settings"]
    assert settings["critic_hidden"] == [8] * 4 and settings["vae_hidden"] == [16, 16]

    ours = content["runs"][0] | {"members": 2, "returns": [[100.0, 200.0], [50.0, 70.0]],
                                 "metrics": {"q": [1.0, 2.0]}}  # fmt: skip
    del ours["seed"]
    Book(out / "evidence.json").add({}, ours, DATA)
    evidence_book = json.loads((out / "evidence.json").read_text())
    evidence_book["datasets"] = content["datasets"]
    (out / "evidence.json").write_text(json.dumps(evidence_book))
    capsys.readouterr()
    assert a2pr_authors.main([*plan, "--source", str(source)]) == 0
    told = capsys.readouterr()
    assert told.err.count("done before") == 2
    (row,) = json.loads((out / "a2pr_authors.json").read_text())["rows"]
    low, high = content["datasets"][DATA]["reference_returns"]
    assert row["saferl"][0] == pytest.approx(100 * (150 - low) / (high - low))
    theirs = [100 * (sum(run["returns"]) / 2 - low) / (high - low) for run in content["runs"]]
    assert row["authors"] == pytest.approx(theirs)
    assert row["difference"] == pytest.approx(sum(row["saferl"]) / 2 - sum(theirs) / 2)
    assert "| authors" in told.out and "saferl − authors" in told.out
    assert a2pr_authors.main([*plan, "--report"]) == 0


@pytest.mark.parametrize("given", [[], ["--source", "nowhere"]])
def test_without_their_code_it_says_where_it_is(given, capsys):
    with pytest.raises(SystemExit) as hit:
        a2pr_authors.main(given)
    assert hit.value.code == 2
    assert "--source must be a clone of https://github.com/ltlhuuu/A2PR" in capsys.readouterr().err
