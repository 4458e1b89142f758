"""Offline reinforcement learning with safety constraints."""
