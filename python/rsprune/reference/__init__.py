"""Slow float64 NumPy twins of the Rust core: the same names, written from the mathematics.

They exist to be read next to a paper and to be compared with; tests and documentation import
them, the package itself never does.
"""

from rsprune.reference.certificate import quadratic_error, relative_error
from rsprune.reference.fista import FistaPoint, fista
from rsprune.reference.pattern import Pattern
from rsprune.reference.scores import magnitude, wanda
from rsprune.reference.sparsegpt import sparsegpt
from rsprune.reference.statistics import Matrix, Statistics
from rsprune.reference.storage import narrow, widen

__all__ = [
    "FistaPoint",
    "Matrix",
    "Pattern",
    "Statistics",
    "fista",
    "magnitude",
    "narrow",
    "quadratic_error",
    "relative_error",
    "sparsegpt",
    "wanda",
    "widen",
]
