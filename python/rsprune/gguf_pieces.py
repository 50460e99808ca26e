"""Tokenizers made from SentencePiece (Llama 2, Mistral, TinyLlama) as llama.cpp takes them: scores.

transformers merges the pair whose rule stands first; llama.cpp merges the pair whose *result* has
the highest score, whether or not there is a rule. With score = -(place of the first rule that makes
a token) both do the same if the rules of a token stand together, and if there is a rule for every
way to cut a token into two. Converters write such rules; other ones are refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rsprune.errors import UsageError

__all__ = ["is_pieces", "piece_scores", "piece_types", "space_prefix"]

Json = dict[str, Any]

SPACE = "\u2581"
PREPEND: Json = {"type": "Prepend", "prepend": SPACE}
REPLACE: Json = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


def is_pieces(content: Json) -> bool:
    """Whether a tokenizer's JSON is of this kind: pairs of characters, bytes for the unknown."""
    model = content["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def space_prefix(content: Json, folder: Path) -> tuple[bool, list[str]]:
    """Whether a text gets a space in front, and notes on what llama.cpp does otherwise.

    Raises:
        UsageError: text is changed or cut in another way than SentencePiece's.
    """
    normalizer, cut = content["normalizer"], content["pre_tokenizer"]
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    if cut is None and steps in ([PREPEND, REPLACE], [REPLACE]):
        return PREPEND in steps, []
    metaspace = {"type": "Metaspace", "replacement": SPACE, "split": False}
    scheme = (cut or {}).get("prepend_scheme")
    if not steps and cut == {**metaspace, "prepend_scheme": scheme}:
        if scheme == "never":
            return False, []
        where = "the beginning" if scheme == "first" else "a piece of text"
        note = "llama.cpp puts a space before text after every special token; the tokenizer at "
        return True, [f"{note}{where}, and only if there is none"]
    raise UsageError(
        f"{folder}: tokenizer.json: GGUF export of a tokenizer with bytes for the unknown expects "
        f"spaces to become {SPACE!r} and nothing else; found {normalizer} and {cut}"
    )


def piece_types(tokens: list[str], types: list[int], unknown: str | None) -> list[int]:
    """Token types with bytes and the unknown token told apart."""
    from gguf import TokenType

    return [
        int(TokenType.BYTE)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">")
        else int(TokenType.UNKNOWN)
        if text == unknown
        else kind
        for text, kind in zip(tokens, types, strict=True)
    ]


def piece_scores(content: Json, tokens: list[str], folder: Path) -> list[float]:
    """The score of every token.

    Raises:
        UsageError: scores cannot say what the rules say; the first such token is named.
    """
    vocabulary = content["model"]["vocab"]
    rules = [tuple(r.split(" ") if isinstance(r, str) else r) for r in content["model"]["merges"]]
    first: dict[str, int] = {}
    before = ""
    for place, (left, right) in enumerate(rules):
        made = left + right
        if made != before and made in first:
            raise _other_rules(folder, made, "rules that stand together, found them apart")
        first.setdefault(made, place)
        before = made
    known = set(rules)
    for text in first:
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair not in known and pair[0] in vocabulary and pair[1] in vocabulary:
                raise _other_rules(folder, text, f"a rule for {pair}, found none")
    for number in range(256):
        if f"<0x{number:02X}>" not in vocabulary:
            raise _other_rules(folder, f"<0x{number:02X}>", "a token for every byte")
    return [-float(first.get(token, 0)) for token in tokens]


def _other_rules(folder: Path, token: str, expected: str) -> UsageError:
    return UsageError(f"{folder}: tokenizer.json: token {token!r}: llama.cpp expects {expected}")
