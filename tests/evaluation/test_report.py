import csv
import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from saferl.data import Card
from saferl.errors import SaferlError
from saferl.evaluation import Episodes, Evaluation, evaluate, plots, write_report
from saferl.evaluation.results import read_metrics
from saferl.evaluation.text import cells, columns, interval, number
from saferl.runs.config import Member, groups_of
from saferl.safety.limits import check_limit


def made(returns, costs, step=0, length=10):
    returns = np.array(returns, float)
    costs = None if costs is None else np.array(costs, float)
    return Evaluation.from_episodes(
        Episodes(returns, costs, np.full(returns.shape, length), "Fake-v0", 0), step
    )


RETURNS = [[1, 2, 3, 4], [3, 4, 5, 6]]
COSTS = [[0, 1, 2, 3], [2, 3, 4, 5]]


def test_the_table_of_known_episodes():
    rows = made(RETURNS, COSTS).table([2.5], reference_returns=(1.5, 5.5))
    assert [row["member"] for row in rows] == [None, 0, 1]
    both, first, second = rows
    assert (both["members"], both["episodes"], both["limit"]) == (2, 8, 2.5)
    assert both["return_mean"] == 3.5 and both["score"] == 50
    assert both["return_iqm"] == pytest.approx((3 + 3 + 4 + 4) / 4)
    assert both["return_low"] < 3.5 < both["return_high"]
    assert both["cost_mean"] == 2.5 and both["cost_ratio"] == 1
    assert both["share_over"] == 0.5 and both["cvar"] == 5
    assert both["members_within"] == 1 and both["cost_per_step"] == 0.25 and both["length"] == 10
    assert (first["cost_mean"], second["cost_mean"]) == (1.5, 3.5)
    assert (first["share_over"], second["share_over"]) == (0.25, 0.75)
    assert both["cost_low"] >= 0  # costs are never negative, so neither is what is expected of them


@pytest.mark.parametrize("limit, verdict", [(90, "not met"), (100, "cannot tell"), (110, "met")])
def test_verdicts_follow_the_interval(limit, verdict):
    costs = 100 + np.random.default_rng(0).normal(size=(3, 8))
    row = made(costs, costs).table([limit])[0]
    assert row["verdict"] == verdict
    assert 97 < row["cost_low"] < 100 < row["cost_high"] < 103


def test_the_ends_of_the_interval_count_as_within():
    rows = made([[1.0] * 6], [[2.0] * 6]).table([2.0, 1.999])
    assert [row["verdict"] for row in rows[:2]] == ["met", "not met"]


def test_too_few_episodes_give_no_verdict():
    assert made([[1.0] * 4], [[0.0] * 4]).table([25])[0]["verdict"] == "cannot tell"
    alone = made([[1.0]], [[0.0]])
    assert math.isnan(alone.table([25])[0]["cost_high"])
    assert "nan" not in alone.text([25])


def test_groups_of_members_are_summed_up_apart():
    members = [Member(seed, {"cost_limit": limit}) for seed, limit in ((0, 5.0), (1, 5.0), (0, 10))]
    groups = groups_of(members)
    assert [group.label for group in groups] == ["cost_limit=5", "cost_limit=5", "cost_limit=10"]
    assert groups_of([Member(0), Member(1)]) is None
    rows = made([[1, 1], [3, 3], [9, 9]], None).table(groups=groups)
    assert [(row["group"], row["member"], row["return_mean"]) for row in rows] == [
        ("cost_limit=5", None, 2),
        ("cost_limit=5", 0, 1),
        ("cost_limit=5", 1, 3),
        ("cost_limit=10", None, 9),
        ("cost_limit=10", 2, 9),
    ]
    with pytest.raises(SaferlError, match="2 group names for 3 members"):
        made([[1, 1], [3, 3], [9, 9]], None).table(groups=groups[:2])


def test_text_for_the_terminal():
    text = made(RETURNS, COSTS).text([2.5, 30], (1.5, 5.5), note="made up, not D4RL's")
    lines = text.splitlines()
    assert lines[1].split()[:2] == ["limit", "verdict"]
    assert lines[0].split() == ["members", "episodes", "CVaR"] and "within" in lines[1]
    assert "cannot tell" in lines[2] and "1 of 2" in lines[2] and "50 % of 8" in lines[2]
    assert " met " in lines[3] and "100 % of 8" in lines[3] and "50.0" in lines[3]
    assert text.count("made up, not D4RL's") == 2  # under each table
    assert "95 % bootstrap interval over 2 members" in text
    assert max(map(len, lines[3:])) <= 120
    single = " ".join(made([[1, 2, 3, 4, 5, 6]], None).text().split())
    assert "says nothing about other seeds" in single
    assert not any(word in single for word in ("cost", "limit", "Each member"))


