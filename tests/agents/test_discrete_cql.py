"""Discrete CQL against a plain reference in both forms, and what each coefficient reaches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from saferl.agents.discrete_cql import DiscreteCQL, balanced, without_repeats
from saferl.data import Dataset
from saferl.errors import SaferlError

from .plain import MEMBERS, Net, adam, affected, descend, make, make_batch, member_of, moved, nets
from .test_ogsrl import logged, quiet

ACTIONS = 4


def huber(u: float, kappa: float) -> float:
    return 0.5 * u**2 if abs(u) <= kappa else kappa * (abs(u) - 0.5 * kappa)


def bellman(taken, target, quantiles: int, kappa: float):
    """One row's loss, with loops over quantiles; predictions and targets ``[K]``."""
    if not quantiles:
        return huber(target[0] - taken[0], kappa)
    total = 0.0
    for i in range(quantiles):
        for j in range(quantiles):
            u = target[j] - taken[i]
            side = abs((i + 0.5) / quantiles - (1.0 if u < 0 else 0.0))
            total = total + side * huber(u, kappa) / kappa / quantiles
    return total


def refuses(observations: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """A guardian's answer, of any states: no odd action where the first number is positive."""
    return ((observations[..., 0] > 0) & (actions % 2 == 1)).to(observations.dtype)


@pytest.mark.parametrize("member", range(len(MEMBERS)))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weight": 4.0, "huber": 0.2},
        {"double": False},
        {"tau": 0.0, "target_interval": 2},
        {"critics": 2},
        {"quantiles": 3},
        {"quantiles": 3, "huber": 0.3, "double": False, "critics": 2},
        {"guardian": "knn", "ood_value": -3.0},
        {"guardian": "knn", "ood_value": [-3.0, 0.5], "quantiles": 3, "critics": 2},
    ],
    ids=str,
)
def test_updates_are_the_reference(float64, settings, member):
    agent = make("discrete_cql", lr=1e-2, **{"tau": 0.1} | settings)
    worth = agent.column("ood_value")[member]
    if agent.guardian is not None:
        agent._is_ood = refuses
    c, count = agent.config, max(1, settings.get("quantiles", 0))
    critics = nets(agent.actor, member)
    targets = [critic.copy() for critic in critics]
    optimizer = adam(*critics, lr=1e-2)

    def values(net: Net, s) -> torch.Tensor:
        return net(s).view(-1, ACTIONS, count)

    for step in range(1, 5):
        batch = make_batch(agent, step)
        metrics = agent.update(batch)
        s, a, r, _, s2, terminal, _ = member_of(batch, member)
        chooser = critics if c.double else targets
        best = sum(values(net, s2).mean(-1) for net in chooser).argmax(-1)
        loss, gaps = 0.0, []
        for net, target_net in zip(critics, targets):
            predicted, next_q = values(net, s), values(target_net, s2)
            for row in range(len(r)):
                following = next_q[row, best[row]]
                if agent.guardian is not None and refuses(s2[row], best[row]):
                    following = torch.full_like(following, worth)
                y = (r[row] + 0.99 * (1 - terminal[row]) * following).detach()
                taken = predicted[row, a[row]]
                loss = loss + bellman(taken, y, c.quantiles, c.huber) / len(r)
            # Checklist 6: the gap is a cross entropy, so it is never negative.
            gaps.append(F.cross_entropy(predicted.mean(-1), a))
        assert min(gaps) >= 0
        torch.testing.assert_close(metrics["critic_loss"][member], loss.detach())
        torch.testing.assert_close(metrics["gap"][member], (sum(gaps) / len(gaps)).detach())
        descend(optimizer, loss + c.weight * sum(gaps))
        for net, target_net in zip(critics, targets):
            if c.tau:
                target_net.follow(net, c.tau)
            elif step % c.target_interval == 0:
                target_net.follow(net, 1.0)
        for e in range(len(critics)):
            critics[e].assert_is(agent.actor.mlp, member, e)
            targets[e].assert_is(agent.critic_target.mlp, member, e)


