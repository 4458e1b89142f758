"""Settings: precedence, families, members."""

from __future__ import annotations

from dataclasses import fields
from fnmatch import fnmatch
from importlib import resources

import pytest
import yaml

from saferl.data.sources.d4rl import ids
from saferl.errors import SaferlError
from saferl.registry import agent_class, names
from saferl.runs.config import RunConfig
from saferl.runs.settings import parse_settings, published, resolve

FILES = sorted(f.name[:-5] for f in resources.files("saferl.configs").iterdir()
               if f.name.endswith(".yaml"))  # fmt: skip


def test_every_agent_has_a_file():
    assert FILES == names("agents")


@pytest.mark.parametrize("agent", FILES)
def test_files_name_fields_and_families_that_exist(agent):
    document = yaml.safe_load(
        resources.files("saferl.configs").joinpath(f"{agent}.yaml").read_text()
    )
    known = {field.name for field in fields(agent_class(agent).Config)}
    assert known >= set(document.get("defaults") or {})
    datasets = [f"d4rl/{id}" for id in ids()]
    for family in document.get("families") or []:
        assert known >= set(family["set"]) and family["source"]
        for pattern in family["datasets"]:
            if pattern.startswith("d4rl/"):
                assert any(fnmatch(id, pattern) for id in datasets), pattern
    for id in datasets:  # what the files say is a valid configuration of the agent
        agent_class(agent).make_config(published(agent, id))


@pytest.mark.parametrize(
    ("agent", "dataset", "expected"),
    [
        # CORL's configurations, as in the table of docs/agents/cql.md.
        ("cql", "halfcheetah-medium-v2", {"actor_lr": 3e-5, "lagrange": False}),
        ("cql", "antmaze-large-play-v2", {"actor_lr": 1e-4, "lagrange": True, "max_backup": True}),
        ("cql", "antmaze-umaze-v2", {"reward_scale": 10.0, "reward_shift": -5.0}),
        ("cql", "antmaze-umaze-v2", {"normalize_observations": False}),
        ("iql", "hopper-medium-v2", {"expectile": 0.7, "beta": 3.0, "normalize_rewards": True}),
        ("iql", "antmaze-umaze-v2", {"expectile": 0.9, "beta": 10.0, "reward_shift": -1.0}),
        # Authors' values, and guesses beside them.
        ("a2pr", "walker2d-random-v2", {"vae_weight": 1.5, "mask": 1.5, "discount": 0.99}),
        ("a2pr", "antmaze-umaze-v2", {"alpha": 7.5, "reward_scale": 1e4, "reward_shift": -1.0}),
        ("a2pr", "pen-human-v1", {"alpha": 2.5, "vae_weight": 1.0, "mask": 0.5}),
        ("td3_bc", "walker2d-medium-v2", {"alpha": 2.5, "normalize_observations": True}),
    ],
)
def test_published_values(agent, dataset, expected):
    config = agent_class(agent).make_config(published(agent, f"d4rl/{dataset}"))
    assert {key: getattr(config, key) for key in expected} == expected


A2PR = {  # the authors' alpha, vae_weight, mask and discount
    "halfcheetah-medium": (40, 1.0, 1.0, 0.99),
    "halfcheetah-medium-replay": (40, 1.5, 0.8, 0.995),
    "halfcheetah-medium-expert": (40, 1.0, 15.0, 0.99),
    "hopper-random": (2.5, 1.5, 1.5, 0.995),
    "hopper-medium": (2.5, 1.0, 0.4, 0.995),
    "hopper-medium-replay": (2.5, 1.5, 0.5, 0.99),
    "hopper-medium-expert": (2.5, 1.0, 4.0, 0.99),
    "walker2d-medium": (2.5, 1.5, 1.0, 0.99),
    "walker2d-medium-replay": (2.5, 1.5, 1.2, 0.995),
    "walker2d-medium-expert": (2.5, 1.0, 0.8, 0.99),
}


@pytest.mark.parametrize("dataset", A2PR)
def test_published_values_of_a2pr(dataset):
    config = agent_class("a2pr").make_config(published("a2pr", f"d4rl/{dataset}-v2"))
    assert (config.alpha, config.vae_weight, config.mask, config.discount) == A2PR[dataset]


def test_a2pr_says_which_values_are_published():
    """The authors' values are those of ten locomotion-v2 datasets; all others are ours."""
    document = yaml.safe_load(resources.files("saferl.configs").joinpath("a2pr.yaml").read_text())
    authors = [f["datasets"] for f in document["families"] if f["source"].startswith("authors")]
    ours = [f["datasets"] for f in document["families"] if f["source"].startswith("ours")]
    assert len(authors) + len(ours) == len(document["families"])
    assert len(authors) == 10 and all(id.endswith("-v2") for (id,) in authors)
    assert not any("saferl/" in id for (id,) in authors)
    for id in [f"d4rl/{id}" for id in ids()]:  # a guess or a published value for every one
        assert any(fnmatch(id, pattern) for family in ours for pattern in family), id


def test_parse_settings():
    assert parse_settings(["a=1", "b=0.5,2", "c=true", "d=word", "e=1e-4", "f=[3,4]"]) == {
        "a": 1, "b": [0.5, 2], "c": True, "d": "word", "e": 1e-4, "f": [3, 4],
    }  # fmt: skip
    with pytest.raises(SaferlError, match="KEY=VALUE"):
        parse_settings(["alpha"])


def resolved(settings, task="point", **options):
    return resolve(RunConfig(settings=settings, **options), task)


def test_lists_multiply_with_seeds():
    asked = {"alpha": [1.0, 2.5], "discount": [0.9, 0.99], "hidden": [4, 4]}
    run = resolved(asked, members=2, seed=5).run
    assert run.settings["hidden"] == [4, 4]
    assert run.agent_settings["alpha"] == [1, 1, 1, 1, 2.5, 2.5, 2.5, 2.5]
    assert run.agent_settings["discount"] == [0.9, 0.9, 0.99, 0.99] * 2
    assert run.seeds == [5, 6] * 4
    assert run.names[2] == "alpha=1 discount=0.99 seed=5"


def test_a_word_in_a_list_of_numbers_is_named():
    with pytest.raises(SaferlError, match=r"alpha = \[.*'x'.*\] is not a number"):
        resolved(parse_settings(["alpha=1,x"]), members=1)


def test_sources_say_where_each_value_comes_from():
    found = resolved({"tau": 0.1}, "d4rl/antmaze-umaze-v2", agent="iql", cost_limits=[3.0])
    assert found.sources["tau"] == "given"
    assert found.sources["beta"].startswith("configs/iql.yaml, d4rl/antmaze")
    assert found.sources["batch_size"] == "default of IQLConfig"
    found = resolved({}, agent="bc_safe", cost_limits=[3.0, 9.0])
    assert found.sources["cost_limit"] == "the run's cost limits"
    assert [m.values["cost_limit"] for m in found.run.who] == [3.0] * 3 + [9.0] * 3
