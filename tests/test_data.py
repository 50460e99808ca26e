"""Token windows: reading documents, packing them, and every refusal by its words."""

import ast
import builtins
import gzip
import hashlib
import itertools
import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import rsprune.data
from rsprune.data import (
    Corpus,
    calibration_windows,
    evaluation_windows,
    load_texts,
    split_heldout,
)
from rsprune.errors import UsageError

WORDS = [f"w{index}" for index in range(200)]


def make_tokenizer(*, eos: bool = True, bos: bool = False, closes: bool = False):
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ("<s> " if bos else "") + "$A" + (" </s>" if closes else "")
    special = [("<s>", 1), ("</s>", 2)]
    inner.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    options = {"eos_token": "</s>"} if eos else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=8, **options)


def documents(count: int = 20, words: int = 5) -> Corpus:
    texts = [" ".join(WORDS[(7 * d + w) % 200] for w in range(words)) for d in range(count)]
    return Corpus("made up", texts)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


# reading


def test_default_is_the_python_manual_with_its_note():
    corpus = load_texts(None)
    assert len(corpus.documents) > 50
    assert "not a basis for quality claims" in corpus.note
    assert corpus.documents == load_texts(None).documents


def test_importing_data_needs_no_heavy_package():
    body = ast.parse(Path(rsprune.data.__file__).read_text()).body
    found = {node.module for node in body if isinstance(node, ast.ImportFrom)}
    found |= {name.name for node in body if isinstance(node, ast.Import) for name in node.names}
    assert "json" in found
    outside = {name for name in found if name.split(".")[0] not in sys.stdlib_module_names}
    assert outside == {"rsprune.errors", "rsprune.guard"}


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.md"])
def test_text_file_is_one_document_with_plain_newlines(tmp_path, name):
    (tmp_path / name).write_bytes("one\r\n\r\ntwo\rthrée\n".encode())
    assert load_texts(str(tmp_path / name)).documents == ["one\n\ntwo\nthrée\n"]


def test_gzip_is_read_by_the_inner_suffix(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"hello"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "hello"}\n'))
    for name in ("a.txt.gz", "a.jsonl.gz"):
        assert load_texts(str(tmp_path / name)).documents == ["hello"]


@pytest.mark.parametrize(
    ("record", "field", "expected", "noted"),
    [
        ({"content": "c", "text": "t"}, None, "t", "'text'"),
        ({"id": "longer than it", "content": "c"}, None, "c", "'content'"),
        ({"id": "x", "story": "the longest", "n": 3}, None, "the longest", "'story'"),
        ({"prefix": "a b", "gold_completion": "c", "text": "t"}, None, "a bc", "'gold_completion'"),
        ({"content": "c", "text": "t"}, "content", "c", None),
    ],
)
def test_text_field_is_guessed_and_said(tmp_path, record, field, expected, noted):
    corpus = load_texts(write_lines(tmp_path / "a.jsonl", [record]), field=field)
    assert corpus.documents == [expected]
    assert corpus.note is None if noted is None else noted in corpus.note


def test_blank_lines_and_empty_documents_are_left_out(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"text": " "}\n{"text": "b"}')
    assert load_texts(str(tmp_path / "a.jsonl")).documents == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "field", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', None, ["line 2", "JSON object", "column"]),
        (b'{"text": "a"}\n["b"]\n', None, ["line 2", "JSON object", "list"]),
        (b'{"text": "a"}\n{"other": "b"}\n', None, ["line 2", "'text'", "other"]),
        (b'{"text": "a"}\n{"text": 5}\n', None, ["line 2", "'text'", "string", "int"]),
        (b'{"text": "a"}\n', "body", ["line 1", "'body'", "text"]),
        (b'{"n": 1}\n', None, ["line 1", "string", "found: n"]),
        (b'{"text": "a"}\n{"text": "\xff"}\n', None, ["line 2", "UTF-8", "0xff"]),
        (b"", None, ["at least one document"]),
    ],
)
def test_bad_json_lines_are_named(tmp_path, content, field, words):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load_texts(str(path), field=field)
    for word in ["bad.jsonl", *words]:
        assert word in str(caught.value)


def test_other_bad_files_are_named(tmp_path):
    (tmp_path / "e.txt").write_bytes(b" \n")
    (tmp_path / "x.txt").write_bytes(b"ab\xffc")
    (tmp_path / "x.pdf").write_bytes(b"ab")
    (tmp_path / "x.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "x.parquet").write_bytes(b"not parquet at all")
    pytest.importorskip("pyarrow")
    expected = {"e.txt": "empty file", "x.txt": "byte 2: 0xff", "x.pdf": "found .pdf"}
    expected |= {"x.txt.gz": "cannot be read", "x.parquet": "parquet file", "no.txt": "no such"}
    for name, words in expected.items():
        with pytest.raises(UsageError, match=words):
            load_texts(str(tmp_path / name))
    with pytest.raises(UsageError, match="no fields"):
        load_texts(str(tmp_path / "x.txt"), field="text")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["a", "b"], "url": ["u", "v"]}), path)
    assert load_texts(str(path)).documents == ["a", "b"]
    assert load_texts(str(path), field="url").documents == ["u", "v"]
    with pytest.raises(UsageError, match="row 1: expected field 'body', found: n, text, url"):
        load_texts(str(path), field="body")


