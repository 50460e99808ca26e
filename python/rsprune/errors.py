"""Refusals that a user can act on; every message names what was expected and what was found."""

from __future__ import annotations

__all__ = ["DoesNotFitError", "RspruneError", "UsageError", "one_line"]

LONGEST = 600


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


def one_line(error: object) -> str:
    """The text of an error for one line of a terminal: no breaks, no control characters, no end.

    What others raise may be pages long and hold a tensor's name as the file spells it.
    """
    joined = " ".join(str(error).split()) or type(error).__name__
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    return printable if len(printable) <= LONGEST else printable[: LONGEST - 3] + "..."
