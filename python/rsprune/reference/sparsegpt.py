"""SparseGPT (arXiv 2301.00774, algorithm 1) in its published form.

    H^-1 = U^T U, U upper triangular;   for every block of 128 columns, for every column j in it:
        w_j is pruned by the lowest w^2 / U_jj^2;   e = (w_j - v_j) / U_jj
        eager: W[:, j+1 : end of block] -= e U[j, j+1 : end of block]
    lazy: W[:, after the block] -= E U[block, after the block]

Masks as published: of a keep-of group when its first column is reached, of a ratio when its block
is reached, so many that the blocks have the ratio together. (The core does the same arithmetic
without an inverse.)
"""

from __future__ import annotations

import numpy as np

from rsprune.reference.pattern import Mask, Pattern
from rsprune.reference.statistics import Matrix, Statistics

BLOCK = 128


def sparsegpt(
    weight: Matrix,
    pattern: Pattern,
    statistics: Statistics,
    *,
    damping: float,
    mask: Mask | None = None,
) -> Matrix:
    """Prunes `weight [m, n]` column by column with error feedback.

    Args:
        weight: W [m, n].
        pattern: what may stay.
        statistics: sums of its input; where they are corrected, `target` is what is pruned.
        damping: added to the diagonal of G, in units of its mean (published: 0.01).
        mask: which weights go [m, n]; None lets the method choose.

    Returns:
        V [m, n], not rounded to a storage type.

    Raises:
        LinAlgError: the damped G is not positive definite.
    """
    hessian = damped(statistics, damping)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    weight = target(weight, statistics, damping)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        part = slice(start, end)
        given = None if mask is None else mask[:, part]
        if given is None and pattern.group is None:
            scores = weight[:, part] ** 2 / np.diag(upper)[part] ** 2
            given = pattern.mask(scores, before=start)
        weight[:, part], errors = _prune_block(weight[:, part], upper[part, part], pattern, given)
        weight[:, end:] -= errors @ upper[part, end:]
    return weight


def damped(statistics: Statistics, damping: float) -> Matrix:
    """`H = G + damping mean(diag G) I [n, n]`."""
    return statistics.gram + damping * statistics.mean_square * np.eye(len(statistics.gram))


def target(weight: Matrix, statistics: Statistics, damping: float) -> Matrix:
    """The best dense `[m, n]`: minimises `||V X* - W X||^2 + damping mean(diag G) ||V - W||^2`.

    A copy of `weight` where both inputs agree. Reconstructed: the paper has no corrected inputs.
    """
    if not statistics.cross.any():
        return weight.copy()
    pull = damping * statistics.mean_square * np.eye(len(statistics.gram))
    wanted = weight @ (statistics.target_cross + pull)
    return np.asarray(np.linalg.solve(damped(statistics, damping), wanted.T).T, np.float64)


def _prune_block(
    weight: Matrix, upper: Matrix, pattern: Pattern, mask: Mask | None
) -> tuple[Matrix, Matrix]:
    """One block `[m, w]` and its errors `[m, w]`."""
    work, errors = weight.copy(), np.zeros_like(weight)
    goes = np.zeros(work.shape, bool) if mask is None else mask
    for j in range(work.shape[1]):
        if mask is None and pattern.group is not None and j % pattern.group[1] == 0:
            unit = slice(j, j + pattern.group[1])
            goes[:, unit] = pattern.mask(work[:, unit] ** 2 / np.diag(upper)[unit] ** 2)
        kept = np.where(goes[:, j], 0.0, work[:, j])
        errors[:, j] = (work[:, j] - kept) / upper[j, j]
        work[:, j + 1 :] -= np.outer(errors[:, j], upper[j, j + 1 :])
        work[:, j] = kept
    return work, errors
