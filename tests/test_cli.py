"""The command line: fast help, one line per error, exit codes, options that mirror `Config`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import fake, in_a_process, run
from safetensors.numpy import save_file
from typer.testing import CliRunner

from rsprune import cli, options
from rsprune.config import Config
from rsprune.errors import RspruneError

HEAVY = ("torch", "transformers", "pydantic", "numpy", "rich", "safetensors")


def test_help_is_fast_and_names_every_command():
    before = os.times()
    done = in_a_process("--help")
    after = os.times()
    assert done.returncode == 0
    commands = ("demo", "plan", "compress", "blocks", "eval", "export", "inspect", "verify")
    for command in commands:
        assert f"\n  {command} " in done.stdout
    # Of the processor, not of the clock: other processes must not fail this test.
    own = after.children_user - before.children_user
    assert 0 < own + after.children_system - before.children_system < 0.3


def test_the_package_and_the_commands_import_nothing_heavy():
    code = f"import sys, rsprune.cli; print([m for m in {HEAVY} if m in sys.modules])"
    source = str(Path(cli.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_without_arguments_the_help_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert run([], monkeypatch) == 0
    assert "Usage:" in capsys.readouterr().out


def test_public_names_are_there_and_documented_ones_only():
    import rsprune

    listed = set(rsprune.__all__)
    assert listed == set(rsprune._HOMES)
    assert rsprune.Config is Config
    assert rsprune.UsageError.__name__ == "UsageError"
    assert rsprune.__version__
    with pytest.raises(AttributeError, match="nonsense"):
        _ = rsprune.nonsense
    assert listed <= set(dir(rsprune))


def test_options_mirror_the_configuration():
    import inspect

    given = set(inspect.signature(options.run_options).parameters)
    assert given == set(Config.model_fields) | {"recipe"}


def test_the_help_names_all_methods():
    from rsprune.methods import names

    text = CliRunner().invoke(cli.app, ["compress", "--help"]).output
    assert names()
    for name in names():
        assert name in text


@pytest.fixture
def compressed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `compress` was called with; the run itself is a stand-in."""
    calls: dict[str, Any] = {}

    def compress(model: str, out: Path, config: Config, **more: Any) -> None:
        calls.update(model=model, out=out, config=config, **more)

    fake(monkeypatch, "rsprune.run", compress=compress)
    return calls


def test_only_explicit_options_reach_the_configuration(
    monkeypatch: pytest.MonkeyPatch, compressed: dict[str, Any]
):
    assert run(["compress", "m", "o", "--quiet"], monkeypatch) == 0
    assert compressed["config"] == Config()
    assert compressed["config"].model_fields_set == set()
    assert (compressed["model"], compressed["out"]) == ("m", Path("o"))
    assert compressed["overwrite"] is False


def test_every_option_arrives(monkeypatch: pytest.MonkeyPatch, compressed: dict[str, Any]):
    text = """--method fista --pattern 4:8 --scope matrix --ignore a* --ignore b --calibration c.txt
        --calibration-field body --samples 7 --seq-len 64 --heldout 0.25 --seed 3 --memory 2GiB
        --propagate model --target own --no-true-sequential --damping 0.5 --warm-start wanda
        --max-rounds 5 --polish-steps 8
        --iterations 9 --xi 0.2 --patience 2 --lambda-start 0.5 --device auto --threads 1
        --trust-remote-code --correction 0.5 --clip-tokens 3.5 --refit --search
        --rho-schedule published --budget 99 --bits 2.5 --format packed
        --tune-block --tune-steps 9 --tune-rate 0.1 --tune-batch 3 --allocate --no-permute
        --calibration d.txt --remove 20% --protect 3,1 --no-fold --pip-norm l2 --edit-rate 0.3
        --texts 4 --text-tokens 99 --rank 8 --flexigpt-mode faithful --replace fold --recover
        --extend 2"""
    command = ["compress", "m", "o", "--quiet", "--overwrite", *text.split()]
    assert run(command, monkeypatch) == 0
    config = compressed["config"]
    assert config.model_fields_set == set(Config.model_fields)
    assert config.ignore == ("a*", "b")
    assert config.calibration == ("c.txt", "d.txt")
    assert (config.remove, config.protect, config.fold) == ("20%", (3, 1), False)
    assert config.memory == 2 << 30
    assert config.true_sequential is False
    assert (config.damping, config.xi, config.heldout) == (0.5, 0.2, 0.25)
    assert config.trust_remote_code is True
    assert compressed["overwrite"] is True


def test_a_plan_that_does_not_fit_says_what_would(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
):
    size = ["--samples", "4", "--seq-len", "32"]
    assert run(["plan", str(tiny_llama), *size, "--memory", "1MiB"], monkeypatch) == 3
    message = capsys.readouterr().err
    assert "memory 1 MiB: too small" in message
    smallest = int(re.search(r"which needs (\d+) MiB", message)[1])
    enough = ["--memory", f"{smallest + 64}MiB"]  # this process grows a little as it plans
    assert run(["plan", str(tiny_llama), *size, *enough], monkeypatch) == 0


