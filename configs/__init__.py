"""Published hyper-parameters, one YAML file per agent; see ``saferl.runs.settings``."""
