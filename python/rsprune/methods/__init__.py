"""The registry of methods: name -> method, one file each, the same parts in the same order."""

from __future__ import annotations

from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.methods.admm import Admm
from rsprune.methods.arb import ARB
from rsprune.methods.base import Inputs, Method, Operator, Packed, Pruned, Workspace
from rsprune.methods.best import Best
from rsprune.methods.billm import BiLLM
from rsprune.methods.binarizer import Binarizer
from rsprune.methods.few_tokens import CODED, DATA_FREE, too_few
from rsprune.methods.fista import Fista
from rsprune.methods.fista_plus import FistaPlus
from rsprune.methods.gptq import GPTQ
from rsprune.methods.magnitude import Magnitude
from rsprune.methods.pbs2p import PBS2P
from rsprune.methods.pbs2p_exact import PBS2PExact, fixed
from rsprune.methods.polish import WORKSPACE as POLISH
from rsprune.methods.polish import polish
from rsprune.methods.sparsegpt import SparseGPT
from rsprune.methods.wanda import Wanda

__all__ = [
    "CODED",
    "DATA_FREE",
    "DEPTH",
    "Binarizer",
    "Inputs",
    "Method",
    "Operator",
    "Packed",
    "Pruned",
    "Workspace",
    "differ",
    "get",
    "inputs_of",
    "names",
    "polish",
    "removes_layers",
    "too_few",
    "workspaces",
]

_ALL: tuple[Method, ...] = (
    Magnitude(), Wanda(), SparseGPT(), Fista(), FistaPlus(), Admm(), Best(),
    PBS2P(), PBS2PExact(), BiLLM(), ARB(), GPTQ(),
)  # fmt: skip
_METHODS = {method.name: method for method in _ALL}

DEPTH = ("pip", "bi", "taylor", "perplexity", "perplexity-greedy", "random", "given",
         "flexigpt")  # fmt: skip
"""Methods that remove whole decoder layers: they solve nothing, and live in `rsprune.depth`
and, where something stands in for a layer, in `rsprune.flexi`."""


def names() -> list[str]:
    """Names that `--method` takes."""
    return [*_METHODS, *DEPTH]


def removes_layers(name: str) -> bool:
    """Whether a method removes decoder layers; raises `UsageError` for one that nobody knows."""
    if name not in DEPTH:
        get(name)
    return name in DEPTH


def get(name: str) -> Method:
    """The method of that name; raises `UsageError` that lists the known ones."""
    try:
        return _METHODS[name]
    except KeyError:
        raise UsageError(f"method {name!r}: expected one of {', '.join(names())}") from None


def differ(config: Config) -> bool:
    """Whether operators differ in what they are pruned to, which is decided before the first is."""
    if config.method == "pbs2p-exact":
        return not fixed(config)
    return config.allocate or config.method == "pbs2p"


def workspaces(config: Config, columns: int) -> list[Workspace]:
    """What the solvers of a run hold one after another, for an operator of so many channels."""
    found = [get(config.method).workspace(columns)]
    if config.refit or config.search:
        found.append(POLISH)
    if config.allocate:
        found.append(get("sparsegpt").workspace(columns))
    return found


def inputs_of(method: Method, config: Config) -> Inputs:
    """The inputs that a run uses: the user's choice, else the method's."""
    default = method.inputs
    return Inputs(
        propagate=config.propagate or default.propagate,
        target=config.target or default.target,
        true_sequential=(
            default.true_sequential if config.true_sequential is None else config.true_sequential
        ),
        correction=default.correction if config.correction is None else config.correction,
        clip_tokens=default.clip_tokens if config.clip_tokens is None else config.clip_tokens,
    )
