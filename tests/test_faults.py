"""Disks that fill up, files that change, links that lead away: a clear error, nothing half-written
that looks whole, and a run that goes on once the cause is gone.

The full disk is real: a few hundred KB of tmpfs in a mount namespace of a forked child.
"""

import ctypes
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_resume import config_of, contents, in_a_child

from rsprune import Config, compress, plan
from rsprune.errors import RspruneError, UsageError
from rsprune.memory_plan import SPILLS
from rsprune.other_files import other_files
from rsprune.output import OutputFolder
from rsprune.report import REPORT_NAME, Journal
from rsprune.verify import verify

NEW_MOUNTS, NEW_USER, READ_ONLY, REMOUNT, PRIVATE = 0x20000, 0x10000000, 1, 32, (1 << 18) | 16384
DISK_BYTES = 4 << 20

Mount = Callable[[Path, int], None]


def own_mounts() -> None:
    """Gives this process, which must have one thread, mounts that nobody else sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS) != 0:
        if libc.unshare(NEW_MOUNTS | NEW_USER) != 0:
            raise OSError(ctypes.get_errno(), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    mount(Path("/"), PRIVATE, kind=None)


def mount(path: Path, flags: int, kind: bytes | None = b"tmpfs") -> None:
    """A small disk at `path`."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={DISK_BYTES}".encode() if kind else None
    if libc.mount(b"none", str(path).encode(), kind, flags, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")


def on_a_small_disk(path: Path, work: Callable[[], object]) -> None:
    """Runs `work` in a child that sees a small disk at `path`; its failure is ours."""
    path.mkdir()

    def child() -> None:
        try:
            own_mounts()
            mount(path, 0)
        except OSError:
            os._exit(77)
        try:
            work()
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            raise

    status = os.waitpid(in_a_child(child), 0)[1]
    if os.waitstatus_to_exitcode(status) == 77:
        pytest.skip("this system allows no mounts")
    assert status == 0


def fill(disk: Path) -> Path:
    """Leaves no byte free; returns what takes the room."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            assert shutil.disk_usage(disk).free == 0
    return ballast


def fill_before(owner: Any, name: str, call: int, disk: Path) -> pytest.MonkeyPatch:
    """The disk is full from call number `call` of a method on."""
    patch, calls, original = pytest.MonkeyPatch(), [], getattr(owner, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            fill(disk)
        return original(*args, **kwargs)

    patch.setattr(owner, name, full)
    return patch


@pytest.fixture(scope="module")
def whole(tiny: Callable[..., Path], documents: Path, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("whole") / "out"
    compress(tiny("llama"), out, config_of("sequential", documents))
    found = contents(out)
    assert sum(len(v) for v in found.values() if isinstance(v, bytes)) < DISK_BYTES / 2
    return found


STAGES = {
    "the first line": (Journal, "write", 1, REPORT_NAME),
    "an operator's line": (Journal, "write", 5, "out.partial"),  # its page may have room left
    "a layer's line": (Journal, "write", 9, "out.partial"),
    "the first shard": (OutputFolder, "put_shard", 1, r"model-\d+-of-00004.safetensors.tmp"),
    "the last shard": (OutputFolder, "put_shard", 4, r"model-\d+-of-00004.safetensors.tmp"),
    "other files": (OutputFolder, "copy_other_files", 1, "config.json"),
    "the card": (OutputFolder, "write_text", 1, "README.md"),
    "the index": (OutputFolder, "write_index", 1, "index.json"),
    "hidden states": ("rsprune.windows", "reserve", 1, "hidden"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_ends_the_run_and_an_empty_one_lets_it_go_on(
    stage: str, whole: dict[str, Any], tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    owner, name, call, named = STAGES[stage]
    disk = tmp_path / "disk"
    config = config_of("sequential", documents)

    def run() -> None:
        spills = pytest.MonkeyPatch()
        if stage == "hidden states":
            spills.setattr(plan, "fit", lambda memory, _: (sum(memory.values()), SPILLS))
        target = sys.modules[owner] if isinstance(owner, str) else owner
        patch = fill_before(target, name, call, disk)
        with pytest.raises((RspruneError, OSError), match=rf"{named}.*No space left on device"):
            compress(tiny_llama, disk / "out", config)
        patch.undo()
        assert {p.name for p in disk.iterdir()} - {"out.partial"} == {"ballast"}
        assert not list((disk / "out.partial").rglob("*.tmp"))
        (disk / "ballast").unlink()
        compress(tiny_llama, disk / "out", config)
        spills.undo()
        assert [p.name for p in disk.iterdir()] == ["out"]
        assert contents(disk / "out") == whole
        assert verify(disk / "out") == []

    on_a_small_disk(disk, run)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_a_disk_that_is_too_small_is_seen_before_the_run(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"

    def run() -> None:
        fill(disk)
        with pytest.raises(UsageError, match=r"out: needs \d+ bytes on disk, found 0 bytes free"):
            compress(tiny_llama, disk / "out", config_of("wanda", documents))
        assert [p.name for p in disk.iterdir()] == ["ballast"]

    on_a_small_disk(disk, run)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_a_read_only_disk_is_named(tiny_llama: Path, documents: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"

    def run() -> None:
        mount(disk, REMOUNT | READ_ONLY)
        with pytest.raises((RspruneError, OSError), match=r"(?i)read-only file system.*out"):
            compress(tiny_llama, disk / "out", config_of("wanda", documents))

    on_a_small_disk(disk, run)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_a_link_to_another_disk_is_followed(
    whole: dict[str, Any], tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    disk, link = tmp_path / "disk", tmp_path / "link"

    def run() -> None:
        link.symlink_to(disk / "out")
        compress(tiny_llama, link, config_of("sequential", documents))
        assert contents(disk / "out") == whole
        assert sorted(p.name for p in tmp_path.iterdir()) == ["disk", "link"]

    on_a_small_disk(disk, run)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("damage", ["cut", "overwritten"])
def test_an_input_that_changes_under_the_run_is_an_error(
    damage: str, layer: int, tiny_llama: Path, documents: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_llama, model)
    shard = model / "model.safetensors"
    original, written = OutputFolder.put_shard, []

    def put_shard(self: OutputFolder, *args: Any, **options: Any) -> Any:
        if len(written) == layer:
            whole = shard.read_bytes()
            shard.write_bytes(whole[: len(whole) // 4] if damage == "cut" else whole[::-1])
        written.append(1)
        return original(self, *args, **options)

    monkeypatch.setattr(OutputFolder, "put_shard", put_shard)
    found = "shrank|was written to"
    with pytest.raises(RspruneError, match=rf"model\.safetensors: the file ({found}).*tensor"):
        compress(model, out, config_of("wanda", documents))
    assert not out.exists()


def test_a_finished_shard_that_rots_is_found(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    compress(tiny_llama, out, config_of("wanda", documents))
    assert verify(out) == []
    shard = sorted(out.glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-5] ^= 16
    shard.write_bytes(content)
    assert [p.where for p in verify(out)][:1] == [shard.name]


def test_the_clock_has_no_part_in_the_bytes(
    whole: dict[str, Any], tiny_llama: Path, documents: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    times = iter(range(10**9, 0, -(10**5)))
    monkeypatch.setattr("time.time", lambda: float(next(times)))
    compress(tiny_llama, tmp_path / "out", config_of("sequential", documents))
    assert contents(tmp_path / "out") == whole


def test_links_that_leave_the_model_are_refused_before_the_run(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    model, secret = tmp_path / "model", tmp_path / "secret"
    shutil.copytree(tiny_llama, model)
    secret.write_text("{}")
    (model / "generation_config.json").unlink(missing_ok=True)
    (model / "generation_config.json").symlink_to(secret)
    message = r"generation_config\.json: leaves the checkpoint folder, links to .*secret"
    with pytest.raises(UsageError, match=message):
        compress(model, tmp_path / "out", config_of("wanda", documents))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "secret"]


def test_a_pipe_among_the_files_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    os.mkfifo(tmp_path / "model" / "pipe")
    with pytest.raises(UsageError, match="pipe: expected a file to copy, found a pipe"):
        other_files(tmp_path / "model")


def test_a_run_works_in_a_child_of_a_process_that_has_run(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    config: Config = config_of("sequential", documents)
    compress(tiny_llama, tmp_path / "parent", config)
    child = in_a_child(lambda: compress(tiny_llama, tmp_path / "child", config))
    assert os.waitpid(child, 0)[1] == 0
    assert contents(tmp_path / "child") == contents(tmp_path / "parent")
