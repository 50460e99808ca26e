"""Hugging Face folder -> GGUF file for llama.cpp, tensor by tensor.

    for every parameter of the model:
        values <- the tensor's pieces on disk          (q and k: rows in llama.cpp's order)
        put    <- encode(values, type)                 gguf_types; packed types only without loss

Norms, biases and rotary factors are float32, as llama.cpp wants them. Linears of the decoder layers
take the type that was asked for; the vocabulary, linears that rsprune left dense and linears whose
rows are not whole blocks are F16 beside a packed type. The file is built in `<target>.partial`,
synced and renamed.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from rsprune.card import LICENCE_KEYS, read_front_matter
from rsprune.errors import RspruneError, UsageError
from rsprune.gguf_models import add_header
from rsprune.gguf_plan import Job, Part, make_job
from rsprune.gguf_tokenizer import add_tokenizer
from rsprune.gguf_types import PLAIN, TYPES, Bytes, NotExactError, Values, decode, encode, ggml_type
from rsprune.output import free_bytes, sync
from rsprune.progress import NullProgress, Progress
from rsprune.sources import resolve

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["Exported", "export_gguf"]

PIECE = 1 << 20
"""Values that are encoded together; a multiple of every block."""


@dataclass
class Exported:
    """What an export wrote."""

    path: Path
    nbytes: int
    parts: list[Part]
    notes: list[str]
    """What a user must know."""
    rounded: int = 0
    """Values that F16 or BF16 changed."""
    largest_change: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """`file bytes * 8 / weights`, everything counted, the tokenizer too."""
        return self.nbytes * 8 / sum(math.prod(part.shape) for part in self.parts)


def export_gguf(
    folder: Path,
    target: Path,
    kind: str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Writes the model in `folder` as one GGUF file.

    Args:
        folder: a checkpoint; which linears rsprune compressed is known from its report.
        target: the file.
        kind: one of `gguf_types.TYPES`, for the linears of the decoder layers.
        overwrite: whether `target` may exist.
        progress: shows one step a tensor.

    Raises:
        UsageError: an architecture, a setting or a tokenizer that llama.cpp does not reproduce,
            values that `kind` would change, or too little room.
        RspruneError: the disk failed.
    """
    _check(target, kind, overwrite)
    job = make_job(resolve(str(folder)), kind)
    if job.nbytes > (free := free_bytes(target)):
        raise UsageError(f"{target}: needs {job.nbytes} bytes on disk, found {free} bytes free")
    partial = target.with_name(f"{target.name}.partial")
    try:
        with _alone(partial):
            exported = _write(job, target, partial, progress or NullProgress())
            sync(partial)
            partial.replace(target)
            sync(target.absolute().parent)
    except OSError as error:
        raise RspruneError(f"{target}: cannot be written: {error.strerror or error}") from error
    return exported


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Holds the unfinished file for this process; nothing of it is left behind."""
    with partial.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{partial}: another export is writing it") from None
        try:
            yield
        finally:
            partial.unlink(missing_ok=True)


def _check(target: Path, kind: str, overwrite: bool) -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        message = "export to GGUF needs the gguf package: pip install 'rsprune[gguf]'"
        raise UsageError(message) from error
    if kind not in TYPES:
        raise UsageError(f"--type: expected one of {', '.join(TYPES)}, found {kind!r}")
    if target.suffix != ".gguf":
        raise UsageError(f"{target}: expected the name of a .gguf file")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target}: expected a folder to write to, found none")
    if target.is_dir() or (target.exists() and not overwrite):
        raise UsageError(f"{target}: exists already; name another or pass --overwrite")


def _write(job: Job, target: Path, partial: Path, progress: Progress) -> Exported:
    """Header, then every tensor in the order of the header, each at a multiple of 32 bytes."""
    exported = Exported(target, 0, job.parts, [*job.notes, *_write_header(job, partial)])
    progress.stage("tensors", len(job.parts))
    with partial.open("ab") as file:
        _pad(file)
        for part in job.parts:
            for encoded in _encoded(job, part, exported):
                file.write(encoded.data)
            _pad(file)
            progress.step(part.name)
        exported.nbytes = file.tell()
    return exported


def _pad(file: BinaryIO) -> None:
    from gguf import GGUF_DEFAULT_ALIGNMENT

    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))


def _write_header(job: Job, partial: Path) -> list[str]:
    """Everything but the tensors' bytes; returns notes."""
    from gguf import GGUFWriter

    config, folder = job.skeleton.config, job.skeleton.checkpoint.folder
    writer = GGUFWriter(partial, job.architecture.gguf)
    _add_general(writer, folder, job.kind)
    notes = add_header(writer, config, job.architecture)
    notes += add_tokenizer(writer, folder, config.vocab_size)
    for part in job.parts:
        values = np.dtype(np.float32)
        writer.add_tensor_info(part.name, part.shape, values, part.nbytes, ggml_type(part.kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return notes


def _add_general(writer: GGUFWriter, folder: Path, kind: str) -> None:
    """Name and type, and from the model card licence, base model and tags."""
    from gguf import GGML_QUANT_VERSION, GGUFType, LlamaFileType

    file_type = "ALL_F32" if kind == "F32" else f"MOSTLY_{kind}"
    writer.add_type(GGUFType.MODEL)
    writer.add_name(folder.resolve().name)
    writer.add_file_type(LlamaFileType[file_type])
    writer.add_quantization_version(GGML_QUANT_VERSION)
    card = folder / "README.md"
    facts = read_front_matter(card.read_text(errors="replace")) if card.is_file() else {}
    for key in LICENCE_KEYS:
        if isinstance(facts.get(key), str):
            writer.add_string(f"general.{key.replace('_', '.')}", facts[key])
    bases = _strings(facts.get("base_model"))
    if bases:
        writer.add_base_model_count(len(bases))
    for index, base in enumerate(bases):
        owner, _, name = base.rpartition("/")
        writer.add_base_model_name(index, name)
        writer.add_base_model_organization(index, owner)
    writer.add_tags(_strings(facts.get("tags")))


def _strings(value: Any) -> list[str]:
    """A card's value, which may be one string or several."""
    return [str(item) for item in (value if isinstance(value, list) else [value]) if item]


def _encoded(job: Job, part: Part, exported: Exported) -> Iterator[Bytes]:
    """The bytes of one tensor; adds to `exported` what rounding did."""
    at = 0
    for values in _values(job, part):
        try:
            encoded = encode(values, part.kind)
        except NotExactError as error:
            raise UsageError(_not_exact(part, at + error.at, error)) from None
        if part.kind in PLAIN:
            with np.errstate(invalid="ignore"):  # infinity less itself
                change = np.abs(decode(encoded, part.kind) - values)
            if not np.isfinite(change).all():
                index = at + int(np.argmin(np.isfinite(change)))
                raise UsageError(
                    f"{part.source}: expected finite values that {part.kind} can hold, found "
                    f"{values[index - at]!r} at flat index {index}"
                )
            exported.rounded += int(np.count_nonzero(change))
            exported.largest_change = max(exported.largest_change, float(change.max(initial=0.0)))
        at += len(values)
        yield encoded


def _values(job: Job, part: Part) -> Iterator[Values]:
    """All values of a tensor in the order of the file, flat, in whole blocks."""
    if not part.source:
        assert job.factors is not None
        yield job.factors
        return
    pieces: Iterator[torch.Tensor] = (
        piece for _, piece in job.skeleton.checkpoint.pieces(part.source)
    )
    if part.heads or part.kind not in PLAIN:
        pieces = iter(torch.split(_in_order(torch.cat(list(pieces)), part), PIECE))
    for piece in pieces:
        values = piece.float()
        yield (values + part.offset if part.offset else values).numpy()


def _in_order(flat: torch.Tensor, part: Part) -> torch.Tensor:
    """The rows of a head as llama.cpp rotates them: neighbours in place of halves."""
    if not part.heads:
        return flat
    halves = flat.view(part.heads, 2, part.shape[0] // part.heads // 2, -1)
    return halves.transpose(1, 2).reshape(-1)


def _not_exact(part: Part, at: int, error: NotExactError) -> str:
    """Names tensor, row and columns on disk, and the way out."""
    row, column = divmod(at, part.shape[1])
    if part.heads:
        width = part.shape[0] // part.heads
        head, place = divmod(row, width)
        row = head * width + place % 2 * (width // 2) + place // 2
    held = "{-a, +a}" if part.kind == "Q1_0" else "{-a, 0, +a}"
    return (
        f"{part.source}: --type {part.kind} holds {held} a block, a in half precision; found "
        f"{error} in row {row} from column {column}; --type F16 takes any values"
    )
