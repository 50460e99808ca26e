"""Token windows for calibration and evaluation.

source --load_texts-----------> Corpus                     whatever is guessed is in its note
Corpus --calibration_windows--> int64 [samples, seq_len]   shuffled documents, packed
text   --evaluation_windows---> int64 [count, seq_len]     one text, in order, tail dropped
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsprune.errors import UsageError
from rsprune.guard import refusing_panics

if TYPE_CHECKING:
    import torch

__all__ = [
    "Corpus",
    "calibration_windows",
    "evaluation_windows",
    "heldout_mask",
    "load_texts",
    "shuffled",
    "split_heldout",
    "token_ids",
]

OFFLINE_NOTE = "calibration text: CPython's pydoc topics (offline default), "
OFFLINE_NOTE += "not a basis for quality claims"
TEXT_SUFFIXES = (".txt", ".raw", ".md")
JSON_SUFFIXES = (".jsonl", ".json")
PREFERRED_FIELDS = ("text", "content", "document", "body", "article")
HALVES = ("prefix", "gold_completion")  # one document in two fields: the C4 sample's form
HUB_DOCUMENTS = 20_000  # read of a hub data set; whole ones can be terabytes

Record = tuple[str, Mapping[str, object]]  # (where it stands, for errors; fields)


@dataclass(frozen=True)
class Corpus:
    """Documents in their source's order; `note` is what was assumed, to be shown to the user."""

    name: str
    documents: list[str]
    note: str | None = None


