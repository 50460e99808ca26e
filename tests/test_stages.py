"""Recipes with stages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hostile import CommandLine
from tiny_models import LAYERS, ordinary

from rsprune import stages
from rsprune.config import Config, read_stages
from rsprune.errors import UsageError
from rsprune.report import load_report
from rsprune.stages import compress_stages
from rsprune.verify import verify

SHARED: dict[str, Any] = {"samples": 8, "seq_len": 32, "texts": 3, "text_tokens": 16, "threads": 1}
FIRST = {"method": "pip", "remove": 1, "protect": "1,0"}
SECOND = {"method": "magnitude", "pattern": "2:4"}


@pytest.fixture
def recipe(text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "stages.yaml"
    content = {**SHARED, "calibration": str(text), "stages": [FIRST, SECOND]}
    path.write_text(yaml.safe_dump(content))
    return path


def test_stages_run_one_after_another(
    recipe: Path, command_line: CommandLine, tiny: Callable[..., Path], tmp_path: Path
):
    out = tmp_path / "out"
    words = ["compress", str(tiny("llama")), str(out), "--recipe", str(recipe)]
    code, _, wrong = command_line.run([*words, "--seed", "3"])
    assert code == 0, wrong
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stages.yaml"]
    assert verify(out) == []
    report = load_report(out)
    assert len(report.layers) == LAYERS - 1
    assert all(tensor["sparsity"] == 0.5 for tensor in report.tensors)
    assert len(ordinary(out).model.layers) == LAYERS - 1
    earlier = (out / "rsprune-report-stage-1.jsonl").read_text()
    assert '"kind": "removal"' in earlier
    card = (out / "README.md").read_text()
    assert tiny("llama").name in card
    again = read_stages(out / "recipe.yaml", {})
    assert again == read_stages(recipe, {"seed": 3})
    assert [config.method for config in again] == ["pip", "magnitude"]


def test_finished_stages_are_not_repeated(
    recipe: Path, tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    configs, out, ran = read_stages(recipe, {}), tmp_path / "out", []
    compress, killed = stages.compress, [True]

    def counted(model: Any, folder: Path, config: Config, **options: Any) -> Any:
        ran.append(config.method)
        if config.method == "magnitude" and killed.pop():
            raise KeyboardInterrupt
        return compress(model, folder, config, **options)

    monkeypatch.setattr(stages, "compress", counted)
    with pytest.raises(KeyboardInterrupt):
        compress_stages(tiny("llama"), out, configs)
    assert ran == ["pip", "magnitude"]
    other = [configs[0].model_copy(update={"pip_norm": "l1"}), configs[1]]
    with pytest.raises(UsageError, match="finished stage lies here whose options: pip_norm"):
        compress_stages(tiny("llama"), out, other)
    killed.append(False)
    compress_stages(tiny("llama"), out, configs, keep=True)
    assert ran == ["pip", "magnitude", "magnitude"]
    assert (tmp_path / "out.stages" / "1-pip" / "config.json").exists()
    # Killed after the last stage, but before its recipe was written: only that is done again.
    compress_stages(tiny("llama"), out, configs)
    assert ran == ["pip", "magnitude", "magnitude"]
    assert not (tmp_path / "out.stages").exists()
    with pytest.raises(UsageError, match="exists already"):
        compress_stages(tiny("llama"), out, configs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"stages": []}, "expected a list of stages"),
        ({"stages": ["pip"]}, "expected a list of stages"),
        ({"stages": [FIRST, {"methodd": "x"}]}, "stage 2: unknown option 'methodd'"),
    ],
)
def test_wrong_stages_are_refused(content: dict[str, Any], message: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UsageError, match=message):
        read_stages(path, {})


def test_one_method_for_all_stages_is_refused(recipe: Path):
    with pytest.raises(UsageError, match="lists stages with methods of their own"):
        read_stages(recipe, {"method": "wanda"})
    with pytest.raises(UsageError, match="lists stages, which only"):
        Config.from_recipe(recipe)


def test_keeping_stages_that_are_not_there_is_refused(
    command_line: CommandLine, tiny: Callable[..., Path], tmp_path: Path
):
    words = ["compress", str(tiny("llama")), str(tmp_path / "out"), "--keep-stages"]
    code, _, wrong = command_line.run(words)
    assert code == 2
    assert "lists stages" in wrong
