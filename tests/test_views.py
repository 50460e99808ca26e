"""Texts and their edited views; several calibration texts by turns."""

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsprune.config import Config
from rsprune.data import Corpus, calibration_windows, split_heldout
from rsprune.depth.views import WORD, choose_texts, perturb
from rsprune.errors import RspruneError, UsageError
from rsprune.mixture import interleaved, load_corpora, shares
from rsprune.report import load_report
from rsprune.run import compress
from rsprune.skeleton import load_tokenizer

ALPHABET = "abcdeABC ,.\n1ßжд"


def words_of(text: str) -> list[str]:
    return [word[0] for word in WORD.finditer(text)]


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(ALPHABET, max_size=200),
    rate=st.floats(0.01, 1.0),
    seed=st.integers(0, 2**32),
)
def test_edits_touch_their_share_of_long_words_and_nothing_else(text: str, rate: float, seed: int):
    edited = perturb(text, rate, Random(seed))
    assert edited == perturb(text, rate, Random(seed))
    before, after = words_of(text), words_of(edited)
    assert len(before) == len(after)
    changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert len(changed) == (max(1, round(rate * len(before))) if before else 0)
    for old, new in changed:
        assert len(new) - len(old) in (0, 1)
        if len(new) > len(old):  # one letter more, the others in order
            assert any(new[:i] + new[i + 1 :] == old for i in range(len(new)))
        else:  # two neighbours swapped, or one letter another
            differing = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
            swapped = sorted(old) == sorted(new) and len(differing) == 2
            assert len(differing) == 1 or swapped
    assert WORD.sub("_", edited) == WORD.sub("_", text)
    assert set(edited.lower()) <= set(text.lower())  # letters are those of the text


def test_words_are_of_letters_alone():
    assert words_of("one four3 words, naïve été жизнь x_yzzy") == ["four", "words", "naïve",
                                                                  "жизнь", "yzzy"]  # fmt: skip
    assert perturb("a bc def 1234 12345", 1.0, Random(0)) == "a bc def 1234 12345"


def test_texts_are_beginnings_first_and_long_enough(tiny: Callable[..., Path]):
    tokenizer = load_tokenizer(tiny("llama"))  # a token a byte
    documents = [f"{name} " * 400 for name in ("alpha", "bravo", "charly")]
    chosen = choose_texts([Corpus("c", documents)], tokenizer, count=5, tokens=40, seed=0)
    assert chosen.plain.shape == (5, 41)
    firsts = [text.split()[0] for text in chosen.texts[:3]]
    assert sorted(firsts) == ["alpha", "bravo", "charly"]
    assert [s.windows for s in chosen.sources] == [5]
    other = choose_texts([Corpus("c", documents)], tokenizer, count=5, tokens=40, seed=1)
    assert chosen.texts != other.texts
    views = chosen.edited(tokenizer, rate=0.5, seed=0, iteration=0)
    assert views.shape == chosen.plain.shape
    assert (views != chosen.plain).any(1).all()


def test_short_documents_are_joined_and_too_few_are_refused(tiny: Callable[..., Path]):
    tokenizer = load_tokenizer(tiny("llama"))
    corpus = Corpus("short", ["words of text"] * 12)
    chosen = choose_texts([corpus], tokenizer, count=2, tokens=40, seed=0)
    assert all("\n\n" in text for text in chosen.texts)
    with pytest.raises(UsageError, match="short: expected 20 texts of 47 tokens, found 3"):
        choose_texts([corpus], tokenizer, count=20, tokens=40, seed=0)
    with pytest.raises(UsageError, match="at least one for each of 2 calibration texts, found 1"):
        choose_texts([corpus, corpus], tokenizer, count=1, tokens=40, seed=0)


def test_a_view_that_edits_make_too_short_is_an_error(tiny: Callable[..., Path]):
    tokenizer = load_tokenizer(tiny("llama"))
    chosen = choose_texts(
        [Corpus("c", ["long words " * 90])], tokenizer, count=1, tokens=40, seed=0
    )
    chosen.texts[0] = "too short"
    with pytest.raises(RspruneError, match="text 0: expected 41 tokens after edits, found"):
        chosen.edited(tokenizer, rate=0.1, seed=0, iteration=0)


@given(total=st.integers(0, 50), parts=st.integers(1, 9))
def test_shares_are_fair(total: int, parts: int):
    found = shares(total, parts)
    assert sum(found) == total
    assert max(found) - min(found) <= 1
    assert found == sorted(found, reverse=True)


def corpus_of(letter: str) -> Corpus:
    return Corpus(letter, [letter * 50 for _ in range(40)])


def test_one_text_gives_what_it_gave_alone(tiny: Callable[..., Path]):
    tokenizer, corpus = load_tokenizer(tiny("llama")), corpus_of("a")
    windows = calibration_windows(corpus, tokenizer, samples=9, seq_len=30, seed=4)
    calibration, heldout = split_heldout(windows, 0.3)
    found = interleaved([corpus], tokenizer, samples=9, seq_len=30, seed=4, heldout=0.3)
    assert torch.equal(found.calibration, calibration)
    assert torch.equal(found.heldout, heldout)


@settings(max_examples=25, deadline=None)
@given(texts=st.integers(2, 4), samples=st.integers(8, 17), heldout=st.floats(0.0, 0.5))
def test_texts_take_turns_and_share_what_is_held_out(
    tiny: Callable[..., Path], texts: int, samples: int, heldout: float
):
    tokenizer = load_tokenizer(tiny("llama"))
    corpora = [corpus_of(letter) for letter in "abcd"[:texts]]
    found = interleaved(corpora, tokenizer, samples=samples, seq_len=20, seed=0, heldout=heldout)
    assert len(found.calibration) + len(found.heldout) == samples
    owners = [chr(int(window[window < 256].min())) for window in found.calibration]
    assert set(owners[:texts]) == set("abcd"[:texts])
    for source, owner in zip(found.sources, "abcd", strict=False):
        assert owners.count(owner) == source.windows - source.heldout
        assert source.tokens == source.windows * 20
    held = [source.heldout for source in found.sources]
    assert sum(held) == len(found.heldout)
    assert max(held) - min(held) <= 1


def test_more_texts_than_windows_are_refused(tiny: Callable[..., Path]):
    tokenizer = load_tokenizer(tiny("llama"))
    with pytest.raises(UsageError, match="option samples: expected at least one window for each"):
        interleaved([corpus_of("a")] * 3, tokenizer, samples=2, seq_len=8, seed=0, heldout=0.0)


def test_the_report_says_what_each_text_gave(
    tiny: Callable[..., Path], text: Path, documents: Path, tmp_path: Path
):
    sources = (str(text), str(documents))
    config = Config.create(method="wanda", calibration=sources, samples=5, seq_len=32, heldout=0.4,
                           threads=1)  # fmt: skip
    compress(tiny("llama"), tmp_path / "out", config)
    facts = load_report(tmp_path / "out").run["calibration"]
    assert [source["windows"] for source in facts["sources"]] == [3, 2]
    assert [source["tokens"] for source in facts["sources"]] == [96, 64]
    assert sum(source["heldout"] for source in facts["sources"]) == 2
    assert re.fullmatch(r"text.txt, .*text.jsonl", facts["source"])
    recipe = Config.from_recipe(tmp_path / "out" / "recipe.yaml")
    assert recipe == config
    assert [corpus.name for corpus in load_corpora(recipe.calibration)] == facts["source"].split(
        ", "
    )
