"""Refusals that a user can act on; every message names what was expected and what was found."""

from __future__ import annotations

__all__ = ["RspruneError", "UsageError"]


class RspruneError(ValueError):
    """A run cannot go on, for a reason outside this program (a file, a model, the machine)."""


class UsageError(RspruneError):
    """An option or input is wrong, seen before any work was done; the CLI exits with status 2."""
