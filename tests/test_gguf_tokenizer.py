"""Tokenizers of GGUF files: llama.cpp's algorithm, written out, gives transformers' tokens."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from gguf_models import build, save_pieces, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from rsprune.errors import UsageError
from rsprune.gguf_export import export_gguf
from rsprune.gguf_import import convert
from rsprune.gguf_tokenizer import PRE_TOKENIZERS, add_tokenizer

gguf = pytest.importorskip("gguf")


class Fields(dict[str, Any]):
    """Stands for a gguf.GGUFWriter: what was added, by its key without the prefix."""

    def __getattr__(self, name: str) -> Any:
        return lambda value: self.__setitem__(name.removeprefix("add_"), value)


def fields_of(folder: Path, vocabulary: int) -> tuple[Fields, list[str]]:
    fields: Any = Fields()
    notes = add_tokenizer(fields, folder, vocabulary)
    return fields, notes


@pytest.mark.parametrize("pre", list(PRE_TOKENIZERS))
def test_byte_level(tmp_path: Path, pre: str):
    save_tokenizer(tmp_path, pre)
    fields, notes = fields_of(tmp_path, 264)
    assert (fields["tokenizer_model"], fields["tokenizer_pre"]) == ("gpt2", pre)
    assert fields["token_merges"] == ["t h", "th e"]
    assert fields["token_list"][256:] == ["th", "the", "<s>", "</s>", "<tool>", *PADS]
    normal, special, defined, unused = (
        int(gguf.TokenType[name]) for name in ("NORMAL", "CONTROL", "USER_DEFINED", "UNUSED")
    )
    expected = [normal] * 258 + [special] * 2 + [defined] + [unused] * 3
    assert fields["token_types"] == expected
    assert (fields["bos_token_id"], fields["eos_token_id"]) == (258, 259)
    assert (fields["add_bos_token"], fields["add_eos_token"]) == (True, False)
    assert fields["chat_template"] == "{{ messages }}"
    assert notes == []


PADS = ["[PAD261]", "[PAD262]", "[PAD263]"]


def edited(folder: Path, change: Any) -> None:
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_other_pre_tokenizers_are_refused_and_shown(tmp_path: Path):
    save_tokenizer(tmp_path, "qwen2")

    def one_letter(content: Any) -> None:
        pattern = content["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        pattern["Regex"] = pattern["Regex"].replace("'ve", "'vw")

    edited(tmp_path, one_letter)
    words = r"knows the pre-tokenizers gpt-2, smollm, llama-bpe, qwen2; found another one, .*'vw"
    with pytest.raises(UsageError, match=words):
        fields_of(tmp_path, 300)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ignore_merges": True}, r"model\.ignore_merges: .*gpt-2 expects False, found True"),
        ({"merges": []}, "llama.cpp expects merges, found none"),
        ({"normalizer": {"type": "Lowercase"}}, "normalizer: .*expects None, found .*Lowercase"),
        ({"end_of_word_suffix": "</w>"}, r"model\.end_of_word_suffix"),
    ],
)
def test_what_llama_cpp_would_not_do_is_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
):
    save_tokenizer(tmp_path, "gpt-2", **changes)
    with pytest.raises(UsageError, match=words):
        fields_of(tmp_path, 300)


def test_tokens_must_have_rows(tmp_path: Path):
    save_tokenizer(tmp_path)
    with pytest.raises(UsageError, match=r"token '</s>': expected a number below the 259 rows"):
        fields_of(tmp_path, 259)


def test_special_tokens_around_a_text(tmp_path: Path):
    save_tokenizer(tmp_path)
    template: Any = {
        "type": "TemplateProcessing",
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}],
    }
    text, end = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    )
    template["special_tokens"] = {"</s>": {"id": "</s>", "ids": [259], "tokens": ["</s>"]}}
    for single, expected in (([text], (False, False)), ([text, end], (False, True))):
        processor = {**template, "single": single}
        edited(tmp_path, lambda content, p=processor: content.update(post_processor=p))
        fields, _ = fields_of(tmp_path, 300)
        assert (fields["add_bos_token"], fields["add_eos_token"]) == expected
    processor = {**template, "single": [end, text]}
    edited(tmp_path, lambda content: content.update(post_processor=processor))
    with pytest.raises(UsageError, match="expects bos before a text, eos after it, or neither"):
        fields_of(tmp_path, 300)


def test_notes(tmp_path: Path):
    save_tokenizer(tmp_path, "qwen2", normalizer={"type": "NFC"})
    edited(tmp_path, lambda content: content["added_tokens"][2].update(lstrip=True))
    notes = fields_of(tmp_path, 300)[1]
    assert "does not normalise text" in notes[0]
    assert notes[1].endswith("1 added tokens treat space: <tool>")


def merged(text: str, fields: Fields) -> list[int]:
    """llama.cpp's loop: the pair whose result has the highest score, the leftmost of equals."""
    tokens, scores = fields["token_list"], fields["token_scores"]
    index = {token: place for place, token in enumerate(tokens)}
    prefix = " " if fields["add_space_prefix"] else ""
    symbols = list((prefix + text).replace(" ", "\u2581"))
    while True:
        pairs = [(a + b, place) for place, (a, b) in enumerate(itertools.pairwise(symbols))]
        known = [(scores[index[pair]], -place) for pair, place in pairs if pair in index]
        if not known:
            break
        place = -max(known)[1]
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    found: list[int] = []
    for symbol in symbols:
        raw = [f"<0x{byte:02X}>" for byte in symbol.encode()]
        found += [index[symbol]] if symbol in index else [index[byte] for byte in raw]
    return found


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from transformers import AutoTokenizer

    made = {}
    for prefix in ("legacy", "first", "none"):
        folder = tmp_path_factory.mktemp(prefix)
        save_pieces(folder, prefix)
        made[prefix] = (*fields_of(folder, 400), AutoTokenizer.from_pretrained(folder))
    return made


