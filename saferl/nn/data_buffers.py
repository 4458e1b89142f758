"""`DataBuffers`: modules whose buffers get their shapes from data; numpy in, numpy out."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class DataBuffers(nn.Module):
    """A module whose buffers get their shapes from data, so that loading has to make them.

    Buffers registered by `declare` are None until they are fitted or loaded; None ones are not part
    of the state. Loading makes this module's buffers exactly those of the state.
    """

    _anchor: Tensor

    def __init__(self):
        super().__init__()
        # Tells the device of a module that holds no data yet; not part of the state.
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)
        self._declared: list[str] = []

    def declare(self, *names: str) -> None:
        for name in names:
            self.register_buffer(name, None)
            self._declared.append(name)

    @property
    def device(self) -> torch.device:
        """Where scores are computed; `to` moves it."""
        return self._anchor.device

    def prepare_load(self, state: dict[str, Tensor]) -> None:
        """Called with this module's part of a state before it is loaded."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        for name in self._declared:
            tensor = own.get(name)
            empty = None if tensor is None else torch.empty_like(tensor, device=self.device)
            setattr(self, name, empty)
        self.prepare_load(own)
        super()._load_from_state_dict(state_dict, prefix, *args)


def as_tensor(values: Any, device: torch.device) -> Tensor:
    """A tensor of the values' own type; numpy arrays are copied, so read-only ones are welcome."""
    if isinstance(values, Tensor):
        return values.detach().to(device)
    return torch.tensor(np.asarray(values), device=device)


def in_kind(result: Tensor, like: Any) -> Any:
    """``result`` as numpy if the caller gave numpy, else on the device of the caller's tensor."""
    return result.to(like.device) if isinstance(like, Tensor) else result.cpu().numpy()
