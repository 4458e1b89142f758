"""Agents: one file per method."""
