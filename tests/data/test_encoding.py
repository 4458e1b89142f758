"""Tables with text, times and odd values; actions that count from 1 or have several numbers."""

from __future__ import annotations

import json

import gymnasium
import numpy as np
import pandas as pd
import pytest
import torch

from saferl.data import (
    Card,
    Dataset,
    encode_rows,
    from_dataframe,
    from_minari,
    load_dataset,
    save_dataset,
    to_minari,
)
from saferl.errors import SaferlError

COLUMNS = {
    "observations": ["age", "sex", "ward"],
    "actions": "drug",
    "rewards": "gain",
    "episode": "patient",
}


def stays() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "patient": [1, 1, 1, 2, 2, 2],
            "hour": [0, 1, 2, 0, 1, 2],
            "age": [50.0, 50.5, 51.0, 60.0, 60.5, 61.0],
            "sex": ["m", "m", "m", "f", "f", "f"],
            "ward": pd.Categorical(
                ["icu", "icu", "ward", "home", "icu", "ward"], ["ward", "icu", "home"]
            ),
            "drug": ["none", "some", "none", "much", "some", "none"],
            "gain": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0],
        }
    )


def refused(match: str, function, *args, **options) -> None:
    with pytest.raises(SaferlError, match=match) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)


def arrays(n: int = 40, **changes) -> dict:
    rng = np.random.default_rng(0)
    ends = np.arange(n) % 8 == 7
    values = dict(
        observations=rng.normal(size=(n, 2)),
        next_observations=rng.normal(size=(n, 2)),
        actions=np.arange(n) % 4,
        rewards=rng.normal(size=n),
        terminals=ends,
    )
    return values | changes


def problems(match: str, **changes) -> list[str]:
    found = Dataset.from_arrays(**arrays(**changes)).problems
    return [problem for problem in found if match in problem]


# Text -------------------------------------------------------------------------------------------


def test_text_is_one_column_per_value_on_request():
    dataset = from_dataframe(stays(), COLUMNS, encode="onehot")
    card = dataset.card
    assert card.features == ("age", "sex=f", "sex=m", "ward=ward", "ward=icu", "ward=home")
    assert dataset.observations[0].tolist() == [50, 0, 1, 0, 1, 0]
    assert dataset.observations[3].tolist() == [60, 1, 0, 0, 0, 1]
    assert card.categories["ward"] == ("ward", "icu", "home")  # pandas' own order
    assert card.categories["drug"] == ("much", "none", "some")  # the alphabet's
    assert dataset.discrete and dataset.action_dim == 3
    assert dataset.actions.tolist() == [1, 2, 1, 0, 2, 1]
    assert Card.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_text_is_numbered_on_request():
    dataset = from_dataframe(stays(), COLUMNS, encode="ordinal")
    assert dataset.observations[:, 1].tolist() == [1, 1, 1, 0, 0, 0]
    assert dataset.observations[:, 2].tolist() == [1, 1, 0, 2, 1, 0]
    assert dataset.card.features == ("age", "sex", "ward")


@pytest.mark.parametrize("encode", ["onehot", "ordinal"])
def test_new_rows_are_encoded_as_those_of_the_dataset(encode, tmp_path):
    stays().to_csv(tmp_path / "stays.csv", index=False)
    dataset = load_dataset(tmp_path / "stays.csv", columns=COLUMNS, encode=encode)
    card = load_dataset(save_dataset(dataset, tmp_path / "saved.npz")).card
    new = stays().iloc[[4, 0]][["ward", "sex", "age"]].astype({"ward": str})
    np.testing.assert_array_equal(encode_rows(new, card), dataset.observations[[4, 0]])
    refused(
        "column 'sex', row 1: 'x' is none of f, m", encode_rows, new.assign(sex=["f", "x"]), card
    )
    refused("column 'sex', row 0: None", encode_rows, new.assign(sex=[None, "m"]), card)
    refused("no column 'ward': Present", encode_rows, new.drop(columns="ward"), card)
    refused("was not made from a table", encode_rows, new, Card("other"))


def test_successors_share_the_values_of_their_column():
    frame = stays().assign(next_age=0.0, next_sex=["m", "m", "m", "f", "f", "other"])
    columns = COLUMNS | {
        "observations": ["age", "sex"],
        "next_observations": ["next_age", "next_sex"],
    }
    dataset = from_dataframe(frame, columns, encode="onehot")
    assert dataset.card.categories["sex"] == ("f", "m", "other")
    assert dataset.next_observations.shape == dataset.observations.shape == (6, 4)
    assert dataset.next_observations[-1].tolist() == [0, 0, 0, 1]


def test_text_without_a_request_is_an_error_that_says_how():
    refused("column 'sex' holds .* pass encode='onehot' or", from_dataframe, stays(), COLUMNS)
    refused("unknown encode 'one-hot'", from_dataframe, stays(), COLUMNS, encode="one-hot")
    dated = stays().assign(age=pd.to_datetime("2020-01-01"))
    refused("turn dates into numbers", from_dataframe, dated, COLUMNS, encode="onehot")
    gap = stays().assign(sex=["m", None, "m", "f", "f", "f"])
    refused("column 'sex', row 1: None", from_dataframe, gap, COLUMNS, encode="onehot")


