"""Recovery of one stand-in: Adam on adapters, maps, gains and norms against the dense outputs.

The tuner of `--tune-block`, with the parameters that a stand-in brings: it fits
`|stand-in(x*) - y|^2 / |y|^2`, rounds to what is stored, and keeps what is best on held-out
windows.
"""

from __future__ import annotations

from typing import Any

from rsprune.config import Config
from rsprune.flexi.site import Site, StandIn, built
from rsprune.tune import LayerTuner
from rsprune.windows import Windows


def recovered(
    site: Site, stand_in: StandIn, source: Windows, config: Config
) -> tuple[StandIn, dict[str, Any]]:
    """Tunes a stand-in; returns the better one of it and the tuned one, and what was done.

    Args:
        source: what enters it.
    """
    kwargs = {} if stand_in.option == "map" else site.kwargs
    dtypes = {name: value.dtype for name, value in stand_in.tensors.items()}
    with built(site.walk, site.index, stand_in) as module:
        tuner = LayerTuner(
            module, kwargs, source, site.dense_out, site.split, dtypes, config, site.walk.threads
        )
        tuned = tuner.run()
    tensors = {name: value.to(dtypes[name]) for name, value in tuned.values.items()}
    better = StandIn(stand_in.option, stand_in.block, tensors)
    with built(site.walk, site.index, better) as module:
        errors = site.measure(stand_in.option, module, source)
    better = StandIn(stand_in.option, stand_in.block, tensors, errors)
    record = {"before": stand_in.errors, "after": errors, "steps": tuned.steps}
    # What deletion is on the calibration windows bounds the stand-in, and so must bound this.
    worse = errors[0] > stand_in.errors[0] or better.judged > stand_in.judged
    return (stand_in, {**record, "kept": False}) if worse else (better, {**record, "kept": True})
