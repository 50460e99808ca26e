"""Which files of a checkpoint an output takes over: all but weights and reports."""

from __future__ import annotations

from pathlib import Path

from rsprune.errors import UsageError
from rsprune.report import REPORT_NAME

WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt",
                "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx")  # fmt: skip
"""Files of the input that are weights in some format: never copied to the output."""

OWN_FILES = (REPORT_NAME, "rsprune-scores.html", "recipe.yaml")
"""What a run writes about itself: never copied to the output of the next."""


def other_files(source: Path) -> list[Path]:
    """What `OutputFolder.copy_other_files` copies, relative to `source`.

    Raises:
        UsageError: one of them is a pipe or device, or a link out of the folder: an output is
            published, and must not hold another file of this machine.
    """
    root = source.resolve()
    # A hub cache links <repo>/snapshots/<revision>/<file> to <repo>/blobs/<hash>.
    revisions = (path.parent for path in (root, *root.parents))
    blobs = (path.with_name("blobs") for path in revisions if path.name == "snapshots")
    inside = (root, *blobs)
    found = []
    for path in sorted(source.rglob("*")):
        relative = path.relative_to(source)
        hidden = any(part.startswith(".") for part in relative.parts)
        if path.is_dir() or hidden or any(path.match(p) for p in WEIGHT_FILES):
            continue
        if path.name in OWN_FILES:
            continue
        if not path.is_file():
            raise UsageError(f"{path}: expected a file to copy, found a pipe or a broken link")
        if not any(path.resolve().is_relative_to(folder) for folder in inside):
            raise UsageError(f"{path}: leaves the checkpoint folder, links to {path.resolve()}")
        found.append(relative)
    return found
