"""Safety: limits and their units, multipliers, guardians, models and the run-time guard.

A limit is the expected undiscounted cost of an episode, in the user's units, everywhere outside a
loss; `saferl.safety.limits.convert` is the one way from there to the units of a loss.
"""

from saferl.safety.limits import CostLimit, check_limit, convert, limit_warnings
from saferl.safety.shield import Shield
from saferl.safety.shield.adapters import each

__all__ = ["CostLimit", "Shield", "check_limit", "convert", "each", "limit_warnings"]
