"""MOORL (Chaudhary et al. 2025, arXiv 2506.09574): SAC in Reptile's outer iterations.

One update is an outer iteration on K batches from a single source, the dataset with probability p:

    φ_m, θ_m ← φ, θ                                        what π and Q are before it
    K times:   SAC's steps of Q, Q̄, π and α                agents/sac.py, its losses and targets
    φ ← φ_m + η (φ - φ_m),   θ ← θ_m + η (θ - θ_m)         ``eta``; η = 1 is SAC in blocks

So what acts, is evaluated and is exported are the slow (meta) weights. Under a cost limit the cost
critic moves with the critics.

The authors have published no code; the abstract, Algorithm 1 and reviews of the paper could be read
for this, not its tables. docs/agents/moorl.md says which choice rests on what; no score of theirs
is claimed. Every choice has a switch:

    S1  buffer              sampling, offline_share, share_rule      S8   meta_temperature
    S2  environment steps   utd (0: one per update; 1: K)            S9   actor_steps
    S3  batches             fresh_batches                            S10  critic_layer_norm
    S4  who acts            acting                                   S11  critics
    S5  the meta step       meta_step                                S12  offline_steps
    S6  inner optimiser     inner_optimizer                          S13  target_entropy
    S7  targets             target_follows                           S14  `MOORL.adapted`
                                                                     S15  entropy_backup
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saferl.errors import SaferlError, unknown
from saferl.nn import Policy, polyak
from saferl.replay import Batch
from saferl.rng import MemberRandom

from .sac import SAC, SACConfig
from .shared.agent import Metrics
from .shared.config import between

CHOICES = {
    "acting": ("meta", "fast"),
    "meta_step": ("reptile", "gradient"),
    "inner_optimizer": ("adam", "adam_reset", "adam_no_momentum", "sgd"),
    "target_follows": ("fast", "meta"),
}


@dataclass(frozen=True)
class MOORLConfig(SACConfig):
    """Defaults: those of docs/agents/moorl.md; the paper's could not be read."""

    inner_steps: int = 5  # K, SAC steps per outer iteration
    sampling: str = "block"  # an outer iteration learns from one source
    eta: float = 0.5  # η, part of the way to the fast weights, in (0, 1]
    meta_step: str = "reptile"  # gradient: - η ∇L at the fast weights, on a batch more
    acting: str = "meta"  # fast: the policy before the last meta step acts
    inner_optimizer: str = "adam"  # adam_reset: moments begin anew; adam_no_momentum: β1 = 0; sgd
    target_follows: str = "fast"  # every critic step; meta: once per update, by 1 - (1 - τ)^K
    meta_temperature: bool = False  # log α is moved back too

    def __post_init__(self):
        super().__post_init__()
        between(self, "eta", 0, 1, above=True)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.meta_step == "gradient" and (self.meta_temperature or not self.fresh_batches):
            raise SaferlError(
                "meta_step=gradient takes a batch of its own and moves actor and critics alone: "
                "leave fresh_batches at true and meta_temperature at false"
            )


