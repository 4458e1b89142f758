"""The run-time guard: shield, budget tracker, intervention log, policy adapters."""

from saferl.safety.shield.adapters import each
from saferl.safety.shield.log import Intervention
from saferl.safety.shield.shield import Shield

__all__ = ["Intervention", "Shield", "each"]
