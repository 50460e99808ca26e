"""Refusals that a user can act on; every message names what was expected and what was found."""

from __future__ import annotations

__all__ = ["DoesNotFitError", "RspruneError", "UsageError"]


class RspruneError(ValueError):
    """A run cannot go on, for a reason outside this program (a file, a model, the machine)."""


class UsageError(RspruneError):
    """An option or input is wrong, seen before any work was done; the CLI exits with status 2."""


class DoesNotFitError(UsageError):
    """A plan needs more memory than it may have; `rsprune plan` exits with status 3."""

    def __init__(self, message: str, smallest: int) -> None:
        super().__init__(message)
        self.smallest = smallest
        """The least bound in bytes that would do."""
