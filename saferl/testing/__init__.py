"""Checks for agents, environments, dataset sources and guardians of third parties."""
