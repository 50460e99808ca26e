"""Loads a packed folder with whatever transformers this interpreter has; run in clean environments.

    python compat_check.py PACKED DENSE

`DENSE` is the same model as an ordinary checkpoint. Prints the version, or fails.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

import rsprune

GENERATED = 6


def main(packed: Path, dense: Path) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype)
        other = AutoModelForCausalLM.from_pretrained(dense, dtype=dtype)
        near_outputs(model, other)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            same_tensors(packed, Path(folder))
            saved = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        for loaded in (model, saved):
            rsprune.set_compute(loaded, "exact")
            same_outputs(loaded, other)
        same_outputs(rsprune.load(packed, dequantize=True, dtype=dtype), other)


def near_outputs(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Logits of products in float32, against those of dense products in the model's type."""
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = one(ids).logits.double(), other(ids).logits.double()
    bound = 1e-5 if other.dtype == torch.float32 else 3e-2  # bfloat16 keeps 8 bits of everything
    assert float((found - expected).norm() / expected.norm()) < bound


def same_outputs(one: torch.nn.Module, other: torch.nn.Module) -> None:
    """Bit-equal logits, and the same text."""
    ids = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    assert type(one) is type(other)
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)
    options = {"max_new_tokens": GENERATED, "do_sample": False}
    assert torch.equal(one.generate(ids, **options), other.generate(ids, **options))


def same_tensors(source: Path, saved: Path) -> None:
    """Parts came back as they were, under the same names."""
    from safetensors.torch import load_file

    read = [
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (source, saved)
    ]
    linears = json.loads((source / "config.json").read_text())["quantization_config"]["linears"]
    parts = [name for name in read[0] if name.rpartition(".")[0] in linears]
    parts = [name for name in parts if not name.endswith(".bias")]
    assert len(parts) >= 2 * len(linears) > 0
    for name in parts:
        assert torch.equal(read[0][name].view(torch.uint8), read[1][name].view(torch.uint8)), name
    section = "quantization_config"
    configs = [json.loads((folder / "config.json").read_text()) for folder in (source, saved)]
    assert configs[0][section] == configs[1][section]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"transformers {transformers.__version__}: packed folders load")
