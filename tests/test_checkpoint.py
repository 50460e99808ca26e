"""Tensors lent from shards, and an output folder that appears whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rsprune import _core
from rsprune import checkpoint as checkpoint_module
from rsprune.checkpoint import PIECE_BYTES, TORCH_DTYPES, Checkpoint, sha256
from rsprune.errors import RspruneError, UsageError
from rsprune.other_files import other_files
from rsprune.output import OutputFolder, check_output, free_bytes

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "b.weight": torch.linspace(-1, 1, 8).reshape(2, 4),
    "b.bias": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "steps": torch.arange(3),
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards and an index."""
    target = tmp_path / "model"
    target.mkdir()
    parts = {"one.safetensors": ("a.weight", "empty"), "two.safetensors": ()}
    parts["two.safetensors"] = tuple(set(TENSORS) - set(parts["one.safetensors"]))
    for file, names in parts.items():
        save_file({name: TENSORS[name] for name in names}, target / file)
    index = {name: file for file, names in parts.items() for name in names}
    (target / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return target


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    info = checkpoint.tensors[name]
    whole = torch.empty(info.shape, dtype=TORCH_DTYPES[info.dtype])
    checkpoint.copy_to(name, whole)
    return whole


@pytest.mark.parametrize("piece", [8, 16, PIECE_BYTES])
def test_tensors_are_read_as_they_are_stored(
    folder: Path, piece: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(checkpoint_module, "PIECE_BYTES", piece)
    checkpoint = Checkpoint.open(folder)
    assert set(checkpoint.tensors) == set(TENSORS)
    for name, expected in TENSORS.items():
        info, found = checkpoint.tensors[name], read(checkpoint, name)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert (info.shape, info.nbytes) == (tuple(expected.shape), expected.nbytes)
        assert torch.equal(found, expected)
        assert checkpoint.same(name, name)
        assert all(part.nbytes <= piece for _, part in checkpoint.pieces(name))
        if expected.dim() == 2 and len(expected):
            assert torch.equal(checkpoint.rows(name, [1, 0, 1]), expected[[1, 0, 1]])
    wide = torch.full((3, 4), torch.nan, dtype=torch.float64)
    checkpoint.copy_to("a.weight", wide)
    assert torch.equal(wide, TENSORS["a.weight"].double())


def test_tensors_that_differ_in_a_bit_are_not_the_same(tmp_path: Path):
    zero = torch.zeros(3, 4)
    others = {"sign": -zero, "shape": zero.T.contiguous(), "type": zero.bfloat16()}
    save_file({"zero": zero, "equal": zero.clone(), **others}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.same("zero", "equal")
    assert not any(checkpoint.same("zero", other) for other in others)


def test_solvers_get_half_types_as_bits(folder: Path):
    checkpoint = Checkpoint.open(folder)
    lent = checkpoint.lend("a.weight")
    assert (lent.dtype, lent.shape) == (np.uint16, (3, 4))
    assert np.array_equal(lent, TENSORS["a.weight"].view(torch.int16).numpy().view(np.uint16))
    assert checkpoint.lend("b.weight").dtype == np.float32


@pytest.mark.parametrize(("length", "message"), [(0, "written to"), (-1, "shrank"), (8, "written")])
def test_a_shard_that_changes_under_the_run_is_an_error(folder: Path, length: int, message: str):
    checkpoint = Checkpoint.open(folder)
    read(checkpoint, "a.weight")
    path = folder / checkpoint.tensors["a.weight"].file
    before = path.read_bytes()
    path.write_bytes((before + bytes(8))[: len(before) + length])
    with pytest.raises(RspruneError, match=rf"{path.name}: the file .*{message}.*a.weight"):
        read(checkpoint, "a.weight")


def test_a_shard_that_was_replaced_by_rename_is_read_as_it_was(folder: Path, tmp_path: Path):
    checkpoint = Checkpoint.open(folder)
    path = folder / checkpoint.tensors["a.weight"].file
    (tmp_path / "other").write_bytes(b"something else")
    (tmp_path / "other").rename(path)
    assert torch.equal(read(checkpoint, "a.weight"), TENSORS["a.weight"])


def test_tensors_that_the_index_does_not_name_are_not_there(folder: Path):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["steps"]
    path.write_text(json.dumps(index))
    assert set(Checkpoint.open(folder).tensors) == set(TENSORS) - {"steps"}


def test_only_what_is_asked_for_must_be_finite(folder: Path):
    bad = {**load_file(folder / "one.safetensors"), "a.weight": TENSORS["a.weight"].clone()}
    bad["a.weight"][2, 1] = torch.inf
    save_file(bad, folder / "one.safetensors")
    checkpoint = Checkpoint.open(folder)
    checkpoint.check_finite(["b.weight", "steps", "empty"])
    with pytest.raises(UsageError, match=r"a\.weight: .*found inf at flat index 9"):
        checkpoint.check_finite(checkpoint.tensors)


def test_an_output_is_committed_by_one_rename(folder: Path, tmp_path: Path):
    out = tmp_path / "deep" / "out"
    output = OutputFolder(out)
    assert output.folder == tmp_path / "deep" / "out.partial"
    changed = np.zeros((3, 4), np.uint16)
    checkpoint = Checkpoint.open(folder)
    record = output.put_shard(
        "s.safetensors", checkpoint, ["a.weight", "steps"], {"a.weight": changed}
    )
    output.put_shard("r.safetensors", checkpoint, ["b.weight", "b.bias", "empty"], {})
    assert not out.exists()
    written = output.folder / "s.safetensors"
    assert record["bytes"] == written.stat().st_size
    assert record["sha256"] == hashlib.sha256(written.read_bytes()).hexdigest() == sha256(written)
    output.write_index()
    output.commit()
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert sorted(contents(out)) == [
        "model.safetensors.index.json",
        "r.safetensors",
        "s.safetensors",
    ]
    after = Checkpoint.open(out)
    assert set(after.tensors) == set(TENSORS)
    assert not read(after, "a.weight").any()
    for name in set(TENSORS) - {"a.weight"}:
        assert torch.equal(read(after, name), TENSORS[name])
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = sum(tensor.nbytes for tensor in TENSORS.values())
    assert index["metadata"] == {"total_size": total, "total_parameters": 12 + 8 + 2 + 3}


@pytest.mark.parametrize("exchanges", [True, False])
def test_an_older_output_goes_when_the_new_one_is_whole(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not exchanges:
        monkeypatch.setattr("rsprune.output._core.exchange", lambda *_: False)
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    output = OutputFolder(out)
    output.write_text("new.txt", "new")
    assert contents(out) == {"old.txt": b"old"}
    output.commit()
    assert contents(tmp_path) == {"out/new.txt": b"new"}


def test_an_older_output_survives_a_rename_that_fails(tmp_path: Path, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old.txt").write_text("old")
    output, rename = OutputFolder(out), os.rename

    def fail(source: Path, target: Path) -> None:
        if source == output.folder:
            raise OSError("the disk went away")
        rename(source, target)

    monkeypatch.setattr("rsprune.output._core.exchange", lambda *_: False)
    monkeypatch.setattr("rsprune.output.os.rename", fail)
    with pytest.raises(OSError, match="went away"):
        output.commit()
    output.discard()
    assert contents(tmp_path) == {"out/old.txt": b"old"}


def test_folders_exchange_their_names(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
        (path / "name").write_text(path.name)
    if not _core.exchange(one, other):
        pytest.skip("this file system cannot exchange names")
    assert contents(tmp_path) == {"one/name": b"other", "other/name": b"one"}
    with pytest.raises(FileNotFoundError, match=r"exchange of names with .*missing"):
        _core.exchange(one, tmp_path / "missing")


def test_what_an_earlier_run_left_stays_until_it_is_cleared(tmp_path: Path):
    first = OutputFolder(tmp_path / "out")
    with first.owned():
        first.write_text("rsprune-report.jsonl", "a")
        (first.scratch / "spill").write_text("hidden states")
    assert contents(first.folder) == {
        "rsprune-report.jsonl": b"a"
    }  # what was spilled is of no use to anyone
    again = OutputFolder(tmp_path / "out")
    with again.owned():
        assert contents(again.folder).keys() == {"rsprune-report.jsonl"}
        again.clear()
        assert contents(again.folder) == {}
        again.write_text("thesis.txt", "not ours")
        with pytest.raises(UsageError, match=r"holds files but no rsprune-report\.jsonl"):
            again.clear()
    again.discard()
    assert list(tmp_path.iterdir()) == []


def test_everything_that_is_not_a_weight_is_copied(folder: Path, tmp_path: Path):
    kept = ["config.json", "tokenizer.model", "LICENSE", "code/modeling.py", "vocab.txt"]
    weights = ["pytorch_model.bin", "pytorch_model.bin.index.json", "sub/adapter.safetensors"]
    weights += ["model.gguf", "onnx/model.onnx", "tf_model.h5", "flax_model.msgpack", "old.pth"]
    ours = ["rsprune-report.jsonl", "recipe.yaml"]
    hidden = [".git/config", ".gitattributes", "sub/.cache/x"]
    for name in (*kept, *weights, *ours, *hidden):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(name)
    before = contents(folder)
    output = OutputFolder(tmp_path / "out")
    output.copy_other_files(folder)
    output.commit()
    assert contents(tmp_path / "out") == {name: name.encode() for name in kept}
    assert contents(folder) == before


def test_links_of_a_hub_cache_become_files(tmp_path: Path):
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123"
    for path in (snapshot, repository / "blobs"):
        path.mkdir(parents=True)
    (repository / "blobs" / "4567").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/4567")
    output = OutputFolder(tmp_path / "out")
    output.copy_other_files(snapshot)
    output.commit()
    copied = tmp_path / "out" / "config.json"
    assert copied.read_text() == "{}"
    assert not copied.is_symlink()


def test_other_files_of_the_machine_are_not_copied(folder: Path, tmp_path: Path):
    (tmp_path / "id_rsa").write_text("secret")
    (folder / "notes.txt").symlink_to("../id_rsa")
    with pytest.raises(UsageError, match=r"notes\.txt: leaves the checkpoint folder, .*id_rsa"):
        other_files(folder)
    (folder / "notes.txt").unlink()
    (folder / "notes.txt").symlink_to("gone")
    with pytest.raises(UsageError, match=r"notes\.txt: expected a file.*broken link"):
        other_files(folder)
    (folder / "notes.txt").unlink()
    os.mkfifo(folder / "notes.txt")
    with pytest.raises(UsageError, match=r"notes\.txt: expected a file.*pipe"):
        other_files(folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["model", "model/out", ".", "link", "link/out", "x/../model"])
def test_an_output_must_lie_apart_from_its_input(
    folder: Path, tmp_path: Path, place: str, overwrite: bool
):
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "x").mkdir()
    with pytest.raises(UsageError, match="must lie apart"):
        check_output(tmp_path / place, folder, overwrite=overwrite)


def test_an_output_may_be_new_or_overwritten(folder: Path, tmp_path: Path):
    check_output(tmp_path / "model-2", folder, overwrite=False)
    (tmp_path / "model-2").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        check_output(tmp_path / "model-2", folder, overwrite=False)
    check_output(tmp_path / "model-2", folder, overwrite=True)


def test_the_place_where_the_output_is_built_is_not_the_input(tmp_path: Path):
    """`out.partial` is emptied before the run: an input of that name would be lost."""
    source = tmp_path / "out.partial"
    source.mkdir()
    with pytest.raises(UsageError, match="must lie apart"):
        check_output(tmp_path / "out", source, overwrite=True)


def test_other_folders_beside_the_output_are_let_alone(tmp_path: Path):
    for name in ("out", "out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    output = OutputFolder(tmp_path / "out")
    output.write_text("new.txt", "new")
    output.commit()
    assert contents(tmp_path) == {"out/new.txt": b"new", "out.old/file": b"out.old"}


def test_an_output_that_is_a_link_does_not_empty_what_it_names(tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").write_text("kept")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    output = OutputFolder(tmp_path / "out")
    output.write_text("new.txt", "new")
    output.commit()
    assert contents(tmp_path) == {"out/new.txt": b"new", "elsewhere/file": b"kept"}


def test_the_folder_that_one_stands_in_can_be_the_output(tmp_path: Path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    output = OutputFolder(Path())
    assert output.folder == tmp_path / "here.partial"
    output.discard()


def test_free_bytes_of_a_folder_that_is_not_there_yet(tmp_path: Path):
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_a_shard_writer_that_fails_leaves_no_file_of_that_name(folder: Path, tmp_path: Path):
    output = OutputFolder(tmp_path / "out")
    wrong = np.zeros((1, 4), np.uint16)
    with pytest.raises(ValueError, match=r"a\.weight"):
        output.put_shard(
            "s.safetensors", Checkpoint.open(folder), ["a.weight"], {"a.weight": wrong}
        )
    assert not (output.folder / "s.safetensors").exists()
    assert _core.__version__
