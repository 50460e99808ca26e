"""GGUF files made to do harm: refused in one line, in bounded time and memory; nothing is kept."""

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import CommandLine
from test_hostile_code import CODE
from test_sources import llama_model, on_disk_weights, write_gguf

from rsprune.errors import UsageError
from rsprune.gguf_header import check_header

gguf = pytest.importorskip("gguf")

HUGE = 2**60
STRING, ARRAY, U8, U32 = 8, 9, 0, 4


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RSPRUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: bytes, length: int | None = None) -> bytes:
    return u64(len(value) if length is None else length) + value


def file(pairs: bytes = b"", tensors: bytes = b"", *, counts: tuple[int, int] = (0, 0)) -> bytes:
    """`counts` of tensors and of pairs, whatever is there."""
    return b"GGUF" + u32(3) + u64(counts[0]) + u64(counts[1]) + pairs + tensors + bytes(32)


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return text(b"k") + u32(ARRAY) + u32(kind) + u64(count) + elements


def tensor(*sizes: int, count: int | None = None) -> bytes:
    named = text(b"t") + u32(len(sizes) if count is None else count)
    return named + b"".join(map(u64, sizes)) + u32(0) + u64(0)


FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "0 bytes"),
    "another magic": (b"GGML" + bytes(40), "expected b'GGUF'"),
    "another version": (b"GGUF" + u32(99) + bytes(40), "version .* found 99"),
    "other byte order": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "little-endian"),
    "tensors without end": (file(counts=(HUGE, 0)), f"tensors: .*found {HUGE}"),
    "keys without end": (file(counts=(0, HUGE)), f"keys: .*found {HUGE}"),
    "array without end": (file(array(U8, HUGE), counts=(0, 1)), f"elements: .*found {HUGE}"),
    "array beyond the file": (file(array(U32, 10_000), counts=(0, 1)), "array of 40000 bytes"),
    "strings beyond the file": (file(array(STRING, 100), counts=(0, 1)), "not a whole GGUF"),
    "array of arrays": (file(array(ARRAY, 1), counts=(0, 1)), "unknown type 9"),
    "string without end": (
        file(text(b"k") + u32(STRING) + text(b"", HUGE), counts=(0, 1)),
        f"string of {HUGE} bytes",
    ),
    "key without end": (file(text(b"", 2**64 - 1), counts=(0, 1)), "key of 18446744073709551615"),
    "key not UTF-8": (file(text(b"\xff"), counts=(0, 1)), "utf-8"),
    "unknown type": (file(text(b"k") + u32(99), counts=(0, 1)), "unknown value type 99"),
    "dimensions without end": (file(tensors=tensor(count=2**32 - 1), counts=(1, 0)), "dimensions"),
    "sizes that overflow": (file(tensors=tensor(HUGE, HUGE), counts=(1, 0)), "values of a tensor"),
    "duplicate tensors": (
        file(tensors=tensor(1) + tensor(1), counts=(2, 0)),
        "(?i)duplicate.*t",
    ),
    "duplicate keys": (file((text(b"k") + u32(U8) + b"1") * 2, counts=(0, 2)), "Duplicate k"),
    "no architecture": (file(), "cannot be converted|cannot read"),
}


@pytest.mark.parametrize("name", FILES)
def test_headers(command_line: CommandLine, cache: Path, tmp_path: Path, name: str):
    import re

    content, message = FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    for command in ("plan", "compress", "eval"):
        said = command_line.refusal(command, path)
        assert re.search(message, said), said
        assert "bad.gguf" in said
    assert not any(path.is_dir() for path in cache.iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GGUF file as llama.cpp's converter writes it."""
    folder = tmp_path_factory.mktemp("gguf")
    model = llama_model(tied=True)
    weights = on_disk_weights(model, folder / "original")
    return write_gguf(folder / "tiny.gguf", model, weights, "llama")


def test_a_file_cut_anywhere(whole: Path, tmp_path: Path, command_line: CommandLine):
    check_header(whole)
    content = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    refused = 0
    for length in range(0, 4_000, 47):  # keys and the vocabulary
        cut.write_bytes(content[:length])
        with pytest.raises(UsageError, match=r"cut\.gguf: not a whole GGUF file"):
            check_header(cut)
        refused += 1
    assert refused > 70
    cut.write_bytes(content[: len(content) * 2 // 3])  # in the weights
    assert "not a whole GGUF file" in command_line.refusal("plan", cut)


def test_every_count_of_a_whole_file_set_to_its_most(whole: Path, tmp_path: Path):
    """Whatever the eight bytes were: the walk ends, with a refusal or without."""
    content = whole.read_bytes()
    path = tmp_path / "changed.gguf"
    refused = 0
    for at in range(8, 3_000, 37):
        path.write_bytes(content[:at] + b"\xff" * 8 + content[at + 8 :])
        try:
            check_header(path)
        except UsageError:
            refused += 1
    assert refused > 20


def replaced(content: bytes, key: bytes, value: int) -> bytes:
    """The file with another u32 for `key`."""
    at = content.index(text(key)) + len(text(key)) + 4
    return content[:at] + u32(value) + content[at + 4 :]


SIZES: dict[str, Callable[[bytes], bytes]] = {
    "layers": lambda content: replaced(content, b"llama.block_count", 2**31 - 1),
    "channels": lambda content: replaced(content, b"llama.embedding_length", 2**31 - 1),
    "no channels": lambda content: replaced(content, b"llama.embedding_length", 0),
    "no heads": lambda content: replaced(content, b"llama.attention.head_count", 0),
}


@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes(whole: Path, tmp_path: Path, command_line: CommandLine, name: str):
    path = tmp_path / "absurd.gguf"
    path.write_bytes(SIZES[name](whole.read_bytes()))
    assert "absurd.gguf" in command_line.refusal("plan", path)


def test_code_beside_a_gguf_file_is_not_run(whole: Path, tmp_path: Path, command_line: CommandLine):
    folder, trap = tmp_path / "folder", tmp_path / "code-has-run"
    folder.mkdir()
    path = folder / "tiny.gguf"
    path.write_bytes(whole.read_bytes())
    (folder / "code.py").write_text(CODE.format(trap=str(trap)))
    names = '{"AutoConfig":"code.Config","AutoTokenizer":["code.Tokenizer","code.Tokenizer"]}'
    for name in ("config.json", "tokenizer_config.json"):
        (folder / name).write_text(
            f'{{"auto_map":{names},"tokenizer_class":"Tokenizer","model_type":"abacus"}}'
        )
    command_line.run(command_line.arguments("plan", path))
    assert not trap.exists()
