"""`rsprune eval`: what it passes on, refuses and prints."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import fake, run


def test_eval_passes_on_what_was_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from rsprune.evaluate import Perplexity

    size = {"tokens": 10, "windows": 1, "seq_len": 8, "seconds": 0.1, "peak_rss_anon": 1}
    found = Perplexity(perplexity=12.5, standard_error=0.25, loss=2.5, losses=[25.0], **size)
    calls = []

    def perplexity(model: str, text: Path, **given: Any) -> Any:
        given.pop("progress")
        calls.append((model, text, given))
        return found

    fake(monkeypatch, "rsprune.evaluate", perplexity=perplexity)
    command = ["eval", "m", "--text", "t.txt", "--quiet"]
    assert run(command, monkeypatch) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("perplexity 12.5000 +- 0.2500  (1 windows of 8 tokens, mean loss")
    more = ["--seq-len", "8", "--windows", "2", "--memory", "1GiB", "--resume", "r", "--json"]
    assert run([*command, *more], monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["perplexity"], result["losses"]) == (12.5, [25.0])
    assert calls[0] == ("m", Path("t.txt"), {})
    assert calls[1][2] == {"seq_len": 8, "windows": 2, "memory": "1GiB", "resume": Path("r")}


def test_eval_passes_tasks_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from rsprune.eval_tasks import TaskResults

    results = {"a": {"acc,none": 0.5}}
    found = TaskResults(results, {"a": 1}, {"a": 40}, {"a": [{}]}, "| a |", 0.1, 1)
    calls = []

    def evaluate_tasks(model: str, tasks: list[str], **given: Any) -> Any:
        given.pop("progress")
        print("a bar", file=sys.stderr)
        calls.append((model, tasks, given))
        return found

    fake(monkeypatch, "rsprune.eval_tasks", evaluate_tasks=evaluate_tasks)
    command = ["eval", "m", "--tasks", "a", "--tasks", "b", "--include-path", "d"]
    assert run([*command, "--quiet"], monkeypatch) == 0
    assert capsys.readouterr() == ("| a |\n", "")
    assert run([*command, "--limit", "3", "--num-fewshot", "0", "--json"], monkeypatch) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["results"], result["examples"]) == (results, {"a": 40})
    assert "samples" not in result
    assert calls[0] == ("m", ["a", "b"], {"include_path": Path("d")})
    assert calls[1][2] == {"include_path": Path("d"), "limit": 3, "num_fewshot": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --text or --tasks, found neither"),
        (["--text", "t", "--tasks", "a"], "expected --text or --tasks, found text and tasks"),
        (["--text", "t", "--num-fewshot", "1"], "--num-fewshot goes with --tasks"),
        (["--tasks", "a", "--windows", "1"], "--windows goes with --text"),
        (["--text", "t", "--memory", "lots"], "option memory: expected a size such as 4GiB"),
    ],
)
def test_what_eval_refuses(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    assert run(["eval", str(tiny_llama), *arguments, "--quiet"], monkeypatch) == 2
    assert message in capsys.readouterr().err


def test_eval_exits_with_3_where_memory_does_not_suffice(
    tiny_llama: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    command = ["eval", str(tiny_llama), "--text", str(text), "--seq-len", "32", "--quiet"]
    assert run([*command, "--memory", "1MiB"], monkeypatch) == 3
    assert "memory 1 MiB: too small for this evaluation" in capsys.readouterr().err
    assert run([*command, "--windows", "2", "--memory", "2GiB"], monkeypatch) == 0
    assert capsys.readouterr().out.startswith("perplexity ")
