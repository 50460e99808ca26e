"""The folder that a run builds, and what it may be.

It is built in `<out>.partial`, shard by shard, and gets its name by one rename when everything is
in it and on disk.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import math
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rsprune import _core
from rsprune.checkpoint import Checkpoint, as_stored, named_errors, sha256
from rsprune.errors import RspruneError, UsageError
from rsprune.other_files import other_files
from rsprune.packing import PackedWeight, linear_of, with_settings
from rsprune.report import REPORT_NAME

MARK = ".rsprune-unfinished"
"""Stands in a folder that is being written without a journal."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


class OutputFolder:
    """The folder that is being written: `<out>.partial` until `commit`.

    What an earlier run left there stays until `clear`.
    """

    def __init__(self, out: Path, *, overwrite: bool = True) -> None:
        self.out = _real(out)
        self.folder = _partial(self.out)
        self.overwrite = overwrite
        self._files: dict[str, str] = {}
        self.packed: dict[str, PackedWeight] = {}
        self.total_bytes = 0
        self.total_parameters = 0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.scratch = self.folder / ".scratch"

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Keeps other runs out for the length of the block; a killed run's claim dies with it.

        Raises:
            UsageError: naming the process that writes here.
        """
        path = self.out.with_name(self.out.name + ".lock")
        with path.open("a+") as lock:

            def is_ours() -> bool:  # and not one that was made since another run removed it
                return path.exists() and os.path.samestat(path.stat(), os.fstat(lock.fileno()))

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken = not is_ours()
            except BlockingIOError:
                taken = True
            if taken:
                lock.seek(0)
                owner = lock.read().strip()
                raise UsageError(f"output {self.out}: another run is writing it ({owner})")
            lock.truncate(0)
            lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            lock.flush()
            self.folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.scratch.mkdir()
            try:
                yield
            finally:
                shutil.rmtree(self.scratch, ignore_errors=True)
                if is_ours():
                    path.unlink()

    def begin(self, what: str) -> None:
        """Clears the folder for work that keeps no journal, and says in it what that is.

        Raises:
            UsageError: an unfinished run lies there: hours that nobody has asked to throw away.
        """
        if (self.folder / REPORT_NAME).exists() and not (self.folder / MARK).exists():
            raise UsageError(
                f"output {self.out}: an unfinished run lies in {self.folder}; repeat it to finish "
                "it, or remove that folder"
            )
        self.clear()
        self.write_text(MARK, what + "\n")

    def clear(self) -> None:
        """Removes what an earlier run left; what shows that it is ours goes last.

        Raises:
            UsageError: there are files that no run of ours has written.
        """
        found = [path for path in self.folder.iterdir() if path != self.scratch]
        ours = any(path.name in (REPORT_NAME, MARK) for path in found)
        if not ours and any(path.suffix != ".tmp" for path in found):
            raise UsageError(
                f"output {self.out}: is built in {self.folder}, which holds files but no "
                "rsprune-report.jsonl; remove it yourself or name another output"
            )
        for path in sorted(found, key=lambda path: path.name in (REPORT_NAME, MARK)):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def keep_shard(
        self,
        file: str,
        source: Checkpoint,
        names: list[str],
        renamed: Mapping[str, str] = NOTHING,
        packed: Mapping[str, PackedWeight] = NOTHING,
    ) -> None:
        """Counts a shard in that is finished; arguments as in `put_shard`."""
        for name in names:
            info = source.tensors[name]
            if (form := packed.get(name)) is None:
                self._files[renamed.get(name, name)] = file
                self.total_bytes += info.nbytes
            else:
                self._files |= {f"{linear_of(name)}.{part}": file for part, _, _ in form.layout}
                self.total_bytes += form.nbytes
                self.packed[name] = form
            self.total_parameters += math.prod(info.shape)

    def put_shard(
        self,
        file: str,
        source: Checkpoint,
        names: list[str],
        changed: Mapping[str, NDArray[Any]],
        renamed: Mapping[str, str] = NOTHING,
        packed: Mapping[str, PackedWeight] = NOTHING,
        parts: Mapping[str, dict[str, NDArray[Any]]] = NOTHING,
    ) -> dict[str, Any]:
        """Writes one shard: `changed` tensors as given, the others copied from `source`.

        Args:
            file: its name.
            source: where the tensors are described, and lie unless they have changed.
            names: the tensors, as `source` calls them.
            changed: new values, by the same names, as they are stored (or would be, if they were
                not packed).
            renamed: what those are called in the shard that have another name there; for tensors
                that are not packed.
            packed: which of them are packed, and how.
            parts: what packed ones consist of, where that is known already.

        Returns:
            file, bytes and sha256 of what is on disk.
        """
        plan = []
        for info in (source.tensors[name] for name in names):
            if (form := packed.get(info.name)) is None:
                plan.append((renamed.get(info.name, info.name), info.dtype, list(info.shape)))
            else:
                prefix = linear_of(info.name)
                plan += [(f"{prefix}.{part}", dtype, shape) for part, dtype, shape in form.layout]
        with named_errors():
            writer = _core.ShardWriter(self.folder / file, plan, {"format": "pt"})
            for name in names:
                called = renamed.get(name, name)
                if (form := packed.get(name)) is not None:
                    for part, value in (parts.get(name) or form.pack(changed[name])).items():
                        writer.put(f"{linear_of(name)}.{part}", _bytes(value))
                elif name in changed:
                    writer.put(called, _bytes(changed[name]))
                else:
                    source.copy_into(writer, name, called)
            writer.finish()
        self.keep_shard(file, source, names, renamed, packed)
        path = self.folder / file
        return {"file": file, "bytes": path.stat().st_size, "sha256": sha256(path)}

    def keep_tensors(
        self,
        file: str,
        source: Checkpoint,
        copied: Mapping[str, str],
        new: Mapping[str, tuple[str, torch.Tensor]],
    ) -> None:
        """Counts a shard in that an earlier run has finished; arguments as in `put_tensors`."""
        self.keep_shard(file, source, list(copied), copied)
        for name, (_, value) in new.items():
            self._files[name] = file
            self.total_bytes += value.nbytes
            self.total_parameters += value.numel()

    def put_tensors(
        self,
        file: str,
        source: Checkpoint,
        copied: Mapping[str, str],
        new: Mapping[str, tuple[str, torch.Tensor]],
    ) -> dict[str, Any]:
        """Writes one shard with tensors that no checkpoint has.

        Args:
            file: its name.
            source: where copied tensors come from.
            copied: what `source` calls a tensor -> what the shard calls it.
            new: what the shard calls a tensor -> its dtype on disk and its value.

        Returns:
            file, bytes and sha256 of what is on disk.
        """
        infos = [source.tensors[name] for name in copied]
        plan = [(copied[info.name], info.dtype, list(info.shape)) for info in infos]
        plan += [(name, dtype, list(value.shape)) for name, (dtype, value) in new.items()]
        with named_errors():
            writer = _core.ShardWriter(self.folder / file, plan, {"format": "pt"})
            for name, called in copied.items():
                source.copy_into(writer, name, called)
            for name, (_, value) in new.items():
                writer.put(name, _bytes(as_stored(value, value.dtype)))
            writer.finish()
        self.keep_tensors(file, source, copied, new)
        path = self.folder / file
        return {"file": file, "bytes": path.stat().st_size, "sha256": sha256(path)}

    def copy_other_files(self, source: Path) -> None:
        """Copies everything that is not a weight (configuration, tokenizer, licence, code)."""
        for relative in other_files(source):
            target = self.folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                shutil.copyfile(source / relative, target)
            except OSError as error:
                raise RspruneError(f"{target}: copy of {relative}: {error.strerror}") from None

    def write_config(self) -> None:
        """Says in config.json which weights are packed; a source's own word on that goes."""
        path = self.folder / "config.json"
        text = path.read_text("utf-8")
        if (configured := with_settings(text, self.packed)) != text:
            self.write_text(path.name, configured)

    def write_text(self, name: str, text: str) -> None:
        """Writes a small file by temporary file and rename."""
        _core.write_file(self.folder / name, text.encode("utf-8"))

    def write_index(self) -> None:
        """Writes the index: from now on the folder can be loaded."""
        metadata = {"total_size": self.total_bytes, "total_parameters": self.total_parameters}
        index = {"metadata": metadata, "weight_map": dict(sorted(self._files.items()))}
        self.write_text("model.safetensors.index.json", json.dumps(index, indent=2) + "\n")

    def commit(self, state: str | None = None) -> None:
        """Gives the folder its name; an older output of that name goes only now.

        Everything is on disk before: a machine that loses power has the old output or the new. What
        an unfinished run is gone on with (`state`, a file) goes after that.
        """
        shutil.rmtree(self.scratch, ignore_errors=True)
        if self.out.exists() and not self.overwrite:
            raise UsageError(f"output {self.out}: has appeared since this run began; move it away")
        for path in [*self.folder.rglob("*"), self.folder]:
            sync(path)
        if self.out.exists():
            self._replace()
        else:
            os.rename(self.folder, self.out)
        for name in (MARK, state):
            if name is not None:
                (self.out / name).unlink(missing_ok=True)
        sync(self.out.parent)

    def _replace(self) -> None:
        """Both names change places at once; by two renames where the file system cannot."""
        prefix = f".{self.out.name}-"
        with tempfile.TemporaryDirectory(dir=self.out.parent, prefix=prefix) as aside:
            old = Path(aside, "old")
            if _core.exchange(self.folder, self.out):
                os.rename(self.folder, old)  # or the next run would take it for an unfinished one
                return
            os.rename(self.out, old)
            try:
                os.rename(self.folder, self.out)
            except BaseException:
                os.rename(old, self.out)
                raise

    def discard(self) -> None:
        """Removes everything that was written."""
        with contextlib.suppress(OSError, UsageError):
            self.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


