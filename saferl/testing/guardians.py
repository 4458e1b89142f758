"""What a guardian must do: ``saferl check NAME`` runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from saferl.errors import SaferlError
from saferl.safety.guardians import Guardian, make_guardian

ROWS = 400


def _data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Observations, actions and episode numbers of random play in a box."""
    random = np.random.default_rng(seed)
    observations = random.normal(size=(ROWS, 3)).astype(np.float32)
    actions = np.tanh(observations[:, :2]) + 0.1 * random.normal(size=(ROWS, 2))
    return observations, actions.astype(np.float32), np.arange(ROWS) // 8 + 1000 * seed


def _ready(name: str) -> Guardian:
    guardian = make_guardian(name)
    s, a, episodes = _data(0)
    guardian.fit(s, a, groups=episodes, next_observations=s)
    s, a, episodes = _data(1)
    guardian.calibrate(s, a, alpha=0.1, groups=episodes)
    return guardian


def it_flags_at_most_alpha_of_supported_rows(name: str) -> None:
    """On episodes that it has not seen, at most about alpha of the rows are flagged."""
    s, a, _ = _data(2)
    share = float(np.mean(_ready(name).is_ood(s, a)))
    assert share <= 0.2, f"{share:.0%} of supported rows are flagged at alpha 10 %"


def it_flags_what_is_far_away(name: str) -> None:
    """Rows far from all data are flagged."""
    s, a, _ = _data(2)
    share = float(np.mean(_ready(name).is_ood(s + 50, a)))
    assert share > 0.99, f"only {share:.0%} of rows far from the data are flagged"


def it_needs_to_be_fitted_and_calibrated(name: str) -> None:
    """Asked too early it says what to call first."""
    s, a, episodes = _data(0)
    guardian = make_guardian(name)
    for _ in range(2):
        try:
            guardian.is_ood(s, a)
        except SaferlError:
            if not guardian.fitted:
                guardian.fit(s, a, groups=episodes, next_observations=s)
            continue
        raise AssertionError("it answers before it is calibrated")


def its_state_is_loaded_into_a_fresh_one(name: str) -> None:
    """``state_dict`` holds all that was learnt."""
    guardian, other = _ready(name), make_guardian(name)
    other.load_state_dict(guardian.state_dict())
    s, a, _ = _data(2)
    assert np.array_equal(guardian.is_ood(s, a), other.is_ood(s, a))


def numpy_in_numpy_out(name: str) -> None:
    """Arrays are answered with arrays, tensors with tensors, whatever the leading axes."""
    guardian: Any = _ready(name)
    s, a, _ = _data(2)
    scores = guardian.score(s, a)
    assert isinstance(scores, np.ndarray) and scores.shape == (ROWS,)
    tensors = guardian.score(torch.from_numpy(s).view(2, -1, 3), torch.from_numpy(a).view(2, -1, 2))
    assert isinstance(tensors, torch.Tensor) and tensors.shape == (2, ROWS // 2)
    np.testing.assert_allclose(tensors.reshape(-1), scores, rtol=1e-4, atol=1e-5)


GUARDIAN_CHECKS: tuple[Callable[[str], None], ...] = (
    it_flags_at_most_alpha_of_supported_rows,
    it_flags_what_is_far_away,
    it_needs_to_be_fitted_and_calibrated,
    its_state_is_loaded_into_a_fresh_one,
    numpy_in_numpy_out,
)