def test_unseen_harm_is_pointed_out():
    text = made([range(10)], [[0.0] * 10]).text([25])
    assert "strikes up to 30 % of the episodes" in " ".join(text.split())
    assert "strikes" not in made([range(10)], [range(10)]).text([25])


def test_a_limit_needs_costs():
    with pytest.raises(SaferlError, match=r"CostWrapper.*with_costs"):
        made(RETURNS, None).table([25])
    for bad in (-1, "many", float("nan"), float("inf"), None):
        with pytest.raises(SaferlError, match="cost limit is a number of 0 or more"):
            check_limit(bad)


def test_rows_survive_a_file_and_the_last_step_counts(tmp_path):
    file = tmp_path / "evaluation.csv"
    random = np.random.default_rng(0)
    parts = [made(random.normal(size=(2, 3)), random.random((2, 3)), step) for step in (5, 20)]
    whole = Evaluation.concatenate(parts)
    whole.write(file)
    assert file.read_text().startswith("step,member,episode,return,cost,length\n5,0,0,")
    read = Evaluation.read(file)
    for name in ("steps", "members", "episodes", "returns", "costs", "lengths"):
        np.testing.assert_array_equal(getattr(read, name), getattr(whole, name))
    np.testing.assert_array_equal(read.matrix(), parts[1].returns.reshape(2, 3))
    np.testing.assert_array_equal(read.at(5).matrix("costs"), parts[0].costs.reshape(2, 3))
    with pytest.raises(SaferlError, match=r"no evaluation at step 6; there are \[5, 20\]"):
        read.at(6)
    assert list(tmp_path.iterdir()) == [file]
    made(RETURNS, None).write(file)
    assert Evaluation.read(file).costs is None
    with pytest.raises(SaferlError, match="cannot write"):
        whole.write(tmp_path / "absent" / "evaluation.csv")


def test_counted_steps_survive_a_file_and_those_not_counted_are_unknown(tmp_path):
    counts = {"ood": np.array([[1, 0, 2, 3], [0, 0, 0, 4]]), "replaced": np.full((2, 4), 2)}
    lengths = np.full((2, 4), 10)
    result = Episodes(np.array(RETURNS, float), np.array(COSTS, float), lengths, "F", 0, **counts)
    last = Evaluation.from_episodes(result, 9)
    whole = Evaluation.concatenate([made(RETURNS, COSTS, 3), last])
    whole.write(tmp_path / "e.csv")
    header, first, *_, final = (tmp_path / "e.csv").read_text().splitlines()
    assert header.endswith(",length,ood,replaced")
    assert first.endswith(",10,,") and final.endswith(",10,4,2")
    read = Evaluation.read(tmp_path / "e.csv")
    assert np.isnan(read.at(3).ood).all() and read.matrix("ood").tolist() == counts["ood"].tolist()
    both, one, _ = read.table([2.5])
    assert (both["ood_rate"], one["ood_rate"], both["replaced_rate"]) == (0.125, 0.15, 0.2)
    assert read.at(3).table([2.5])[0]["ood_rate"] is None
    text = read.text([2.5])
    assert "12.5 %" in text and "20.0 %" in text and "guardian calls unsupported" in text


def test_values_known_from_elsewhere_are_means_over_members():
    beside = {"predicted_return": [5.0, 7.0], "predicted_cost": [1.0, 1.0], "exact_return": [3, 4]}
    rows = made(RETURNS, COSTS).table([2.5], beside=beside)
    assert [row["predicted_return"] for row in rows] == [6, 5, 7]
    assert [row["exact_return"] for row in rows] == [3.5, 3, 4]
    heads, lines = cells(rows)
    found = dict(zip(heads, lines[0]))
    assert found["predicted − measured return"] == "+2.5" and found["exact return"] == "3.5"
    assert found["predicted − measured cost"] == "−1.5" and "exact cost" not in found


def test_steps_without_costs_join_those_with_costs():
    both = Evaluation.concatenate([made(RETURNS, None, 0), made(RETURNS, COSTS, 1)])
    assert both.at(0).matrix("costs").tolist() == [[0] * 4] * 2
    assert both.matrix("costs").tolist() == COSTS


