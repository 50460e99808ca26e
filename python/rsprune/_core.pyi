"""The Rust core as Python sees it; checked against the built module by `make lint`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "PACK_VERSION",
    "MappedTensor",
    "PackedMatrix",
    "Pattern",
    "Regression",
    "Shard",
    "ShardWriter",
    "Statistics",
    "__version__",
    "admm",
    "arb",
    "best",
    "billm",
    "checkpoint_index",
    "default_threads",
    "exchange",
    "fista",
    "fista_plus",
    "gptq",
    "gradient_sizes",
    "gradient_squares",
    "group_channels",
    "kernel_name",
    "magnitude",
    "pack",
    "pack_format",
    "pack_layout",
    "pair_distance",
    "pbs2p",
    "pbs2p_exact",
    "pbs2p_losses",
    "pbs2p_residual",
    "plan_shard",
    "polish",
    "signs_bits",
    "sparsegpt",
    "truncated_svd",
    "unpack",
    "wanda",
    "write_file",
]

__version__: str
PACK_VERSION: int

class _Operator(Protocol):
    """What the methods read: see `rsprune.methods.base.Operator`."""

    @property
    def weight(self) -> NDArray[Any]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def pattern(self) -> Pattern: ...
    @property
    def calibration(self) -> Statistics: ...
    @property
    def heldout(self) -> Statistics | None: ...

_Pruned = tuple[NDArray[Any], dict[str, Any]]
_Packed = tuple[NDArray[Any], dict[str, Any], tuple[str, dict[str, NDArray[Any]]]]

def default_threads() -> int: ...
def kernel_name() -> str: ...

@final
class PackedMatrix:
    def __new__(
        cls, parts: dict[str, NDArray[Any]], dtype: str, format: str, shape: tuple[int, int]
    ) -> PackedMatrix: ...
    def linear(
        self, x: NDArray[np.float32], *, mode: str = "float32", threads: int | None = None
    ) -> NDArray[np.float32]: ...
    def int8_error(self, x: NDArray[np.float32], *, threads: int | None = None) -> float: ...

@final
class Pattern:
    def __new__(cls, text: str, scope: str = "row") -> Pattern: ...
    def check(self, name: str, columns: int) -> None: ...
    def holds(self, weight: NDArray[Any], dtype: str) -> bool: ...
    @property
    def sparsity(self) -> float: ...

@final
class Statistics:
    def __new__(
        cls, width: int, *, corrected: bool = False, spill: Path | None = None
    ) -> Statistics: ...
    def add(
        self,
        x: NDArray[np.float32],
        dense: NDArray[np.float32] | None = None,
        *,
        threads: int | None = None,
    ) -> None: ...
    @property
    def width(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def dead_channels(self) -> int: ...
    def diagonal(self) -> NDArray[np.float64]: ...
    def gram(self) -> NDArray[np.float64]: ...
    def cross(self) -> NDArray[np.float64] | None: ...
    def drift(self) -> NDArray[np.float64] | None: ...

def magnitude(operator: _Operator, *, threads: int | None = None) -> _Pruned: ...
def wanda(operator: _Operator, *, threads: int | None = None) -> _Pruned: ...
def sparsegpt(operator: _Operator, *, damping: float, threads: int | None = None) -> _Pruned: ...
def fista(
    operator: _Operator,
    *,
    warm_start: str,
    iterations: int,
    xi: float,
    patience: int,
    lambda_start: float,
    damping: float,
    max_rounds: int | None = None,
    threads: int | None = None,
) -> _Pruned: ...
def fista_plus(
    operator: _Operator,
    *,
    iterations: int,
    xi: float,
    patience: int,
    lambda_start: float,
    floor: str | None,
    max_rounds: int | None = None,
    polish_steps: int = 20,
    threads: int | None = None,
) -> _Pruned: ...
def admm(
    operator: _Operator, *, damping: float, slow: bool, threads: int | None = None
) -> _Pruned: ...
def best(operator: _Operator, *, budget: int, threads: int | None = None) -> _Pruned: ...
def polish(
    operator: _Operator,
    values: NDArray[Any],
    *,
    refit: bool,
    search: bool,
    steps: int = 20,
    threads: int | None = None,
) -> _Pruned: ...
def pbs2p_exact(
    operator: _Operator, *, damping: float, stage: str = "search", threads: int | None = None
) -> _Pruned: ...
def pbs2p_residual(
    operator: _Operator, *, damping: float, threads: int | None = None
) -> _Packed: ...
def pbs2p_losses(
    operator: _Operator,
    codes: list[tuple[Pattern, Pattern | None]],
    *,
    damping: float,
    threads: int | None = None,
) -> list[dict[str, Any]]: ...
def pbs2p(operator: _Operator, *, damping: float, threads: int | None = None) -> _Packed: ...
def billm(operator: _Operator, *, damping: float, threads: int | None = None) -> _Packed: ...
def arb(operator: _Operator, *, damping: float, threads: int | None = None) -> _Packed: ...
def gptq(
    operator: _Operator, *, damping: float, bits: int, threads: int | None = None
) -> _Packed: ...
def signs_bits(pattern: Pattern, columns: int) -> float: ...
def group_channels(
    operator: _Operator, *, segment: int, repeats: int, threads: int | None = None
) -> NDArray[np.int64]: ...

_Triples = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float32]]

def truncated_svd(
    weight: NDArray[Any], dtype: str, *, rank: int, seed: int = 0, threads: int | None = None
) -> _Triples: ...
def pair_distance(
    one: _Triples, other: _Triples, *, rank: int, threads: int | None = None
) -> float: ...

@final
class Regression:
    def __new__(cls, inputs: int, outputs: int) -> Regression: ...
    def add(
        self,
        x: NDArray[np.float32],
        targets: NDArray[np.float32] | None = None,
        *,
        threads: int | None = None,
    ) -> None: ...
    @property
    def tokens(self) -> int: ...
    def fit(
        self,
        heldout: Regression | None,
        *,
        rank: int | None,
        dampings: Sequence[float],
        threads: int | None = None,
    ) -> tuple[NDArray[np.float32] | None, NDArray[np.float32], dict[str, Any]]: ...
    def factors(
        self, weight: NDArray[Any], dtype: str, *, rank: int, threads: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...

def pack_format(weight: NDArray[Any], dtype: str, pattern: Pattern) -> str: ...
def pack_layout(
    format: str, dtype: str, shape: tuple[int, int]
) -> list[tuple[str, str, list[int]]]: ...
def pack(weight: NDArray[Any], dtype: str, format: str) -> dict[str, NDArray[Any]]: ...
def unpack(
    parts: dict[str, NDArray[Any]],
    dtype: str,
    format: str,
    shape: tuple[int, int],
    *,
    start: int = 0,
    stop: int | None = None,
) -> NDArray[Any]: ...
def gradient_sizes(
    deltas: NDArray[np.float32],
    inputs: NDArray[np.float32],
    weight: NDArray[Any],
    dtype: str,
    *,
    threads: int | None = None,
) -> tuple[float, float, float]: ...
def gradient_squares(
    deltas: NDArray[np.float32], inputs: NDArray[np.float32], *, threads: int | None = None
) -> float: ...

@final
class Shard:
    def __new__(cls, path: Path) -> Shard: ...
    def tensors(self) -> list[tuple[str, str, list[int], int]]: ...
    @property
    def metadata(self) -> dict[str, str]: ...
    def read(self, name: str) -> NDArray[np.uint8]: ...
    def read_part(self, name: str, start: int, count: int) -> NDArray[np.uint8]: ...
    def map(self, name: str) -> MappedTensor: ...

@final
class MappedTensor:
    def release(self) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

@final
class ShardWriter:
    def __new__(
        cls,
        path: Path | str,
        tensors: Sequence[tuple[str, str, Sequence[int]]],
        metadata: dict[str, str],
    ) -> ShardWriter: ...
    @property
    def nbytes(self) -> int: ...
    def put(self, name: str, data: NDArray[np.uint8]) -> None: ...
    def copy(self, name: str, source: Shard, *, renamed_from: str | None = None) -> None: ...
    def finish(self) -> None: ...
    def abort(self) -> None: ...

def plan_shard(
    tensors: Sequence[tuple[str, str, Sequence[int]]], metadata: dict[str, str]
) -> int: ...
def checkpoint_index(folder: Path) -> dict[str, str]: ...
def write_file(path: Path, data: bytes) -> None: ...
def exchange(one: Path, other: Path) -> bool: ...
