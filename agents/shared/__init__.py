"""What agents share: the contract, settings, limits, online fine-tuning, pixels."""

from .agent import Agent, Metrics
from .config import AgentConfig

__all__ = ["Agent", "AgentConfig", "Metrics"]
