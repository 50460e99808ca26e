"""The registry of methods: name -> method, one file each, the same parts in the same order."""

from __future__ import annotations

from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.methods.admm import Admm
from rsprune.methods.base import Inputs, Method, Operator, Packed, Pruned, Workspace
from rsprune.methods.best import Best
from rsprune.methods.few_tokens import DATA_FREE, too_few
from rsprune.methods.fista import Fista
from rsprune.methods.fista_plus import FistaPlus
from rsprune.methods.magnitude import Magnitude
from rsprune.methods.polish import WORKSPACE as POLISH
from rsprune.methods.polish import polish
from rsprune.methods.sparsegpt import SparseGPT
from rsprune.methods.wanda import Wanda

__all__ = [
    "DATA_FREE",
    "Inputs",
    "Method",
    "Operator",
    "Packed",
    "Pruned",
    "Workspace",
    "get",
    "inputs_of",
    "names",
    "polish",
    "too_few",
    "workspaces",
]

_ALL: tuple[Method, ...] = (
    Magnitude(), Wanda(), SparseGPT(), Fista(), FistaPlus(), Admm(), Best(),
)  # fmt: skip
_METHODS = {method.name: method for method in _ALL}


def names() -> list[str]:
    """Names that `--method` takes."""
    return list(_METHODS)


def get(name: str) -> Method:
    """The method of that name; raises `UsageError` that lists the known ones."""
    try:
        return _METHODS[name]
    except KeyError:
        raise UsageError(f"method {name!r}: expected one of {', '.join(_METHODS)}") from None


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
    )
