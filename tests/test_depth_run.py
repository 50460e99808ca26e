"""Runs that remove layers: choices, resume, refusals, folds, what is reported."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile import CommandLine
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import LAYERS, ordinary, tensors_of, token_ids

from rsprune import _core, methods
from rsprune.config import Config
from rsprune.depth import run as depth_run
from rsprune.depth.fold import RIDGES, best_map, spans
from rsprune.depth.picture import removal_page
from rsprune.depth.remove import choose, lowest, parse_removal
from rsprune.depth.scores import METHODS, DepthMethod
from rsprune.driver import make_plan
from rsprune.errors import DoesNotFitError, UsageError
from rsprune.report import load_report
from rsprune.run import compress
from rsprune.unused import unused_depth_options

OPTIONS: dict[str, Any] = {
    "remove": "2", "protect": "0,0", "texts": 3, "text_tokens": 16, "samples": 8, "seq_len": 32,
    "heldout": 0.25, "threads": 1,
}  # fmt: skip


def config_of(text: Path, method: str = "pip", **options: Any) -> Config:
    return Config.create(method=method, calibration=str(text), **{**OPTIONS, **options})


def test_the_registry_knows_the_methods():
    assert set(METHODS) == set(methods.DEPTH)
    assert all(methods.removes_layers(name) for name in METHODS)
    assert not methods.removes_layers("wanda")
    with pytest.raises(UsageError, match=r"expected one of magnitude, .* perplexity-greedy"):
        methods.removes_layers("pipp")


@pytest.mark.parametrize(
    ("remove", "count"), [("20%", 6), ("6", 6), ("5 %", 2), ("24", 24), ("80%", 24)]
)
def test_remove_is_a_number_or_a_share(remove: str, count: int):
    removal = parse_removal(Config.create(remove=remove), 30)
    assert removal.count == count
    assert removal.protected == {0, 1, 2, 3, 28, 29}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "option remove: expected a number of layers or a share such as 20%"),
        ({"remove": "some"}, "share such as 20%, found 'some'"),
        ({"remove": "1%"}, "1% of 30 layers is none"),
        ({"remove": "0"}, "0 of 30 layers is none"),
        ({"remove": "25"}, "expected at most 24 of 30 layers"),
        ({"remove": "1", "protect": "20,10"}, "expected at most 0 of 30 layers"),
    ],
)
def test_what_cannot_be_removed_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(UsageError, match=message):
        parse_removal(Config.create(**options), 30)


def test_given_layers_go_whatever_is_protected():
    removal = parse_removal(Config.create(method="given", remove="17, 0,29"), 30)
    assert (removal.count, removal.candidates) == (3, [0, 17, 29])


@pytest.mark.parametrize(
    ("method", "remove", "message"),
    [
        ("given", None, r"with --method given, expected layers such as 17,18,16 .* found ''"),
        ("given", "20%", "expected layers such as 17,18,16 .* found '20%'"),
        ("given", "3,4,3", "layer 3 is named twice in 3,4,3"),
        ("given", "3,30", "expected layers from 0 to 29, found 30"),
        ("given", ",".join(map(str, range(30))), "all of the 30 layers are named"),
        ("pip", "3,4", "share such as 20%, found '3,4'"),
    ],
)
def test_lists_of_layers_are_read_with_care(method: str, remove: str | None, message: str):
    with pytest.raises(UsageError, match=message):
        parse_removal(Config.create(method=method, remove=remove), 30)


@pytest.mark.parametrize("protect", ["4", "a,b", "-1,2", "1,2,3"])
def test_protect_is_two_counts(protect: str):
    with pytest.raises(UsageError, match="option protect"):
        Config.create(protect=protect)


def test_iterated_methods_score_anew_and_others_once():
    asked: list[list[int]] = []

    def score(scoring: Any, kept: list[int], candidates: list[int], iteration: int) -> Any:
        asked.append(kept)
        return {index: float((index * 7 + iteration * 3) % 5) for index in candidates}

    removal = parse_removal(Config.create(remove="3", protect="1,0"), 6)
    lines: list[dict[str, Any]] = []
    for iterated, times in ((True, 3), (False, 1)):
        asked.clear()
        lines.clear()
        method = DepthMethod(score, iterated=iterated)
        kept = choose(method, removal, object(), [], lambda **line: lines.append(line))  # type: ignore[arg-type]
        assert len(asked) == times
        assert len(kept) == 3
        assert kept[0] == 0
        for line in lines:
            assert line["removed"] == lowest(line["scores"])
        resumed = json.loads(json.dumps(lines[:2]))
        assert choose(method, removal, object(), resumed, lambda **_: None) == kept  # type: ignore[arg-type]


def test_spans_end_where_the_next_layer_stays():
    assert spans([0, 1, 4, 5], 8) == {1: 3, 5: 7}
    assert spans([2, 3], 4) == {}  # nothing before a span at the start
    assert spans([0, 1, 2], 3) == {}


def test_layers_that_are_named_go(tiny: Callable[..., Path], text: Path, tmp_path: Path):
    dense, out = tiny("llama"), tmp_path / "out"
    compress(dense, out, config_of(text, "given", remove="2,0", fold=False))
    report = load_report(out)
    assert [record["removed"] for record in report.removals] == [2, 0]
    assert [layer["dense_layer"] for layer in report.layers] == [1, *range(3, LAYERS)]
    before, after = tensors_of(dense), tensors_of(out)
    name = "model.layers.{}.self_attn.q_proj.weight"
    assert torch.equal(after[name.format(0)], before[name.format(1)])


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), channels=st.integers(1, 12))
def test_the_map_is_the_ridge_solution_that_held_out_tokens_prefer(seed: int, channels: int):
    chooser = np.random.default_rng(seed)
    true = chooser.normal(size=(channels, channels)) / channels
    given_sums, tokens = [], []
    for _ in range(2):
        m = chooser.normal(size=(60, channels))
        delta = m @ true.T + 0.1 * chooser.normal(size=m.shape)
        sums = _core.Statistics(channels, corrected=True)
        sums.add(m.astype(np.float32), (m - delta).astype(np.float32))
        given_sums.append(sums)
        tokens.append((m, delta))
    found = best_map(*given_sums)
    (m, delta), (other_m, other_delta) = tokens
    candidates = {}
    for ridge in RIDGES:
        damping = ridge * np.trace(m.T @ m) / channels * np.eye(channels)
        candidates[ridge] = np.linalg.solve(m.T @ m + damping, m.T @ delta).T
    errors = {r: ((other_m @ d.T - other_delta) ** 2).sum() for r, d in candidates.items()}
    best = min(errors, key=lambda ridge: errors[ridge])
    if errors[best] > 0.999 * (other_delta**2).sum():
        return  # too close to no map at all to tell
    assert found is not None
    assert errors[found[1]] == pytest.approx(errors[best], rel=1e-3)
    np.testing.assert_allclose(found[0].numpy(), candidates[found[1]], atol=1e-3)


def test_no_map_is_folded_where_it_does_not_help():
    chooser = np.random.default_rng(0)
    made = []
    for sign in (1.0, -1.0):  # held-out tokens want the opposite
        m = chooser.normal(size=(50, 4)).astype(np.float32)
        sums = _core.Statistics(4, corrected=True)
        sums.add(m, (m - sign * m).astype(np.float32))
        made.append(sums)
    assert best_map(*made) is None


@pytest.fixture(scope="module")
def folded(
    tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    dense, out = tiny("llama"), tmp_path_factory.mktemp("folded") / "out"
    compress(dense, out, config_of(text, "bi", remove="1", protect="1,0", samples=24))
    return dense, out


def test_a_folded_map_is_stored_and_lowers_the_error(folded: tuple[Path, Path]):
    dense, out = folded
    report = load_report(out)
    removed = report.removals[0]["removed"]
    (layer,) = (line for line in report.layers if "fold" in line)
    fold = layer["fold"]
    assert layer["dense_layer"] == removed - 1
    assert fold["after"][1] < fold["before"][1]
    before, after = tensors_of(dense), tensors_of(out)
    name = "model.layers.{}.mlp.down_proj.weight"
    changed = after[name.format(layer["layer"])]
    assert changed.dtype == before[name.format(removed - 1)].dtype
    assert not torch.equal(changed, before[name.format(removed - 1)])
    others = [
        n for n in after if n.startswith("model.layers.") and n != name.format(layer["layer"])
    ]
    renamed = {line["layer"]: line["dense_layer"] for line in report.layers}
    for other in others:
        number = other.split(".")[2]
        source = other.replace(f".{number}.", f".{renamed[int(number)]}.", 1)
        assert torch.equal(after[other], before[source])


def test_the_reported_error_is_that_of_the_stored_model(folded: tuple[Path, Path], text: Path):
    """What leaves the layers is compared with the dense model's, on the windows of the run."""
    from rsprune.mixture import interleaved, load_corpora
    from rsprune.skeleton import load_tokenizer

    dense, out = folded
    report = load_report(out)
    removed = report.removals[0]["removed"]
    fold = next(line["fold"] for line in report.layers if "fold" in line)
    windows = interleaved(load_corpora([str(text)]), load_tokenizer(dense), samples=24, seq_len=32,
                          seed=0, heldout=0.25).heldout  # fmt: skip

    def behind(folder: Path, layer: int) -> torch.Tensor:
        with torch.no_grad():
            model = ordinary(folder).model
            model.norm = torch.nn.Identity()
            del model.layers[layer + 1 :]
            return model(windows, use_cache=False).last_hidden_state.double()

    wanted, found = behind(dense, removed), behind(out, removed - 1)
    error = float((found - wanted).square().sum() / wanted.square().sum())
    assert error == pytest.approx(fold["after"][1], rel=1e-3)


