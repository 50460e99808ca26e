"""Layer problems for tests of the solvers, posed to the Rust core and to its NumPy twins alike."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rsprune import _core, reference
from rsprune.methods import Operator

FISTA: dict[str, Any] = {
    "warm_start": "wanda",
    "iterations": 20,
    "xi": 0.3,
    "patience": 3,
    "lambda_start": 0.01,
    "damping": 0.01,
}
"""The defaults of `Config`."""

WHOLE_BUDGET = 1116
"""Products with the Gram with which `best` tries all of its candidates."""

LEADING: dict[str, dict[str, Any]] = {
    "admm": {"damping": 0.01, "slow": False},
    "fista_plus": {
        "iterations": 20,
        "xi": 0.3,
        "patience": 3,
        "lambda_start": 0.05,
        "floor": None,
    },
    "best": {"budget": WHOLE_BUDGET},
    "polish": {"refit": True, "search": True},
}
"""They work in scaled variables: a weight that stays may change by its last bit."""

METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "wanda": {},
    "sparsegpt": {"damping": 0.01},
    "fista": FISTA,
} | LEADING


def run(method: str, operator: Any, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """One call of the core with the default options of `method`, on one thread."""
    if method == "polish":
        return polish(operator, run("wanda", operator)[0], **options)
    return getattr(_core, method)(operator, **({"threads": 1} | METHODS[method] | options))


def polish(operator: Any, values: np.ndarray, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """The same for `polish` from other `values` than those of Wanda."""
    return _core.polish(operator, values, **({"threads": 1} | METHODS["polish"] | options))


def statistics(
    x: np.ndarray, dense: np.ndarray | None = None, *, batch: int = 256, threads: int = 1
) -> _core.Statistics:
    """The core's sums of `x [tokens, n]`, added in batches as windows are."""
    sums = _core.Statistics(x.shape[1], corrected=dense is not None)
    for start in range(0, len(x), batch):
        part = slice(start, start + batch)
        sums.add(x[part], None if dense is None else dense[part], threads=threads)
    return sums


def bits_equal(a: np.ndarray, b: np.ndarray) -> bool:
    """Also tells -0 from 0."""
    return a.dtype == b.dtype and a.tobytes() == b.tobytes()


def activations(rng: np.random.Generator, tokens: int, n: int) -> np.ndarray:
    """Inputs as layers have them: correlated, with heavy-tailed channel scales."""
    hidden = rng.standard_normal((tokens, n)) * (1 + np.arange(n)) ** -0.5
    mixed = hidden @ rng.standard_normal((n, n)) + 0.3 * rng.standard_normal((tokens, n))
    return (mixed * np.exp(0.8 * rng.standard_normal(n))).astype(np.float32)


