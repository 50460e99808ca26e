"""Prune large language models on the CPU that you have, one decoder layer at a time.

    import rsprune
    report = rsprune.compress("SmolLM2-135M", "out", rsprune.Config(pattern="2:4"))

What is listed in `__all__` is the public API; each name is imported when it is first used, so
that `import rsprune` (and `rsprune --help`) does not wait for torch. Importing it also lets
transformers load packed folders.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rsprune import transformers_hook

if TYPE_CHECKING:
    from rsprune._core import __version__
    from rsprune.config import Config
    from rsprune.driver import make_plan
    from rsprune.errors import RspruneError, UsageError
    from rsprune.eval_tasks import evaluate_tasks
    from rsprune.evaluate import perplexity
    from rsprune.export import export_dense
    from rsprune.hf import load
    from rsprune.inspect import inspect
    from rsprune.packed_linear import int8_errors, set_compute
    from rsprune.report import Report, load_report
    from rsprune.run import compress
    from rsprune.verify import verify

__all__ = [
    "Config",
    "Report",
    "RspruneError",
    "UsageError",
    "__version__",
    "compress",
    "evaluate_tasks",
    "export_dense",
    "inspect",
    "int8_errors",
    "load",
    "load_report",
    "make_plan",
    "perplexity",
    "set_compute",
    "verify",
]

_HOMES = {
    "Config": "config",
    "Report": "report",
    "RspruneError": "errors",
    "UsageError": "errors",
    "__version__": "_core",
    "compress": "run",
    "evaluate_tasks": "eval_tasks",
    "export_dense": "export",
    "inspect": "inspect",
    "int8_errors": "packed_linear",
    "load": "hf",
    "load_report": "report",
    "make_plan": "driver",
    "perplexity": "evaluate",
    "set_compute": "packed_linear",
    "verify": "verify",
}


class _Package(ModuleType):
    """This package. Importing `rsprune.inspect` or `rsprune.verify` would put the submodule where
    the function of that name belongs; the function is put there instead.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType) and _HOMES.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rsprune' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"rsprune.{_HOMES[name]}"), name)
    setattr(sys.modules[__name__], name, value)
    return value


transformers_hook.register()


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
