"""Random numbers with one independent stream per member.

Member i draws from a generator seeded with its own seed, so what it draws does not depend on which
other members are trained beside it: member i of M is the same as that member alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class MemberRandom:
    """M generators on one device; every draw has a leading member axis."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", stream: int = 0):
        """``stream`` separates users of the same seed (initialisation, batches, noise)."""
        self.device = torch.device(device)
        self.generators = [
            torch.Generator(self.device).manual_seed((seed * 1_000_003 + stream * 7_919) % 2**63)
            for seed in seeds
        ]

    def _draw(self, function, *shape: int) -> Tensor:
        draws = [
            function(shape, generator=generator, device=self.device)
            for generator in self.generators
        ]
        return draws[0].unsqueeze(0) if len(draws) == 1 else torch.stack(draws)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal ``[M, *shape]``."""
        return self._draw(torch.randn, *shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform on [0, 1), ``[M, *shape]``."""
        return self._draw(torch.rand, *shape)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), ``[M, *shape]``, int64."""
        draws = [
            torch.randint(high, shape, generator=generator, device=self.device)
            for generator in self.generators
        ]
        return draws[0].unsqueeze(0) if len(draws) == 1 else torch.stack(draws)

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": torch.stack([g.get_state() for g in self.generators])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for generator, row in zip(self.generators, state["state"], strict=True):
            generator.set_state(row.clone())  # set_state needs an aligned tensor of its own
