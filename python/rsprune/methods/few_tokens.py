"""What becomes of an expert that a router sent too few tokens to: a rule that needs no data.

    tokens < ENOUGH[method] * input channels    ->    magnitude, and the report says so

A method that solves with the Gram estimates n^2 numbers from them, one that scores by norms n. Of
too few tokens the first fits the sample at the cost of all other inputs. Measured: relative error
on unseen text at 2:4, SmolLM2-135M, gate (576 channels) and down (1,536) of layers 3 and 15, as a
geometric mean relative to magnitude's:

    tokens per channel      1/32    1/8     1/4     1/2     1       2       4
    wanda                   0.81    0.77    0.76    0.75    0.75    0.74    0.74
    sparsegpt               0.92    1.06    1.17    1.20    1.01    0.75    0.64

So the limit lies at one token a channel for methods that solve (ADMM, on the two gates: 1.11 at 1
and 0.70 at 2), and lower for Wanda alone; below 1/8 it lost to magnitude on one of the four. Ours.
"""

from __future__ import annotations

DATA_FREE = "magnitude"
"""The rule, as the report names it."""

CODED = ("pbs2p", "pbs2p-exact", "billm", "arb", "gptq")
"""Methods whose result has a format that magnitude's does not have: they go on with what the
damping leaves of the Gram, which without any token is the identity."""

ENOUGH = {DATA_FREE: 0.0, "wanda": 0.125, **dict.fromkeys(CODED, 0.0)}
"""Tokens per input channel that a method needs; every other one needs 1."""


def too_few(method: str, *, tokens: int, columns: int) -> bool:
    """Whether an expert with `columns` input channels saw too few tokens for `method`."""
    return tokens < ENOUGH.get(method, 1.0) * columns
