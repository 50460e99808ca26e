"""Runs that end early go on, and end in the bytes of an undisturbed run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import KINDS, build

from rsprune import Config, compress, methods
from rsprune.errors import RspruneError, UsageError
from rsprune.output import OutputFolder
from rsprune.report import REPORT_NAME
from rsprune.verify import verify

OPTIONS: dict[str, Any] = {"samples": 6, "seq_len": 32, "heldout": 0.34, "threads": 1}
TUNE = {"tune_block": True, "tune_steps": 4}
EXPERTS = {"kind": "qwen3_moe"}
CASES: dict[str, dict[str, Any]] = {
    "wanda": {"method": "wanda"},
    "sparsegpt dense": {"method": "sparsegpt", "target": "dense"},
    "fista": {"method": "fista", "iterations": 3},
    "sequential": {"method": "admm", "propagate": "model", "target": "own"},
    "permuted": {"method": "wanda", "permute": True},
    "tuned apart": {"method": "best", "budget": 1, **TUNE},
    "tuned": {"method": "wanda", "propagate": "model", "permute": True, **TUNE},
    "allocated": {"method": "sparsegpt", "pattern": "70%", "allocate": True},
    "packed": {"method": "wanda", "propagate": "model", "permute": True, "format": "packed"},
    "layers' codes": {"method": "pbs2p", "pattern": "6:8"},
    "operators' codes": {"method": "pbs2p-exact", "bits": 1.9},
    "experts": {"method": "sparsegpt", "permute": True, **EXPERTS},
    "experts dense": {"method": "fista", "iterations": 3, "permute": True, **EXPERTS},
}
VOLATILE = {
    "seconds", "rss_anon", "peak_rss_anon", "import_rss_anon", "planned_peak",
}  # fmt: skip
"""What two undisturbed runs do not agree in either."""


class StopError(Exception):
    """Ends a run."""


def config_of(case: str, documents: Path, **more: Any) -> Config:
    options = {"calibration": str(documents), **OPTIONS, **CASES[case], **more}
    return Config(**{key: value for key, value in options.items() if key != "kind"})


def kind_of(case: str) -> str:
    kind: str = CASES[case].get("kind", "llama")
    return kind


def contents(folder: Path) -> dict[str, Any]:
    """Every file of an output; of the report what does not depend on the clock."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            files[str(path.relative_to(folder))] = path.read_bytes()
    lines = [json.loads(line) for line in files[REPORT_NAME].splitlines()]
    files[REPORT_NAME] = [{k: v for k, v in line.items() if k not in VOLATILE} for line in lines]
    return files


@pytest.fixture(scope="module")
def undisturbed(
    tiny: Callable[..., Path], documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, Any]]:
    """The contents of a whole run of a case, made once."""
    made: dict[str, dict[str, Any]] = {}

    def contents_of(case: str) -> dict[str, Any]:
        if case not in made:
            out = tmp_path_factory.mktemp("whole") / "out"
            compress(tiny(kind_of(case)), out, config_of(case, documents))
            made[case] = contents(out)
        return made[case]

    return contents_of