def test_copied_targets_move_at_the_interval_alone():
    agent = make("discrete_cql", tau=0.0, target_interval=3)
    batch = make_batch(agent)
    for step in range(1, 7):
        assert moved(agent, batch) == {"actor"} | ({"critic_target"} if step % 3 == 0 else set())


@pytest.mark.parametrize("quantiles", [0, 3])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"weight": 0.0}, {"weight": 1.0}),
        ({"discount": 0.9}, {"discount": 0.99}),
        ({"huber": 1.0}, {"huber": 0.1}),
    ],
)
def test_coefficients_reach(before, after, quantiles):
    assert affected("discrete_cql", before, after, quantiles=quantiles) == {"actor"}


# The variants -------------------------------------------------------------------------------------


def fitted(dataset: Dataset, say=quiet, members=MEMBERS, **settings) -> DiscreteCQL:
    config = DiscreteCQL.make_config({"hidden": [8, 8], "batch_size": 16} | settings)
    prepared = DiscreteCQL.prepare(dataset, config)
    agent = DiscreteCQL(prepared.spec(config), config, members)
    agent.fit(prepared, say)
    return agent


def batch_of(agent: DiscreteCQL, dataset: Dataset, rows: int = 64):
    """The first rows of a dataset, as a buffer holds them, for every member."""
    from saferl.replay import ReplayBuffer

    buffer = ReplayBuffer.from_dataset(dataset.subset(rows), agent.spec, agent.seeds)
    return buffer.sample(rows)


@pytest.mark.parametrize("most", [10**6, 0])
def test_the_guardian_answers_for_raw_states_whether_from_a_table_or_not(monkeypatch, most):
    monkeypatch.setattr("saferl.agents.shared.ood_table.MAX_TABLE", most)
    dataset = logged(True)
    agent = fitted(dataset, guardian="knn", alpha=0.3)
    assert agent.spec.observation_mean  # the buffer's rows are not the raw ones
    assert (agent.ood_table.flagged is None) == (most == 0)
    seen = torch.from_numpy(agent.spec.observations(dataset.next_observations))
    for action in range(4):
        actions = np.full(len(dataset), action)
        expected = agent.guardian.is_ood(dataset.next_observations, actions)
        assert 0 < expected.mean() < 1
        found = agent._is_ood(seen[None], torch.from_numpy(actions)[None])[0].bool().numpy()
        assert (found == expected).mean() > (0.999 if most else 0.98)  # rounding, where not hashed
    if most:  # what was never logged is out of the data
        elsewhere = torch.full((1, 1, seen.shape[1]), 0.123)
        assert agent._is_ood(elsewhere, torch.zeros(1, 1, dtype=torch.int64)) == 1


def test_a_guardian_reaches_the_critics_through_refused_pairs_alone():
    dataset, same = logged(True), {"members": (5,)}
    plain = fitted(dataset, **same)
    batch = batch_of(plain, dataset)

    def after(agent, refused: float):
        agent._is_ood = lambda observations, actions: torch.full_like(observations[..., 0], refused)
        agent.update(batch)
        return [p.detach().clone() for p in agent.actor.parameters()]

    plain.update(batch)
    inside = after(fitted(dataset, guardian="knn", **same), 0.0)
    assert all(map(torch.equal, plain.actor.parameters(), inside))  # to the bit
    one, two = (after(fitted(dataset, guardian="knn", ood_value=v, **same), 1.0) for v in (-25, -1))
    assert not all(map(torch.equal, inside, one)) and not all(map(torch.equal, one, two))


