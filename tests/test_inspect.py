"""The bytes are inspected: zeros, the strongest pattern that holds, true bits per weight."""

import importlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import save_file

import rsprune
from rsprune import _core
from rsprune import inspect as module_or_function
from rsprune.inspect import GROUPS, TensorFacts, count_zeros, describe, totals
from rsprune.inspect import inspect as facts_of
from rsprune.tables import inspect_table


def dense(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    values[values == 0] = 1.0
    return values


def keep_of(values: np.ndarray, keep: int, of: int) -> np.ndarray:
    """Keeps random `keep` of every `of`: other zeros than a projection would give."""
    rng = np.random.default_rng(1)
    groups = values.reshape(-1, of).copy()
    order = rng.permuted(np.tile(np.arange(of), (len(groups), 1)), axis=1)
    groups[order >= keep] = 0
    return groups.reshape(values.shape)


def unstructured(values: np.ndarray, sparsity: float) -> np.ndarray:
    zero = np.random.default_rng(2).random(values.shape) < sparsity
    return np.where(zero, 0, values).astype(values.dtype)


def by_name(folder: Path) -> dict[str, TensorFacts]:
    return {fact.name: fact for fact in facts_of(folder)}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_patterns_are_found(tmp_path: Path, dtype: type):
    base = dense(64, 64).astype(dtype)
    cases = {"2:4": (2, 4), "1:4": (1, 4), "3:8": (3, 8), "5:16": (5, 16), "3:4": (3, 4)}
    tensors = {name: keep_of(base, *rule) for name, rule in cases.items()}
    tensors |= {"50.0%": unstructured(base, 0.5), "dense": base}
    tensors["4:8"] = keep_of(base, 4, 8)
    tensors["dense"][0, :16] = 0  # below one per cent
    save_file(tensors, tmp_path / "model.safetensors")
    facts = by_name(tmp_path)
    assert (tensors["4:8"].reshape(-1, 4) != 0).sum(axis=1).max() > 2  # it is not 2:4 as well
    for name, fact in facts.items():
        if name == "50.0%":
            assert fact.pattern == f"{fact.sparsity:.1%}"
            assert fact.sparsity == pytest.approx(0.5, abs=0.02)
        else:
            assert fact.pattern == name
        assert fact.sparsity == (tensors[name] == 0).mean()
        assert fact.bits_per_weight == 8 * np.dtype(dtype).itemsize


def test_bf16_bits_and_negative_zeros(tmp_path: Path):
    bits = (dense(8, 16).view(np.uint32) >> 16).astype(np.uint16)
    assert not (bits & 0x7FFF == 0).any()
    bits[:, 0::2] = 0x8000  # -0
    bits[:, 1::4] = 0
    writer = _core.ShardWriter(tmp_path / "model.safetensors", [("w", "BF16", [8, 16])], {})
    writer.put("w", bits.reshape(-1).view(np.uint8))
    writer.finish()
    (fact,) = facts_of(tmp_path)
    assert (fact.dtype, fact.sparsity, fact.pattern) == ("BF16", 0.75, "1:4")
    assert (fact.nbytes, fact.bits_per_weight) == (256, 16.0)


def test_one_bad_group_breaks_a_pattern():
    values = keep_of(dense(16, 16), 2, 4)
    assert count_zeros(values.view(np.uint8).reshape(-1), "F32", 256, 16)[1][4] == 2
    values[15, 12:] = 1.0
    zeros, kept = count_zeros(values.view(np.uint8).reshape(-1), "F32", 256, 16)
    assert kept[4] == 4
    assert zeros == 126


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch):
    values = keep_of(dense(24, 32), 3, 8)
    raw = values.view(np.uint8).reshape(-1)
    whole = count_zeros(raw, "F32", values.size, 32)
    monkeypatch.setattr(sys.modules["rsprune.inspect"], "BLOCK", 112)
    assert 112 % max(GROUPS) == 0
    assert values.size % 112 != 0  # the last block is a short one
    assert count_zeros(raw, "F32", values.size, 32) == whole
    assert whole == ((values == 0).sum(), whole[1])
    assert whole[1][8] == 3


