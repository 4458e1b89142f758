"""Exact nearest neighbours: trees on the CPU, blocks of distances on any device; equal rows."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from saferl.errors import SaferlError

TREE_ROWS = 2048
"""References from which on scikit-learn searches on the CPU."""
BLOCK = 2**24
"""Distances in memory at once in a block search (64 MB)."""


def squared_distances(queries: Tensor, references: Tensor) -> Tensor:
    """``[B, D], [N, D]`` to ``[B, N]``, by differences: exact for rows that are equal or close."""
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(queries, references, compute_mode=mode).square()


def blocks(queries: int, references: int) -> tuple[int, int]:
    """Rows of queries and of references whose distances fit in one block."""
    rows = min(max(queries, 1), 4096)
    return rows, max(1, min(references, BLOCK // rows))


_trees: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


@torch.library.custom_op("saferl::tree_search", mutates_args=())
def tree_search(queries: Tensor, tree: int, k: int) -> Tensor:
    """Row numbers ``[B, k]`` int64 of the k nearest of queries ``[B, D]``, in no order.

    scikit-learn is no part of torch. As an operator of its own the search is asked anew wherever a
    recorded or compiled update runs, and not once while it is recorded.

    Args:
        tree: the number of a `Search` with a tree.

    Raises:
        SaferlError: that search is gone.
    """
    found = _trees.get(tree)
    if found is None:
        raise SaferlError("a recorded update asks a neighbour search that is gone: record it anew")
    rows = found.kneighbors(queries.detach().cpu().numpy(), k, return_distance=False)
    return torch.from_numpy(rows).to(queries.device)


@tree_search.register_fake
def _(queries: Tensor, tree: int, k: int) -> Tensor:
    return queries.new_empty((queries.shape[0], k), dtype=torch.int64)


class Search:
    """The k nearest of ``references [N, D]``, Euclidean, nearest first.

    On the CPU a scikit-learn index finds them where there are `TREE_ROWS` references or more;
    elsewhere distances to blocks of references are merged on the device, without reads to the host.
    Both then compute distance by the same formula and order ties by row number. Which of several
    rows at exactly the k-th distance is returned is not defined.
    """

    def __init__(self, references: Tensor, tree: bool | None = None):
        """``tree``: use scikit-learn or not; None decides by device and number of references."""
        self.references, self.index, self.number = references, None, -1
        if tree is None:
            tree = references.device.type == "cpu" and len(references) >= TREE_ROWS
        if tree:
            from sklearn.neighbors import NearestNeighbors

            # "auto" is a KD-tree in few dimensions and blocked brute force in many.
            self.index = NearestNeighbors(algorithm="auto").fit(references.cpu().numpy())

    def __call__(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Distances and row numbers, each ``[B, k]``, of queries ``[B, D]``."""
        step = max(1, BLOCK // (k * max(1, queries.shape[1])))
        found = [self._nearest(block, k) for block in queries.split(min(step, 4096))]
        return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])

    def _nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        if self.index is None:
            rows = self._block_search(queries, k)
        elif len(queries):
            if _trees.get(self.number) is not self.index:  # first used, or copied since
                self.number = next(_numbers)
                _trees[self.number] = self.index
            rows = tree_search(queries, self.number, k)
        else:
            rows = torch.empty(0, k, dtype=torch.int64)
        rows = rows.sort(1).values
        distances = (queries.unsqueeze(1) - self.references[rows]).square().sum(-1).sqrt()
        distances, order = distances.sort(dim=1, stable=True)
        return distances, rows.gather(1, order)

    def _block_search(self, queries: Tensor, k: int) -> Tensor:
        _, step = blocks(len(queries), len(self.references))
        best: Any = None
        rows: Any = None
        for start in range(0, len(self.references), step):
            block = squared_distances(queries, self.references[start : start + step])
            near, index = block.topk(min(k, block.shape[1]), largest=False)
            index = index + start
            if best is not None:
                near, index = torch.cat((best, near), 1), torch.cat((rows, index), 1)
            if near.shape[1] > k:
                near, order = near.topk(k, largest=False)
                index = index.gather(1, order)
            best, rows = near, index
        return rows


def hash_multipliers(width: int, seed: int = 0) -> Tensor:
    """Odd multipliers ``[width]`` int64 for `row_keys`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**62), 2**62, (width,), generator=generator) * 2 + 1


def row_keys(rows: Tensor, multipliers: Tensor) -> Tensor:
    """64-bit hashes ``[N]`` int64 of float32 rows ``[N, R]``; equal rows have equal keys."""
    bits = (rows + 0.0).contiguous().view(torch.int32).long()  # + 0.0 turns -0 into 0
    # Bits are spread first: round numbers differ in few of them.
    bits = (bits ^ (bits >> 15)) * 0x2545F4914F6CDD1D
    bits = (bits ^ (bits >> 29)) * 0x369DEA0F31A53F85
    return ((bits ^ (bits >> 32)) * multipliers).sum(-1)


def distinct_rows(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which of the float32 rows ``[N, R]`` are equal, without a sort of whole rows.

    Returns:
        Keys ``[U]`` of the U different rows, ascending; the first row number of each ``[U]``; for
        every row its number among the U ``[N]``; the multipliers that make the keys.
    """
    seed = 0
    while True:
        multipliers = hash_multipliers(rows.shape[1], seed).to(rows.device)
        keys, index = row_keys(rows, multipliers).unique(return_inverse=True)
        first = index.new_full((len(keys),), len(rows))
        first.scatter_reduce_(0, index, torch.arange(len(rows), device=rows.device), "amin")
        if (rows[first][index] == rows).all():
            return keys, first, index, multipliers
        seed += 1  # two different rows had the same key
