"""What several test files need: tiny models, a text, and the real model where there is one."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from hostile import CommandLine
    from tiny_models import Run

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).parents[1]
WORDS = "the of a model layer weight keeps zero sum matrix row small large open text"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The texts that are kept beside the repository."""
    folder = Path(os.environ.get("RSPRUNE_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is not there (RSPRUNE_SHARED names another place)")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a folder: a real model."""
    if named := os.environ.get("RSPRUNE_SMOLLM2"):
        if not Path(named, "config.json").is_file():
            pytest.skip(f"RSPRUNE_SMOLLM2={named} holds no config.json")
        return Path(named)
    from rsprune.errors import RspruneError
    from rsprune.sources import demo_model

    try:
        return demo_model(cache=None)
    except (RspruneError, OSError) as error:
        pytest.skip(f"no real model: {error}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny(kind, shards=1)`: the folder of a tiny model, made once; tests must not change it."""
    import torch
    from tiny_models import build

    torch.set_num_threads(1)
    made: dict[tuple[str, int], Path] = {}

    def folder_of(kind: str, shards: int = 1) -> Path:
        if (kind, shards) not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{kind}-{shards}")
            made[kind, shards] = build(kind, folder, shards=shards)
        return made[kind, shards]

    return folder_of


@pytest.fixture(scope="session")
def tiny_llama(tiny: Callable[..., Path]) -> Path:
    """One file, untied."""
    return tiny("llama")


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6,000 tokens of the tiny models, in 60 documents."""
    chooser = random.Random(0)
    texts = [" ".join(chooser.choices(WORDS.split(), k=20)) for _ in range(60)]
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


@pytest.fixture(scope="session")
def text(documents: Path) -> Path:
    """The same as one document."""
    path = documents.with_suffix(".txt")
    texts = [json.loads(line)["text"] for line in documents.read_text().splitlines()]
    path.write_text("\n".join(texts))
    assert path.stat().st_size > 5_000
    return path


@pytest.fixture(scope="session")
def compressed(
    tiny: Callable[..., Path], documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, str], "Run"]:
    """`compressed(kind, method, pattern)`, run once for each; tests must not change the folders."""
    from tiny_models import Run

    from rsprune.config import Config
    from rsprune.run import compress

    made: dict[tuple[str, str, str], Run] = {}
    options: dict[str, Any] = {"samples": 6, "seq_len": 32, "heldout": 0.34, "threads": 1}

    def run_of(kind: str, method: str, pattern: str) -> "Run":
        case = (kind, method, pattern)
        if case not in made:
            config = Config(calibration=str(documents), method=method, pattern=pattern, **options)
            out = tmp_path_factory.mktemp("compressed") / "out"
            model = tiny(kind, shards=3 if kind == "llama_tied" else 1)
            compress(model, out, config)
            made[case] = Run(model, out, config)
        return made[case]

    return run_of


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`deep(kind)`: a tiny model of six layers."""
    import tiny_models
    from tiny_models import build

    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(tiny_models.SIZES, "num_hidden_layers", 6)
                made[kind] = build(kind, tmp_path_factory.mktemp(f"deep-{kind}"))
        return made[kind]

    return model


@pytest.fixture(scope="session")
def replaced(
    deep: Callable[[str], Path], documents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """`replaced(name)`: the output of one of `RUNS` on the tiny llama, made once."""
    from replaced_models import OPTIONS, RUNS

    from rsprune.config import Config
    from rsprune.run import compress

    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("replaced") / "out"
            config = Config(calibration=str(documents), **OPTIONS, **RUNS[name])
            compress(deep("llama"), made[name], config)
        return made[name]

    return run


@pytest.fixture
def command_line(text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> "CommandLine":
    """The command line as a user sees it; its outputs go to a folder of their own."""
    from hostile import CommandLine

    return CommandLine(text, tmp_path, capfd)
