"""Tasks of lm-evaluation-harness: the oracle is the harness's own model class, unstreamed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import LAYERS, ordinary

import rsprune
from rsprune.errors import DoesNotFitError, UsageError
from rsprune.progress import NullProgress
from rsprune.scoring import Scorer
from rsprune.skeleton import Skeleton, load_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra rsprune[eval]")
from lm_eval.api.instance import Instance

from rsprune.eval_journal import Journal
from rsprune.eval_tasks import TaskResults, evaluate_tasks
from rsprune.harness import StreamedLM

Tiny = Callable[..., Path]
TASKS = Path(__file__).parent / "tasks"
CONTEXTS = ["", "The sky is", "Two spaces  ", "naïve", "long " * 60]
CONTINUATIONS = [" blue", "!", " x", " y", " and so on", "<eos>", " " * 9]


@pytest.fixture(autouse=True)
def in_the_repository(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of our task are found from here; the harness's own tasks take long to list."""
    import lm_eval.tasks

    original = lm_eval.tasks.TaskManager

    def quick(**options: Any) -> Any:
        return original(**{**options, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", quick)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.chdir(root)


def run(model: Path, tasks: tuple[str, ...] = ("plain_facts",), **options: Any) -> TaskResults:
    return evaluate_tasks(model, tasks, **{"include_path": TASKS, "threads": 2, **options})


def oracle(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(ordinary(folder), tokenizer=load_tokenizer(folder), batch_size=1)


def streamed(folder: Path, **options: Any) -> StreamedLM:
    scorer = Scorer.open(
        folder, memory=None, device="cpu", threads=2, trust_remote_code=False,
        progress=NullProgress(),
    )  # fmt: skip
    tokenizer = load_tokenizer(folder)
    return StreamedLM(scorer, tokenizer, max_length=128, journal=Journal(None, {}), **options)


def requests(kind: Any, arguments: list[tuple[str, ...]]) -> list[Instance]:
    return [Instance(kind, {}, pair, n) for n, pair in enumerate(arguments)]


def samples_of(found: Any) -> list[Any]:
    return [sample["filtered_resps"] for sample in found["plain_facts"]]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "opt", "gpt_neox"])
def test_log_likelihoods_equal_those_of_the_harness(tiny: Tiny, kind: str, monkeypatch):
    pairs = [(context, end) for context in CONTEXTS for end in CONTINUATIONS]
    pairs.remove(("", "<eos>"))  # for an empty context EOS stands before the text already
    asked = requests("loglikelihood", pairs * 2)
    expected = oracle(tiny(kind)).loglikelihood(asked, disable_tqdm=True)
    lm, notes = streamed(tiny(kind)), []
    monkeypatch.setattr(NullProgress, "note", lambda self, message: notes.append(message))
    found = lm.loglikelihood(asked)
    assert notes == ["14 requests are longer than 128 tokens: their contexts are cut at the left"]
    assert found == found[: len(pairs)] * 2
    assert len("long " * 60) > 128  # this one is cut
    assert len({round(log_likelihood, 4) for log_likelihood, _ in found}) > 20
    for (ours, greedy), (theirs, same) in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert greedy == same


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_rolling_log_likelihoods_equal_those_of_the_harness(tiny: Tiny, kind: str):
    texts = ["short", "a longer text " * 40, "x" * 128, "x" * 129, ""]
    asked = requests("loglikelihood_rolling", [(text,) for text in texts])
    expected = oracle(tiny(kind)).loglikelihood_rolling(asked, disable_tqdm=True)
    assert streamed(tiny(kind)).loglikelihood_rolling(asked) == pytest.approx(expected, rel=1e-5)


def test_a_task_equals_that_of_the_harness(tiny_llama: Path):
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    options = {"num_fewshot": 1, "limit": 12}
    manager = TaskManager(include_path=str(TASKS))
    expected = simple_evaluate(
        oracle(tiny_llama), tasks=["plain_facts"], task_manager=manager, **options
    )
    assert expected is not None
    found = run(tiny_llama, **options)
    (prompt, _) = found.samples["plain_facts"][0]["arguments"][0]
    assert prompt.count("Question:") == 2
    theirs = expected["samples"]["plain_facts"]
    for ours, sample in zip(found.samples["plain_facts"], theirs, strict=True):
        assert ours["arguments"] == sample["arguments"]
        for (ours_ll, greedy), (theirs_ll, same) in zip(
            ours["filtered_resps"], sample["filtered_resps"], strict=True
        ):
            assert ours_ll == pytest.approx(theirs_ll, rel=1e-5)
            assert greedy == same
    for metric in ("acc,none", "acc_norm,none", "acc_stderr,none"):
        assert found.results["plain_facts"][metric] == expected["results"]["plain_facts"][metric]
    assert found.examples == {"plain_facts": 12}
    assert "plain_facts" in found.table


def test_our_questions_are_well_formed():
    lines = (TASKS / "plain_facts.jsonl").read_text().splitlines()
    questions = [json.loads(line) for line in lines]
    assert len({q["question"] for q in questions}) == 40
    assert all(len(set(q["choices"])) == 4 and q["answer"] in range(4) for q in questions)
    positions = [q["answer"] for q in questions]
    assert all(7 <= positions.count(n) <= 13 for n in range(4))


def test_the_checkpoint_is_read_once_for_a_task(tiny_llama: Path, tmp_path: Path, monkeypatch):
    loaded, passages = [], []
    load_layer, score = Skeleton.load_layer, Scorer.score

    def load(self: Skeleton, index: int) -> None:
        loaded.append(index)
        load_layer(self, index)

    def scored(self: Scorer, given: list[Any], **options: Any) -> Any:
        passages.append(len(given))
        return score(self, given, **options)

    monkeypatch.setattr(Skeleton, "load_layer", load)
    monkeypatch.setattr(Scorer, "score", scored)
    whole = run(tiny_llama)
    assert loaded == list(range(LAYERS))
    assert passages == [160]
    loaded.clear()
    monkeypatch.setattr("rsprune.eval_tasks.BATCH_TOKENS", 2000)
    split = run(tiny_llama, resume=tmp_path / "eval.jsonl", threads=1)
    assert len(loaded) > 2 * LAYERS
    assert samples_of(split.samples) == samples_of(whole.samples)  # the same bits


def test_requests_with_the_same_input_are_one_passage(tiny_llama: Path):
    lm, count = streamed(tiny_llama), []
    original = lm._scorer.score
    object.__setattr__(
        lm._scorer, "score", lambda given, **o: (count.append(len(given)), original(given, **o))[1]
    )
    answers = requests("loglikelihood", [("Answer:", end) for end in "ABCD"])
    together = lm.loglikelihood(answers)
    assert count == [1]
    assert len(set(together)) == 4
    assert [streamed(tiny_llama).loglikelihood([one])[0] for one in answers] == together


def test_a_killed_task_goes_on(tiny_llama: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("rsprune.eval_tasks.BATCH_TOKENS", 2000)
    whole, path = run(tiny_llama), tmp_path / "eval.jsonl"
    original, written = Journal.write, []

    def write(self: Journal, name: str, result: Any) -> None:
        if len(written) == 70:
            raise KeyboardInterrupt
        written.append(name)
        original(self, name, result)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", write)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_llama, resume=path)
    assert len(path.read_bytes().splitlines()) == 1 + 70
    again = run(tiny_llama, resume=path)
    assert len(path.read_bytes().splitlines()) == 1 + 160
    assert samples_of(again.samples) == samples_of(whole.samples)
    assert again.results == whole.results
    with pytest.raises(UsageError, match="whose measure differs: expected 'tasks'"):
        rsprune.perplexity(tiny_llama, TASKS / "plain_facts.jsonl", seq_len=32, resume=path)


GENERATING = """
task: writes_on
dataset_path: json
dataset_kwargs: {data_files: {test: tests/tasks/plain_facts.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."]}
metric_list: [{metric: exact_match}]
"""


def test_what_is_refused(tiny_llama: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "writes_on.yaml").write_text(GENERATING)
    with pytest.raises(UsageError, match=r"task writes_on: expected a task of log-likelihoods"):
        run(tiny_llama, ("writes_on",), include_path=tmp_path)
    asked = Instance("generate_until", {}, ("a", {}), 0, metadata=("by_hand", 0, 1))
    with pytest.raises(UsageError, match=r"task by_hand: expected a task of log-likelihoods"):
        streamed(tiny_llama).generate_until([asked])
    with pytest.raises(UsageError, match=r"tasks nowhere: Spec 'nowhere' is not a registered"):
        run(tiny_llama, ("nowhere",))
    with pytest.raises(UsageError, match=r"include-path .*none: expected a folder of task files"):
        run(tiny_llama, include_path=tmp_path / "none")
    with pytest.raises(DoesNotFitError, match="memory 1 MiB: too small"):
        run(tiny_llama, memory="1MiB")
    with pytest.raises(UsageError, match=r"continuation .*: expected 1 to 8 tokens, found"):
        run(tiny_llama, seq_len=8)
    monkeypatch.setattr("rsprune.eval_tasks.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'rsprune\[eval\]'"):
        run(tiny_llama)


def test_a_text_starts_with_one_bos(tiny_llama: Path):
    lm = streamed(tiny_llama)
    assert lm.tokenizer.bos_token_id is None
    assert lm.prefix_token_id == lm.eot_token_id == 256
    assert lm.tok_encode("<eos>a") == [256, 97]
    lm.tokenizer.bos_token = "<pad>"
    assert lm.prefix_token_id == 257
    lm.tokenizer.bos_token = lm.tokenizer.eos_token = None
    with pytest.raises(UsageError, match="expected a BOS or EOS token"):
        _ = lm.prefix_token_id
