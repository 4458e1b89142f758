"""`FeatureMap`: state-action pairs to the vectors in which a guardian measures distance.

    raw row     [observation, action]            an action is A numbers, or one index when discrete
    encoded     [observation, action or levels or one-hot]
    features    ((encoded - shift) · scale) @ rotation

Everything is learnt from the rows that `FeatureMap.fit` sees and kept in buffers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saferl.errors import SaferlError, unknown
from saferl.nn.data_buffers import DataBuffers, as_tensor, in_kind

SCALINGS = ("minmax", "standard", "whiten")
ENCODINGS = ("levels", "onehot")


class FeatureMap(DataBuffers):
    """Scaled, optionally rotated state-action features.

    Args:
        scaling: "minmax" puts every column in [-1, 1] by the least and greatest value seen;
            "standard" gives it mean 0 and standard deviation 1; "whiten" also rotates the
            observation so that its columns are uncorrelated. Observation columns without a range
            are left as they are, and so are directions that whitening finds without variance.
        action_weight: w_a, multiplies the action's columns: how much an action's difference counts
            beside a feature's. 0 leaves the action out of the distance.
        n_actions: None for continuous actions; the number of discrete actions; or the numbers of
            levels of several factors, (5, 5) for action = 5 · first + second.
        action_encoding: discrete actions as "levels" (of each factor: one level is as far as one
            feature standard deviation, or with "minmax" in [-1, 1]), or "onehot" (two different
            levels are w_a apart whichever they are; for actions without an order).
        pca: keep the fewest principal components with this share of the variance (0.95). What
            leaves their subspace is then invisible.

    Raises:
        SaferlError: an unknown scaling or encoding; pca with whitening; sizes that do not fit.
    """

    # Tensors once there are data, None before.
    observation_shift: Any
    observation_scale: Any
    action_shift: Any
    action_scale: Any
    rotation: Any

    def __init__(
        self,
        scaling: str = "standard",
        action_weight: float = 1.0,
        n_actions: int | tuple[int, ...] | None = None,
        action_encoding: str = "levels",
        pca: float | None = None,
    ):
        super().__init__()
        if scaling not in SCALINGS:
            raise unknown("scaling", scaling, SCALINGS)
        if action_encoding not in ENCODINGS:
            raise unknown("action encoding", action_encoding, ENCODINGS)
        if pca is not None and not 0 < pca < 1:
            raise SaferlError(f"pca is the share of variance to keep, between 0 and 1; got {pca}")
        if pca is not None and scaling == "whiten":
            raise SaferlError(
                "pca cannot choose components after whitening, which gives all the same variance: "
                "take scaling='standard'"
            )
        if action_weight < 0:
            raise SaferlError(f"action_weight must be 0 or more, got {action_weight}")
        self.scaling, self.action_weight, self.pca = scaling, float(action_weight), pca
        self.onehot = action_encoding == "onehot"
        factors = (n_actions,) if isinstance(n_actions, int) else n_actions
        self.factors = None if factors is None else tuple(int(n) for n in factors)
        if self.factors is not None and (not self.factors or min(self.factors) < 1):
            raise SaferlError(f"n_actions must be 1 or more, got {n_actions}")
        # Separate shifts, because their shapes are the sizes of observation and action.
        self.declare("observation_shift", "observation_scale", "action_shift", "action_scale")
        self.declare("rotation")

    @property
    def discrete(self) -> bool:
        return self.factors is not None

    @property
    def observation_dim(self) -> int:
        return self.observation_shift.shape[0]

    def rows(self, observations: Any, actions: Any) -> Tensor:
        """Raw rows ``[*, O + A]`` (discrete ``[*, O + 1]``), float32; leading axes broadcast.

        Raises:
            SaferlError: leading axes that do not match; sizes other than those fitted.
        """
        s = as_tensor(observations, self.device).float()
        a = as_tensor(actions, self.device)
        if self.discrete:
            if a.is_floating_point():
                raise SaferlError("discrete actions must be whole numbers 0 … n-1 of an int type")
            a = a.unsqueeze(-1)
        elif a.dim() < 2 <= s.dim():
            raise SaferlError(
                f"actions of shape {list(a.shape)} have no component axis: reshape to [N, A], or "
                "pass n_actions= if they are discrete"
            )
        a = a.float()
        try:
            leading = torch.broadcast_shapes(s.shape[:-1], a.shape[:-1])
        except RuntimeError:
            raise SaferlError(
                f"observations {list(s.shape)} and actions {list(a.shape)} differ in their leading "
                "axes: give one action per observation"
            ) from None
        if self.observation_shift is not None:
            sizes = (self.observation_dim, 1 if self.discrete else self.action_shift.shape[0])
            if (s.shape[-1], a.shape[-1]) != sizes:
                raise SaferlError(
                    f"got {s.shape[-1]} observation and {a.shape[-1]} action numbers per row, but "
                    f"the guardian was fitted on {sizes[0]} and {sizes[1]}"
                )
        return torch.cat((s.expand(*leading, -1), a.expand(*leading, -1)), -1)

    def valid(self, rows: Tensor) -> Tensor:
        """``[*]`` bool: finite, and a discrete action that exists."""
        valid = rows.isfinite().all(-1)
        if self.discrete:
            valid &= (rows[..., -1] >= 0) & (rows[..., -1] < math.prod(self.factors or ()))
        return valid

    def action_levels(self, rows: Tensor) -> Tensor:
        """The raw action ``[*, A]`` of raw rows; discrete: its level in each factor."""
        if not self.discrete:
            return rows[..., self.observation_dim :]
        index, levels = rows[..., -1].long(), []
        for n in reversed(self.factors or ()):
            levels.append(index % n)
            index = index // n
        return torch.stack(levels[::-1], -1).to(rows.dtype)

    def fit(self, observations: Any, actions: Any) -> Tensor:
        """Learn from observations ``[N, O]`` and actions ``[N, A]`` or ``[N]``; returns raw rows.

        Raises:
            SaferlError: not two-dimensional, no rows, values that are not finite, actions that do
                not exist.
        """
        shape = tuple(np.shape(observations))
        if len(shape) != 2:
            raise SaferlError(f"observations must be [N, O], got {list(shape)}: flatten them")
        if len(np.shape(actions)) != (1 if self.discrete else 2):
            raise SaferlError(
                f"actions of shape {list(np.shape(actions))}: continuous ones are [N, A]; for "
                "discrete ones [N] pass n_actions="
            )
        self.observation_shift = None  # an earlier fit may have had other sizes
        rows = self.rows(observations, actions)
        self.check(rows)
        o = shape[1]
        shift, scale = self._scaling(rows[:, :o].double())
        self.observation_shift, self.observation_scale = shift.float(), scale.float()
        if self.discrete:
            levels = torch.tensor(self.factors, dtype=torch.float64, device=rows.device)
            shift, scale = (levels - 1) / 2, torch.ones_like(levels)
            if self.scaling == "minmax":
                scale = torch.where(levels > 1, 2 / (levels - 1).clamp_min(1), 1.0)
        else:
            shift, scale = self._scaling(rows[:, o:].double())
        self.action_shift = shift.float()
        self.action_scale = (scale * self.action_weight).float()
        self.rotation = None
        if self.scaling == "whiten":
            self.rotation = self._whitening(rows).float()
        elif self.pca is not None:
            self.rotation = self._components(rows).float()
        return rows

    def check(self, rows: Tensor) -> None:
        """Raise unless there are rows and all of them are valid."""
        if not rows.shape[0]:
            raise SaferlError("no rows: pass at least one observation and action")
        bad = ~self.valid(rows)
        if bad.any():
            raise SaferlError(
                f"{int(bad.sum())} rows (first: {int(bad.nonzero()[0, 0])}) hold values that are "
                "not finite or actions that do not exist: remove them"
            )

    def _scaling(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and scale per column ``[N, D]``; 0 and 1 where a column has no range."""
        low, high = x.amin(0), x.amax(0)
        flat = high == low
        if self.scaling == "minmax":
            shift, scale = (low + high) / 2, 2 / (high - low)
        else:
            shift, scale = x.mean(0), 1 / x.std(0, correction=0)
        return torch.where(flat, 0.0, shift), torch.where(flat, 1.0, scale)

    def _whitening(self, rows: Tensor) -> Tensor:
        z = self._scaled(rows).double()
        o = self.observation_dim
        values, vectors = torch.linalg.eigh(torch.cov(z[:, :o].T, correction=0).reshape(o, o))
        # A direction without variance is left as it is: scaling it would blow up rounding errors.
        kept = values > 1e-6 * values.max()
        rotation = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        rotation[:o, :o] = vectors * torch.where(kept, values, 1.0).rsqrt()
        return rotation

    def _components(self, rows: Tensor) -> Tensor:
        z = self._scaled(rows).double()
        covariance = torch.cov(z.T, correction=0).reshape(z.shape[1], z.shape[1])
        values, vectors = torch.linalg.eigh(covariance)
        assert self.pca is not None
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        share = values.cumsum(0) / values.sum()
        count = int((share < self.pca - 1e-12).sum()) + 1
        return vectors[:, :count].contiguous()

    def _scaled(self, rows: Tensor) -> Tensor:
        s = (rows[..., : self.observation_dim] - self.observation_shift) * self.observation_scale
        levels = self.action_levels(rows)
        if not (self.discrete and self.onehot):
            return torch.cat((s, (levels - self.action_shift) * self.action_scale), -1)
        codes = [
            (levels[..., i, None] == torch.arange(n, device=rows.device)).to(s.dtype)
            for i, n in enumerate(self.factors or ())
        ]
        return torch.cat((s, torch.cat(codes, -1) * (self.action_weight / math.sqrt(2))), -1)

    def encode(self, rows: Tensor) -> Tensor:
        """Features ``[*, D]`` of raw rows ``[*, R]``."""
        scaled = self._scaled(rows)
        return scaled if self.rotation is None else scaled @ self.rotation

    @torch.no_grad()
    def forward(self, observations: Any, actions: Any) -> Any:
        """Features ``[*, D]`` of ``[*, O]`` and ``[*, A]`` (discrete ``[*]``), numpy for numpy.

        Raises:
            SaferlError: not fitted; sizes that do not fit.
        """
        if self.observation_shift is None:
            raise SaferlError("the feature map is not fitted: call fit first")
        return in_kind(self.encode(self.rows(observations, actions)), observations)
