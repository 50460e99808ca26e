"""What every method looks like to the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from numpy.typing import NDArray

from rsprune import _core
from rsprune.config import Config


@dataclass(frozen=True)
class Operator:
    """One linear operator to prune; read attribute by attribute by the Rust core.

    Attributes:
        weight: [outputs, inputs], float32 or the bits of a half type as uint16; not mutated.
        dtype: its safetensors name: F32, BF16 or F16.
        pattern: what may stay.
        calibration: sums over the calibration tokens of the operator's input.
        heldout: the same over tokens that no solver sees.
        residual: of what codes a second plane of signs is, where there is one; `pattern` then
            keeps all.
        spill: a folder on whose disk large arrays lie while it is solved; None for memory.
    """

    weight: NDArray[Any]
    dtype: str
    pattern: _core.Pattern
    calibration: _core.Statistics
    heldout: _core.Statistics | None
    spill: Path | None = None
    residual: _core.Pattern | None = None


@dataclass(frozen=True)
class Inputs:
    """Which inputs a method is run on; see the fields of the same names in `Config`."""

    propagate: Literal["layer", "model"]
    target: Literal["dense", "own"]
    true_sequential: bool
    correction: float = 1.0
    clip_tokens: float = 0.0

    @property
    def needs_dense(self) -> bool:
        """Whether the dense layer must run, beside or instead of the compressed one."""
        return self.propagate == "layer" or self.target == "dense"

    @property
    def corrected(self) -> bool:
        """Whether sums compare inputs that have drifted with those of the dense model."""
        return self.target == "dense" and (self.true_sequential or self.propagate == "model")


BLENDED = Inputs(
    propagate="model", target="dense", true_sequential=True, correction=0.25, clip_tokens=3.0
)
"""Of the leading solvers: the compressed model is followed and a quarter of its drift made up
for (measured; the whole of it over-fits), massive tokens do not count for more than the others."""


SURVEYED = Inputs(propagate="layer", target="own", true_sequential=False)
"""Of a look at the dense model before a run."""


class Packed(NamedTuple):
    """A weight in a packed format that cannot be worked out from its values alone."""

    format: str
    """As `_core` names it."""
    parts: dict[str, NDArray[Any]]
    """Tensors of the format by name; unpacked they are the weight, bit for bit."""


class Pruned(NamedTuple):
    """What a method makes of an operator."""

    weight: NDArray[Any]
    """As it is stored: float32, or the bits of a half type as uint16."""
    certificate: dict[str, Any]
    """What the report says of it."""
    packed: Packed | None = None
    """Only of methods with a format of their own."""


@dataclass(frozen=True)
class Workspace:
    """float32 arrays that a solver holds at its peak.

    Attributes:
        matrices: of the weight's size; these may lie in a file.
        squares: of the Gram's size that may lie in a file: of held-out sums, mostly.
        resident: of the Gram's size that every step goes over: always in memory.
        kept: of the weight's size that are always in memory: codes beside the values.
    """

    matrices: int
    squares: int
    resident: int
    kept: int = 0


class Method(Protocol):
    """A layer-wise pruning method."""

    name: str
    """What `--method` takes."""
    source: str
    """Where it was published."""
    scope: Literal["row", "matrix"]
    """Over what a sparsity is counted unless the user says otherwise."""
    inputs: Inputs
    """The inputs it is run on unless the user says otherwise."""
    permute: bool
    """Whether channels are permuted for keep-of patterns unless the user says otherwise."""

    def workspace(self, columns: int) -> Workspace:
        """What the solver holds for an operator with so many input channels."""
        ...

    def products(self, config: Config) -> float:
        """About how many products with its Gram an operator takes, measures included."""
        ...

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """Prunes one operator.

        Args:
            operator: weight, pattern and statistics.
            config: the method's options.
            model_type: `model_type` of config.json, for published per-family choices.
            threads: worker threads; the result has the same bits for any number.

        Raises:
            ValueError: the pattern does not fit, or the Gram is not positive definite.
        """
        ...