@pytest.mark.parametrize(
    "content", ["", "a,b\n1,2\n", "step,member,episode,return,cost,length\n1,0,0,x,0,3\n"]
)
def test_a_file_that_is_no_evaluation_is_named(tmp_path, content):
    file = tmp_path / "evaluation.csv"
    file.write_text(content)
    with pytest.raises(SaferlError, match=r"evaluation\.csv is not an evaluation"):
        Evaluation.read(file)
    with pytest.raises(SaferlError, match="cannot read"):
        Evaluation.read(tmp_path / "absent.csv")


def test_a_member_with_missing_episodes_is_told():
    whole = made(RETURNS, COSTS)
    with pytest.raises(SaferlError, match="different numbers of episodes at step 0"):
        whole._pick(np.arange(len(whole)) != 3).table()


def test_evaluate_plays_and_keeps_the_step():
    result = evaluate(
        lambda observations: np.ones(observations.shape[:2], int), "CartPole-v1", 3, step=40
    )
    assert result.steps.tolist() == [40] * 3 and result.episodes.tolist() == [0, 1, 2]
    assert result.costs is None and (result.returns == result.lengths).all()


def test_numbers_are_for_people():
    values = [0, 25.0, 3120.449, 0.00925, 12345.6, 1e9, float("nan"), None, 999.97]
    shown = ["0", "25", "3120", "0.00925", "12346", "1e+09", "–", None, "1000"]
    assert [number(value) for value in values] == shown
    assert interval(21.31, 18.2, 24.449) == "21.3 [18.2, 24.4]"
    assert interval(0.5, float("nan"), float("nan")) == "0.5"
    assert columns(["n", "verdict"], [["1", "met"], ["20", "not met"]]) == (
        " n  verdict\n 1  met\n20  not met"
    )


# The report


