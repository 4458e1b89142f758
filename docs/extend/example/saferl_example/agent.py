"""Return-weighted behaviour cloning: rows of good episodes count more.

With G the discounted return-to-go of a row, and mean and deviation over the rows of the batch:

    w   = min(exp(β (G - mean G) / std G), w_max)
    L_π = mean w |π(s) - a|²
"""

from __future__ import annotations

from dataclasses import dataclass

from saferl.agents import Agent, AgentConfig, Metrics
from saferl.nn import DeterministicActor
from saferl.replay import Batch, ReturnsToGo
from saferl.rng import MemberRandom


@dataclass(frozen=True)
class WeightedBCConfig(AgentConfig):
    """Settings beside those that every agent has."""

    lr: float = 3e-4
    beta: float = 1.0  # β, inverse temperature; 0 clones all rows alike
    max_weight: float = 20.0  # w_max


class WeightedBC(Agent[WeightedBCConfig]):
    Config = WeightedBCConfig
    per_member = frozenset({"beta"})  # may differ between members

    @classmethod
    def batch_extras(cls, config):
        """Columns that a batch has beside the transition."""
        return (ReturnsToGo(config.discount),)

    def build(self, init: MemberRandom) -> None:
        """Networks and optimisers. The actor is what is exported as the policy."""
        sizes = self.spec.observation_dim, self.spec.action_dim, self.config.hidden
        self.actor = DeterministicActor(init, *sizes)
        self.actor_optimizer = self.adam(self.actor, lr=self.config.lr)

    def learn(self, batch: Batch) -> Metrics:
        """One update. Every tensor has the member axis first, so losses are ``[M]``."""
        returns = batch.extras["returns_to_go"]  # [M, B]
        returns = returns.clamp_min(-1e6)  # -inf where an episode has no known end
        centred = returns - returns.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        weight = (self.scalar("beta") * scaled).exp().clamp_max(self.config.max_weight)
        error = (self.actor(batch.observations) - batch.actions).square().mean(-1)  # [M, B]
        loss = (weight * error).mean(-1)
        self.minimise(self.actor_optimizer, loss)
        return {"actor_loss": loss.detach(), "weight": weight.mean(-1)}
