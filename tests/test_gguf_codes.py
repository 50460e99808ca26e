"""What the one-bit methods write, as GGUF files: exactly, in the type that they are named for."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_models import build
from test_gguf_export import HEADS, tensors_in

from rsprune import Config, compress, load
from rsprune.gguf_export import export_gguf


@pytest.mark.parametrize(
    ("kind", "options"),
    [("Q1_0", {"pattern": "8:8"}), ("TQ2_0", {"pattern": "2:8"}), ("TQ1_0", {"bits": 1.0})],
)
@pytest.mark.parametrize("form", ["dense", "packed"])
def test_what_one_bit_methods_write_is_exported_exactly(
    tmp_path: Path, documents: Path, kind: str, options: dict[str, Any], form: str
):
    size = {"samples": 6, "seq_len": 32, "heldout": 0.34, "threads": 1}
    config = Config.create(
        method="pbs2p-exact", calibration=str(documents), format=form, **size, **options
    )
    folder = compress(build(tmp_path / "model"), tmp_path / "out", config).folder
    exported = export_gguf(folder, tmp_path / "out.gguf", kind)
    found = tensors_in(exported.path, HEADS)
    weights = load(folder, dequantize=True).state_dict()
    linears = [name for name in found if weights[name].dim() == 2 and ".layers." in name]
    assert len(linears) == 14
    for name in linears:
        stored, read = found[name]
        assert stored == kind, name
        assert np.array_equal(read, weights[name].float().numpy()), name