def fake_run(folder, *, evaluated=True, metrics=True, card=True, **config):
    folder.mkdir()
    settings = {"agent": "bc", "dataset": "made/up-v0", "env": "Fake-v0", "cost_limits": [2.5]}
    members = [{"seed": 0}, {"seed": 1}]
    settings |= {"format": 2, "members": members, "settings": {"alpha": 0.75}} | config
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    values = Card(
        id="made/up-v0",
        horizon=20,
        reference_returns=(1.5, 5.5),
        origin="made up <for> this test",
    ).to_dict()
    document = {"card": values, "fingerprint": "c0ffee"} if card else {}
    (folder / "dataset.json").write_text(json.dumps(document))
    if evaluated:
        parts = [made(RETURNS, COSTS, step) for step in (50, 100)]
        Evaluation.concatenate(parts).write(folder / "evaluation.csv")
    if metrics:
        with open(folder / "metrics.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "member", "loss", "later", "never"])
            for step in (50, 100):
                for member in (0, 1):
                    writer.writerow([step, member, member + 1 / step, "" if step == 50 else 3, ""])
    return folder


class Checked(HTMLParser):
    """Collects text and images; fails on unbalanced tags."""

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.images = [], "", []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "img":
            self.images.append(dict(attributes))
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += " " + data


def test_the_report_is_one_file_that_says_everything(tmp_path):
    run = fake_run(tmp_path / "run<1>")
    path = write_report(run)
    assert path == run / "report.html"
    page = path.read_text(encoding="utf-8")
    assert "http" not in page and "run<1>" not in page and "url(" not in page
    checked = Checked(page)
    assert len(checked.images) == 4
    assert all(i["src"].startswith("data:image/png;base64,iVBOR") for i in checked.images)
    for phrase in (
        "run<1>: bc on made/up-v0",
        "cannot tell",
        "2.50 [0.00, ",
        "1 of 2",
        "score 0: return 1.5, score 100: return 5.5",
        "made up <for> this test",
        "c0ffee",
        "alpha",
        "0.75",
        "0.125",  # the limit of 2.5 per episode over a horizon of 20 steps
        "0.25",  # cost per step
        "How each number is computed",
        "At training step 100",
    ):
        assert phrase in checked.text, phrase
    assert not [file for file in run.iterdir() if file.name.endswith(".tmp")]


def test_limits_may_be_given_and_several_runs_compared(tmp_path):
    first = fake_run(tmp_path / "first")
    second = fake_run(
        tmp_path / "second",
        members=[{"seed": 0, "values": {"alpha": alpha}} for alpha in (1, 2)],
        cost_limits=[],
    )
    third = fake_run(tmp_path / "third", evaluated=False, metrics=False, card=False)
    path = write_report([first, second, third], tmp_path / "all.html", limits=[30])
    checked = Checked(path.read_text())
    assert "3 runs compared" in checked.text
    for phrase in ("second alpha=1", "second alpha=2", "saferl evaluate", "has no evaluation.csv"):
        assert phrase in checked.text, phrase
    assert "2.50 [0.00, " in checked.text and " met " in checked.text
    assert "without a dataset" in checked.text and "nothing has been logged" in checked.text
    assert len(checked.images) == 3 + 4 + 4
    with pytest.raises(SaferlError, match="name the file"):
        write_report([first, second])


def test_an_unevaluated_run_and_one_without_costs(tmp_path):
    run = fake_run(tmp_path / "bare", evaluated=False)
    checked = Checked(write_report(run).read_text())
    assert "has no evaluation.csv" in checked.text and len(checked.images) == 1
    made(RETURNS, None, 7).write(run / "evaluation.csv")
    checked = Checked(write_report(run).read_text())
    assert "no cost limit can be judged" in checked.text
    assert "Evaluated at one training step only" in checked.text


def test_a_folder_that_is_no_run_is_told(tmp_path):
    with pytest.raises(SaferlError, match=r"not a run folder: it has no config\.yaml"):
        write_report(tmp_path)
    run = fake_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: [")
    with pytest.raises(SaferlError, match="not valid YAML") as error:
        write_report(run)
    assert "\n" not in str(error.value)
    (run / "config.yaml").write_text("agent: bc")
    (run / "dataset.json").write_text("[1]")
    with pytest.raises(SaferlError, match="not a dataset card"):
        write_report(run)


def test_metrics_with_gaps_and_a_cut_off_row(tmp_path):
    run = fake_run(tmp_path / "run")
    with open(run / "metrics.csv", "a") as file:
        file.write("150,0,0.")
    metrics = read_metrics(run / "metrics.csv")
    assert metrics["step"].tolist() == [50, 50, 100, 100, 150]
    assert np.isnan(metrics["later"][[0, 1, 4]]).all() and (metrics["later"][2:4] == 3).all()
    figure = plots.training_metrics(metrics)
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == ["loss", "later"]
    assert plots.training_metrics({"step": np.ones(1), "member": np.zeros(1)}) is None


def test_plots_draw_what_they_say():
    parts = [made(np.array(RETURNS) + step, COSTS, step) for step in (0, 10, 20)]
    whole = Evaluation.concatenate(parts)
    figure = plots.learning_curves(whole, [2.5])
    returns, costs = figure.axes
    thick = [line for line in returns.lines if line.get_linewidth() == 2]
    assert [line.get_ydata().tolist() for line in thick] == [[3.5, 13.5, 23.5]]
    thin = [line.get_ydata().tolist() for line in returns.lines if line.get_linewidth() < 1]
    assert thin == [[2.5, 12.5, 22.5], [4.5, 14.5, 24.5]]
    dashed = [line.get_ydata()[0] for line in costs.lines if line.get_linestyle() == "--"]
    assert dashed == [2.5]
    # Two members give a very wide interval: it must not press the curves flat.
    low, high = returns.get_ylim()
    assert low < 2.5 and 24.5 < high and high - low <= 1.6 * (24.5 - 2.5) + 1e-9
    figure = plots.return_against_cost({"a": whole, "none": made(RETURNS, None)}, [2.5, 4])
    episodes, means = figure.axes[0].collections
    assert len(episodes.get_offsets()) == 8
    assert means.get_offsets().tolist() == [[1.5, 22.5], [3.5, 24.5]]
    assert [line.get_xdata()[0] for line in figure.axes[0].lines] == [2.5, 4]
    assert plots.png(figure).startswith(b"\x89PNG")


def test_the_frontier_joins_policies_that_differ_by_their_limit():
    rows = [
        {"family": "", "cost_mean": 3.0, "cost_low": 2.5, "cost_high": 4.0, "return_mean": 9.0}
        | {"group": group, "family": "guarded" if "guarded" in group else "", "cost_mean": cost,
           "return_mean": 2 * cost, "exact_cost": exact, "exact_return": 1.0}
        for group, cost, exact in (
            ("cost_limit=10", 3.0, None), ("cost_limit=5", 2.0, 1.5), ("guarded, limit 5", 1.0, 2),
        )
    ]  # fmt: skip
    figure = plots.frontier([*rows, rows[0]], [5, 10], [[0, 1], [4, 6]])
    axis = figure.axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axis.lines}
    assert drawn["best possible (exact)"] == [[0, 1], [4, 6]]
    assert drawn["exact value of a policy"] == [[1.5, 1]]
    points = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axis.containers}
    assert points == {"policies": [[2, 4], [3, 6]], "guarded": [[1, 2]]}
    assert plots.png(plots.frontier(rows[:1])).startswith(b"\x89PNG")
