"""Training: the loop, its engines, run folders and configurations."""

from saferl.training.evaluation import evaluate_run
from saferl.training.gathered import gathered
from saferl.training.members import merge, split
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
