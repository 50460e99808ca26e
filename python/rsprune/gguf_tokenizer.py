"""A tokenizer as llama.cpp takes it: what transformers runs, in the words of GGUF, or a refusal.

llama.cpp does not read how a byte-level tokenizer cuts words, it knows some ways by name. So the
JSON of the tokenizer as transformers loads it is compared with what each name means; what differs
in one letter is another tokenizer, and is refused. Those from SentencePiece: gguf_pieces. Which
special tokens stand around a text is seen by encoding one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsprune.errors import UsageError
from rsprune.gguf_pieces import is_pieces, piece_scores, piece_types, space_prefix
from rsprune.guard import refusing_panics

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["PRE_TOKENIZERS", "WHOLE_WORDS", "add_tokenizer"]

Json = dict[str, Any]

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(*, use_regex: bool) -> Json:
    own = {"add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return {"type": "ByteLevel", **own}


def _split(expression: str) -> list[Json]:
    """A regular expression, then bytes."""
    split = {"type": "Split", "pattern": {"Regex": expression}}
    return [{**split, "behavior": "Isolated", "invert": False}, _byte_level(use_regex=False)]


PRE_TOKENIZERS: dict[str, list[Json]] = {
    "gpt-2": [_byte_level(use_regex=True)],
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(use_regex=True)],
    "llama-bpe": _split(WORDS + r"\p{N}{1,3}" + REST),
    "qwen2": _split(WORDS + r"\p{N}" + REST),
}
"""`tokenizer.ggml.pre` -> the steps that it stands for."""
WHOLE_WORDS = ("llama-bpe",)
"""Those with which llama.cpp takes a word of the vocabulary whole, whatever the merges say."""
PLAIN_BPE = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
"""What byte-pair encoding must be without."""


def add_tokenizer(writer: GGUFWriter, folder: Path, vocabulary: int) -> list[str]:
    """Adds the tokenizer, its special tokens and the chat template to a file's header.

    Args:
        writer: of the file.
        folder: of the checkpoint.
        vocabulary: rows of the embedding; rows without a token get a name of their own.

    Returns:
        Notes for the user: what llama.cpp will do otherwise.

    Raises:
        UsageError: the tokenizer is none that llama.cpp is known to reproduce.
    """
    from gguf import SpecialVocab
    from transformers import AutoTokenizer

    with refusing_panics(f"{folder}: its tokenizer cannot be loaded"):
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        content = json.loads(loaded.backend_tokenizer.to_str())
        bare, text = (
            loaded("a", add_special_tokens=special).input_ids for special in (False, True)
        )
        special = SpecialVocab(folder, n_vocab=vocabulary)
    if content["model"].get("type") != "BPE":
        kind = content["model"].get("type")
        raise UsageError(f"{folder}: tokenizer.json: GGUF export expects BPE, found {kind}")
    tokens, types = _tokens(content, vocabulary, folder)
    if is_pieces(content):
        types = piece_types(tokens, types, loaded.unk_token)
        notes = _add_pieces(writer, content, tokens, types, folder)
    else:
        notes = _add_byte_level(writer, content, tokens, types, folder)
        special.merges = _merges(content["model"])
    special.add_special_token = _around(bare, text, special.special_token_ids, folder)
    special.add_to_gguf(writer, quiet=True)
    return notes + _notes(content)


def _add_byte_level(
    writer: GGUFWriter, content: Json, tokens: list[str], types: list[int], folder: Path
) -> list[str]:
    name = _pre_tokenizer(content, folder)
    _check_model(content, name, folder)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if not content["normalizer"]:
        return []
    return ["llama.cpp does not normalise text; the tokenizer does, to NFC"]


def _add_pieces(
    writer: GGUFWriter, content: Json, tokens: list[str], types: list[int], folder: Path
) -> list[str]:
    prefix, notes = space_prefix(content, folder)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_scores(piece_scores(content, tokens, folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)
    return notes


def _pre_tokenizer(content: Json, folder: Path) -> str:
    """llama.cpp's name of the steps that cut a text into words."""
    found = content["pre_tokenizer"] or {}
    steps = found.get("pretokenizers", [found])
    # which offsets a token has is nothing to its number
    steps = [step | ({"trim_offsets": True} if "trim_offsets" in step else {}) for step in steps]
    for name, expected in PRE_TOKENIZERS.items():
        if steps == expected:
            return name
    known = ", ".join(PRE_TOKENIZERS)
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise UsageError(
        f"{folder}: tokenizer.json: GGUF export knows the pre-tokenizers {known}; found another "
        f"one, with the steps {kinds}: {json.dumps(steps)}"
    )


def _check_model(content: Json, name: str, folder: Path) -> None:
    """Refuses a model that is not plain byte-pair encoding, or that has what `name` excludes."""
    model, normalizer = content["model"], content["normalizer"] or {}
    expected: Json = {**dict.fromkeys(PLAIN_BPE), "ignore_merges": name in WHOLE_WORDS}
    facts = [(f"model.{key}", value, model.get(key)) for key, value in expected.items()]
    if normalizer.get("type") != "NFC":
        facts.append(("normalizer", None, normalizer))
    for key, value, found in facts:
        if (found or None) != (value or None):
            raise UsageError(
                f"{folder}: tokenizer.json: {key}: GGUF export with the pre-tokenizer {name} "
                f"expects {value!r}, found {found!r}"
            )
    if not model["merges"]:
        raise UsageError(f"{folder}: tokenizer.json: llama.cpp expects merges, found none")


def _merges(model: Json) -> list[str]:
    """Pairs as lines: a space inside of a token is never one (bytes have letters of their own)."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    return [" ".join(pair) for pair in pairs]


def _tokens(content: Json, vocabulary: int, folder: Path) -> tuple[list[str], list[int]]:
    """Text and type of every row of the embedding."""
    from gguf import TokenType

    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    types = [int(TokenType.UNUSED)] * vocabulary
    known = [(text, index, TokenType.NORMAL) for text, index in content["model"]["vocab"].items()]
    for added in content["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        known.append((added["content"], added["id"], kind))
    for text, index, kind in known:
        if not 0 <= index < vocabulary:
            raise UsageError(
                f"{folder}: tokenizer.json: token {text!r}: expected a number below the "
                f"{vocabulary} rows of the embedding, found {index}"
            )
        tokens[index], types[index] = text, int(kind)
    return tokens, types


def _around(bare: list[int], text: list[int], ids: dict[str, int], folder: Path) -> dict[str, bool]:
    """Which special tokens are put before and after a text."""
    for bos in (False, True):
        for eos in (False, True):
            first = [ids.get("bos")] if bos else []
            last = [ids.get("eos")] if eos else []
            if text == [*first, *bare, *last]:
                return {"bos": bos, "eos": eos}
    raise UsageError(
        f"{folder}: tokenizer.json: GGUF export expects bos before a text, eos after it, or neither"
        f"; found {text} for {bare}, where bos is {ids.get('bos')} and eos {ids.get('eos')}"
    )


def _notes(content: Json) -> list[str]:
    flags = ("single_word", "lstrip", "rstrip")
    bound = [t["content"] for t in content["added_tokens"] if any(t[flag] for flag in flags)]
    if not bound:
        return []
    return [f"llama.cpp ignores how {len(bound)} added tokens treat space: {', '.join(bound[:4])}"]