def check_output(out: Path, *sources: Path, overwrite: bool) -> None:
    """Refuses an output that is or holds an input; one that exists, unless `overwrite`; and with
    `overwrite` a folder that rsprune did not write.

    Raises:
        UsageError: in these cases.
    """
    for source, target in itertools.product(
        sources, (out.resolve(), _partial(_real(out)).resolve())
    ):
        origin = source.resolve()
        if target == origin or target in origin.parents or origin in target.parents:
            raise UsageError(f"output {out}: must lie apart from the input {source}")
    if out.exists() and not overwrite:
        raise UsageError(f"output {out}: exists already; name another or pass --overwrite")
    if out.exists() and not out.is_dir():
        raise UsageError(f"output {out}: expected a folder, found a file")
    if out.exists() and any(out.iterdir()) and not (out / REPORT_NAME).exists():
        raise UsageError(
            f"output {out}: --overwrite replaces only what rsprune wrote, found a folder without "
            "rsprune-report.jsonl; remove it yourself or name another"
        )


def _bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """What the writer takes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def sync(path: Path) -> None:
    """Makes a file, or the names in a folder, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no fsync of folders
            raise
    finally:
        os.close(descriptor)


def _real(out: Path) -> Path:
    """What `out` means: a link that leads nowhere yet is followed, so that all is built there."""
    return out.resolve() if out.is_symlink() and not out.exists() else Path(os.path.abspath(out))


def _partial(out: Path) -> Path:
    """Where the output is built."""
    return out.with_name(out.name + ".partial")


def finished_bytes(out: Path) -> int:
    """What an unfinished run of `out` has on disk already."""
    shards = _partial(_real(out)).glob("*.safetensors")
    return sum(path.stat().st_size for path in shards)


def free_bytes(path: Path) -> int:
    """Bytes free on the file system that will hold `path`."""
    while not path.exists():
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError as error:
        raise RspruneError(f"{path}: cannot ask for free space: {error}") from None