def test_missing_extras_are_named(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("datasets", "pyarrow"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    for source in ("hub:owner/name", str(tmp_path / "a.parquet")):
        with pytest.raises(UsageError, match=r"rsprune\[data\]"):
            load_texts(source)


def test_hub_address_is_taken_apart(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert load_texts("hub:owner/name/config:test").documents == ["a", "b"]
    load_texts("hub:name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_texts("hub:owner/name")
    assert calls == [
        (("owner/name", "config"), {"split": "test", "streaming": True}),
        (("name",), {"split": "train", "streaming": True}),
        (("owner/name",), {"split": "train", "streaming": False}),
    ]
    with pytest.raises(UsageError, match="expected hub:owner/name"):
        load_texts("hub:a/b/c/d")


# windows


def reference_stream(corpus, tokenizer, seed):
    """The same packing, written as plainly as possible over the shuffled documents."""
    import numpy as np

    order = np.argsort(np.random.PCG64(seed).random_raw(len(corpus.documents)), kind="stable")
    stream = []
    for position, index in enumerate(order):
        stream += [tokenizer.eos_token_id] if position and tokenizer.eos_token_id else []
        stream += tokenizer(corpus.documents[index])["input_ids"]
    return stream


@pytest.mark.parametrize("options", [{}, {"bos": True}, {"eos": False}])
def test_windows_are_the_packed_stream_without_gaps(options):
    tokenizer, corpus = make_tokenizer(**options), documents()
    windows = calibration_windows(corpus, tokenizer, samples=8, seq_len=11, seed=3)
    assert windows.dtype == torch.int64
    assert windows.shape == (8, 11)
    assert windows.flatten().tolist() == reference_stream(corpus, tokenizer, 3)[:88]


def test_windows_follow_the_seed_and_nothing_else():
    tokenizer, corpus = make_tokenizer(), documents()
    first, again, other = (
        calibration_windows(corpus, tokenizer, samples=4, seq_len=9, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    # golden: the order of documents must not change with NumPy's or our releases
    digest = hashlib.sha256(first.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest[:16] == "2e525a30cc2a0436"


def test_eos_is_not_doubled():
    tokenizer = make_tokenizer(closes=True)
    windows = calibration_windows(documents(), tokenizer, samples=3, seq_len=12, seed=0)
    flat = windows.flatten().tolist()
    assert flat.count(2) == 6
    assert all(pair != (2, 2) for pair in itertools.pairwise(flat))


def test_documents_after_the_last_window_are_not_tokenised():
    tokenizer, seen = make_tokenizer(), []

    class Counting:
        eos_token_id = tokenizer.eos_token_id

        def __call__(self, text, **options):
            seen.append(text)
            return tokenizer(text, **options)

    calibration_windows(documents(), Counting(), samples=1, seq_len=7, seed=0)
    assert len(seen) == 2


def test_too_few_tokens_says_what_would_fit():
    corpus, tokenizer = documents(count=4, words=5), make_tokenizer()
    total = 4 * 5 + 3
    assert calibration_windows(corpus, tokenizer, samples=1, seq_len=total, seed=0).shape[0] == 1
    with pytest.raises(UsageError) as caught:
        calibration_windows(corpus, tokenizer, samples=9, seq_len=10, seed=0)
    assert "expected 90 tokens" in str(caught.value)
    assert f"found {total}: at most 2 samples" in str(caught.value)
    with pytest.raises(UsageError, match="1 or more"):
        calibration_windows(corpus, tokenizer, samples=0, seq_len=10, seed=0)


@pytest.mark.parametrize(
    ("total", "fraction", "held"),
    [(16, 1 / 8, [4, 12]), (2, 1 / 8, [1]), (1, 1 / 8, []), (4, 0.0, []), (4, 0.5, [1, 3])],
)
def test_heldout_windows_are_evenly_spaced(total, fraction, held):
    windows = torch.arange(total).reshape(total, 1)
    calibration, heldout = split_heldout(windows, fraction)
    assert heldout.flatten().tolist() == held
    assert calibration.flatten().tolist() == [i for i in range(total) if i not in held]


@pytest.mark.parametrize("total", range(2, 70))
def test_heldout_count_is_exact(total):
    calibration, heldout = split_heldout(torch.arange(total).reshape(total, 1), 0.125)
    assert len(heldout) == max(1, round(total / 8))
    assert len(calibration) == total - len(heldout)


def test_evaluation_windows_are_consecutive_without_special_tokens():
    text = " ".join(WORDS[:25])
    windows = evaluation_windows(text, make_tokenizer(bos=True, closes=True), 10)
    assert windows.dtype == torch.int64
    assert windows.tolist() == [list(range(3, 13)), list(range(13, 23))]
    with pytest.raises(UsageError, match="expected 26 tokens or more, found 25"):
        evaluation_windows(text, make_tokenizer(), 26)


def test_no_warning_about_the_length_of_the_text():
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        make_tokenizer()(" ".join(WORDS))
        assert any("longer than" in line for line in said), "premise: transformers does warn"
        said.clear()
        evaluation_windows(" ".join(WORDS), make_tokenizer(), 10)
        corpus = Corpus("one", [" ".join(WORDS)])
        calibration_windows(corpus, make_tokenizer(), samples=2, seq_len=20, seed=0)
    finally:
        logger.removeHandler(handler)
    assert said == []


@pytest.mark.shared
def test_shared_texts(shared_dir):
    c4 = load_texts(str(shared_dir / "data" / "c4-sample.jsonl"))
    assert len(c4.documents) == 1480
    assert "gold_completion" in c4.note
    assert len(load_texts(str(shared_dir / "data" / "wiki.test.raw")).documents) == 1
