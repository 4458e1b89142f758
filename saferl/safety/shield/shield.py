"""Run-time guard: wraps a policy, enforces a cost budget, replaces unsafe actions.

    shield = Shield(policy, guardian, fallback=controller, cost_limit=25.0)
    shield.reset()
    action = shield(observation)      # step the environment with it, then tell
    shield.observe(cost, ended)       # what the step cost and whether the episode ended

The policy's proposal is not accepted, for the first of these reasons that holds,

- *budget*, without a cost critic: limit - cost so far ≤ ``reserve``. The fallback acts from then
  on, as costs are 0 or more;
- *invalid*: it, or the observation, is not a number, or it is no action of the task; or it lies
  outside the bounds: then it is clipped, and the tests below are made of the clipped action;
- *ood*: ``guardian.score(s, a)`` exceeds the guardian's threshold, as in `Guardian.is_ood`;
- *critic*, with a cost critic Qc and candidates: Qc(s, a) ≥ b (1 - γⁿ) / ((1 - γ) n), the
  discounted value of spending the budget b evenly over the n steps left. This is the rule by which
  CAPS chooses between its policy heads: of the candidates below, the preferred one is taken, if
  there is none the one of least Qc. Invalid and unsupported candidates are left out before.

Where nothing else is left the fallback acts. Whether the guardian supports what it does is recorded
and not enforced: a guard is as good as its fallback, which must be able to take over wherever the
policy leaves it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saferl.errors import SaferlError
from saferl.safety.guardians.base import TIE
from saferl.safety.limits import check_limit, convert
from saferl.safety.shield.adapters import PolicyAdapter, to_numpy
from saferl.safety.shield.budget import BudgetTracker
from saferl.safety.shield.log import REASONS, Intervention, InterventionLog
from saferl.spec import Spec

NONE, BUDGET, INVALID, OOD, CRITIC = range(5)
assert len(REASONS) == CRITIC  # REASONS[code - 1] is the name of a code

LARGEST = np.finfo(np.float32).max
SLACK = 1e-5
"""Share of the action range that rounding may exceed the bounds by without being recorded."""


class Shield:
    """A policy with a guard around it, called like a policy for one or many environments.

    A policy is a `saferl.nn.Policy` of one member (or anything with ``members == 1`` that maps a
    tensor ``[1, N, O]`` to ``[1, N, A]``), or a function of numpy observations ``[N, O]`` to
    actions ``[N, A]``, ``[N]`` when discrete (counted from 0); `each` makes one of a function of a
    single observation.

    Args:
        policy: what is guarded.
        guardian: calibrated; ``score(observations [N, O], actions) -> [N]`` and ``threshold``.
        fallback: a policy: a behaviour clone, the user's controller; or ``"supported"`` (the
            default with a guardian): the action that the guardian scores lowest, of all actions if
            discrete, else of those in the ``neighbours`` logged rows nearest to the proposal.
        cost_limit: undiscounted cost an episode may have, in the user's units, or a `CostLimit`.
        cost_critic: Qc: function of numpy observations ``[N, O]`` and actions to ``[N]``, the
            expected cost from here on discounted by ``discount``, in the user's units; with
            ``members == 1`` it is given tensors ``[1, N, …]``.
        candidates: actions to choose from beside the policy's and the fallback's: how many to draw
            from ``policy.sample``, or a function of observations ``[N, O]`` to ``[N, K, A]``
            (``[N, K]``) such as the other heads of CAPS, most preferred first.
        reward_critic: as ``cost_critic``; prefers the candidate of highest value. Without it the
            policy's action is preferred, then the candidates in order, then the fallback's.
        reserve: cost kept back for what happens after the fallback takes over.
        samples: draw so many from ``fallback.sample`` where the fallback's own action is not
            supported, and take the one that the guardian scores lowest of them all.
        horizon: longest episode in steps, for the cost critic's rule; default: the spec's.
        discount: γ of the cost critic.
        spec: sizes and bounds; default: the policy's. For another library's policy:
            ``Spec.from_spaces(env.observation_space, env.action_space)``.
        records: how many interventions, the latest, are kept in memory.
        log: file to which each intervention is appended as a line of JSON.
        seed: of the samples.

    Raises:
        SaferlError: when made, if the parts do not fit together; when called, for observations of
            another shape, a `reset` or `observe` left out, or if no valid action is to be had.
    """

    members = 1

    def __init__(
        self,
        policy: Any,
        guardian: Any = None,
        fallback: Any = None,
        cost_limit: Any = None,
        cost_critic: Any = None,
        *,
        candidates: int | Callable[[np.ndarray], Any] = 0,
        reward_critic: Any = None,
        reserve: float = 0.0,
        samples: int = 0,
        neighbours: int = 10,
        horizon: int | None = None,
        discount: float = 0.99,
        spec: Spec | None = None,
        records: int = 10_000,
        log: str | Path | None = None,
        seed: int = 0,
    ):
        spec = spec or getattr(policy, "spec", None)
        if spec is None:
            raise SaferlError(
                "the policy does not say its sizes and bounds: pass "
                "spec=Spec.from_spaces(env.observation_space, env.action_space)"
            )
        if hasattr(cost_limit, "horizon"):
            cost_limit, horizon = cost_limit.value, horizon or cost_limit.horizon
        self.spec, self.guardian = spec, guardian
        self.threshold: Any = None  # score above which an action is unsupported
        self.cost_limit = None if cost_limit is None else check_limit(cost_limit)
        self.reserve = float(reserve)
        if not 0 <= self.reserve < np.inf:
            raise SaferlError(f"the reserve is a cost of 0 or more, got {reserve!r}")
        self.horizon = int(horizon or getattr(spec, "horizon", 0) or 0)
        self.samples, self.neighbours = samples, neighbours
        self._candidates: Any = candidates
        self._policy = PolicyAdapter(policy, "policy")
        if guardian is not None:
            self.threshold = _threshold(guardian)
        self._fallback: Any = self._check_fallback(fallback, cost_critic)
        self._cost_critic: Any = None
        self._reward_critic: Any = None
        if cost_critic is not None:
            self._cost_critic = PolicyAdapter(cost_critic, "cost critic")
            if reward_critic is not None:
                self._reward_critic = PolicyAdapter(reward_critic, "reward critic")
            self._check_critic(policy)
            # Entry n - 1: what one unit of budget, spent evenly over n steps, is worth to Qc.
            steps = range(1, self.horizon + 1)
            worth = [convert(1.0, "discounted", horizon=n, discount=discount) for n in steps]
            self._worth = np.array(worth)
        elif reward_critic is not None or candidates:
            raise SaferlError(
                "candidates and reward_critic are for use with a cost_critic: pass it"
            )
        self._shape = () if spec.discrete else (spec.action_dim,)
        if not spec.discrete:
            bounds = spec.action_low or (-LARGEST,), spec.action_high or (LARGEST,)
            self._low, self._high = (
                np.clip(b, -LARGEST, LARGEST).astype(np.float32) for b in bounds
            )
            width = self._high - self._low.astype(np.float64)
            slack = SLACK * np.where(width < LARGEST, width, 0)
            self._least, self._most = self._low - slack, self._high + slack
        self._seed = seed
        self._random: Any = None  # made when first needed: its device is a policy's
        self.replaced = np.zeros(0, bool)  # [N], where the last call took another action
        self._log = InterventionLog(records, log)
        self._budget = BudgetTracker(self.cost_limit)

    def _check_fallback(self, fallback: Any, cost_critic: Any) -> PolicyAdapter | str | None:
        if self.samples and (self.guardian is None or not hasattr(fallback, "sample")):
            raise SaferlError("samples needs a guardian and a fallback with a sample method")
        if fallback is not None and not isinstance(fallback, str):
            return PolicyAdapter(fallback, "fallback")
        advice = "pass fallback= a policy or a function of observations"
        if fallback not in (None, "supported"):
            raise SaferlError(f"unknown fallback {fallback!r}: 'supported', or {advice}")
        if self.cost_limit is not None and cost_critic is None:
            raise SaferlError(
                "a cost limit without a cost critic needs a fallback that acts safely once the "
                f"budget is spent: {advice}"
            )
        if self.guardian is None:
            if fallback == "supported":
                raise SaferlError(f"fallback 'supported' needs a guardian: pass one, or {advice}")
            return None
        if not self.spec.discrete and not hasattr(self.guardian, "explain"):
            raise SaferlError(
                "the guardian has no explain() that names the nearest logged rows, so there is no "
                f"supported action to fall back on: {advice}"
            )
        return "supported"

    def _check_critic(self, policy: Any) -> None:
        if self.cost_limit is None:
            raise SaferlError("a cost critic needs a limit to keep: pass cost_limit=")
        if not self.horizon >= 1:
            raise SaferlError(
                "the rule for a cost critic spreads the budget over the steps left: pass horizon= "
                "the longest episode in steps"
            )
        if callable(self._candidates):
            self._candidates = PolicyAdapter(self._candidates, "candidates function")
        elif self._candidates and not hasattr(policy, "sample"):
            raise SaferlError(
                "the policy has no sample method to draw candidates from: pass candidates= a "
                "function of observations"
            )
        if not self._candidates and not isinstance(self._fallback, PolicyAdapter):
            raise SaferlError(
                "a cost critic needs actions to choose from: pass candidates= or fallback= a policy"
            )

    # Episodes and budgets ------------------------------------------------------------------------

    def reset(self, mask: Any = None) -> None:
        """Begin an episode where ``mask`` ``[N]`` is true, everywhere if it is None.

        The first reset tells how many environments there are; one if mask is None.
        """
        self._budget.reset(mask)

    def observe(self, cost: Any, ended: Any = False) -> None:
        """What the last step cost, and whether the episode ended with it (for either cause).

        ``cost``: number or ``[N]``, 0 or more; None where there is no limit. ``ended``: bool or
        ``[N]``. An environment that has ended is left out, whatever its cost, until it is `reset`;
        keep ``ended`` true for it.
        """
        self._budget.observe(cost, ended)

    @property
    def remaining(self) -> np.ndarray | None:
        """Budget left ``[N]``, negative where it is overspent; None without a limit."""
        return self._budget.remaining

    @property
    def records(self) -> deque[Intervention]:
        """The latest interventions, oldest first."""
        return self._log.latest

    def summary(self) -> dict[str, Any]:
        """Shares of steps that were changed, and why; see `InterventionLog.summary`."""
        return self._log.summary()

    def state_dict(self) -> dict[str, Any]:
        """Tensors by which another shield of the same parts goes on where this one stands.

        Budgets, episodes, counters and the stream of the samples; not `records`.
        """
        import torch

        arrays = self._budget.state() | self._log.state()
        state = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if self._draws():
            state["stream"] = self._stream().state_dict()["state"][0]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """What `state_dict` returned."""
        arrays = {name: tensor.numpy() for name, tensor in state.items() if name != "stream"}
        self._budget.load(arrays)
        self._log.load(arrays)
        if self._draws():
            self._stream().load_state_dict({"state": state["stream"][None]})

    def close(self) -> None:
        """Close the log."""
        self._log.close()

    # Acting --------------------------------------------------------------------------------------

    def __call__(self, observations: Any) -> Any:
        """Actions to execute, finite and within the bounds.

        ``[O]`` (one environment) to ``[A]``, ``[N, O]`` to ``[N, A]``, ``[1, N, O]`` to
        ``[1, N, A]``, without the last axis when discrete; a tensor for a tensor.
        """
        tensor = hasattr(observations, "detach")
        rows, size = to_numpy(observations), self.spec.observation_dim
        leading = rows.shape[:-1]
        many = len(leading) > 2 or (len(leading) == 2 and leading[0] != 1)  # members, not rows
        if rows.shape[-1:] != (size,) or many or not rows.size:
            raise SaferlError(
                f"the shield was given observations of shape {rows.shape}, expected ({size},) or "
                f"(N, {size})"
            )
        rows = rows.reshape(-1, size)
        self._budget.turn(len(rows))
        taken = self._decide(rows)
        self._budget.acted()
        taken = taken.reshape((*leading, *self._shape))[()]
        if tensor:
            import torch

            return torch.as_tensor(taken, device=observations.device)
        return taken

    def _decide(self, rows: np.ndarray) -> np.ndarray:
        """Actions taken at ``rows [N, O]``, and the record of those that were not proposed."""
        proposals = self._proposals(rows)
        n, k = proposals.shape[:2]
        every = np.arange(n)
        repeated = rows if k == 1 else np.repeat(rows, k, 0)
        actions, valid, clipped = self._check(proposals.reshape(n * k, *self._shape))
        valid = valid & np.isfinite(repeated).all(1)
        unlike = (~valid | clipped).reshape(n, k)
        # Why each candidate is not accepted; what is written last is the reason that counts.
        why, usable = np.zeros((n, k), np.int64), valid.reshape(n, k)
        best = first = np.zeros(n, np.int64)  # the candidates that are taken and proposed
        remaining: Any = self.remaining
        score: Any = None
        cost: Any = None
        allowed: Any = None
        if self.guardian is not None:
            score = self._score(repeated, actions, valid).reshape(n, k)
            supported = score <= self.threshold  # false for NaN
            usable = usable & supported
        if self._cost_critic is not None:
            cost, rank = self._rank(repeated, actions, valid, (n, k))
            left = np.maximum(self.horizon - self._budget.step, 1)
            allowed = (remaining - self.reserve) * self._worth[left - 1]
            within = cost < allowed[:, None]
            preferred = np.where(usable & within, rank, np.inf)
            least = np.where(usable, cost, np.inf)
            usable = np.isfinite(least)
            best = np.where(np.isfinite(preferred).any(1), preferred.argmin(1), least.argmin(1))
            first = rank.argmin(1)
            why[~within] = CRITIC
        if score is not None:
            why[~supported] = OOD
        why[unlike] = INVALID
        if self.cost_limit is not None and cost is None:
            # The tolerance is for sums of costs such as 0.1, whose rounding must not grant a step.
            spent = remaining <= self.reserve + 1e-9 * (1 + self.cost_limit)
            why[spent] = BUDGET
            usable = usable & ~spent[:, None]
        actions = actions.reshape(proposals.shape)
        taken = actions[every, best]
        in_support: Any = None if score is None else supported[every, best]
        if not (acceptable := usable.any(1)).all():
            at = np.flatnonzero(~acceptable)
            taken[at], found = self._replace(rows[at], taken[at])
            if score is not None:
                in_support[at] = found
        why, running = why[every, first], self._budget.running
        self.replaced = np.zeros(n, bool)
        self._log.steps += int(np.count_nonzero(running))
        for i in ((why != NONE) & running).nonzero()[0]:
            scored = limit = None
            place = i, first[i]
            if why[i] == CRITIC:
                scored, limit = float(cost[place]), float(allowed[i])
            elif score is not None:
                scored, limit = float(score[place]), self.threshold
            self.replaced[i] = unlike[place] or not np.array_equal(actions[place], taken[i])
            self._log.add(
                Intervention(
                    environment=int(i),
                    episode=int(self._budget.episode[i]),
                    step=int(self._budget.step[i]),
                    reason=REASONS[why[i] - 1],
                    proposed=proposals[place].tolist(),
                    taken=taken[i].tolist(),
                    changed=bool(self.replaced[i]),
                    score=scored,
                    threshold=limit,
                    supported=None if score is None else bool(in_support[i]),
                    remaining=None if remaining is None else float(remaining[i]),
                )
            )
        return taken

    def _proposals(self, rows: np.ndarray) -> np.ndarray:
        """``[N, K, A]``: the policy's action, then the candidates', then the fallback's."""
        own = self._policy(rows, shape=self._shape)[:, None]
        if self._cost_critic is None:
            return own
        parts = [own]
        if isinstance(self._candidates, PolicyAdapter):
            parts.append(self._candidates(rows, shape=("K", *self._shape)))
        elif self._candidates:
            parts.append(self._sample(self._policy, rows, self._candidates))
        if isinstance(self._fallback, PolicyAdapter):
            parts.append(self._fallback(rows, shape=self._shape)[:, None])
        return np.concatenate(parts, 1)

    def _rank(
        self, rows: np.ndarray, actions: np.ndarray, valid: np.ndarray, shape: tuple
    ) -> tuple:
        """Qc and rank (the lower the more preferred), each ``[N, K]``; infinite for NaN."""
        cost = self._cost_critic(rows, actions, shape=())
        rank = np.tile(np.arange(shape[1]), shape[0])
        if self._reward_critic is not None:
            rank = np.where(valid, -self._reward_critic(rows, actions, shape=()), np.inf)
        return tuple(np.where(np.isnan(x), np.inf, x).reshape(shape) for x in (cost, rank))

    def _sample(self, function: PolicyAdapter, rows: np.ndarray, count: int) -> np.ndarray:
        """``[N, count, A]`` from the policy's own distribution."""
        drawn = function.sample(np.repeat(rows, count, 0), self._stream(), self._shape)
        return drawn.reshape(len(rows), count, *self._shape)

    def _draws(self) -> bool:
        return bool(self.samples or (self._candidates and not callable(self._candidates)))

    def _stream(self) -> Any:
        if self._random is None:
            from saferl.rng import MemberRandom

            drawn_from = self._fallback if self.samples else self._policy
            self._random = MemberRandom([self._seed], drawn_from.device)
        return self._random

    def _check(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Executable actions, which of the given ones were valid, and which were clipped."""
        if self.spec.discrete:
            valid = (actions >= 0) & (actions < self.spec.action_dim)
            valid &= actions == np.floor(actions)
            return np.where(valid, actions, 0).astype(np.int64), valid, np.zeros_like(valid)
        # Comparisons with NaN are false.
        within: Any = ((actions >= self._least) & (actions <= self._most)).all(1)
        valid = within
        if not within.all():
            valid = (np.abs(actions) <= LARGEST).all(1)
            actions = np.where(valid[:, None], actions, 0)
        clean = np.maximum(np.minimum(actions, self._high), self._low)
        return clean.astype(np.float32, copy=False), valid, valid & ~within

    def _score(self, rows: np.ndarray, actions: np.ndarray, valid: Any = True) -> np.ndarray:
        """Guardian's scores ``[N]``; infinite where observation or action cannot be scored."""
        valid = np.isfinite(rows).all(1) & valid
        if not valid.all():
            score = np.full(len(rows), np.inf)
            if valid.any():
                score[valid] = self._score(rows[valid], actions[valid])
            return score
        rows = rows.astype(np.float32, copy=False)
        return to_numpy(self.guardian.score(rows, actions)).astype(np.float64).reshape(len(rows))

    def _replace(self, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, Any]:
        """The fallback's actions; whether the guardian supports them (None without one)."""
        if self._fallback is None:
            raise SaferlError(
                "no proposed action can be executed and there is no fallback: pass fallback= a "
                "policy or a function of observations"
            )
        if self._fallback == "supported":
            if not np.isfinite(rows).all():
                raise SaferlError(
                    "an observation is not finite, on which fallback 'supported' cannot act: pass "
                    "fallback= a function that can"
                )
            return self._best(rows, self._supported(rows, actions))
        own, valid, _ = self._check(self._fallback(rows, shape=self._shape))
        if not valid.all():
            raise SaferlError("the fallback returned an action that cannot be executed: mend it")
        if self.guardian is None:
            return own, None
        supported = self._score(rows, own) <= self.threshold
        at = np.flatnonzero(~supported)
        if self.samples and at.size:
            drawn = self._sample(self._fallback, rows[at], self.samples)
            options = np.concatenate([own[at][:, None], drawn.astype(own.dtype)], 1)
            own[at], supported[at] = self._best(rows[at], options)
        return own, supported

    def _supported(self, rows: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Actions ``[N, K]`` or ``[N, K, A]`` of which the best supported one is to be taken."""
        if self.spec.discrete:
            return np.tile(np.arange(self.spec.action_dim), (len(rows), 1))
        k = min(self.neighbours, len(getattr(self.guardian, "rows", range(self.neighbours))))
        near = self.guardian.explain(rows.astype(np.float32, copy=False), actions, k)
        return actions[:, None] - to_numpy(near.action_differences)

    def _best(self, rows: np.ndarray, options: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ``options [N, K, A]`` those of lowest score ``[N, A]``, and which are supported."""
        n, k = options.shape[:2]
        flat, valid, _ = self._check(options.reshape(n * k, *self._shape))
        score = self._score(np.repeat(rows, k, 0), flat, valid).reshape(n, k)
        best = np.arange(n), np.where(np.isnan(score), np.inf, score).argmin(1)
        return flat.reshape(options.shape)[best], score[best] <= self.threshold


def _threshold(guardian: Any) -> float:
    """The score up to which a guardian's `is_ood` is false."""
    for needed in ("score", "threshold"):
        if not hasattr(guardian, needed):
            raise SaferlError(f"the guardian has no {needed}: pass one of make_guardian")
    threshold = float("nan") if guardian.threshold is None else float(guardian.threshold)
    if np.isnan(threshold):
        raise SaferlError(
            "the guardian is not calibrated: call guardian.calibrate on logged rows that it was "
            "not fitted to"
        )
    return threshold + TIE * max(1.0, abs(threshold))
