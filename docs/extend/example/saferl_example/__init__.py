"""An agent, an environment and a dataset source for saferl, as a package of its own."""
