"""Runs: the settings of one, its members, and the folder that holds it."""
