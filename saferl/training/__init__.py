"""Training: the loop, its engines, run folders and configurations."""

from saferl.runs.gathered import gathered
from saferl.runs.split import merge, split
from saferl.training.evaluate import evaluate_run
from saferl.training.train import Run, load_agent, make_agent, resume, train

__all__ = [
    "Run",
    "evaluate_run",
    "gathered",
    "load_agent",
    "make_agent",
    "merge",
    "resume",
    "split",
    "train",
]
