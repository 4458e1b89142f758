"""Random numbers with one independent stream per member.

Member i draws from a generator seeded with its own seed, so what it draws does not depend on which
other members are trained beside it: member i of M is the same as that member alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum

import torch
from torch import Tensor


class Stream(IntEnum):
    """Who draws: users of one seed, each with a stream of its own.

    The numbers are part of every result: changing one changes runs of the same seed.
    """

    INIT = 0  # first weights
    UPDATE = 1  # noise and samples within updates
    DATASET_ROWS = 2  # which rows of a dataset a batch has
    ACTING = 3  # actions in environments; models that OGSRL fits
    OWN_ROWS = 4  # which rows of its own a member's batch has; OGSRL's cloning
    SHARES = 5  # which source a batch comes from; OGSRL's predictions
    REGRESSION = 6  # OGSRL's regression of the behaviour's cost-to-go


# A function of torch, its arguments before the shape, and the shape without the member axis.
Request = tuple[Callable[..., Tensor], tuple[int, ...], tuple[int, ...]]


class MemberRandom:
    """M generators on one device; every draw has a leading member axis."""

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", stream: int = 0):
        """``stream`` separates users of the same seed (initialisation, batches, noise)."""
        self.device = torch.device(device)
        self.generators = [
            torch.Generator(self.device).manual_seed((seed * 1_000_003 + stream * 7_919) % 2**63)
            for seed in seeds
        ]
        self._requests: list[Request] | None = None
        self._drawn: Iterator[Tensor] | None = None

    def _draw(self, request: Request) -> Tensor:
        if self._drawn is not None:
            return next(self._drawn)
        if self._requests is not None:
            self._requests.append(request)
        function, arguments, shape = request
        draws = [
            function(*arguments, shape, generator=generator, device=self.device)
            for generator in self.generators
        ]
        return draws[0].unsqueeze(0) if len(draws) == 1 else torch.stack(draws)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal ``[M, *shape]``."""
        return self._draw((torch.randn, (), shape))

    def uniform(self, *shape: int) -> Tensor:
        """Uniform on [0, 1), ``[M, *shape]``."""
        return self._draw((torch.rand, (), shape))

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers in [0, high), ``[M, *shape]``, int64."""
        return self._draw((torch.randint, (high,), shape))

    def pick(self, members: Sequence[int], highs: Sequence[int], *shape: int) -> Tensor:
        """Uniform integers of some members, each below its own bound, ``[len(members), *shape]``.

        The other members' streams stay where they are.
        """
        return torch.stack(
            [
                torch.randint(high, shape, generator=self.generators[member], device=self.device)
                for member, high in zip(members, highs)
            ]
        )

    # A compiled function cannot draw from generators. So its draws are noted in one plain call,
    # and from then on made before the call, in the same order, and handed in.

    @contextlib.contextmanager
    def noting(self) -> Iterator[list[Request]]:
        """Draw as usual; the list receives what was asked for."""
        self._requests = []
        try:
            yield self._requests
        finally:
            self._requests = None

    @contextlib.contextmanager
    def handing_out(self, drawn: Sequence[Tensor]) -> Iterator[None]:
        """Return these tensors instead of drawing."""
        self._drawn = iter(drawn)
        try:
            yield
        finally:
            self._drawn = None

    def draw(self, requests: Sequence[Request]) -> list[Tensor]:
        """What `noting` noted, drawn again."""
        return [self._draw(request) for request in requests]

    def state_dict(self) -> dict[str, Tensor]:
        return {"state": torch.stack([g.get_state() for g in self.generators])}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for generator, row in zip(self.generators, state["state"], strict=True):
            generator.set_state(row.clone())  # set_state needs an aligned tensor of its own
