"""The rules of the house that a reader could break without noticing; each test names the rule."""

import ast
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "rsprune"
CORE = ROOT / "rust" / "rsprune-core"
BINDING = ROOT / "rust" / "rsprune-py"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if "reference" not in p.parts)
CRATE_FILES = sorted((CORE / "src").rglob("*.rs"))
RUST_FILES = sorted((ROOT / "rust").rglob("*.rs"))
SOURCES = sorted(
    path
    for folder in ("python", "rust", "tests", "benches")
    for suffix in ("py", "rs")
    for path in (ROOT / folder).rglob(f"*.{suffix}")
)

FOUNDATIONS = {"errors", "config", "memory", "pool", "timing", "windows", "blocks", "data"}
FOUNDATIONS |= {"progress", "report", "stored", "experts", "scratch", "guard", "gguf_header"}
FOUNDATIONS |= {"packing", "transformers_hook", "clip", "mixture", "replaced", "replaced_layers"}
FOUNDATIONS |= {"gguf_types", "gguf_models", "gguf_pieces", "gguf_tokenizer"}
MIDDLE = {
    "checkpoint",
    "output",
    "skeleton",
    "stream",
    "layer_path",
    "calibrate",
    "methods",
    "evaluate",
}
MIDDLE |= {"sources", "inspect", "model_config", "head", "scoring", "eval_plan", "eval_journal"}
MIDDLE |= {"evaluate", "eval_tasks", "harness", "permute", "tune", "resume", "gguf_plan"}
MIDDLE |= {"packed_linear", "hf", "new_output"}
TOP = {"plan", "run", "demo", "verify", "tables", "card", "options", "cli", "estimate"}
TOP |= {"layer_run", "survey", "allocate", "codes", "budget", "unused", "export", "memory_plan"}
TOP |= {
    "console",
    "eval_command",
    "gguf_export",
    "driver",
    "depth",
    "stages",
    "flexi",
    "train_command",
}


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: Path) -> str:
    """`methods` for methods/wanda.py, `run` for run.py."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imports(path: Path) -> Iterator[str]:
    """Every imported name, those in functions and in `if TYPE_CHECKING` too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)}: imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    """The modules of the package that `path` names, itself left out."""
    found = set()
    for name in imports(path):
        parts = name.split(".")
        known = len(parts) > 1 and (
            (PACKAGE / f"{parts[1]}.py").exists() or (PACKAGE / parts[1]).is_dir()
        )
        if parts[0] == "rsprune" and known:
            found.add(parts[1])
    return found - {module_of(path)}


def test_the_parser_sees_what_is_there():
    assert {"plan", "calibrate", "methods", "output"} <= own_imports(PACKAGE / "run.py")
    assert "torch" in set(imports(PACKAGE / "stream.py"))
    assert len(MODULES) > 20
    assert len(CRATE_FILES) > 15


@pytest.mark.parametrize("path", MODULES, ids=short)
def test_imports_point_downwards(path: Path):
    above = {**dict.fromkeys(FOUNDATIONS, MIDDLE | TOP), **dict.fromkeys(MIDDLE, TOP)}
    assert own_imports(path) & above.get(module_of(path), set()) == set()


def test_nothing_imports_the_command_line():
    importers = {module_of(path) for path in MODULES if "cli" in own_imports(path)}
    assert importers == {"__main__"}


def test_no_cycles():
    uses: dict[str, set[str]] = {}
    for path in MODULES:
        if module_of(path) != "__init__":
            uses.setdefault(module_of(path), set()).update(own_imports(path))
    while leaves := {name for name, used in uses.items() if not used & set(uses)}:
        for name in leaves:
            del uses[name]
    assert uses == {}


@pytest.mark.parametrize("path", sorted((PACKAGE / "methods").glob("*.py")), ids=short)
def test_methods_know_neither_torch_nor_where_numbers_come_from(path: Path):
    assert not any(name.partition(".")[0] in ("torch", "transformers") for name in imports(path))
    assert own_imports(path) <= {"config", "errors"}
    assert len(path.read_text().splitlines()) <= 200


def test_calibration_knows_only_what_statistics_methods_need():
    below = {"calibrate", "layer_path", "blocks", "windows", "stream", "skeleton", "checkpoint"}
    for path in MODULES:
        if module_of(path) in below:
            methods = {name for name in imports(path) if name.startswith("rsprune.methods")}
            assert methods <= {"rsprune.methods.base.Inputs"}, short(path)