# Time -------------------------------------------------------------------------------------------


def test_rows_out_of_time_are_a_problem_until_a_time_sorts_them():
    frame = stays().iloc[[2, 0, 1, 3, 4, 5]]
    taken = from_dataframe(frame, COLUMNS, encode="onehot")
    assert taken.rewards.tolist() == [2, 0, 1, 3, 4, 5]
    assert any("column 'hour' runs backwards at 1 of 4 steps" in p for p in taken.problems)
    assert any("first at row 1 of the table" in p and "role time" in p for p in taken.problems)
    ordered = from_dataframe(frame, COLUMNS | {"time": "hour"}, encode="onehot")
    assert ordered.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert not any("backwards" in p for p in ordered.problems)
    assert not any(
        "backwards" in p for p in from_dataframe(stays(), COLUMNS, encode="onehot").problems
    )


def test_episodes_by_flags_are_looked_at_as_well():
    frame = stays().assign(done=[0, 0, 1, 0, 0, 1], t=[0, 1, 2, 1, 0, 2])
    flags = {"observations": "age", "actions": "gain", "rewards": "gain", "terminals": "done"}
    assert any("column 't' runs backwards" in p for p in from_dataframe(frame, flags).problems)
    assert not any("'hour'" in p for p in from_dataframe(frame, flags).problems)


@pytest.mark.parametrize("kind", ["dates", "text", "numbers as text"])
def test_times_may_be_dates(kind):
    days = ["2020-01-10", "2020-01-09", "2020-02-01", "2020-01-01", "2020-01-03", "2020-01-02"]
    when = {
        "dates": pd.to_datetime(days),
        "text": days,
        "numbers as text": ["b", "a", "c", "a", "c", "b"],
    }[kind]
    frame = stays().assign(charted=when)
    dataset = from_dataframe(frame, COLUMNS | {"time": "charted"}, encode="onehot")
    assert dataset.rewards.tolist() == [1, 0, 2, 3, 5, 4]
    frame.loc[2, "charted"] = None
    columns = COLUMNS | {"time": "charted"}
    refused(
        "column 'charted', row 2: a time is missing",
        from_dataframe,
        frame,
        columns,
        encode="onehot",
    )


def test_the_command_line_has_the_roles():
    from saferl.cli import _loader_options, _parser

    words = ["inspect", "x.csv", "--column", "time=hour", "--column", "observations=age,sex"]
    given = _parser().parse_args([*words, "--dataset-option", "encode=onehot"])
    assert _loader_options(given) == {
        "columns": {"time": "hour", "observations": ["age", "sex"]},
        "encode": "onehot",
    }


# Actions ----------------------------------------------------------------------------------------


def test_actions_may_count_from_another_number(tmp_path):
    dataset = Dataset.from_arrays(**arrays(actions=np.arange(40) % 4 + 1), action_start=1)
    assert dataset.actions.tolist() == (np.arange(40) % 4).tolist()
    assert dataset.action_dim == 4 and dataset.card.action_start == 1
    again = load_dataset(save_dataset(dataset, tmp_path / "saved.npz"))
    assert again.fingerprint == dataset.fingerprint and again.card == dataset.card
    raw = {k: np.asarray(v) for k, v in arrays(actions=np.arange(40) % 4 - 2).items()}
    np.savez(tmp_path / "raw.npz", **raw)
    assert load_dataset(tmp_path / "raw.npz", action_start=-2).fingerprint == dataset.fingerprint
    refused(
        "must be whole numbers 1 … 4$", Dataset.from_arrays, **arrays(), action_start=1, n_actions=4
    )
    refused(
        "whole numbers 0 … 3; pass action_start=", Dataset.from_arrays,
        **arrays(actions=np.arange(40) % 4 + 1), n_actions=4,
    )  # fmt: skip


def test_actions_that_no_row_takes_are_named():
    assert problems("1 of 5 actions occur in no row: 0: ", actions=np.arange(40) % 4 + 1)
    assert problems("pass action_start=1", actions=np.arange(40) % 4 + 1)
    assert problems("4 of 8 actions occur in no row: 4, 5, 6, 7: ", n_actions=8)
    assert problems("actions occur in no row: 5, 6: ", n_actions=6, action_start=1,
                    actions=np.arange(40) % 4 + 1)  # fmt: skip
    assert not problems("occur in no row")


