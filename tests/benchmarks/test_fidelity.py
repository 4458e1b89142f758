"""The studies against published code, with stand-ins for that code."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks.fidelity import authors as code
from benchmarks.fidelity import published
from benchmarks.store import Store

from ..agents import plain

DATA = "saferl/hopper-velocity-medium-v0"
# The layers of the authors' class; it moves the first of its critics' weights, and by no rule.
AGENT = """
import copy
import torch
import torch.nn as nn
import wandb
from core.nets import layers

class Actor(nn.Sequential):
    def forward(self, states):
        return super().forward(states).tanh()

class A2PR:
    def __init__(self, o, a, max_action, device, alpha, mask, vae_weight, discount):
        self.settings = alpha, mask, vae_weight, discount
        wide, latent = (750, 750), 2 * a
        critic = (o + a, *4 * [256], 1)
        first, *others = layers(o, *3 * [256], a)
        self.actor = Actor(first, *(m for layer in others for m in (nn.ReLU(), layer)))
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
NETS = """
import torch.nn as nn

def layers(*sizes):
    return [nn.Linear(*pair) for pair in zip(sizes, sizes[1:])]
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
def authors(tmp_path):
    """A clone of the authors' code, as far as these benchmarks look."""
    folder = tmp_path / "authors"
    files = {"A2PR.py": AGENT, "core/nets.py": NETS, "utils/buffer.py": BUFFER}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


class PlainCQL(published.Published):
    """tests/agents/plain.py in the place of published code."""

    agent, source, file = "cql", "corl", "A2PR.py"
    weight = 10.0

    def build(self, module):
        return plain.CQL(*self.sizes, replace(self.config, weight=self.weight))

    def networks(self):
        t = self.theirs
        return {"actor": [t.actor], "critic": t.critics, "critic_target": t.critic_targets}

    def others(self, ours):
        actor = self.theirs.actor
        return [("actor", actor.multiplier, ours.actor.multiplier[0, 0, 0]),
                ("actor", actor.offset, ours.actor.offset[0, 0, 0])]  # fmt: skip

    def step(self, batch, random):
        rows, n, a = len(batch[0]), self.config.samples, self.sizes[1]
        noise = random.normal(rows, 2 + 2 * n, a)[0]
        parts = iter((noise[:, 0], noise[:, 1 + 2 * n], noise[:, 1 : 1 + n], noise[:, 1 + n : -1]))
        self.theirs.normal = lambda *shape: next(parts).reshape(shape)
        self.theirs.uniform = lambda *shape: random.uniform(*shape)[0]
        self.theirs.update(*batch)


def test_the_same_updates_are_told_from_others(authors, monkeypatch):
    rows = published.compare(PlainCQL, authors, 600, 2, "float64")
    assert [row["updates"] for row in rows] == [1, 2]
    for row in rows:
        assert row["precision"] == "float64" and row["apart"].keys() > {"actor", "critic"}
        assert all(0 <= distance < 1e-9 for distance in row["apart"].values())
    monkeypatch.setattr(PlainCQL, "weight", 9.9)
    assert published.compare(PlainCQL, authors, 600, 1, "float64")[0]["apart"]["critic"] > 1e-4
    assert torch.get_default_dtype() == torch.float32


def test_a_stand_in_is_not_a2pr(authors):
    before = set(sys.modules)
    (row,) = published.compare(published.AuthorsA2PR, authors, 600, 1, "float32")
    assert row["apart"]["critic"] > 0.5 and row["apart"]["vae"] is None  # not moved
    left = {"A2PR", "core", "core.nets", "wandb"} & (set(sys.modules) - before)
    assert not left
    assert str(authors) not in sys.path
    text = published.STUDY.report(
        {"rows": [row], "command": "c", "date": "d", "machine": {"cpu": "p"}}
    )
    assert "| a2pr " in text and "–" in text


def test_layers_are_laid_beside_their_own(authors):
    from saferl.registry import agent_class

    data = published.dataset_of(DATA, 600)
    config = agent_class("a2pr").make_config({})
    ours = agent_class("a2pr")(data.spec(config), config, [0])
    theirs = published.AuthorsA2PR(authors, data, config)
    for _, parameter, own in theirs.pairs(ours):
        parameter.data = own.detach().clone()
    states = torch.randn(5, data.observation_dim)
    with torch.no_grad():
        torch.testing.assert_close(theirs.theirs.actor(states), ours.actor(states[None])[0])
    assert theirs.theirs.settings == (2.5, 0.5, 1.0, 0.99)


def test_scores_train_resume_and_report(authors, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results"
    plan = ["--datasets", DATA, "--size", "600", "--updates", "4", "--episodes", "2", "--hidden",
            "8", "--seeds", "2", "--out", str(out)]  # fmt: skip
    monkeypatch.setattr(code, "RESULTS", out)
    assert code.STUDY.run([*plan, "--report"]) == 0
    assert code.STUDY.run([*plan, "--a2pr", str(authors)]) == 0
    assert capsys.readouterr().out.count("Nothing has been measured") == 2
    content = json.loads((out / "a2pr_authors.json").read_text())
    assert [run["seed"] for run in content["runs"]] == [0, 1]
    settings = content["runs"][0]["settings"]
    assert settings["critic_hidden"] == [8] * 4 and settings["vae_hidden"] == [16, 16]

    ours = content["runs"][0] | {"members": 2, "returns": [[100.0, 200.0], [50.0, 70.0]],
                                 "metrics": {"q": [1.0, 2.0]}}  # fmt: skip
    del ours["seed"]
    Store(out / "comparison.json").add(DATA, content["datasets"][DATA], [ours])
    assert code.STUDY.run([*plan, "--a2pr", str(authors)]) == 0
    told = capsys.readouterr()
    assert told.err.count("done before") == 2
    (row,) = json.loads((out / "a2pr_authors.json").read_text())["rows"]
    low, high = content["datasets"][DATA]["reference_returns"]
    assert row["saferl"][0] == pytest.approx(100 * (150 - low) / (high - low))
    theirs = [100 * (sum(run["returns"]) / 2 - low) / (high - low) for run in content["runs"]]
    assert row["authors"] == pytest.approx(theirs)
    assert row["difference"] == pytest.approx(sum(row["saferl"]) / 2 - sum(theirs) / 2)
    assert "saferl − authors" in told.out and "| authors" in told.out
    assert code.STUDY.run([*plan, "--report"]) == 0


@pytest.mark.parametrize("main", [published.STUDY.run, code.STUDY.run])
@pytest.mark.parametrize("given", [[], ["--a2pr", "nowhere"]])
def test_without_the_code_it_says_where_it_is(main, given, capsys):
    with pytest.raises(SystemExit) as hit:
        main(given)
    assert hit.value.code == 2
    assert "--a2pr must be a clone of https://github.com/ltlhuuu/A2PR" in capsys.readouterr().err