def test_shapes_that_are_no_matrix_or_have_no_groups(tmp_path: Path):
    tensors = {
        "vector": np.zeros(8, np.float32),
        "scalar": np.array(2.0, np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "odd": unstructured(dense(10, 9), 0.5),
        "zero": np.zeros((4, 4), np.float16),
        "ids": np.arange(4, dtype=np.int64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    facts = by_name(tmp_path)
    assert (facts["vector"].pattern, facts["vector"].sparsity) == (None, 1.0)
    assert (facts["scalar"].pattern, facts["scalar"].shape) == (None, ())
    assert (facts["empty"].pattern, facts["empty"].sparsity) == ("dense", 0.0)
    assert facts["odd"].pattern == f"{facts['odd'].sparsity:.1%}"
    assert facts["zero"].pattern == "100.0%"
    assert facts["ids"].sparsity == 0.25


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95, 0.99])
def test_a_pattern_that_holds_by_chance_is_not_the_name(sparsity: float):
    values = unstructured(dense(256, 64), sparsity)
    zeros, kept = count_zeros(values.view(np.uint8).reshape(-1), "F32", values.size, 64)
    assert kept[16] < 16 or sparsity < 0.9  # so some keep-of pattern does hold
    share = zeros / values.size
    assert describe(share, kept, values.size) == f"{share:.1%}"


def test_a_pattern_with_further_zeros_keeps_its_name():
    values = unstructured(keep_of(dense(256, 64), 2, 4), 0.4)
    zeros, kept = count_zeros(values.view(np.uint8).reshape(-1), "F32", values.size, 64)
    assert zeros / values.size == pytest.approx(0.7, abs=0.02)
    assert describe(zeros / values.size, kept, values.size) == "2:4"
    assert describe(0.005, {4: 4}, 1024) == "dense"
    assert describe(0.5, {4: 2, 8: 4, 16: 8}, 16) == "2:4"  # few groups, all exact


def test_totals_count_the_files_themselves(tmp_path: Path):
    save_file({"a": keep_of(dense(8, 8), 2, 4)}, tmp_path / "one.safetensors")
    save_file({"b": dense(8, 8), "unlisted": dense(2, 2)}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    facts = facts_of(tmp_path)
    assert [(fact.name, fact.file) for fact in facts] == [
        ("a", "one.safetensors"),
        ("b", "two.safetensors"),
    ]
    total = totals(tmp_path, facts)
    assert (total.tensors, total.weights, total.zeros) == (2, 128, 32)
    files = sum((tmp_path / name).stat().st_size for name in ("one.safetensors", "two.safetensors"))
    assert total.file_bytes == files
    assert total.bits_per_weight == files * 8 / 128


def test_the_table_fits_in_80_columns(tmp_path: Path):
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(12)]
    tensors = {name: keep_of(dense(16, 16), 2, 4) for name in names}
    save_file(tensors, tmp_path / "model.safetensors")
    facts = facts_of(tmp_path)
    for every in (False, True):
        out = io.StringIO()
        table = inspect_table(facts, totals(tmp_path, facts), every=every)
        Console(file=out, width=80).print(table)
        text = out.getvalue()
        assert max(map(len, text.splitlines())) <= 80
        assert "…" not in text
        assert ("12x" in text) is not every
        assert text.count("2:4") == (12 if every else 1)


def test_the_package_offers_the_function_even_after_the_module_was_imported():
    importlib.import_module("rsprune.inspect")
    importlib.import_module("rsprune.verify")
    assert module_or_function is facts_of
    assert rsprune.inspect is facts_of
    assert callable(rsprune.verify)


def test_missing_weights_are_refused_by_name(tmp_path: Path):
    with pytest.raises((ValueError, OSError), match=r"model\.safetensors"):
        facts_of(tmp_path)