@pytest.mark.parametrize("prefix", ["legacy", "first", "none"])
@given(text=st.text(st.sampled_from("theren ☃"), min_size=1, max_size=14))
def test_scores_give_the_tokens_of_the_rules(pieces: dict[str, Any], prefix: str, text: str):
    fields, notes, tokenizer = pieces[prefix]
    if prefix == "first":
        assert "the tokenizer at the beginning, and only if there is none" in notes[0]
        text = text.lstrip(" ") or "t"
    else:
        assert notes == []
    assert merged(text, fields) == tokenizer(text, add_special_tokens=False).input_ids


def test_types_of_pieces(pieces: dict[str, Any]):
    fields = pieces["legacy"][0]
    kinds = dict(zip(fields["token_list"], fields["token_types"], strict=True))
    names = {"<unk>": "UNKNOWN", "<s>": "CONTROL", "<0x41>": "BYTE", "the": "NORMAL"}
    assert {token: gguf.TokenType(kinds[token]).name for token in names} == names
    assert (fields["tokenizer_model"], fields["tokenizer_pre"]) == ("llama", "default")
    assert "token_merges" not in fields


def test_rules_that_scores_cannot_say_are_refused(tmp_path: Path):
    save_pieces(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    rules = content["model"]["merges"]
    two = next(i for i, r in enumerate(rules) if "".join(r) == "".join(rules[i + 1]))
    save_pieces(tmp_path, merges=[*rules[:two], *rules[two + 1 :]])
    with pytest.raises(UsageError, match=r"llama\.cpp expects a rule for \('"):
        fields_of(tmp_path, 400)
    save_pieces(tmp_path, merges=[*rules[:two], *rules[two + 1 :], rules[two]])
    with pytest.raises(UsageError, match=r"llama\.cpp expects rules that stand together"):
        fields_of(tmp_path, 400)
    save_pieces(tmp_path)
    edited(tmp_path, lambda content: content.update(normalizer={"type": "NFKC"}))
    with pytest.raises(UsageError, match=r"expects spaces to become .* and nothing else; found"):
        fields_of(tmp_path, 400)


@pytest.mark.parametrize("pre", list(PRE_TOKENIZERS))
def test_import_cuts_words_as_the_file_says(tmp_path: Path, pre: str):
    from transformers import AutoTokenizer

    folder = build(tmp_path / "model")
    save_tokenizer(folder, pre)
    said: list[str] = []
    path = export_gguf(folder, tmp_path / "out.gguf", "F16").path
    back = convert(path, tmp_path / "back", progress=said.append)
    assert not any(line.startswith("note") for line in said)
    steps = [
        json.loads((f / "tokenizer.json").read_text())["pre_tokenizer"] for f in (folder, back)
    ]
    assert steps[0] == steps[1]
    one, other = (AutoTokenizer.from_pretrained(f) for f in (folder, back))
    text = "the year 1234567, then\r\n\n it's 3 \u00bd THE'S  end"
    assert (
        one(text, add_special_tokens=False).input_ids
        == other(text, add_special_tokens=False).input_ids
    )


def test_import_says_that_it_guesses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = build(tmp_path / "model")
    path = export_gguf(folder, tmp_path / "out.gguf", "F16").path
    monkeypatch.delitem(PRE_TOKENIZERS, "gpt-2")
    said: list[str] = []
    convert(path, tmp_path / "back", progress=said.append)
    assert "note: the tokenizer cuts words as transformers guesses; the file says: gpt-2" in said