@pytest.mark.parametrize("kind", [np.int64, bool, np.float32])
def test_several_numbers_become_one_integer_on_request(kind, tmp_path):
    levels = (2, 2, 2) if kind is bool else (3, 4, 2)
    numbers = np.stack(np.unravel_index(np.arange(40) % np.prod(levels), levels), 1)
    values = arrays(actions=numbers.astype(kind))
    dataset = Dataset.from_arrays(**values, action_levels=levels)
    assert dataset.actions.tolist() == (np.arange(40) % np.prod(levels)).tolist()
    assert dataset.action_dim == np.prod(levels) and dataset.card.action_levels == levels
    again = load_dataset(save_dataset(dataset, tmp_path / "saved.hdf5"))
    assert again.fingerprint == dataset.fingerprint and again.card == dataset.card
    from_one = Dataset.from_arrays(
        **values | {"actions": numbers + 1}, action_levels=levels, action_start=1
    )
    assert from_one.fingerprint == dataset.fingerprint


def test_several_numbers_without_a_request_are_an_error_that_says_how():
    numbers = np.stack(np.unravel_index(np.arange(40) % 24, (3, 4, 2)), 1)
    refused(r"pass action_levels=\(3, 4, 2\)", Dataset.from_arrays, **arrays(actions=numbers))
    small, wide = arrays(actions=numbers, action_levels=(3, 3, 2)), arrays(actions=numbers)
    refused(r"actions\[6, 1\] is 3, not one of its levels 0 … 2", Dataset.from_arrays, **small)
    refused("3 columns, action_levels 2", Dataset.from_arrays, **wide, action_levels=(3, 4))
    refused("make 24 actions, but n_actions is 25", Dataset.from_arrays, **wide,
            action_levels=(3, 4, 2), n_actions=25)  # fmt: skip
    refused("action_levels must be whole numbers", Dataset.from_arrays, **wide, action_levels=(0,))


@pytest.mark.parametrize(
    "space, levels",
    [
        (gymnasium.spaces.MultiDiscrete([3, 4], start=[1, 0]), (3, 4)),
        (gymnasium.spaces.MultiBinary(2), (2, 2)),
        (gymnasium.spaces.Discrete(5, start=2), None),
    ],
    ids=["MultiDiscrete", "MultiBinary", "Discrete"],
)
def test_minari_has_the_same_numbers(space, levels, monkeypatch, tmp_path):
    import minari
    from minari.data_collector import EpisodeBuffer

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    total = 5 if levels is None else int(np.prod(levels))
    numbers = np.arange(20) % total
    logged = numbers + 2
    if levels is not None:
        start = np.ravel(getattr(space, "start", 0))
        logged = (np.stack(np.unravel_index(numbers, levels), 1) + start).astype(space.dtype)
    buffer = EpisodeBuffer(
        observations=np.zeros((21, 2), np.float32),
        actions=logged,
        rewards=np.zeros(20),
        terminations=np.arange(20) == 19,
        truncations=np.zeros(20, bool),
        infos={},
    )
    with pytest.warns(UserWarning):  # minari asks for author, description …
        stored = minari.create_dataset_from_buffers(
            "test/several-v0",
            [buffer],
            observation_space=gymnasium.spaces.Box(-1, 1, (2,)),
            action_space=space,
        )
    if levels is not None:
        refused(rf"pass action_levels=\({levels[0]}, {levels[1]}\)", from_minari, stored)
    options = {} if levels is None else {"action_levels": levels}
    loaded = from_minari(stored, **options)
    assert loaded.actions.tolist() == numbers.tolist() and loaded.action_dim == total
    assert loaded.card.action_start == (2 if levels is None else 0)
    again = from_minari(to_minari(loaded, "test/again-v0"))
    assert again.fingerprint == loaded.fingerprint and again.card == loaded.card


# Values -----------------------------------------------------------------------------------------


def test_large_values_are_named_with_column_and_row():
    states = arrays()["observations"].copy()
    states[[7, 9], 1] = 99_999_999
    found = problems("observations column 1: 1e+08 at row 7 (2 values", observations=states)
    assert len(found) == 1
    assert problems("rewards: -2e+06 at row 3 (1 values", rewards=np.eye(40)[3] * -2e6)
    assert not problems("beyond 1e+06")
    frame = stays().assign(age=[50, 50, 9e9, 60, 60, 60])
    named = from_dataframe(frame, COLUMNS, encode="onehot").problems
    assert any("observations column 0 (age): 9e+09 at row 2" in problem for problem in named)


def test_torch_tensors_with_a_gradient_are_taken_as_they_are():
    plain = arrays()
    tensors = {name: torch.tensor(np.asarray(value)) for name, value in plain.items()}
    for name in ("observations", "rewards"):
        tensors[name].requires_grad_()
    assert Dataset.from_arrays(**tensors).fingerprint == Dataset.from_arrays(**plain).fingerprint
    halves = Dataset.from_arrays(**tensors | {"rewards": torch.ones(40, dtype=torch.bfloat16)})
    assert halves.rewards.tolist() == [1.0] * 40


def test_an_id_of_a_family_wins_over_a_folder(tmp_path, monkeypatch):
    from saferl import registry

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "data").mkdir(parents=True)
    monkeypatch.setitem(
        registry._registered["datasets"],
        "mine",
        lambda rest: Dataset.from_arrays(**arrays(), id=rest),
    )
    assert load_dataset("mine/data").card.id == "data"
    refused("is a folder", load_dataset, "./mine/data")
