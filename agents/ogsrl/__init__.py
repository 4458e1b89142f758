"""OGSRL: offline guarded safe RL; see `saferl.agents.ogsrl.agent` for the equations."""

from .agent import OGSRL, DiscreteOGSRL
from .guarded import OGSRLConfig

__all__ = ["OGSRL", "DiscreteOGSRL", "OGSRLConfig"]