def stop_after(monkeypatch: pytest.MonkeyPatch, shards: int) -> None:
    """Ends the next run as it is about to write a shard, `shards` having been written."""
    written, original = [], OutputFolder.put_shard

    def put_shard(self: OutputFolder, *args: Any, **options: Any) -> Any:
        if len(written) == shards:
            raise StopError
        written.append(1)
        return original(self, *args, **options)

    monkeypatch.setattr(OutputFolder, "put_shard", put_shard)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_run_goes_on(
    case: str,
    shards: int,
    undisturbed: Callable[[str], dict[str, Any]],
    tiny: Callable[..., Path],
    documents: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, config, out = undisturbed(case), config_of(case, documents), tmp_path / "out"
    model = tiny(kind_of(case))
    with monkeypatch.context() as patch:
        stop_after(patch, shards)
        with pytest.raises(StopError):
            compress(model, out, config)
    assert not out.exists()
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == shards
    solved = []
    original = methods.get(config.method).solve
    monkeypatch.setattr(
        methods.get(config.method), "solve",
        lambda task, *a, **k: (solved.append(1), original(task, *a, **k))[1],
    )  # fmt: skip
    compress(model, out, config)
    later = [t for t in expected[REPORT_NAME] if t["kind"] == "tensor" and t["layer"] >= shards]
    by_method = [t for t in later if t["method"] == config.method]
    assert len(solved) == len(by_method) > 0 or shards == 3  # nothing was solved twice
    assert contents(out) == expected
    assert verify(out) == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def stopped(model: Path, out: Path, config: Config, shards: int = 2) -> Path:
    """An unfinished run; returns its folder."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, shards)
        with pytest.raises(StopError):
            compress(model, out, config)
    return out.with_name("out.partial")


DIFFERENT: list[tuple[str, dict[str, Any]]] = [
    ("options: method", {"method": "magnitude"}),
    ("options: pattern", {"pattern": "4:8"}),
    ("calibration tokens", {"seed": 1}),
    ("threads", {"threads": 2}),
]


@pytest.mark.parametrize(("part", "change"), DIFFERENT)
def test_another_run_is_not_mixed_in(
    part: str, change: dict[str, Any], tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    config, out = config_of("wanda", documents), tmp_path / "out"
    partial = stopped(tiny_llama, out, config)
    before = {path.name: path.read_bytes() for path in partial.iterdir() if path.is_file()}
    other = config.model_copy(update=change)
    with pytest.raises(UsageError, match=f"whose {part} differs: expected .*, found .*--restart"):
        compress(tiny_llama, out, other)
    after = {path.name: path.read_bytes() for path in partial.iterdir() if path.is_file()}
    assert after == before
    compress(tiny_llama, out, other, restart=True)
    assert verify(out) == []


def test_another_model_is_not_mixed_in(
    tiny: Callable[..., Path], tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    config, out = config_of("wanda", documents), tmp_path / "out"
    stopped(tiny_llama, out, config)
    with pytest.raises(UsageError, match=r"whose model files: model.* differs"):
        compress(tiny("llama", shards=3), out, config)


def test_other_weights_behind_the_same_headers_are_not_mixed_in(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    model, config, out = tmp_path / "model", config_of("wanda", documents), tmp_path / "out"
    shutil.copytree(tiny_llama, model)
    stopped(model, out, config)
    shard = model / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-8] ^= 1  # the last bits of a weight
    shard.write_bytes(content)
    with pytest.raises(UsageError, match=r"whose model files: model.safetensors differs"):
        compress(model, out, config)


def test_the_memory_bound_may_change(
    tiny_llama: Path,
    documents: Path,
    tmp_path: Path,
    undisturbed: Callable[[str], dict[str, Any]],
) -> None:
    out = tmp_path / "out"
    stopped(tiny_llama, out, config_of("wanda", documents))
    compress(tiny_llama, out, config_of("wanda", documents, memory=3 << 30))
    expected, found = undisturbed("wanda"), contents(out)
    for name in expected.keys() - {REPORT_NAME, "recipe.yaml", "README.md"}:
        assert found[name] == expected[name]


@pytest.mark.parametrize("damage", ["flipped", "short", "gone"])
def test_a_broken_shard_is_made_again(
    damage: str,
    undisturbed: Callable[[str], dict[str, Any]],
    tiny_llama: Path,
    documents: Path,
    tmp_path: Path,
) -> None:
    config, out = config_of("sequential", documents), tmp_path / "out"
    shard = sorted(stopped(tiny_llama, out, config).glob("*.safetensors"))[0]
    content = bytearray(shard.read_bytes())
    if damage == "flipped":
        content[-7] ^= 1
        shard.write_bytes(content)
    elif damage == "short":
        shard.write_bytes(content[:-9])
    else:
        shard.unlink()
    compress(tiny_llama, out, config)
    assert contents(out) == undisturbed("sequential")


def test_a_torn_line_and_litter_do_no_harm(
    undisturbed: Callable[[str], dict[str, Any]], tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    config, out = config_of("wanda", documents), tmp_path / "out"
    partial = stopped(tiny_llama, out, config)
    with (partial / REPORT_NAME).open("ab") as file:
        file.write(b'{"kind": "tensor", "na')
    (partial / "model-00004-of-00004.safetensors.tmp").write_bytes(b"half")
    (partial / ".scratch").mkdir()
    (partial / ".scratch" / "hidden-0").write_bytes(b"old")
    compress(tiny_llama, out, config)
    assert contents(out) == undisturbed("wanda")


def test_two_runs_do_not_share_an_output(tiny_llama: Path, documents: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    message = rf"another run is writing it \(process {os.getpid()}"
    with OutputFolder(out).owned(), pytest.raises(UsageError, match=message):
        compress(tiny_llama, out, config_of("wanda", documents))
    compress(tiny_llama, out, config_of("wanda", documents))


def test_a_report_that_is_no_report_is_not_gone_on_with(
    tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    config, out = config_of("wanda", documents), tmp_path / "out"
    partial = stopped(tiny_llama, out, config)
    (partial / REPORT_NAME).write_text("no JSON\n")
    with pytest.raises(RspruneError, match="line 1: expected a JSON object"):
        compress(tiny_llama, out, config)
    compress(tiny_llama, out, config, restart=True)


def lines_of(path: Path) -> int:
    """Of a journal, which tell how far a run came; 0 of any other file."""
    return path.read_bytes().count(b"\n") if path.name == REPORT_NAME else 0


def in_a_child(work: Callable[[], object]) -> int:
    """Starts `work` in a forked process; returns its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tuned", "fista", "sequential", "allocated"])
def test_kill_at_random_instants(
    case: str, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """25 kills a case of four layers, most runs several times over, writer and commit included."""
    four = {"num_hidden_layers": 4, "tie_word_embeddings": False}
    monkeypatch.setitem(KINDS, "four", ("Llama", four))
    dense, config, out = (
        build("four", tmp_path / "four"),
        config_of(case, documents),
        tmp_path / "out",
    )
    chooser = random.Random(case)
    started = time.perf_counter()
    assert os.waitpid(in_a_child(lambda: compress(dense, out, config)), 0)[1] == 0
    whole = time.perf_counter() - started
    expected = contents(out)
    shutil.rmtree(out)
    kills, places = 0, set()
    while kills < 25:
        child = in_a_child(lambda: compress(dense, out, config))
        time.sleep(chooser.uniform(0.0, whole))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        kills += os.WIFSIGNALED(status)
        places.add(tuple(sorted((path.name, lines_of(path)) for path in tmp_path.glob("out*/*"))))
        if out.exists():
            assert contents(out) == expected
            shutil.rmtree(out)
    assert len(places) > 2  # kills came at different places of a run
    compress(dense, out, config)
    assert contents(out) == expected
    assert verify(out) == []


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_resumable_state_within_two_seconds(
    sent: signal.Signals, code: int, tiny_llama: Path, documents: Path, tmp_path: Path
) -> None:
    """Long tuning holds the run in its second layer until the signal comes."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    config = config_of("tuned", documents, tune_steps=2000, tune_rate=1e-9)
    recipe.write_text(config.to_recipe())
    command = ["compress", str(tiny_llama), str(out), "--recipe", str(recipe)]
    process = subprocess.Popen(
        [sys.executable, "-m", "rsprune", *command], stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    journal = out.with_name("out.partial") / "rsprune-report.jsonl"
    deadline = time.perf_counter() + 120
    while not (journal.exists() and '"kind": "layer"' in journal.read_text()):
        assert process.poll() is None, process.stderr
        assert time.perf_counter() < deadline
        time.sleep(0.05)
    process.send_signal(sent)
    sent_at = time.perf_counter()
    _, errors = process.communicate(timeout=60)
    assert time.perf_counter() - sent_at < 2
    assert process.returncode == code
    assert "of 3 layers are finished" in errors
    assert "the same command goes on from there" in errors
    assert not out.exists()
    assert not out.with_name("out.lock").exists()