def test_the_slow_twins_are_not_part_of_the_program():
    for path in MODULES:
        assert not any("reference" in name.split(".") for name in imports(path)), short(path)


def test_only_the_command_line_prints():
    printing = set()
    for path in MODULES:
        calls = (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call))
        if any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls):
            printing.add(module_of(path))
    assert "console" in printing
    assert printing <= {"cli", "console", "eval_command", "progress"}


@pytest.mark.parametrize("path", SOURCES, ids=short)
def test_files_are_short(path: Path):
    assert len(path.read_text().splitlines()) <= 400


def code(path: Path) -> str:
    """Rust without its comments."""
    return re.sub(r"//.*", "", path.read_text())


def test_one_file_names_rayon():
    naming = {short(path) for path in RUST_FILES if re.search(r"\brayon\b", code(path))}
    assert naming == {"rust/rsprune-core/src/par.rs"}


@pytest.mark.parametrize("path", RUST_FILES, ids=short)
def test_torch_is_nowhere_and_python_not_in_the_core(path: Path):
    assert not re.search(r"\b(torch|tch)\b", code(path))
    if CORE in path.parents:
        assert not re.search(r"\b(pyo3|numpy)\b", code(path))
        assert not re.search(r"\be?print(ln)?!", code(path)) or "tests" in path.parts


def test_dependencies_of_the_crates():
    core = tomllib.loads((CORE / "Cargo.toml").read_text())["dependencies"]
    assert not {"pyo3", "numpy", "tch"} & set(core)
    binding = tomllib.loads((BINDING / "Cargo.toml").read_text())["dependencies"]
    assert {"pyo3", "numpy"} <= set(binding)
    assert "rayon" not in binding
    for path in (CORE, BINDING):
        pins = tomllib.loads((path / "Cargo.toml").read_text())["dependencies"].values()
        assert all(isinstance(pin, dict) and pin.get("workspace") for pin in pins), short(path)


LOWER = {
    "error": set(),
    "float": {"error"},
    "disk": set(),
    "kernels": {"error"},
    "buffer": {"disk", "error"},
    "par": {"buffer", "error"},
    "pattern": {"error"},
    "linalg": {"buffer", "error", "float", "kernels", "par"},
    "shard": {"disk", "error", "float"},
    "pack": {"error", "float", "pattern"},
    "packed": {"error", "float", "kernels", "linalg", "pack", "par"},
    "solve": {"buffer", "error", "float", "kernels", "par", "pattern", "linalg"},
    "binarize": {"buffer", "error", "float", "kernels", "par", "pattern", "linalg"}
    | {"pack", "solve"},
    "lowrank": {"buffer", "error", "float", "kernels", "par", "linalg"},
}
"""Module of the core -> what it may use."""


@pytest.mark.parametrize("path", CRATE_FILES, ids=short)
def test_arrows_of_the_core(path: Path):
    module = path.relative_to(CORE / "src").with_suffix("").parts[0]
    if module == "lib":
        return
    used = set(re.findall(r"\bcrate::(\w+)", code(path))) - {module}
    modules = {name for name in used if name[0].islower()}
    assert modules <= LOWER[module]


def test_unsafe_code_is_opened_with_a_reason():
    workspace = tomllib.loads((ROOT / "Cargo.toml").read_text())
    assert workspace["workspace"]["lints"]["rust"]["unsafe_code"] == "deny"
    openings = 0
    for path in RUST_FILES:
        lines = path.read_text().splitlines()
        opened = [line for line in lines if "allow(unsafe_code)" in line]
        for line in opened:
            assert re.search(r"\] // \w.{10,}", line), f"{short(path)}: {line.strip()}"
        assert opened or not re.search(r"\bunsafe\s*(fn|impl|\{)", code(path)), short(path)
        openings += len(opened)
    assert openings > 3


def test_the_version_stands_in_one_place():
    version = tomllib.loads((ROOT / "Cargo.toml").read_text())["workspace"]["package"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    places = []
    ours = [path for path in SOURCES if ROOT / "tests" not in path.parents]
    files = itertools.chain(ours, *(ROOT.glob(f"{d}*.toml") for d in ("", "rust/*/")))
    for path in files:
        if re.search(rf"version\w*\s*=\s*[\"']{re.escape(version)}[\"']", path.read_text()):
            places.append(short(path))
    assert places == ["Cargo.toml"]
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"]
    for crate in (CORE, BINDING):
        package = tomllib.loads((crate / "Cargo.toml").read_text())["package"]
        assert package["version"] == {"workspace": True}