def load_texts(source: str | None, *, field: str | None = None) -> Corpus:
    """Read documents from `source`.

    Arguments: `source` is a file (.txt, .raw, .md: one document, newlines as `\\n`; .jsonl, .json:
    one object a line; each also .gz; .parquet), `hub:[owner/]name` or `hub:owner/name/config`, each
    with `:split` after it (default train, first 20,000 documents), or None for the Python manual's
    topics that CPython ships. `field` is the text's field in records; guessed and noted if None.
    Raises UsageError that names file, line and field, with what was expected and found.
    """
    if source is None:
        from pydoc_data.topics import topics

        return Corpus("pydoc topics", [topics[key] for key in sorted(topics)], OFFLINE_NOTE)
    if source.startswith("hub:"):
        return _from_records(source, _hub_records(source), field)
    path = Path(source).expanduser()
    kind = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file():
        raise UsageError(f"{source}: no such file")
    if kind in TEXT_SUFFIXES:
        if field is not None:
            raise UsageError(f"{source}: a {kind} file has no fields, found field {field!r}")
        return Corpus(path.name, [_plain_text(path)])
    if kind in JSON_SUFFIXES:
        return _from_records(source, _json_records(path), field)
    if kind == ".parquet" and path.suffix == kind:
        return _from_records(source, _parquet_records(path), field)
    known = ", ".join((*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet"))
    raise UsageError(f"{source}: expected a file of kind {known}, found {path.suffix or 'none'}")


def text_bytes(sources: Sequence[str]) -> int:
    """Memory that reading these texts takes at its peak, of files that are there.

    Their bytes, the lines that those are cut into, and documents; a packed file is taken to hold
    four times its size.
    """
    files = [Path(source) for source in sources if Path(source).is_file()]
    return sum(file.stat().st_size * (16 if file.suffix == ".gz" else 4) for file in files)


def _read_bytes(path: Path) -> bytes:
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = f"byte {error.start}: {raw[error.start]:#04x}"
        raise UsageError(f"{where}: expected UTF-8 text, found at {at}") from error


def _plain_text(path: Path) -> str:
    """The whole file; `\\r\\n` and `\\r` become `\\n`, as in Python's text mode."""
    text = _decoded(_read_bytes(path), str(path)).replace("\r\n", "\n").replace("\r", "\n")
    if not text.strip():
        raise UsageError(f"{path}: expected text, found an empty file")
    return text


def _json_records(path: Path) -> Iterator[Record]:
    for number, raw in enumerate(_read_bytes(path).split(b"\n"), start=1):
        where = f"{path}, line {number}"
        line = _decoded(raw, where)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            found = f"{error.msg} at column {error.colno}"
            raise UsageError(f"{where}: expected one JSON object a line, found {found}") from error
        if not isinstance(record, dict):
            found = type(record).__name__
            raise UsageError(f"{where}: expected a JSON object, found {found}")
        yield where, record


def _parquet_records(path: Path) -> Iterator[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UsageError(f"{path}: needs pyarrow: pip install 'rsprune[data]'") from error
    row = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"{path}: expected a parquet file, found: {error}") from error


def _hub_records(source: str) -> Iterator[Record]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UsageError(f"{source}: needs datasets: pip install 'rsprune[data]'") from error
    address, _, split = source.removeprefix("hub:").partition(":")
    parts = address.split("/")
    if not all(parts) or len(parts) > 3:
        raise UsageError(f"{source}: expected hub:owner/name[/config][:split]")
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    name, options = "/".join(parts[:2]), {"split": split or "train", "streaming": not offline}
    try:
        rows = load_dataset(name, *parts[2:], **options)
        for number, record in zip(range(1, HUB_DOCUMENTS + 1), rows, strict=False):
            yield f"{source}, row {number}", record
    except (OSError, ValueError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UsageError(f"{source}: the data set cannot be loaded: {first_line}") from error


def _from_records(source: str, records: Iterator[Record], field: str | None) -> Corpus:
    """Documents from the text field of each record, empty ones left out."""
    documents: list[str] = []
    fields: tuple[str, ...] = () if field is None else (field,)
    for where, record in records:
        fields = fields or _guess_fields(where, record)
        document = "".join(_text_of(where, record, name) for name in fields)
        if document.strip():
            documents.append(document)
    if not documents:
        raise UsageError(f"{source}: expected at least one document with text, found none")
    note = f"{source}: text taken from {' + '.join(map(repr, fields))} (guessed)"
    return Corpus(source, documents, note if field is None else None)


def _guess_fields(where: str, record: Mapping[str, object]) -> tuple[str, ...]:
    """The two halves, else a usual name, else the field with the longest string."""
    strings = {name: value for name, value in record.items() if isinstance(value, str)}
    if not strings:
        found = ", ".join(record)
        raise UsageError(f"{where}: expected a field whose value is a string, found: {found}")
    if all(half in strings for half in HALVES):
        return HALVES
    usual = [name for name in PREFERRED_FIELDS if name in strings]
    return (usual[0] if usual else max(strings, key=lambda name: len(strings[name])),)


def _text_of(where: str, record: Mapping[str, object], field: str) -> str:
    value = record.get(field)
    if field not in record:
        raise UsageError(f"{where}: expected field {field!r}, found: {', '.join(record)}")
    if not isinstance(value, str):
        found = type(value).__name__
        raise UsageError(f"{where}: expected a string in field {field!r}, found {found}")
    return value


def calibration_windows(
    corpus: Corpus, tokenizer: Any, *, samples: int, seq_len: int, seed: int
) -> torch.Tensor:
    """Windows of shuffled, packed documents: int64 `[samples, seq_len]`, the same for one seed.

    Each document is tokenised whole, with the special tokens that the tokenizer adds to a document
    by default (a BOS where the model was trained with one); an EOS, if the tokenizer has one,
    stands between documents unless the tokenizer put it there. No token is skipped or used twice,
    and no document is read after the last window is full. A single document (a plain text file)
    starts at a line that the seed chooses and wraps around at its end.
    Raises UsageError when the corpus has fewer than `samples * seq_len` tokens.
    """
    import numpy as np
    import torch

    if samples < 1 or seq_len < 1:
        raise UsageError(f"expected samples and seq_len of 1 or more, found {samples}, {seq_len}")
    documents = shuffled(corpus, seed)
    needed, tokens = samples * seq_len, np.empty(samples * seq_len, dtype=np.int64)
    found = 0
    for ids in _packed(tokenizer, documents):
        taken = ids[: needed - found]
        tokens[found : found + len(taken)] = taken
        found += len(taken)
        if found == needed:
            return torch.from_numpy(tokens.reshape(samples, seq_len))
    raise UsageError(
        f"{corpus.name}: expected {needed} tokens ({samples} samples of {seq_len}), found {found}: "
        f"at most {found // seq_len} samples fit"
    )


def shuffled(corpus: Corpus, seed: int) -> list[str]:
    """The documents in an order that the seed chooses; a single one, rotated."""
    import numpy as np

    # raw words of a bit generator: unlike Generator.permutation, the same in every NumPy release
    keys = np.random.PCG64(seed).random_raw(len(corpus.documents))
    if len(corpus.documents) == 1:
        return _rotated(corpus.documents[0], int(keys[0]))
    return [corpus.documents[index] for index in np.argsort(keys, kind="stable").tolist()]


def _rotated(document: str, key: int) -> list[str]:
    """The document from a line on that `key` chooses, and what stands before that line."""
    lines = document.splitlines(keepends=True)
    first = key % max(1, len(lines))
    parts = ["".join(lines[first:]), "".join(lines[:first])]
    return [part for part in parts if part]


def _packed(tokenizer: Any, documents: Iterable[str]) -> Iterator[list[int]]:
    """Token ids of one document after the other, an EOS in front of all but the first."""
    end: list[int] = []  # what must stand between the last document and the next
    for document in documents:
        ids = token_ids(tokenizer, document)
        yield end + ids
        eos = tokenizer.eos_token_id
        end = [] if eos is None or ids[-1:] == [eos] else [eos]


def token_ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """The tokens of a text; raises UsageError when the tokenizer fails on it."""
    # verbose=False: it would warn that the text is longer than the model's context
    with refusing_panics("tokenizer"):
        ids: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    return ids


def split_heldout(
    windows: torch.Tensor, fraction: float = 1 / 8
) -> tuple[torch.Tensor, torch.Tensor]:
    """Set evenly spaced windows aside: int64 `[n, seq_len]` -> calibration, held out (both copies).

    `fraction` of the windows, rounded, but at least one on each side; of a single window, and for
    a fraction of 0, none.
    """
    held = heldout_mask(windows.shape[0], fraction)
    return windows[~held], windows[held]


def heldout_mask(total: int, fraction: float) -> torch.Tensor:
    """Which of `total` windows `split_heldout` sets aside: bool [total]."""
    import torch

    if not 0 <= fraction < 1:
        raise UsageError(f"held-out fraction: expected from 0 to below 1, found {fraction}")
    count = min(max(1, round(total * fraction)), total - 1) if total and fraction else 0
    held = torch.zeros(total, dtype=torch.bool)
    for index in range(count):
        held[(2 * index + 1) * total // (2 * count)] = True
    return held


def evaluation_windows(text: str, tokenizer: Any, seq_len: int) -> torch.Tensor:
    """Windows for perplexity: int64 `[count, seq_len]`, consecutive, the tail dropped.

    The text is tokenised once, as one string, without special tokens.
    Raises UsageError when it is shorter than one window.
    """
    import torch

    if seq_len < 2:
        raise UsageError(f"seq_len: expected 2 or more to predict a token, found {seq_len}")
    ids = token_ids(tokenizer, text, add_special_tokens=False)
    count = len(ids) // seq_len
    if count == 0:
        raise UsageError(f"evaluation text: expected {seq_len} tokens or more, found {len(ids)}")
    return torch.tensor(ids[: count * seq_len], dtype=torch.int64).reshape(count, seq_len)
