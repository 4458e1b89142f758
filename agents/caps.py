"""CAPS: implicit Q-learning with several policies, between which a cost limit chooses at run time.

Constraint-Adaptive Policy Switching (AAAI 2025) on IQL. Training never sees a limit. One trunk has
H heads: head 0 seeks reward, head H - 1 avoids cost, those between mix. With Q̄, Q̄c Polyak averages
of twin critics of the reward and of the cost, and w_η(u) = η if u > 0 else 1 - η, one update is:

    v'      = V(s'),  v'_c = Vc(s')                       before their steps
    A       = min_e Q̄_e(s, a) - V(s)                      what a earns above V, before V's step
    A_c     = Vc(s) - max_e Q̄c_e(s, a)                    what a saves below Vc, before Vc's step
    1. L_V  = mean w_η(A) A²;   L_Vc = mean w_ηc(A_c) A_c²                 step V, Vc
    2. L_Q  = ½ Σ_e mean (Q_e(s, a) - [r + γ (1 - terminal) v'])²          step Q
       L_Qc = ½ Σ_e mean (Qc_e(s, a) - [c + γ_c (1 - terminal) v'_c])²     step Qc
    3. W_r  = min(exp(β A), 100),   W_c = min(exp(β_c A_c), 100)
       W_0  = W_r,   W_{H-1} = W_c,   else W_i = W_r + W_c i / ((H - 1) / 2)
       L_π  = (1 / H) Σ_i mean [-W_i log π_i(a|s)]                         step π
       Q̄, Q̄c ← τ (Q, Qc) + (1 - τ) (Q̄, Q̄c)

π_i is N(tanh f_i(s), σ_i), σ_i not a function of the state; its rate falls along a cosine to 0.

At run time, with d what the limit allows in the units of Qc, a_i the mean of head i, and i over the
heads with max_e Qc_e(s, a_i) < d, the action is the a_i of largest min_e Q_e(s, a_i); if there is
no such head, the a_i of least Qc. Two ways to say what is allowed:

- `CAPS.policy` and `CAPS.policy_for(limit)` take d = L (1 - γ_c^T) / ((1 - γ_c) T) everywhere: the
  whole limit spread over a whole episode. A policy of the state alone, so it neither saves what it
  has not spent nor stops when the limit is reached;
- `tracked(policy, limit)` knows what the episode has cost and how many steps n are left, and takes
  d = b (1 - γ_c^n) / ((1 - γ_c) n) with b = L - cost so far: CAPS's own rule, as a `Shield`.

Qc is the cost of a_i followed by little cost, not by head i: costs from the next step on are those
of an expectile near the cheapest logged actions. That is what makes one head after the other a
meaningful choice, and why a budget is spent early and not evenly.

Deviations from the authors' code: terminals and time-outs are told apart; Qc and Vc hold costs
where theirs hold minus costs, the same up to the sign of the last layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from saferl.data.dataset import Dataset
from saferl.errors import SaferlError
from saferl.nn import MLP, Policy, QEnsemble, VEnsemble, polyak
from saferl.nn.policies import gaussian_log_prob
from saferl.replay import Batch
from saferl.rng import MemberRandom
from saferl.safety.limits import check_limit, convert
from saferl.safety.shield import Shield

from .shared.agent import Agent, AgentConfig, Metrics
from .shared.constraint import costs_of

LOG_STD = (-20.0, 2.0)


@dataclass(frozen=True)
class CAPSConfig(AgentConfig):
    """Defaults: the authors' for two heads; batch and scale of rewards are OSRL's."""

    batch_size: int = 512
    hidden: tuple[int, ...] = (512, 512)
    reward_scale: float = 0.1
    heads: int = 2  # H
    cost_limit: float = math.inf  # of `policy`; not used in training
    cost_discount: float = 0.99  # γ_c, per environment step
    expectile: float = 0.7  # η, of rewards
    cost_expectile: float = 0.7  # η_c, of savings; → 1 the cheapest action in the data
    beta: float = 3.0  # inverse temperature of A
    cost_beta: float = 3.0  # β_c, of A_c
    advantage_clip: float = 100.0  # largest W_r and W_c
    actor_lr: float = 3e-4
    critic_lr: float = 3e-4
    value_lr: float = 3e-4
    actor_decay_steps: int = 100_000  # updates until the actor's cosine reaches 0; 0: constant
    tau: float = 0.005  # Polyak rate of the target critics per update


class Heads(nn.Module):
    """H Gaussian policies on one trunk."""

    def __init__(
        self,
        init: MemberRandom,
        observation_dim: int,
        action_dim: int,
        hidden: tuple[int, ...],
        heads: int,
    ):
        super().__init__()
        self.shape = (heads, action_dim)
        self.mlp = MLP(init, (observation_dim, *hidden, heads * action_dim))
        self.log_std = nn.Parameter(torch.zeros(self.mlp.members, 1, heads, action_dim))

    def forward(self, observations: Tensor) -> Tensor:
        """Means, ``[M, B, O]`` to ``[M, B, H, A]``."""
        return self.mlp(observations)[:, 0].tanh().unflatten(-1, self.shape)

    def log_prob(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Log density of actions ``[M, B, A]`` under each head, ``[M, B, H]``."""
        log_std = self.log_std.clamp(*LOG_STD)
        noise = (actions.unsqueeze(2) - self(observations)) * (-log_std).exp()
        return gaussian_log_prob(noise, log_std)