def test_a_layer_whose_output_is_normalised_is_not_folded(
    tiny: Callable[..., Path], text: Path, tmp_path: Path
):
    compress(tiny("gemma2"), tmp_path / "out", config_of(text, "bi", remove="1", protect="1,0"))
    report = load_report(tmp_path / "out")
    (fold,) = (line["fold"] for line in report.layers if "fold" in line)
    assert "as it is" in fold["skipped"]
    assert fold["before"][0] > 0


class Killed(Exception):  # noqa: N818
    """Stands for a kill: nothing is cleaned up by hand."""


@pytest.mark.parametrize("after", ["one removal", "one layer"])
def test_a_run_that_ended_early_ends_in_the_same_bytes(
    after: str,
    tiny: Callable[..., Path],
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    config = config_of(text, remove="1" if after == "one layer" else "2", protect="1,0")
    compress(tiny("llama"), tmp_path / "whole", config)
    asked: list[int] = []
    score = METHODS["pip"].score

    def counted(scoring: Any, kept: Any, candidates: Any, iteration: int) -> Any:
        asked.append(iteration)
        if after == "one removal" and asked == [0, 1]:
            raise Killed
        return score(scoring, kept, candidates, iteration)

    monkeypatch.setitem(METHODS, "pip", dataclasses.replace(METHODS["pip"], score=counted))
    write = depth_run.DepthRun._write_layer

    def stopped(self: Any, output: Any, new: int, *rest: Any) -> None:
        if new == 1 and len(asked) == 1 and after == "one layer":
            asked.append(-1)
            raise Killed
        write(self, output, new, *rest)

    monkeypatch.setattr(depth_run.DepthRun, "_write_layer", stopped)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        compress(tiny("llama"), out, config)
    assert (tmp_path / "out.partial" / "rsprune-report.jsonl").exists()
    with pytest.raises(UsageError, match="options: pip_norm differs"):
        compress(tiny("llama"), out, config.model_copy(update={"pip_norm": "l2"}))
    compress(tiny("llama"), out, config)
    assert asked == ([0, 1, 1] if after == "one removal" else [0, -1])
    for path in (tmp_path / "whole").iterdir():
        if path.name != "rsprune-report.jsonl":  # it has times
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name


def test_memory_that_does_not_suffice_is_refused(tiny: Callable[..., Path], text: Path):
    from rsprune.depth.plan import prepare

    with pytest.raises(DoesNotFitError, match="too small for this plan"):
        prepare(tiny("llama"), config_of(text, memory="1MiB"), None)


def test_planned_memory_does_not_grow_with_layers(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import tiny_models

    from rsprune.depth.plan import Opened, memory_of

    found = []
    for layers in (3, 9):
        monkeypatch.setitem(tiny_models.SIZES, "num_hidden_layers", layers)
        folder = tiny_models.build("llama", tmp_path / str(layers))
        opened = Opened.of(folder, config_of(text), 32)
        parts = memory_of(opened, config_of(text), gradients=True, fold=True)
        found.append({name: size for name, size in parts.items() if "python" not in name})
    assert found[0] == found[1]


def test_options_without_effect_are_named():
    quiet = Config.create(method="pip", remove="1", calibration="x")
    assert list(unused_depth_options(quiet)) == []
    loud = Config.create(
        method="bi", remove="1", pattern="4:8", pip_norm="l1", fold=False, samples=3
    )
    told = " ".join(unused_depth_options(loud))
    for name in ("pattern is for methods that prune weights", "pip_norm is read by pip", "samples"):
        assert name in told


def test_the_command_line_removes_layers_and_draws_scores(
    command_line: CommandLine, tiny: Callable[..., Path], text: Path, tmp_path: Path
):
    words = ["--texts", "3", "--text-tokens", "16", "--calibration", str(text), "--threads", "1"]
    run = ["--remove", "50%", "--protect", "0,1", "--no-fold", "--pip-norm", "l1"]
    out = tmp_path / "pruned"

    def told(command: str, *arguments: object) -> str:
        code, said, wrong = command_line.run([command, str(tiny("llama")), *map(str, arguments)])
        assert code == 0, wrong
        return said

    told("compress", out, "--method", "pip", *run, *words)
    report = load_report(out)
    assert report.run["removed"] == len(report.removals) == 2
    assert report.run["texts"]["sources"][0]["windows"] == 3
    page = (out / "rsprune-scores.html").read_text()
    assert page == removal_page(report)
    assert page.count('class="ring"') == 2
    assert "http" not in page.replace("http-equiv", "")
    html = tmp_path / "scores.html"
    table = told("blocks", "--html", html, *words)
    for metric in ("pip-taylor", "bi", "loss without"):
        assert metric in table
        assert metric in html.read_text()
    planned = told("plan", "--method", "pip", *run, *words)
    assert "forward and backward with two views, 2 times" in planned


@pytest.mark.parametrize("then", ["magnitude", "pbs2p"])
def test_another_method_goes_on_from_a_shorter_model(
    then: str, tiny: Callable[..., Path], text: Path, tmp_path: Path
):
    short, out = tmp_path / "short", tmp_path / "out"
    compress(tiny("llama"), short, config_of(text, remove="1"))
    options = {"samples": 4, "seq_len": 32, "threads": 1, "calibration": str(text)}
    report = compress(short, out, Config.create(method=then, pattern="4:8", **options))
    assert len(report.layers) == LAYERS - 1
    assert not (out / "rsprune-scores.html").exists()
    with torch.no_grad():
        assert ordinary(out)(token_ids(1, 12)).logits.isfinite().all()


def test_make_plan_says_what_a_depth_run_would_do(tiny: Callable[..., Path], text: Path):
    plan = make_plan(tiny("llama"), config_of(text, remove="1"))
    assert "1 times" in plan.passes
