"""Agents: one file per method. A new one subclasses `Agent`: see docs/extend/agent.md."""

from .shared import Agent, AgentConfig, Metrics

__all__ = ["Agent", "AgentConfig", "Metrics"]