class Switch(nn.Module):
    """Heads, the critics that choose between them, and what is allowed (d, ``[M]``)."""

    def __init__(
        self,
        heads: Heads,
        critic: QEnsemble,
        cost_critic: QEnsemble,
        allowed: Tensor,
        cost_discount: float,
    ):
        super().__init__()
        self.heads, self.critic, self.cost_critic = heads, critic, cost_critic
        # A parameter, so that it goes with its member when a policy is taken apart.
        self.allowed = nn.Parameter(allowed, requires_grad=False)
        self.cost_discount = cost_discount

    def values(self, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """min_e Q_e and max_e Qc_e of actions ``[M, B, K, A]``, each ``[M, B, K]``."""
        value = self.critic.many(observations, actions).amin(1)
        return value, self.cost_critic.many(observations, actions).amax(1)

    def choose(self, observations: Tensor, actions: Tensor) -> Tensor:
        """Which of the heads' actions ``[M, B, H, A]`` is taken, ``[M, B]``."""
        value, cost = self.values(observations, actions)
        within = cost < self.allowed[:, None, None]
        best = value.masked_fill(~within, -math.inf).argmax(-1)
        return torch.where(within.any(-1), best, cost.argmin(-1))

    def mode(self, observations: Tensor) -> Tensor:
        actions = self.heads(observations)
        return _take(actions, self.choose(observations, actions))

    def sample(self, observations: Tensor, random: MemberRandom) -> Tensor:
        """A draw from the head whose mean `mode` would take."""
        actions = self.heads(observations)
        chosen = self.choose(observations, actions)
        mean, std = (
            _take(x.expand_as(actions), chosen)
            for x in (actions, self.heads.log_std.clamp(*LOG_STD).exp())
        )
        return (mean + std * random.normal(*mean.shape[1:])).clamp(-1, 1)


class CAPS(Agent[CAPSConfig]):
    Config = CAPSConfig
    per_member = frozenset(
        {"cost_limit", "discount", "expectile", "cost_expectile", "beta", "cost_beta"}
    )
    needs_costs: ClassVar[bool] = True

    @classmethod
    def prepare(cls, dataset: Dataset, config: Any) -> Dataset:
        """All of the dataset.

        Raises:
            SaferlError: it has no costs.
        """
        if dataset.costs is None:
            raise SaferlError(
                f"caps learns what actions cost but {dataset.card.id} has no costs: attach them "
                "with Dataset.with_costs(function), or map a cost column"
            )
        return super().prepare(dataset, config)

    def build(self, init: MemberRandom) -> None:
        c, o, a = self.config, self.spec.observation_dim, self.spec.action_dim
        if c.heads < 2:
            raise SaferlError(f"caps needs 2 heads or more, got {c.heads}")
        if not 0 <= c.cost_discount < 1:
            raise SaferlError(f"cost_discount lies between 0 and below 1, got {c.cost_discount:g}")
        heads = Heads(init, o, a, c.hidden, c.heads)
        critic, cost_critic = (QEnsemble(init, o, a, c.hidden, 2) for _ in range(2))
        allowed = self.allowed(c.cost_limit)
        self.actor = Switch(heads, critic, cost_critic, allowed, c.cost_discount)
        self.value, self.cost_value = (VEnsemble(init, o, c.hidden) for _ in range(2))
        self.critic_target = self.target_of(critic)
        self.cost_critic_target = self.target_of(cost_critic)
        rate = torch.tensor(c.actor_lr, device=self.device)
        self.actor_optimizer = self.adam(heads, lr=rate)
        self.critic_optimizer = self.adam(critic, lr=c.critic_lr)
        self.cost_optimizer = self.adam(cost_critic, lr=c.critic_lr)
        self.value_optimizer = self.adam(self.value, lr=c.value_lr)
        self.cost_value_optimizer = self.adam(self.cost_value, lr=c.value_lr)
        shares = [1.0, *(i / ((c.heads - 1) / 2) for i in range(1, c.heads - 1)), 1.0]
        earning = [1.0] * (c.heads - 1) + [0.0]
        self.mixture = torch.tensor([earning, [0.0, *shares[1:]]], device=self.device)

    def allowed(self, cost_limit: float | Sequence[float]) -> Tensor:
        """d of a limit per episode, or of one per member, ``[M]``; the largest number for none."""
        limits = cost_limit if isinstance(cost_limit, (list, tuple)) else [cost_limit]
        if len(limits) not in (1, self.members):
            raise SaferlError(f"cost_limit has {len(limits)} values for {self.members} members")
        allowed = []
        for limit in (check_limit(limit, infinite=True) for limit in limits):
            if limit < math.inf:
                limit = convert(
                    limit,
                    "discounted",
                    horizon=self.spec.horizon,
                    discount=self.config.cost_discount,
                )
            allowed.append(min(limit, float(np.finfo(np.float32).max)))
        return torch.tensor(allowed, device=self.device).expand(self.members).clone()

    def policy_for(self, cost_limit: float | Sequence[float]) -> Policy:
        """The policy of another limit (or of one per member); it shares the agent's weights.

        Raises:
            SaferlError: a limit that is no number of 0 or more; no horizon.
        """
        own = self.actor
        actor = Switch(
            own.heads, own.critic, own.cost_critic, self.allowed(cost_limit), own.cost_discount
        )
        return Policy(actor, self.spec, self.members).to(self.device)

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        s, a, costs = batch.observations, batch.actions, costs_of(batch)
        not_done = 1 - batch.terminals
        with torch.no_grad():
            next_observations = batch.next_observations
            target = (
                batch.rewards
                + self.scalar("discount") * not_done * self.value(next_observations)[:, 0]
            )
            cost_target = (
                costs + c.cost_discount * not_done * self.cost_value(next_observations)[:, 0]
            )
            earned = self.critic_target(s, a).amin(1)
            spent = self.cost_critic_target(s, a).amax(1)

        advantage = earned - self.value(s)[:, 0]
        value_loss = _expectile(advantage, self.scalar("expectile"))
        self.minimise(self.value_optimizer, value_loss)
        saving = self.cost_value(s)[:, 0] - spent
        cost_value_loss = _expectile(saving, self.scalar("cost_expectile"))
        self.minimise(self.cost_value_optimizer, cost_value_loss)

        q = self.actor.critic(s, a)
        critic_loss = (q - target[:, None]).square().mean((1, 2))
        self.minimise(self.critic_optimizer, critic_loss)
        cost_q = self.actor.cost_critic(s, a)
        cost_loss = (cost_q - cost_target[:, None]).square().mean((1, 2))
        self.minimise(self.cost_optimizer, cost_loss)

        weights = [
            (self.scalar(name) * x.detach()).exp().clamp_max(c.advantage_clip)
            for name, x in (("beta", advantage), ("cost_beta", saving))
        ]
        log_prob = self.actor.heads.log_prob(s, a)  # [M, B, H]
        weight = torch.stack(weights, -1) @ self.mixture.to(log_prob)
        head_loss = -(weight * log_prob).mean(1)  # [M, H]
        actor_loss = head_loss.mean(-1)
        self.decay(self.actor_optimizer, c.actor_lr, c.actor_decay_steps)
        self.minimise(self.actor_optimizer, actor_loss)
        polyak(self.critic_target, self.actor.critic, c.tau)
        polyak(self.cost_critic_target, self.actor.cost_critic, c.tau)
        return {
            "critic_loss": critic_loss.detach(),
            "value_loss": value_loss.detach(),
            "cost_critic_loss": cost_loss.detach(),
            "cost_value_loss": cost_value_loss.detach(),
            "actor_loss": actor_loss.detach(),
            "reward_head_loss": head_loss[:, 0].detach(),
            "cost_head_loss": head_loss[:, -1].detach(),
            "q": q.detach().mean((1, 2)),
            "cost_q": cost_q.detach().mean((1, 2)),
        }


def tracked(policy: Policy, cost_limit: float, **options: Any) -> Shield:
    """CAPS's run-time rule for one member: the budget left, spread over the steps left.

    Call it like a policy, and tell it what each step cost: see `Shield`, of which the heads are the
    candidates and the critics those of the policy.

        guard = tracked(agent.policy().member(0), cost_limit=20)

    Args:
        policy: a `CAPS` policy of one member; for which limit it was made does not matter.
        cost_limit: undiscounted cost that an episode may have.
        options: of `Shield`, such as ``horizon``, ``guardian`` or ``log``.

    Raises:
        SaferlError: not a CAPS policy, several members, or what `Shield` refuses.
    """
    actor = getattr(policy, "actor", None)
    if not isinstance(actor, Switch):
        raise SaferlError("tracked() needs a policy of the agent caps: agent.policy().member(0)")
    if policy.members != 1:
        raise SaferlError(
            f"the policy has {policy.members} members: pass one of them, policy.member(0)"
        )

    def tensor(rows: np.ndarray) -> Tensor:
        return torch.as_tensor(rows, dtype=torch.float32, device=policy.action_center.device)[None]

    @torch.no_grad()
    def propose(observations: np.ndarray) -> np.ndarray:  # [N, O] to [N, H, A]
        actions = actor.heads(policy._normalise(tensor(observations)))
        return policy._raw(actions)[0].cpu().numpy()

    def critic(which: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        @torch.no_grad()
        def value(observations: np.ndarray, actions: np.ndarray) -> np.ndarray:
            own = (tensor(actions) - policy.action_center) / policy.action_half_range
            rows = policy._normalise(tensor(observations))
            return actor.values(rows, own.unsqueeze(2))[which][0, :, 0].cpu().numpy()

        return value

    return Shield(
        lambda observations: propose(observations)[:, 0],
        candidates=lambda observations: propose(observations)[:, 1:],
        reward_critic=critic(0),
        cost_critic=critic(1),
        cost_limit=cost_limit,
        discount=actor.cost_discount,
        **{"spec": policy.spec} | options,
    )


def _take(actions: Tensor, chosen: Tensor) -> Tensor:
    """``[M, B, H, A]`` at heads ``[M, B]``, ``[M, B, A]``."""
    return actions.take_along_dim(chosen[..., None, None], 2).squeeze(2)


def _expectile(difference: Tensor, expectile: float | Tensor) -> Tensor:
    """mean w_η(u) u², ``[M]``."""
    weight = torch.where(difference.detach() > 0, expectile, 1 - expectile)
    return (weight * difference.square()).mean(-1)
