"""PBS2P: stepwise pruning with binarization optimisation, N of 8 by the layer's redundancy.

    V = m o (alpha B + mu),  m keeps N of 8;   N of a layer: see `rsprune.codes`

Published: the form, its closed forms, the choice of N. Reconstructed, as there is no public code
and the text after the introduction could not be checked: see the core's `binarize/pbs2p.rs`.
"""

from __future__ import annotations

import re

from rsprune import _core
from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.methods.base import Operator, Packed, Pruned
from rsprune.methods.binarizer import Binarizer


class PBS2P(Binarizer):
    """2.75 true bits at 4:8, 3.0 at 5:8 and 6:8; 0.55, 0.70 and 0.80 as the paper counts."""

    name = "pbs2p"
    source = "PBS2P 2025, arXiv 2502.01705 (reconstructed in part)"

    def check(self, config: Config) -> str:
        """See `Binarizer.check`."""
        if not re.fullmatch("[1-8]:8", config.pattern):
            raise UsageError(
                f"option pattern: pbs2p expects n:8 such as 6:8, found {config.pattern}"
            )
        super().check(config.model_copy(update={"pattern": Config.model_fields["pattern"].default}))
        return config.pattern

    def solve(
        self, operator: Operator, config: Config, *, model_type: str, threads: int | None
    ) -> Pruned:
        """See `Method.solve`."""
        weight, certificate, packed = _core.pbs2p(operator, damping=config.damping, threads=threads)
        return Pruned(weight, certificate, Packed(*packed))
