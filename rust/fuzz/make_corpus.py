"""Writes the folders of corpus: one small file for every rule that can be broken.

`accept-*` must be read and `reject-*` refused; rust/rsprune-core/tests/corpus.rs holds them to it.
What a fuzzer finds is added by hand, under a name of the same kind.
"""

from __future__ import annotations

import json
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"


def file(text: str | bytes, data: int = 0, *, length: int | None = None) -> bytes:
    """A safetensors file of the JSON `text` and `data` bytes; `length` overrides the prefix."""
    body = text.encode() if isinstance(text, str) else text
    prefix = (len(body) if length is None else length).to_bytes(8, "little")
    return prefix + body + bytes(range(data))


def tensor(begin: int, end: int, *, dtype: str = "U8", shape: list[int] | None = None) -> str:
    """One entry of a header."""
    sizes = [end - begin] if shape is None else shape
    return json.dumps({"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]})


def tensors(**entries: str) -> str:
    """A header of the tensors `entries`."""
    return "{" + ",".join(f'"{name}":{entry}' for name, entry in entries.items()) + "}"


def twice(name: str, other: str) -> str:
    """A header of two tensors."""
    return f'{{"{name}":{tensor(0, 1)},"{other}":{tensor(1, 2)}}}'


ONE = tensors(a=tensor(0, 4))
PICKLE = b"cos\nsystem\n(S'true'\ntR."

HEADERS = {
    "accept-no-tensor": file("{}"),
    "accept-one": file(ONE, 4),
    "accept-out-of-order": file(tensors(b=tensor(4, 6), a=tensor(0, 4)), 6),
    "accept-metadata-and-padding": file('{"__metadata__":{"format":"pt"}}    '),
    "accept-scalar-and-empty": file(
        tensors(e=tensor(0, 0, dtype="F64", shape=[0, 7]), s=tensor(0, 2, dtype="BF16", shape=[])),
        2,
    ),
    "accept-half-types": file(
        tensors(
            f=tensor(0, 8, dtype="F16", shape=[2, 2]), b=tensor(8, 12, dtype="BF16", shape=[2])
        ),
        12,
    ),
    "reject-empty-file": b"",
    "reject-shorter-than-prefix": b"\x02\0\0",
    "reject-length-zero": file("{}", length=0),
    "reject-length-bomb": file("{}", length=2**64 - 1),
    "reject-length-above-bound": file("{}", length=100_000_001),
    "reject-length-beyond-file": file("{}", length=3),
    "reject-pickle": PICKLE,
    "reject-zip": b"PK\x03\x04" + bytes(40),
    "reject-not-utf8": file(b'{"\xff":1}'),
    "reject-array": file("[]"),
    "reject-leading-space": file(" {}"),
    "reject-half-json": file('{"a":'),
    "reject-two-values": file("{}{}"),
    "reject-lone-surrogate": file(r'{"\ud800":1}'),
    "reject-deep-json": file('{"a":' + "[" * 1000 + "]" * 1000 + "}"),
    "reject-duplicate-tensor": file(twice("a", "a"), 2),
    "reject-duplicate-escaped": file(twice("a", r"\u0061"), 2),
    "reject-duplicate-metadata": file('{"__metadata__":{},"__metadata__":{}}'),
    "reject-duplicate-field": file(ONE.replace('"shape"', '"dtype":"I8","shape"'), 4),
    "reject-metadata-number": file('{"__metadata__":{"k":1}}'),
    "reject-unknown-dtype": file(tensors(a=tensor(0, 4, dtype="F128")), 4),
    "reject-sub-byte-dtype": file(tensors(a=tensor(0, 4, dtype="F4", shape=[8])), 4),
    "reject-unknown-field": file(ONE.replace('"shape"', '"x":0,"shape"'), 4),
    "reject-missing-shape": file('{"a":{"dtype":"U8","data_offsets":[0,4]}}', 4),
    "reject-negative-size": file(tensors(a=tensor(0, 4, shape=[-4])), 4),
    "reject-fractional-size": file(ONE.replace("[4]", "[4.0]"), 4),
    "reject-size-beyond-64-bits": file(ONE.replace("[4]", "[18446744073709551616]"), 4),
    "reject-three-offsets": file(ONE.replace("[0, 4]", "[0,4,4]"), 4),
    "reject-begin-after-end": file(tensors(a=tensor(4, 0, shape=[4])), 4),
    "reject-shape-overflow": file(tensors(a=tensor(0, 0, dtype="U64", shape=[2**32, 2**32]))),
    "reject-shape-overflow-of-empty": file(tensors(a=tensor(0, 0, shape=[2**40, 2**40, 0]))),
    "reject-end-overflow": file(tensors(a=tensor(0, 2**64 - 1))),
    "reject-dtype-size": file(tensors(a=tensor(0, 11, dtype="BF16", shape=[2, 3])), 11),
    "reject-overlap": file(tensors(a=tensor(0, 4), b=tensor(3, 6)), 6),
    "reject-same-bytes-twice": file(tensors(a=tensor(0, 4), b=tensor(0, 4)), 4),
    "reject-empty-inside": file(tensors(a=tensor(0, 4), b=tensor(2, 2)), 4),
    "reject-hole": file(tensors(a=tensor(0, 4), b=tensor(5, 6)), 6),
    "reject-hole-at-start": file(tensors(a=tensor(1, 4)), 4),
    "reject-truncated-data": file(ONE, 3),
    "reject-bytes-without-owner": file(ONE, 5),
}


def index(**weight_map: str) -> bytes:
    """An index file's text."""
    return json.dumps({"weight_map": weight_map}).encode()


DEEP = b"[" * 1000 + b"]" * 1000
DEEP_METADATA = b'{"metadata":' + DEEP + b',"weight_map":{"a":"1.safetensors"}}'  # passed over

INDICES = {
    "accept-two-files": index(a="1.safetensors", b="sub/2.safetensors"),
    "accept-any-metadata": b'{"metadata":{"x":[2.5]},"weight_map":{"a":"1.safetensors"}}',
    "reject-parent": index(a="../outside.safetensors"),
    "reject-parent-inside": index(a="sub/../../outside.safetensors"),
    "reject-absolute": index(a="/outside.safetensors"),
    "reject-dot": index(a="./1.safetensors"),
    "reject-empty-name": index(a=""),
    "reject-backslash": index(a="..\\outside.safetensors"),
    "reject-drive": index(a="C:\\outside.safetensors"),
    "reject-pickled": index(a="pytorch_model.bin"),
    "reject-other-type": index(a="config.json"),
    "reject-duplicate-tensor": b'{"weight_map":{"a":"1.safetensors","a":"2.safetensors"}}',
    "reject-duplicate-map": b'{"weight_map":{},"weight_map":{"a":"1.safetensors"}}',
    "reject-number": b'{"weight_map":{"a":1}}',
    "reject-empty-map": b'{"weight_map":{}}',
    "reject-no-map": b'{"metadata":{}}',
    "reject-null": b"null",
    "reject-empty-file": b"",
    "reject-half-json": b'{"weight_map":{"a":',
    "reject-not-utf8": b'{"weight_map":{"\xff":"1.safetensors"}}',
    "accept-deep-metadata": DEEP_METADATA,
    "reject-deep-map": b'{"weight_map":' + b'{"a":' * 1000 + b"1" + b"}" * 1000 + b"}",
}


def packed(form: str, shape: tuple[int, int], *parts: list[int], dtype: str = "BF16") -> bytes:
    """A file of `src/packed_case.rs`."""
    line = f"{form}|{dtype}|{shape[0]}|{shape[1]}\n"
    return line.encode() + bytes(byte for part in parts for byte in part)


ONES = [0x80, 0x3F] * 4
"""Four bfloat16 ones."""
HALF = [0x00, 0x38]
"""0.5 as an F16."""

KEEP_OF = {
    "accept-2-of-4": packed("keep-of 2:4", (1, 8), ONES, [0b1010_0110]),
    "accept-half-a-byte": packed("keep-of 2:4", (2, 4), ONES, [0b0110, 0b0011]),
    "accept-1-of-16": packed("keep-of 1:16", (1, 16), [1, 2, 3, 4], [0, 0x10], dtype="F32"),
    "reject-three-bits": packed("keep-of 2:4", (1, 8), ONES, [0b1110_0110]),
    "reject-one-bit": packed("keep-of 2:4", (1, 8), ONES, [0b1000_0110]),
    "reject-bits-after-the-last-column": packed("keep-of 2:4", (1, 4), ONES[:4], [0b0011_0110]),
    "reject-short-mask": packed("keep-of 2:4", (2, 8), ONES * 2, [0b1010_0110]),
    "reject-short-values": packed("keep-of 2:4", (1, 8), ONES[:6], []),
    "reject-long-mask": packed("keep-of 2:4", (1, 8), ONES, [0b1010_0110, 0]),
    "reject-columns": packed("keep-of 2:4", (1, 6), ONES, [0b1010]),
    "reject-too-many-kept": packed("keep-of 5:4", (1, 8), ONES, [0]),
    "reject-no-rows": packed("keep-of 2:4", (0, 8)),
    "reject-overflow": packed("keep-of 2:4", (2**62, 8), ONES, [0b1010_0110]),
    "reject-dtype": packed("keep-of 2:4", (1, 8), ONES, [0b1010_0110], dtype="F64"),
}
BITMAP = {
    "accept-four": packed("bitmap 4", (1, 9), ONES, [0b1000_0110, 1]),
    "accept-none": packed("bitmap 0", (2, 9), [0, 0, 0, 0]),
    "accept-a-stored-zero": packed("bitmap 1", (1, 3), [0, 0], [2]),
    "reject-too-few-bits": packed("bitmap 4", (1, 9), ONES, [0b1000_0110, 0]),
    "reject-too-many-bits": packed("bitmap 4", (1, 9), ONES, [0b1000_0111, 1]),
    "reject-bits-after-the-last-column": packed("bitmap 4", (1, 9), ONES, [0b1000_0110, 2]),
    "reject-more-than-there-are": packed("bitmap 4", (1, 3), ONES, [0b111]),
    "reject-short-values": packed("bitmap 4", (1, 9), ONES[:2], [0b1000_0110, 1]),
    "reject-count-overflow": packed(f"bitmap {2**63}", (2**31, 2**31), ONES, [0]),
    "reject-negative-count": packed("bitmap -1", (1, 3), [0]),
}
SIGNS = {
    "accept-2-of-8": packed("signs 2:8", (1, 16), [0b11010_00011 & 255, 3], [0b0110], HALF),
    "accept-dense": packed("signs 8:8", (2, 8), [1, 255], HALF * 2, dtype="F32"),
    "accept-two-blocks": packed("signs 4:4", (1, 260), [0xA5] * 32 + [5], HALF, [0, 0]),
    "accept-scale-zero": packed("signs 2:4", (1, 4), [1], [3], [0, 0]),
    "reject-code": packed("signs 2:8", (1, 8), [28], [1], HALF),
    "reject-bits-after-the-last-code": packed("signs 2:8", (1, 8), [0x20], [1], HALF),
    "reject-bits-after-the-last-sign": packed("signs 2:8", (1, 8), [0], [4], HALF),
    "reject-infinite-scale": packed("signs 2:8", (1, 8), [0], [1], [0x00, 0x7C]),
    "reject-scale-not-a-number": packed("signs 2:8", (1, 8), [0], [1], [0x01, 0x7C]),
    "reject-negative-scale": packed("signs 2:8", (1, 8), [0], [1], [0x00, 0xB8]),
    "reject-scale-minus-zero": packed("signs 2:8", (1, 8), [0], [1], [0x00, 0x80]),
    "reject-scale-that-bfloat16-rounds": packed("signs 2:8", (1, 8), [0], [1], [0x01, 0x38]),
    "reject-short-scales": packed("signs 4:4", (1, 260), [0xA5] * 32 + [5], HALF),
    "reject-group-of-16": packed("signs 2:16", (1, 16), [0], [1], HALF),
}

UNIT = [0x00, 0x3C]
"""1 as an F16."""
SALIENT = [0b1000, *[0] * 15]
"""A block whose column 3 is salient."""
LEVELS = [0x00, 0x3C, 0x00, 0x40, 0x00, 0x44, 0x00, 0x38], [0x00, 0x34, 0x00, 0xB4, 0x00, 0x00]
COLUMNS = [0x00, 0x3C] * 9

DECIDED = {
    "accept-binary": packed("binary 6:8", (1, 8), [19], [0x21], [0x24], SALIENT, *LEVELS),
    "accept-residual": packed("residual 1:8", (1, 8), [0x32], UNIT, [2], [0], HALF),
    "accept-residual-dense": packed(
        "residual 8:8", (1, 8), [0x32], UNIT, [0xFF], HALF, dtype="F32"
    ),
    "accept-row-column": packed("row-column", (1, 9), [0x49, 0], [0x00, 0x40], COLUMNS),
    "accept-uniform": packed("uniform 3", (1, 4), [0xD5, 1], HALF, [3]),
    "reject-binary-code": packed("binary 6:8", (1, 8), [28], [0x21], [0x24], SALIENT, *LEVELS),
    "reject-binary-short": packed("binary 6:8", (1, 8), [19], [0x21], [0x24], SALIENT, LEVELS[0]),
    "reject-residual-code": packed("residual 1:4", (1, 8), [0x32], UNIT, [0x10], [0], HALF),
    "reject-residual-scale": packed("residual 1:8", (1, 8), [0x32], UNIT, [2], [0], [0x00, 0x7C]),
    "reject-residual-first": packed("residual 1:8", (1, 8), [0x32], [0x00, 0xB8], [2], [0], HALF),
    "reject-residual-columns": packed("residual 3:4", (1, 12), [0x32, 0], UNIT, [0], [0], HALF),
    "reject-row-column-end": packed("row-column", (1, 9), [0x49, 2], [0x00, 0x40], COLUMNS),
    "reject-row-column-infinite": packed("row-column", (1, 9), [0x49, 0], [0x00, 0x7C], COLUMNS),
    "reject-uniform-zero": packed("uniform 3", (1, 4), [0xD5, 1], HALF, [8]),
    "reject-uniform-width": packed("uniform 5", (1, 4), [0xD5, 1], HALF, [3]),
}

TARGETS = {
    "header": HEADERS,
    "index": INDICES,
    "keep_of": KEEP_OF,
    "bitmap": BITMAP,
    "signs": SIGNS,
    "decided": DECIDED,
}


def main() -> None:
    """Writes what is not there yet or differs."""
    for target, files in TARGETS.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)


if __name__ == "__main__":
    main()
