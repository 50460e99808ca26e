"""Perplexity within a memory bound, and gone on with after it was killed."""

import fcntl
import json
import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS, build, ordinary, token_ids

from rsprune.checkpoint import Checkpoint
from rsprune.errors import DoesNotFitError, RspruneError, UsageError
from rsprune.eval_plan import Costs, plan_batches
from rsprune.evaluate import Perplexity, perplexity
from rsprune.head import Head, Passage, Tally
from rsprune.memory import memory_limit
from rsprune.progress import NullProgress
from rsprune.scoring import Scorer
from rsprune.skeleton import Skeleton
from rsprune.stream import Stream

Tiny = Callable[..., Path]
SIZE: dict[str, Any] = {"seq_len": 32, "threads": 1}


class Notes(NullProgress):
    """Keeps what a display would show."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.steps: list[str] = []

    def stage(self, name: str, total: int) -> None:
        self.stages.append((name, total))

    def step(self, detail: str = "", error: float | None = None) -> None:
        self.steps.append(detail)


def scored(folder: Path, passages: list[Passage], **options: Any) -> dict[str, list[Any]]:
    """The scores of passages by name."""
    scorer = Scorer(Skeleton(Checkpoint.open(folder)), memory_limit(), 2, NullProgress())
    return {passage.name: scores for passage, scores in scorer.score(passages, **options)}


# Scores


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_those_of_the_whole_model(tiny: Tiny, kind: str, monkeypatch):
    """Several continuations of several lengths, with vocabulary and positions in pieces."""
    monkeypatch.setattr("rsprune.head.PIECE_BYTES", 97 * 4 * 32)
    monkeypatch.setattr("rsprune.head.LOGIT_BYTES", 97 * 4 * 5)
    model = ordinary(tiny(kind))
    passages = []
    for length in (21, 9, 21, 1):
        ids = token_ids(1, length, seed=length)[0]
        greedy = model(ids[None]).logits[0].argmax(-1)
        targets = [token_ids(1, n, seed=n)[0] for n in (1, 7, length) if n <= length]
        passages.append(Passage(f"p{len(passages)}", ids, (*targets, greedy[-1:], greedy)))
    found = scored(tiny(kind), passages)
    for passage in passages:
        log_probabilities = model(passage.inputs[None]).logits[0].double().log_softmax(-1)
        for target, score in zip(passage.targets, found[passage.name], strict=True):
            chosen = log_probabilities[-len(target) :].gather(1, target[:, None])
            assert score.log_likelihood == pytest.approx(float(chosen.sum()), rel=1e-5)
            best = log_probabilities[-len(target) :].argmax(-1)
            assert score.greedy == torch.equal(best, target)
        assert [s.greedy for s in found[passage.name][-2:]] == [True, True]
    assert not all(score.greedy for scores in found.values() for score in scores)


def test_scores_do_not_depend_on_what_runs_beside(tiny_llama: Path):
    passages = [
        Passage(str(n), token_ids(1, length, seed=n)[0], (token_ids(1, 3, seed=n)[0],))
        for n, length in enumerate((5, 17, 9, 17, 5, 30))
    ]
    together = scored(tiny_llama, passages)
    assert scored(tiny_llama, passages, most_tokens=1) == together
    assert {p.name: scored(tiny_llama, [p])[p.name] for p in passages} == together
    assert len({scores[0].log_likelihood for scores in together.values()}) == len(passages)
    assert scored(tiny_llama, []) == {}


def test_the_output_embedding_is_never_whole(tiny_llama: Path, monkeypatch):
    monkeypatch.setattr("rsprune.head.PIECE_BYTES", 97 * 4 * 32)
    stream = Stream(Skeleton(Checkpoint.open(tiny_llama)))
    head, seen = Head(stream), []
    output = stream.model.get_output_embeddings()
    with stream.head():
        for ids in head.pieces():
            assert output.weight.shape == (len(ids), 32)
            assert output.weight.device.type == "cpu"
            seen.extend(ids)
        assert output.weight.device.type == "meta"
    assert seen == list(range(300))


def test_logits_that_depend_on_each_other_are_refused(tiny_llama: Path, monkeypatch):
    stream = Stream(Skeleton(Checkpoint.open(tiny_llama)))
    stream.open(8)
    hidden = torch.randn(1, 8, stream.skeleton.channels)
    with stream.head():
        Head(stream).check(hidden)  # the premise: as it is, nothing is wrong
        original = stream.logits
        monkeypatch.setattr(stream, "logits", lambda *a: original(*a).softmax(-1))
        with pytest.raises(RspruneError, match="do not depend on each other"):
            Head(stream).check(hidden)


def test_an_output_embedding_of_another_shape_is_named(tiny_llama: Path, tmp_path: Path):
    tensors = load_file(tiny_llama / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    with pytest.raises(UsageError, match=r"lm_head\.weight: expected shape \[300, 32\]"):
        Head(Stream(Skeleton(Checkpoint.open(tmp_path))))


def test_a_loss_that_is_not_finite_is_named(tiny_llama: Path, monkeypatch):
    original = Tally.scores

    def scores(self: Tally) -> list[Any]:
        self._log_sum[0] = math.nan
        return original(self)

    monkeypatch.setattr(Tally, "scores", scores)
    passage = Passage("window 7", token_ids(1, 8)[0], (token_ids(1, 8)[0],))
    with pytest.raises(RspruneError, match="window 7: expected a finite loss, found nan"):
        scored(tiny_llama, [passage])


# Perplexity


def test_windows_and_their_spread(tiny_llama: Path, text: Path):
    found = perplexity(tiny_llama, text, windows=5, **SIZE)
    assert len(found.losses) == found.windows == 5
    assert found.loss == math.fsum(found.losses) / (5 * 31)
    assert found.perplexity == math.exp(found.loss)
    # The error of exp(mean) to first order, and by leaving out a window at a time.
    rest = [math.exp((math.fsum(found.losses) - loss) / (4 * 31)) for loss in found.losses]
    jackknife = math.sqrt(4 / 5 * sum((r - statistics.mean(rest)) ** 2 for r in rest))
    assert found.standard_error == pytest.approx(jackknife, rel=0.05)
    assert found.peak_rss_anon > 2**20
    one = perplexity(tiny_llama, text, windows=1, **SIZE)
    assert one.losses == found.losses[:1]
    assert one.standard_error is None


def test_losses_do_not_depend_on_batches_threads_and_memory(
    tiny_llama: Path, text: Path, monkeypatch
):
    whole = perplexity(tiny_llama, text, windows=7, **SIZE)
    notes = Notes()
    monkeypatch.setattr("rsprune.evaluate.BATCH_TOKENS", 2 * 31)
    other = {**SIZE, "threads": 2, "memory": memory_limit() // 2, "progress": notes}
    assert perplexity(tiny_llama, text, windows=7, **other).losses == whole.losses
    assert notes.stages == [("evaluate", 4 * (3 + 1))]  # three layers and the head, four times
    assert notes.steps[0] == "batch 1 of 4"
    assert notes.steps[-1].startswith("batch 4 of 4, perplexity of 6 windows ")


def test_too_little_memory_is_refused(tiny_llama: Path, text: Path):
    with pytest.raises(DoesNotFitError, match=r"memory 1 MiB: too small.*decoder layer") as caught:
        perplexity(tiny_llama, text, memory="1MiB", **SIZE)
    smallest = caught.value.smallest + 2**25  # this process grows a little
    assert perplexity(tiny_llama, text, windows=2, memory=smallest, **SIZE).windows == 2
    with pytest.raises(UsageError, match="option memory: expected a size such as 4GiB"):
        perplexity(tiny_llama, text, memory="lots", **SIZE)


# The plan

COSTS = Costs(fixed={"layer": 1000}, thread={"activations": 100}, token=1, length=2)


def planned(lengths: list[int], limit: int, threads: int = 1, most: int | None = None) -> Any:
    passages = [Passage(str(n), torch.zeros(n, dtype=torch.int64), ()) for n in lengths]
    return plan_batches(passages, COSTS, limit=limit, threads=threads, most_tokens=most)


def test_batches_fill_the_bound():
    assert planned([10, 30, 10, 20], 9999).batches == [[1, 3, 0, 2]]  # longest first
    assert planned([10, 30, 10, 20], 9999).peak_bytes == 1100 + 70 + 2 * 60
    assert planned([10, 30, 10, 20], 1190).batches == [[1], [3, 0], [2]]
    assert planned([10, 30, 10, 20], 1190).peak_bytes == 1190
    assert planned([10] * 5, 9999, most=25).batches == [[0, 1], [2, 3], [4]]
    assert planned([10] * 3, 9999, most=1).batches == [[0], [1], [2]]


def test_threads_yield_to_memory():
    assert planned([10] * 9, 9999, threads=4).threads == 4
    assert planned([10] * 3, 9999, threads=4).threads == 3
    assert planned([10] * 9, 1000 + 300 + 30 + 20, threads=4).threads == 3
    assert planned([10] * 9, 1000 + 100 + 10 + 20, threads=4).threads == 1
    with pytest.raises(DoesNotFitError, match="10 tokens on one thread") as caught:
        planned([10] * 9, 1000 + 100 + 10 + 19, threads=4)
    assert caught.value.smallest == 1130


BOUNDED = """
import sys, json, rsprune
memory = int(sys.argv[3]) or None
try:
    found = rsprune.perplexity(sys.argv[1], sys.argv[2], seq_len=512, memory=memory, threads=2)
    print(json.dumps([found.peak_rss_anon, found.losses]))
