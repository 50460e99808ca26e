"""Slow float64 NumPy twins of the Rust core: the same names, written from the mathematics.

They exist to be read next to a paper and to be compared with; tests and documentation import
them, the package itself never does.
"""

from rsprune.reference import binarize
from rsprune.reference.admm import AdmmPoint, admm
from rsprune.reference.binarize_published import arb, billm, gptq, pbs2p
from rsprune.reference.certificate import quadratic_error, relative_error
from rsprune.reference.fista import FistaPoint, fista
from rsprune.reference.fista_plus import fista_plus
from rsprune.reference.gradient import gradient_sizes, gradient_squares
from rsprune.reference.local_search import local_search
from rsprune.reference.lowrank import factors, pair_distance, reduced_rank, truncated_svd
from rsprune.reference.pattern import Pattern
from rsprune.reference.polish import Polished, polish
from rsprune.reference.refit import refit
from rsprune.reference.scaled import Scaled
from rsprune.reference.scores import magnitude, wanda
from rsprune.reference.sparsegpt import sparsegpt
from rsprune.reference.statistics import Matrix, Statistics
from rsprune.reference.storage import narrow, widen

__all__ = [
    "AdmmPoint",
    "FistaPoint",
    "Matrix",
    "Pattern",
    "Polished",
    "Scaled",
    "Statistics",
    "admm",
    "arb",
    "billm",
    "binarize",
    "factors",
    "fista",
    "fista_plus",
    "gptq",
    "gradient_sizes",
    "gradient_squares",
    "local_search",
    "magnitude",
    "narrow",
    "pair_distance",
    "pbs2p",
    "polish",
    "quadratic_error",
    "reduced_rank",
    "refit",
    "relative_error",
    "sparsegpt",
    "truncated_svd",
    "wanda",
    "widen",
]
