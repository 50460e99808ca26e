"""Maps of low rank, from full decompositions and normal equations."""

from __future__ import annotations

import numpy as np

from rsprune.reference.statistics import Matrix

__all__ = ["factors", "pair_distance", "reduced_rank", "truncated_svd"]


def truncated_svd(weight: Matrix, rank: int) -> tuple[Matrix, Matrix, Matrix]:
    """The `rank` leading singular triples: left [rank, m], values [rank], right [rank, n]."""
    u, s, v = np.linalg.svd(weight, full_matrices=False)
    return u[:, :rank].T, s[:rank], v[:rank]


def pair_distance(one: Matrix, other: Matrix, *, of: int, rank: int) -> float:
    """`min |W^_i - W^_j - D|_F^2` over D of `rank`, `W^` the rank-`of` reconstructions."""
    left, values, right = truncated_svd(one, of)
    reconstructed = (left.T * values) @ right
    left, values, right = truncated_svd(other, of)
    spectrum = np.linalg.svd(reconstructed - (left.T * values) @ right, compute_uv=False)
    return float(np.square(spectrum[rank:]).sum())


def reduced_rank(x: Matrix, targets: Matrix, *, rank: int | None, damping: float) -> Matrix:
    """`argmin |T - D X|_F^2 + l |D diag(G)^1/2|_F^2` over D [outputs, inputs] of `rank`.

    Solved as an ordinary least-squares problem with the penalty as further rows: the best D of
    rank r is the full solution projected on the leading left singular vectors of what it fits.

    Args:
        x: [tokens, inputs].
        targets: [tokens, outputs].
        rank: None for the full solution.
        damping: the penalty `l`.
    """
    penalty = np.sqrt(damping * np.square(x).sum(0))
    rows = np.vstack([x, np.diag(penalty)])
    wanted = np.vstack([targets, np.zeros((x.shape[1], targets.shape[1]))])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    if rank is not None:
        _, _, v = np.linalg.svd(rows @ solution, full_matrices=False)
        solution = solution @ v[:rank].T @ v[:rank]
    whole: Matrix = solution.T
    return whole


def factors(x: Matrix, weight: Matrix, *, rank: int) -> Matrix:
    """`argmin |(W - V) X|_F` over V of `rank`, for inputs x [tokens, inputs]."""
    _, _, v = np.linalg.svd(x @ weight.T, full_matrices=False)
    nearest: Matrix = v[:rank].T @ v[:rank] @ weight
    return nearest