except rsprune.RspruneError as error:
    print(json.dumps([error.smallest, None]))
"""


@pytest.mark.slow
def test_memory_stays_below_the_bound(tmp_path: Path, monkeypatch):
    """Hidden states that are large beside the bound."""
    monkeypatch.setitem(KINDS, "wide", ("Llama", {"hidden_size": 1024, "head_dim": 16}))
    build("wide", tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("a few words and no more " * 1300)
    assert len(text.read_text()) * 1024 * 4 > 120 * 2**20  # all hidden states

    def run(memory: int) -> Any:
        command = [sys.executable, "-c", BOUNDED, str(tmp_path), str(text), str(memory)]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    smallest, _ = run(1)
    peak, losses = run(smallest + 2**24)
    assert peak < smallest + 2**24
    free, same = run(0)
    assert free > peak + 2**26
    assert losses == same


# Resuming


@pytest.fixture(scope="module")
def whole(tiny: Tiny, text: Path) -> Perplexity:
    """An evaluation that nothing disturbed."""
    return perplexity(tiny("llama"), text, windows=6, **SIZE)


@pytest.fixture
def journal(tiny_llama: Path, text: Path, tmp_path: Path, whole: Perplexity) -> Path:
    """The journal of the same."""
    path = tmp_path / "eval.jsonl"
    assert perplexity(tiny_llama, text, windows=6, resume=path, **SIZE).losses == whole.losses
    assert len(path.read_bytes().splitlines()) == 1 + 6
    return path


@pytest.mark.parametrize("lines", [1, 3, 7])
@pytest.mark.parametrize("torn", [b"", b'{"window 5": 12', b'{"window 5": 12.5}'])
def test_an_evaluation_goes_on(
    journal: Path, tiny_llama: Path, text: Path, whole: Perplexity, lines: int, torn: bytes,
    monkeypatch,
):  # fmt: skip
    kept = journal.read_bytes().splitlines(keepends=True)[:lines]
    journal.write_bytes(b"".join(kept) + torn)
    run: list[str] = []
    original = Scorer.score

    def score(self: Scorer, passages: list[Passage], **options: Any) -> Any:
        run.extend(passage.name for passage in passages)
        return original(self, passages, **options)

    monkeypatch.setattr(Scorer, "score", score)
    found = perplexity(tiny_llama, text, windows=6, resume=journal, **SIZE)
    assert (found.losses, found.perplexity) == (whole.losses, whole.perplexity)
    assert run == [f"window {n}" for n in range(lines - 1, 6)]
    records = [json.loads(line) for line in journal.read_bytes().splitlines()]
    assert sorted(name for record in records for name in record) == [
        "fingerprint", *(f"window {n}" for n in range(6))
    ]  # fmt: skip
    more = perplexity(tiny_llama, text, windows=7, resume=journal, **SIZE)
    assert more.losses[:6] == whole.losses  # further windows go on from these


def test_a_killed_evaluation_goes_on(
    tiny_llama: Path, text: Path, tmp_path: Path, whole: Perplexity, monkeypatch
):
    monkeypatch.setattr("rsprune.evaluate.BATCH_TOKENS", 2 * 31)
    path = tmp_path / "eval.jsonl"
    original, heads = Head.check, []

    def check(self: Head, hidden: torch.Tensor) -> None:
        heads.append(1)
        if len(heads) == 3:
            raise KeyboardInterrupt
        original(self, hidden)

    with monkeypatch.context() as patch:
        patch.setattr(Head, "check", check)
        with pytest.raises(KeyboardInterrupt):
            perplexity(tiny_llama, text, windows=6, resume=path, **SIZE)
    assert len(path.read_bytes().splitlines()) == 1 + 4
    assert perplexity(tiny_llama, text, windows=6, resume=path, **SIZE).losses == whole.losses


def test_another_evaluation_is_refused(
    journal: Path, tiny: Tiny, tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch
):
    before = journal.read_bytes()
    other_text = tmp_path / "other.txt"
    other_text.write_text(text.read_text()[1:])

    def refused(part: str, model: Path = tiny_llama, source: Path = text, **more: Any) -> None:
        with pytest.raises(UsageError, match=f"belongs to an evaluation whose {part} differs"):
            perplexity(model, source, resume=journal, **{**SIZE, **more})
        assert journal.read_bytes() == before

    refused("seq_len", seq_len=16)
    refused("text tokens", source=other_text)
    refused(r"model files: config\.json", model=tiny("mistral"))
    tuned = shutil.copytree(tiny_llama, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, tuned / "model.safetensors")
    refused(r"model files: model\.safetensors", model=tuned)
    monkeypatch.setattr("torch.__version__", "0.0")
    refused("torch")


def test_a_foreign_or_broken_file_is_refused(
    journal: Path, tiny_llama: Path, text: Path, tmp_path: Path
):
    def go_on(path: Path) -> None:
        perplexity(tiny_llama, text, resume=path, **SIZE)

    foreign = tmp_path / "notes.txt"
    foreign.write_text("mine\nno newline")
    with pytest.raises(UsageError, match=r"notes\.txt: expected a journal of `rsprune eval`"):
        go_on(foreign)
    assert foreign.read_text() == "mine\nno newline"
    with journal.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="another evaluation is writing to it"):
            go_on(journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    for broken in (b"{]\n", b"[1]\n"):
        journal.write_bytes(lines[0] + broken + lines[1])
        with pytest.raises(RspruneError, match=r"line 2: expected a JSON object, found"):
            go_on(journal)


def test_the_device_is_resolved_as_in_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a text of a few words. " * 40)
    cpu, auto = (perplexity(tiny_llama, text, seq_len=32, device=d) for d in ("cpu", "auto"))
    if torch.cuda.is_available():
        pytest.skip("auto is cuda here")
    assert auto.losses == cpu.losses
    with pytest.raises(UsageError, match="option device: cuda was asked for"):
        perplexity(tiny_llama, text, seq_len=32, device="cuda")