@dataclass
class Case:
    """One operator with its inputs; `dense` are the inputs in the dense model, where they differ.

    The first `split` tokens are for calibration, the others are held out.
    """

    weight: np.ndarray
    dtype: str
    x: np.ndarray
    dense: np.ndarray | None
    split: int

    @classmethod
    def random(
        cls, m: int, n: int, *, seed: int = 0, dtype: str = "F32", corrected: bool = False,
        tokens: int | None = None,
    ) -> Case:  # fmt: skip
        rng = np.random.default_rng([seed, m, n])
        split = tokens or 3 * n
        x = activations(rng, split + n, n)
        drift = 0.1 * x.std(axis=0) * rng.standard_normal(x.shape) + 0.1 * np.roll(x, 1, axis=1)
        weight = rng.standard_t(5, (m, n)) / np.sqrt(n)
        return cls(
            weight=reference.narrow(weight, dtype),
            dtype=dtype,
            x=(x + drift).astype(np.float32) if corrected else x,
            dense=x if corrected else None,
            split=split,
        )

    def part(self, heldout: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Inputs and dense inputs of the calibration tokens or of the held-out ones."""
        rows = slice(self.split, None) if heldout else slice(None, self.split)
        return self.x[rows], None if self.dense is None else self.dense[rows]

    @cached_property
    def values(self) -> np.ndarray:
        """The dense weight [m, n] in float64."""
        return reference.widen(self.weight, self.dtype)

    @cached_property
    def sums(self) -> tuple[_core.Statistics, _core.Statistics]:
        return statistics(*self.part(heldout=False)), statistics(*self.part(heldout=True))

    @cached_property
    def twin(self) -> reference.Statistics:
        """The sums over the calibration tokens in float64."""
        sums = reference.Statistics(self.x.shape[1])
        sums.add(*self.part(heldout=False))
        return sums

    @cached_property
    def heldout_twin(self) -> reference.Statistics:
        """The sums over the held-out tokens in float64."""
        sums = reference.Statistics(self.x.shape[1])
        sums.add(*self.part(heldout=True))
        return sums

    @cached_property
    def scaled(self) -> reference.Scaled:
        """The same problem in scaled variables."""
        return reference.Scaled.of(self.values, self.twin)

    def damped(self, values: np.ndarray, damping: float) -> float:
        """The damped objective at `values`, in variables as they are stored."""
        return self.scaled.objective(values * self.scaled.roots, damping)

    def operator(self, pattern: str, scope: str = "row", *, judged: bool = True) -> Operator:
        """The operator as solvers take it, held-out sums among it only if it is `judged`."""
        calibration, heldout = self.sums
        wanted = _core.Pattern(pattern, scope)
        return Operator(self.weight, self.dtype, wanted, calibration, heldout if judged else None)

    def error(self, values: np.ndarray, *, heldout: bool = False) -> float:
        """The relative error of `values`, from the activations."""
        return reference.relative_error(values, self.values, *self.part(heldout))


def score(certificate: dict[str, Any], *, judged: bool) -> float:
    """What solvers compare points by."""
    return certificate["heldout_error" if judged else "error"]


def operators_of_layer(
    model: Path, shared: Path, *, layer: int, pattern: str, rows: int
) -> Iterator[tuple[str, Operator]]:
    """First rows of q, o, up, down of a real layer, with sums over 4 windows of 512 tokens."""
    import torch

    from rsprune.calibrate import LayerJob
    from rsprune.config import Config
    from rsprune.data import calibration_windows, load_texts
    from rsprune.methods import Inputs
    from rsprune.plan import prepare
    from rsprune.skeleton import load_tokenizer
    from rsprune.timing import Timing
    from rsprune.windows import Split, Windows

    count, length = 4, 512
    prepared = prepare(model, Config.create(samples=count, seq_len=length), None)
    skeleton, checkpoint = prepared.skeleton, prepared.checkpoint
    ids = calibration_windows(
        load_texts(str(shared / "data" / "c4-sample.jsonl")),
        load_tokenizer(model),
        samples=count,
        seq_len=length,
        seed=0,
    )
    hidden = Windows(count, length, skeleton.channels)
    for window, value in enumerate(prepared.stream.embed(ids)):
        hidden.put(window, value)
    for index in range(layer):
        skeleton.load_layer(index)
        for window in range(count):
            with torch.no_grad():
                before = hidden.get(window, torch.device("cpu"))
                after = skeleton.layers[index](before, **prepared.stream.kwargs(index))
            hidden.put(window, after[0] if isinstance(after, tuple) else after)
        skeleton.drop_layer(index)
    skeleton.load_layer(layer)
    job = LayerJob(
        layer=skeleton.layers[layer],
        structure=prepared.opening.structures[layer],
        kwargs=prepared.stream.kwargs(layer),
        inputs=Inputs("layer", "own", False),
        split=Split(count, 0),
        threads=1,
        store=lambda kind, channels: Windows(count, length, channels),
        pool=skeleton.pool,
        where=f"layer {layer}",
        timing=Timing(),
    )
    for group, sums in job.groups(hidden, hidden):
        for linear in group.linears:
            short = linear.rpartition(".")[2]
            if short in ("q_proj", "o_proj", "up_proj", "down_proj"):
                name = skeleton.disk_name(skeleton.layer_name(layer, f"{linear}.weight"))
                assert name is not None
                stored = checkpoint.lend(name)[:rows]
                wanted = _core.Pattern(pattern, "matrix")
                yield short, Operator(stored, "BF16", wanted, sums.calibration, None)
    job.advance()
    skeleton.drop_layer(layer)