def test_explicit_options_win_over_the_recipe(
    monkeypatch: pytest.MonkeyPatch, compressed: dict[str, Any], tmp_path: Path
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("method: wanda\nsamples: 5\nseed: 9\n")
    command = ["compress", "m", "o", "--quiet", "--recipe", str(recipe), "--seed", "0"]
    assert run(command, monkeypatch) == 0
    config = compressed["config"]
    assert (config.method, config.samples, config.seed) == ("wanda", 5, 0)
    assert Config().seed == 0  # so an explicit default must win, too


REFUSED = [
    (["bogus"], "bogus"),
    (["compress", "m"], "out"),
    (["compress", "m", "o", "--samples", "x"], "--samples"),
    (["compress", "m", "o", "--samples", "0"], "samples"),
    (["compress", "m", "o", "--scope", "column"], "scope"),
    (["compress", "m", "o", "--memory", "lots"], "expected a size such as 4GiB"),
    (["compress", "m", "o", "--recipe", "/nonexistent.yaml"], "/nonexistent.yaml"),
    (["compress", "m", "o", "--no-such-option"], "--no-such-option"),
    (["export", "m", "o.gguf"], "--type"),
    (["export", "m", "o.gguf", "--type", "Q9"], "--type: expected one of F32, F16, BF16"),
    (["verify", "/nonexistent"], "/nonexistent"),
    (["inspect", "/nonexistent"], "/nonexistent"),
]


@pytest.mark.parametrize(("arguments", "named"), REFUSED)
def test_refusals_are_one_line_and_status_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    named: str,
):
    assert run(arguments, monkeypatch) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert named in line
    assert captured.out == ""


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (RspruneError("no disk space"), 2, "error: no disk space"),
        (FileNotFoundError("shard gone"), 2, "error: shard gone"),
        (TypeError("oops"), 1, "error: TypeError: oops (RSPRUNE_DEBUG=1 shows where)"),
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_exit_codes_of_a_run(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    raised: BaseException,
    code: int,
    text: str,
):
    def compress(*_: Any, **__: Any) -> None:
        raise raised

    fake(monkeypatch, "rsprune.run", compress=compress)
    monkeypatch.delenv("RSPRUNE_DEBUG", raising=False)
    assert run(["compress", "m", "o", "--quiet"], monkeypatch) == code
    shown = capsys.readouterr().err
    assert shown.startswith(text)
    assert "Traceback" not in shown


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RSPRUNE_DEBUG", "1")
    assert run(["verify", "/nonexistent"], monkeypatch) == 2
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert shown.splitlines()[-1].startswith("error: ")


def test_a_dry_run_plans_for_its_output(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tiny_llama: Path,
    documents: Path,
    tmp_path: Path,
):
    size = ["--samples", "4", "--seq-len", "32", "--calibration", str(documents)]
    out = tmp_path / "out"
    command = ["compress", str(tiny_llama), str(out), "--dry-run", "--json", "--tune-block"]
    assert run([*command, *size], monkeypatch) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[0])
    assert result["plan"]["model"] == str(tiny_llama)
    assert [stage["name"] for stage in result["stages"]] == [
        "read and check", "calibrate", "solve", "tune, at most", "propagate", "write",
    ]  # fmt: skip
    assert all(stage["seconds"] >= 0 for stage in result["stages"])
    assert result["stages"][-1]["writes"] == result["plan"]["output_bytes"] > 0
    assert list(tmp_path.iterdir()) == []
    assert run(["plan", str(tiny_llama), *size], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "together" in shown
    assert "memory, at the peak" in shown


def test_inspect_and_verify_of_a_plain_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    weight = np.tile(np.array([0, 1, 0, 2], np.float32), (4, 4))
    save_file({"model.layers.0.w.weight": weight}, tmp_path / "model.safetensors")
    assert run(["inspect", str(tmp_path)], monkeypatch) == 0
    assert "2:4" in capsys.readouterr().out
    assert run(["inspect", str(tmp_path), "--json"], monkeypatch) == 0
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["tensors"][0]["pattern"] == "2:4"
    assert result["totals"]["zeros"] == 32
    fake(monkeypatch, "rsprune.skeleton", missing_tensors=lambda folder: [])
    assert run(["verify", str(tmp_path), "--json"], monkeypatch) == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert {p["where"] for p in problems} >= {"config.json", "tokenizer", "rsprune-report.jsonl"}


def test_the_demo_measures_on_text_that_calibration_never_sees(tmp_path: Path):
    from pydoc_data.topics import topics

    from rsprune.demo import SEPARATOR, write_texts

    evaluation = write_texts(tmp_path).read_text()
    lines = (tmp_path / "calibration.jsonl").read_text().splitlines()
    calibration = [json.loads(line)["text"] for line in lines]
    assert len(calibration) == len(topics) * 3 // 4
    assert SEPARATOR.join([*calibration, evaluation]) == SEPARATOR.join(
        topics[key] for key in sorted(topics)
    )
    assert len(evaluation) > 24 * 512 * 3  # characters: enough for the demo's windows


@pytest.mark.parametrize("kind", [RuntimeError, type("PanicException", (BaseException,), {})])
def test_what_nobody_foresaw_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type[BaseException]
):
    """A panic of Rust is no `Exception`; lines and control characters cannot fake another error."""

    def fail(folder: Path) -> None:
        raise kind("first\n\x1b[2J" + "second " * 500)

    fake(monkeypatch, "rsprune.verify", verify=fail)
    assert run(["verify", "folder"], monkeypatch) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {kind.__name__}: first \\x1b[2Jsecond")
    assert line.endswith("...")
