"""--format packed: what is stored is smaller, and is what the dense run stores, bit for bit."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packed_models import Pair, binarized, pair_of
from safetensors.torch import load_file, save_file
from tiny_models import ordinary, tensors_of, token_ids
from transformers import AutoModelForCausalLM

import rsprune
from rsprune import methods
from rsprune.checkpoint import Checkpoint
from rsprune.cli import main
from rsprune.config import Config
from rsprune.driver import make_plan
from rsprune.errors import RspruneError, UsageError
from rsprune.evaluate import perplexity
from rsprune.export import export_dense
from rsprune.inspect import inspect, totals
from rsprune.packing import PackedWeight
from rsprune.report import load_report
from rsprune.run import compress
from rsprune.skeleton import Skeleton
from rsprune.verify import verify

CASES = {
    "keep-of": ("llama_tied", "2:4", "sparsegpt"),
    "bitmap": ("qwen2", "50%", "wanda"),
    "bias": ("opt", "4:8", "magnitude"),
    "fused": ("phi3", "2:4", "magnitude"),
    "signs": ("llama", "3:4", "magnitude"),
}
CODED: dict[str, tuple[str, float | None, str]] = {
    "pbs2p": ("6:8", None, "binary"),
    "pbs2p-exact": ("2:4", 2.3, "residual|signs"),
    "billm": ("2:4", None, "binary 8:8"),
    "arb": ("2:4", None, "row-column"),
    "gptq": ("2:4", 3, "uniform 3"),
}
"""Methods of codes -> pattern (the default, where they take none), bits, formats."""
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def pairs(
    tiny: Callable[..., Path], documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Pair]:
    made: dict[str, Pair] = {}

    def of(case: str) -> Pair:
        if case not in made:
            kind, pattern, method = CASES[case]
            folder, model = tmp_path_factory.mktemp(case), tiny(kind)
            if case == "signs":
                model = binarized(model, folder / "model", pattern, shutil.copyfile)
            made[case] = pair_of(model, folder, documents, pattern, method)
        return made[case]

    return of


@pytest.fixture
def broken(pairs: Callable[[str], Pair], tmp_path: Path) -> Path:
    """A packed folder that a test may break."""
    return shutil.copytree(pairs("keep-of").packed, tmp_path / "broken")


def edit_config(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    edit(content["quantization_config"])
    path.write_text(json.dumps(content))


def edit_shard(folder: Path, name: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.mark.parametrize("case", CASES)
def test_every_reader_sees_the_dense_run(case: str, pairs: Callable[[str], Pair]) -> None:
    pair = pairs(case)
    stored = tensors_of(pair.packed)
    dense, packed = Checkpoint.open(pair.dense), Checkpoint.open(pair.packed)
    assert len(packed.packed) == len(load_report(pair.packed).tensors) > 0
    assert not packed.packed.keys() & stored.keys()
    assert dense.tensors.keys() == packed.tensors.keys()
    for name, tensor in tensors_of(pair.dense).items():
        for seen in (packed.read(name), torch.cat([p for _, p in packed.pieces(name)])):
            assert seen.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
        assert np.array_equal(packed.lend(name), dense.lend(name))
    assert verify(pair.packed) == []
    assert Skeleton(packed).missing() == []


@pytest.mark.parametrize(
    ("case", "form", "bits"),
    [("keep-of", "keep-of 2:4", 9.0), ("bias", "keep-of 4:8", 9.0), ("signs", "signs 3:4", None)],
)
def test_true_bits_are_those_of_the_files(
    case: str, form: str, bits: float | None, pairs: Callable[[str], Pair]
) -> None:
    pair = pairs(case)
    report, facts = load_report(pair.packed), inspect(pair.packed)
    stored = tensors_of(pair.packed)
    for record in report.tensors:
        prefix = record["name"].removesuffix("weight")
        parts = [t.nbytes for name, t in stored.items() if name.startswith(prefix)]
        bias = stored.get(f"{prefix}bias")
        assert record["stored_bytes"] == sum(parts) - (0 if bias is None else bias.nbytes)
        rows, columns = record["shape"]
        assert record["true_bits"] == record["stored_bytes"] * 8 / (rows * columns)
        assert (record["format"], bits or record["true_bits"]) == (form, record["true_bits"])
        (fact,) = (f for f in facts if f.name == record["name"])
        assert (fact.format, fact.nbytes) == (form, record["stored_bytes"])
        assert abs(fact.sparsity - record["sparsity"]) < 1e-9
    total = totals(pair.packed, facts)
    whole = sum(path.stat().st_size for path in pair.packed.glob("*.safetensors"))
    assert total.file_bytes == whole
    assert f"{total.packed_bits:.3f} of the pruned linears" in (report.bits or "")
    assert f"{whole * 8 / total.weights:.3f} of the whole model" in (report.bits or "")


def test_an_evaluation_reads_packed_folders(pairs: Callable[[str], Pair], documents: Path) -> None:
    pair = pairs("signs")
    options: dict[str, Any] = {"seq_len": 32, "windows": 3, "threads": 1}
    dense, packed = (perplexity(f, documents, **options) for f in (pair.dense, pair.packed))
    assert dense.loss == packed.loss
    assert dense.loss > 0


def test_a_packed_folder_is_compressed_again(
    pairs: Callable[[str], Pair], documents: Path, tmp_path: Path
) -> None:
    pair = pairs("keep-of")
    config = Config(
        calibration=str(documents), method="magnitude", pattern="1:4", samples=4, seq_len=32,
        threads=1,
    )  # fmt: skip
    for source in ("dense", "packed"):
        compress(getattr(pair, source), tmp_path / source, config)
    first, second = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "packed")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "quantization_config" not in (tmp_path / "packed/config.json").read_text()


def test_what_gains_nothing_stays_dense(
    tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    config = Config(
        calibration=str(documents), method="magnitude", pattern="4:4", samples=4, seq_len=32,
        threads=1, format="packed",
    )  # fmt: skip
    report = compress(tiny("llama"), tmp_path / "out", config)
    assert {record["format"] for record in report.tensors} == {"dense"}
    assert {record["true_bits"] for record in report.tensors} == {16.0}
    assert not report.packed
    assert "import rsprune" not in (tmp_path / "out/README.md").read_text()
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()


def test_the_plan_knows_the_size(pairs: Callable[[str], Pair]) -> None:
    for case, close in (("keep-of", 1.0), ("bitmap", 1.0)):
        pair = pairs(case)
        planned = make_plan(pair.model, pair.config).output_bytes
        summary = load_report(pair.packed).summary
        assert summary is not None
        assert summary["bytes_written"] <= planned <= close * summary["bytes_written"]


def test_a_method_hands_over_its_own_parts(
    tiny: Callable[..., Path], documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method, wrong = methods.get("magnitude"), []
    original = method.solve

    def solve(operator: methods.Operator, *args: Any, **options: Any) -> methods.Pruned:
        pruned = original(operator, *args, **options)
        rows, columns = pruned.weight.shape
        form = PackedWeight("keep-of 3:4", operator.dtype, (rows, columns))  # not the smallest
        parts = form.pack(pruned.weight)
        if wrong:
            parts["values"] = parts["values"] ^ np.uint16(1)
        return pruned._replace(packed=methods.Packed(form.format, parts))

    monkeypatch.setattr(method, "solve", solve)
    config = Config(
        calibration=str(documents), method="magnitude", pattern="2:4", samples=4, seq_len=32,
        threads=1, format="packed",
    )  # fmt: skip
    report = compress(tiny("llama"), tmp_path / "out", config)
    assert {record["format"] for record in report.tensors} == {"keep-of 3:4"}
    assert verify(tmp_path / "out") == []
    wrong.append(True)
    with pytest.raises(RspruneError, match=r"proj.weight: the packed form of the method \(keep-of"):
        compress(tiny("llama"), tmp_path / "other", config)


@pytest.mark.parametrize("method", CODED)
def test_codes_load_as_the_dense_run(
    method: str, tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    pattern, bits, forms = CODED[method]
    pair = pair_of(tiny("llama"), tmp_path, documents, pattern, method, bits)
    found = {record["format"] for record in load_report(pair.packed).tensors}
    assert found
    assert all(re.match(forms, form) for form in found)
    assert method != "pbs2p-exact" or any(form.startswith("residual") for form in found)
    assert verify(pair.packed) == []
    packed = AutoModelForCausalLM.from_pretrained(pair.packed, dtype=torch.float32).eval()
    rsprune.set_compute(packed, "exact")
    ids = token_ids(1, 8)
    with torch.no_grad():
        assert torch.equal(packed(ids).logits, ordinary(pair.dense)(ids).logits)
    unpacked = rsprune.load(pair.packed, dequantize=True).state_dict()
    for name, tensor in tensors_of(pair.dense).items():
        assert torch.equal(unpacked[name], tensor)


@pytest.mark.parametrize("case", ["keep-of", "signs"])
def test_export_gives_the_dense_run(
    case: str, pairs: Callable[[str], Pair], tmp_path: Path
) -> None:
    pair = pairs(case)
    assert main_code(["export", str(pair.packed), str(tmp_path / "out"), "--dense", "--quiet"]) == 0
    assert verify(tmp_path / "out") == []
    dense, exported = tensors_of(pair.dense), tensors_of(tmp_path / "out")
    assert dense.keys() == exported.keys()
    for name, tensor in dense.items():
        assert tensor.view(torch.uint8).equal(exported[name].view(torch.uint8))
    assert "import rsprune" not in (tmp_path / "out/README.md").read_text()
    ids = token_ids(1, 8)
    logits = [ordinary(folder)(ids).logits for folder in (pair.dense, tmp_path / "out")]
    assert torch.equal(*logits)
    with pytest.raises(UsageError, match="expected packed linears to unpack, found none"):
        export_dense(pair.dense, tmp_path / "other")
    with pytest.raises(UsageError, match="exists already"):
        export_dense(pair.packed, tmp_path / "out")


def main_code(arguments: list[str]) -> int:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sys.argv", ["rsprune", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def test_the_card_says_what_loading_needs(pairs: Callable[[str], Pair]) -> None:
    card = (pairs("keep-of").packed / "README.md").read_text()
    body = card.split("---\n", 2)[2].lstrip()
    assert body.startswith("> **`import rsprune` first.**")
    assert "9.000 of the pruned linears" in card


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "no section": (
        lambda f: edit_config(f, lambda s: s.update(quant_method="other")),
        "config.json: expected keep-of 2:4 for",
    ),
    "a linear is not named": (
        lambda f: edit_config(f, lambda s: (s["linears"].pop(DOWN), s["dense"].pop(DOWN))),
        f"config.json: expected keep-of 2:4 for {DOWN}, found dense",
    ),
    "a part is missing": (
        lambda f: edit_shard(f, f"{DOWN}.mask", lambda t: t.pop(f"{DOWN}.mask")),
        "mask",
    ),
    "a part has another shape": (
        lambda f: edit_shard(
            f, f"{DOWN}.mask", lambda t: t.update({f"{DOWN}.mask": t[f"{DOWN}.mask"][1:].clone()})
        ),
        rf"{DOWN}.mask: expected U8 \[32, 8\] for keep-of 2:4, found U8 \[31, 8\]",
    ),
    "a mask is no mask": (
        lambda f: edit_shard(f, f"{DOWN}.mask", lambda t: t[f"{DOWN}.mask"].fill_(255)),
        "mask: row 0: group 0: expected 2 bits, found 4",
    ),
    "a newer version": (
        lambda f: edit_config(f, lambda s: s.update(version=2)),
        "expected version 1, found 2; a newer rsprune",
    ),
    "another format": (
        lambda f: edit_config(f, lambda s: s["linears"].update({DOWN: "zip"})),
        f'{DOWN}: packed format "zip": unknown',
    ),
    "no format": (
        lambda f: edit_config(f, lambda s: s["linears"].update({DOWN: ""})),
        f'{DOWN}: packed format "": unknown',
    ),
    "no format in int8": (
        lambda f: edit_config(
            f, lambda s: s.update(compute="int8", linears=s["linears"] | {DOWN: ""})
        ),
        "expected signs beside compute 'int8'",
    ),
    "an odd shape": (
        lambda f: edit_config(f, lambda s: s["dense"].update({DOWN: ["BF16", [32, -64]]})),
        f"{DOWN}: expected a format and",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_verify_names_what_is_broken(case: str, broken: Path) -> None:
    assert verify(broken) == []
    damage, message = BROKEN[case]
    damage(broken)
    problems = "\n".join(str(problem) for problem in verify(broken))
    assert re.search(message, problems), problems


def test_it_is_in_the_public_api() -> None:
    assert {"export_dense", "load"} <= set(rsprune.__all__)
