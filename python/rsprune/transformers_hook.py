"""Registers rsprune with transformers, whichever of the two is imported first.

transformers takes seconds to import and most commands of rsprune do without it, so it is not
imported for this: if it is there, rsprune registers now, else right after it was imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


def register() -> None:
    """Registers now or later."""
    if REGISTRY in sys.modules:
        importlib.import_module("rsprune.hf")
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport:
    """Finds the registry as everyone does, and has rsprune registered once it has run."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            importlib.import_module("rsprune.hf")

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