def test_pairs_that_were_never_logged_are_refused():
    """States 0, behind its action 0 state 1, behind its action 1 state 2; there action 0 ends."""
    rows = []
    for episode in range(60):
        first = episode % 2
        rows += [(0, first, 0.0, 1 + first, False), (1 + first, 0, 0.4, 0, True)]
    states, actions, rewards, following, ends = map(np.array, zip(*rows))
    code = np.eye(3, dtype=np.float32)
    dataset = Dataset.from_arrays(
        code[states], actions, rewards, ends, np.zeros(len(rows), bool), code[following],
        id="fork", n_actions=3,
    )  # fmt: skip
    agent = fitted(dataset, guardian="count", alpha=0.1, normalize_observations=False)
    seen = torch.from_numpy(code)[None].repeat(3, 1, 1)
    asked = torch.arange(3)[:, None].expand(3, 3)  # action a in every state
    assert agent._is_ood(seen, asked).tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]


def test_balancing_gives_every_class_the_mean_size():
    lengths = [2, 3, 1, 2, 2, 4, 2, 1]
    labels = [0, 0, 0, 0, 0, 1, 2, 0]
    actions = np.concatenate([np.full(n, a) for n, a in zip(lengths, labels)])
    actions[2:5] = [0, 2, 0]  # the second episode's most frequent action is 0
    ends = np.zeros(len(actions), bool)
    ends[np.cumsum(lengths) - 1] = True
    mark = np.repeat(np.arange(8.0), lengths)[:, None]
    dataset = Dataset.from_arrays(mark, actions, mark[:, 0], ends, ~ends & False, mark,
                                  id="classes", n_actions=4)  # fmt: skip
    again = balanced(dataset)
    which = again.observations[again.episodes[:, 0], 0].astype(int)
    assert len(which) == 9  # three classes that occur, of round(8 / 3) episodes
    assert (which == 5).sum() == (which == 6).sum() == 3
    others = which[(which != 5) & (which != 6)]
    assert len(set(others.tolist())) == 3  # without replacement, where there are enough
    np.testing.assert_array_equal(balanced(dataset).observations, again.observations)
    once = without_repeats(again)
    assert once.observations[once.episodes[:, 0], 0].tolist() == sorted(set(which.tolist()))
    config = DiscreteCQL.make_config({})
    assert DiscreteCQL.prepare(dataset, config) is dataset


def test_balanced_repeats_do_not_calibrate_the_guardian_that_they_fit():
    """Two episodes of a class of its own are repeated often; each is on one side of the split."""
    dataset = logged(True, episodes=60)
    lines: list[str] = []
    agent = fitted(dataset, lines.append, guardian="knn", balance=True, alpha=0.2)
    config = DiscreteCQL.make_config({"balance": True})
    drawn = DiscreteCQL.prepare(dataset, config)
    once = without_repeats(drawn)
    assert len(once.episodes) < len(drawn.episodes)
    rows = agent.guardian.rows.numpy()
    assert len(np.unique(rows, axis=0)) == len(rows)  # as in the data, where no row is twice
    assert any(f"of {len(rows)} rows" in line for line in lines)


def test_a_checkpoint_holds_the_guardian_and_its_table():
    dataset = logged(True)
    one = fitted(dataset, guardian="kde", alpha=0.3)
    batch = batch_of(one, dataset)
    metrics = one.update(batch)
    assert metrics["ood_rate"].shape == (len(MEMBERS),) and (metrics["ood_rate"] > 0).all()
    state = {key: tensor.clone() for key, tensor in one.state_dict().items()}
    two = DiscreteCQL(one.spec, one.config, MEMBERS)
    two.load_state_dict(state)
    assert all(
        torch.equal(a, b) for a, b in zip(one.update(batch).values(), two.update(batch).values())
    )
    assert two.guardian.calibrated and fitted(dataset).guardian is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guardian": "knm"}, "'knn'"),
        ({"guardian": "knn", "guardian_options": "neighbors=3"}, "'neighbours'"),
        ({"guardian": "knn", "alpha": 1.0}, "between 0 and 1"),
        ({"guardian": "knn", "calibration": 0.0}, "calibration = 0.0 is not in"),
        ({"guardian": "knn", "levels": (2, 3)}, "levels = 2,3 make 6 actions, but the task has 4"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(SaferlError, match=message) as error:
        fitted(logged(True), **settings)
    assert "\n" not in str(error.value)
