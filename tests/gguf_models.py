"""Tiny models for the tests of GGUF export: whole blocks, tokenizers that llama.cpp knows."""

import json
import zlib
from pathlib import Path
from typing import Any

import torch
from tiny_models import SIZES

WIDTH = 256
"""Rows of one block of TQ1_0 and TQ2_0."""
WIDE = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
SCALES = (0.5, 2.0**-14, 3.0)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
SPLIT += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def build(folder: Path, family: str = "Llama", values: str = "dense", **options: Any) -> Path:
    """A folder whose weights half precision and bfloat16 hold exactly.

    Args:
        folder: where to.
        family: prefix of the classes of transformers.
        values: of the linears in decoder layers: dense, ternary or signs.
        options: of the configuration.
    """
    import transformers

    config = getattr(transformers, f"{family}Config")(**{**SIZES, **WIDE, **options})
    torch.manual_seed(len(family))
    model = getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".layers." in name and values != "dense":
            parameter.copy_(coded(parameter.shape, values))
        else:
            parameter.copy_(torch.randint(-96, 97, parameter.shape) / 64)
    model.to(torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def coded(shape: torch.Size, values: str) -> torch.Tensor:
    """{-a, 0, +a} or {-a, +a}, `a` another one in every block; the first block is all zero."""
    lowest = -1 if values == "ternary" else 0
    codes = torch.randint(lowest, 2, (shape[0], shape[1] // WIDTH, WIDTH))
    if values == "signs":
        codes = 2 * codes - 1
    scales = torch.tensor(SCALES)[torch.randint(0, len(SCALES), codes.shape[:2])]
    scales[0, 0] = 0.0
    return (codes * scales[..., None]).reshape(shape)


def save_tokenizer(folder: Path, pre: str = "gpt-2", **changes: Any) -> None:
    """A byte-level tokenizer with two merges and a beginning of text.

    Args:
        folder: where to.
        pre: llama.cpp's name of the pre-tokenizer.
        changes: of the JSON's `model`, or of the whole where it is no part of that.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Split
    from transformers import PreTrainedTokenizerFast

    letters = sorted(ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*letters, "th", "the"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("th", "e")]))
    steps = {"gpt-2": [], "smollm": [Digits(individual_digits=True)]}
    steps["llama-bpe"] = [Split(Regex(SPLIT % "{1,3}"), "isolated")]
    steps["qwen2"] = [Split(Regex(SPLIT % ""), "isolated")]
    last = ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps[pre], last])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.add_tokens(["<tool>"])
    start = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", start)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{{ messages }}"
    fast.save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["ignore_merges"] = pre == "llama-bpe"
    for key, value in changes.items():
        (content["model"] if key in content["model"] else content)[key] = value
    (folder / "tokenizer.json").write_text(json.dumps(content))


SPACE = "\u2581"


def save_pieces(folder: Path, prefix: str = "legacy", **changes: Any) -> None:
    """A tokenizer as converters make them of SentencePiece: rules from scored pieces.

    Args:
        folder: where to.
        prefix: how a space gets before a text: legacy (always), first, or none.
        changes: of the JSON's `model`.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["the", "there", "then", "hen", "here", "enter"]
    longer = {w[i:j] for w in words for i in range(len(w)) for j in range(i + 2, len(w) + 1)}
    longer |= {SPACE + w for w in words} | {SPACE + w[:1] for w in words} | {SPACE * 2}
    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    scored = sorted(longer, key=lambda piece: (len(piece), hash_of(piece)))
    singles = sorted({letter for piece in longer for letter in piece})
    tokens = ["<unk>", "<s>", "</s>", *bytes_[:256], *scored, *singles]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    rules = [
        (piece[:cut], piece[cut:])
        for piece in scored
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    model = models.BPE(vocabulary, rules, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend(SPACE)] if prefix == "legacy" else []
        tokenizer.normalizer = normalizers.Sequence([*steps, spaces])
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(content))


def hash_of(text: str) -> int:
    """An order that has nothing to do with the alphabet."""
    return zlib.crc32(text.encode())