class MOORL(SAC):
    Config = MOORLConfig
    config: MOORLConfig
    needs_dataset = True
    per_member = SAC.per_member | {"eta", "offline_share"}

    def build(self, init: MemberRandom) -> None:
        super().build(init)
        c = self.config
        if self.spec.image and c.meta_step == "gradient":
            raise SaferlError("meta_step=gradient is for vectors: use reptile on pixels")
        if c.acting == "fast":
            self.fast_actor = self.target_of(self.actor)
        moving = [*self.actor.parameters(), *self.critic.parameters()]
        if self.constraint is not None:
            moving += self.cost_critic.online.parameters()
        if c.meta_temperature:
            moving.append(self.log_temperature)
        self._moving = moving
        self._meta = [torch.empty_like(p, device=self.device) for p in moving]  # φ_m, θ_m
        self._back: Any = 1 - self.scalar("eta", 0)
        if isinstance(self._back, Tensor):  # one η per member
            rates: Any = (1 - self.scalar("eta", p.dim() - 1) for p in moving)
            self._back = [rate.expand_as(p) for rate, p in zip(rates, moving)]

    def adam(self, *networks: nn.Module | nn.Parameter, lr: Any) -> Any:
        """The inner optimiser."""
        optimizer = super().adam(*networks, lr=lr)
        group = optimizer.param_groups[0]
        if self.config.inner_optimizer == "sgd":
            return torch.optim.SGD(group["params"], lr=lr)
        if self.config.inner_optimizer == "adam_no_momentum":
            group["betas"] = (0.0, 0.999)
        return optimizer

    @property
    def batch_rows(self) -> int:
        c = self.config
        return super().batch_rows + (c.batch_size if c.meta_step == "gradient" else 0)

    def behaviour(self) -> Policy:
        if self.config.acting == "meta":
            return self.policy()
        return Policy(self.fast_actor, self.spec, self.members).to(self.device)

    def warm_start(self, state: dict[str, Tensor]) -> None:
        super().warm_start(state)
        if self.config.acting == "fast" and not any(k.startswith("fast_actor.") for k in state):
            polyak(self.fast_actor, self.actor, 1.0)

    def learn(self, batch: Batch) -> Metrics:
        c = self.config
        with torch.no_grad():
            torch._foreach_copy_(self._meta, self._moving)
            if c.inner_optimizer == "adam_reset":
                self._reset_moments()
        inner = super().batch_rows
        metrics = self.inner_loop(batch.rows(0, inner) if self.batch_rows > inner else batch)
        if c.acting == "fast":
            polyak(self.fast_actor, self.actor, 1.0)
        if c.meta_step == "gradient":
            self._gradient_step(batch.rows(inner, self.batch_rows))
        else:
            self.meta_step()
        if c.target_follows == "meta":
            super().follow(1 - (1 - c.tau) ** c.inner_steps)
        return metrics

    @torch.no_grad()
    def meta_step(self) -> None:
        """From the fast weights back towards the meta weights; at η = 1 exactly nowhere."""
        torch._foreach_lerp_(self._moving, self._meta, self._back)

    def follow(self, rate: float) -> None:
        if self.config.target_follows == "fast":
            super().follow(rate)

    def _reset_moments(self) -> None:
        slots = [
            tensor
            for optimizer in vars(self).values()
            if isinstance(optimizer, torch.optim.Optimizer)
            for state in optimizer.state.values()
            for tensor in state.values()
        ]
        if slots:
            torch._foreach_zero_(slots)

    def _gradient_step(self, batch: Batch) -> None:
        """φ_m, θ_m minus η times the gradients of L_π, L_Q and L_Qc at the fast weights (S5)."""
        target, next_actions = self.target(batch)
        loss, q = self.critic_loss(batch, target)
        of_critics = torch.autograd.grad(loss.sum(), [*self.critic.parameters()])
        if self.constraint is not None:
            loss = self.cost_critic.loss(batch, self.cost_backup(batch, next_actions))
            of_critics += torch.autograd.grad(loss.sum(), [*self.cost_critic.online.parameters()])
        loss, *_ = self.actor_loss(batch, q)
        of_actor = torch.autograd.grad(loss.sum(), [*self.actor.parameters()])
        with torch.no_grad():
            torch._foreach_copy_(self._moving, self._meta)
            for p, gradient in zip(self._moving, (*of_actor, *of_critics), strict=True):
                p.sub_(gradient * self.scalar("eta", p.dim() - 1))

    def adapted(self, batch: Batch) -> Policy:
        """The policy that K further SAC steps would make (S14); the agent stays as it is.

        ``batch``: rows that the members gathered, as many as K steps take: ``[M, K · batch_size]``,
        or ``[M, batch_size]`` without ``fresh_batches``.
        """
        twin = copy.deepcopy(self)
        twin.inner_loop(batch)
        return twin.policy()
