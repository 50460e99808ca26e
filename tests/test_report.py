"""The journal is readable line by line, and what is read is what was written."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from rsprune.card import model_card
from rsprune.errors import RspruneError
from rsprune.report import (
    REPORT_NAME,
    Journal,
    Report,
    by_kind,
    geometric_mean,
    kind_of,
    load_report,
)
from rsprune.tables import certificate_table, size, summary_table

CONFIG = {"method": "sparsegpt", "pattern": "2:4", "seed": 0}


def tensor(layer: int, kind: str, error: float | None, **more: Any) -> dict[str, Any]:
    fields = {"name": f"model.layers.{layer}.{kind}.weight", "layer": layer, "shape": [4, 8]}
    fields |= {"dtype": "BF16", "error": error, "heldout_error": error, "sparsity": 0.5}
    return fields | {"seconds": 1.5, "pattern": "2:4", "scope": "row"} | more


def write_report(folder: Path, *, summary: bool = True) -> Report:
    journal = Journal(folder)
    calibration = {"source": "c4.jsonl", "note": "field guessed", "samples": 32, "seq_len": 2048}
    journal.write(
        "run",
        version="0.1.0",
        config=CONFIG,
        model="org/base",
        architecture="LlamaForCausalLM",
        layers=2,
        calibration=calibration | {"heldout": 4},
        kernel="avx2",
        versions={"torch": "2.15", "transformers": "5.23"},
    )
    for layer in range(2):
        for kind, error in (("self_attn.q_proj", 0.01), ("mlp.down_proj", 0.04)):
            journal.write("tensor", **tensor(layer, kind, error * 4**layer))
        journal.write("layer", layer=layer, file=f"{layer}.safetensors", bytes=10, sha256="00")
    journal.write("file", file="rest.safetensors", bytes=10, sha256="00")
    if summary:
        seconds = {"embed": 1.0, "solve": 200.0}
        weights = {"weights": 128, "zeros": 64, "bytes_written": 5 << 20, "passes_per_layer": 3}
        journal.write(
            "summary", seconds=seconds, peak_rss_anon=1 << 30, import_rss_anon=1 << 28, **weights
        )
    journal.close()
    return load_report(folder)


def test_a_report_is_read_as_written(tmp_path: Path):
    report = write_report(tmp_path)
    assert report.run["config"] == CONFIG
    assert [record["layer"] for record in report.layers] == [0, 1]
    assert report.files == [{"file": "rest.safetensors", "bytes": 10, "sha256": "00"}]
    assert report.tensors[0] == tensor(0, "self_attn.q_proj", 0.01)
    assert report.summary is not None
    assert report.summary["weights"] == 128
    assert write_report(tmp_path, summary=False).folder == tmp_path


def test_each_record_is_on_disk_at_once_as_one_sorted_json_line(tmp_path: Path):
    journal = Journal(tmp_path)
    values = {"lambda": np.float32(0.5), "rounds": np.int64(3), "path": Path("a"), "shape": (2, 3)}
    journal.write("tensor", name="w", error=float("nan"), nested={"x": [float("inf")]}, **values)
    (line,) = (tmp_path / REPORT_NAME).read_text().splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    record = json.loads(line, parse_constant=refuse)
    assert list(record) == sorted(record)
    assert record["error"] is None
    assert record["nested"] == {"x": [None]}
    assert (record["lambda"], record["rounds"], record["shape"]) == (0.5, 3, [2, 3])
    with pytest.raises(ValueError, match="expected one of run"):
        journal.write("tensors", name="w")
    journal.close()
    journal.close()


def test_the_last_record_of_a_tensor_counts(tmp_path: Path):
    write_report(tmp_path)
    journal = Journal(tmp_path)
    journal.write("tensor", **tensor(0, "self_attn.q_proj", 0.5))
    journal.close()
    report = load_report(tmp_path)
    assert len(report.tensors) == 4
    assert report.tensors[0]["error"] == 0.5


def test_a_torn_line_is_dropped_when_a_run_goes_on(tmp_path: Path):
    write_report(tmp_path, summary=False)
    path = tmp_path / REPORT_NAME
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "tens')
    with pytest.raises(RspruneError, match=f"line {len(whole.splitlines()) + 1}: .*bad JSON"):
        load_report(tmp_path)
    journal = Journal(tmp_path)
    journal.write("layer", layer=9)
    journal.close()
    assert path.read_bytes().startswith(whole)
    assert load_report(tmp_path).layers[-1] == {"layer": 9}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, f"{REPORT_NAME}: the report cannot be read"),
        ("", "expected a record of kind run"),
        ("[1]\n", "line 1: expected a kind of run"),
        ('{"kind": "other"}\n', "line 1: expected a kind of run, .* found 'other'"),
        ('{"kind": "run"}\n{"kind": "tensor"}\n', "line 2: expected 'name' in a tensor record"),
        ("\xff\n", "line 1: expected a JSON object"),
    ],
)
def test_a_bad_report_is_refused_by_file_and_line(
    tmp_path: Path, content: str | None, message: str
):
    if content is not None:
        (tmp_path / REPORT_NAME).write_bytes(content.encode("latin-1"))
    with pytest.raises(RspruneError, match=message) as caught:
        load_report(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_kinds_are_what_layers_have_in_common():
    assert kind_of("model.layers.3.mlp.down_proj.weight") == "mlp.down_proj"
    assert kind_of("model.layers.3.mlp.experts.17.w1.weight") == "mlp.experts.*.w1"
    assert kind_of("lm_head.weight") == "lm_head"
    assert kind_of("model.norms.3") == "model.norms.*"


def test_errors_are_averaged_geometrically(tmp_path: Path):
    rows = {row.kind: row for row in by_kind(write_report(tmp_path).tensors)}
    assert list(rows) == ["self_attn.q_proj", "mlp.down_proj"]
    assert rows["self_attn.q_proj"].error == pytest.approx(0.02)  # of 0.01 and 0.04
    assert rows["mlp.down_proj"].seconds == 3.0
    assert rows["mlp.down_proj"].sparsity == 0.5
    assert geometric_mean([None, None]) is None
    assert geometric_mean([0.0, 0.5]) == 0.0
    assert geometric_mean([None, 0.5]) == pytest.approx(0.5)


def rendered(table: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    text = out.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    return text


def test_tables_fit_in_80_columns_with_every_number(tmp_path: Path):
    report = write_report(tmp_path)
    kinds = rendered(certificate_table(report))
    assert "self_attn.q_proj" in kinds
    assert "0.0200" in kinds
    assert "…" not in kinds
    every = rendered(certificate_table(report, every=True))
    assert "model.layers.1.mlp.down_proj" in every
    assert "0.1600" in every
    assert "…" not in every
    summary = rendered(summary_table(report))
    assert "3 min 20 s" in summary
    assert "1.0 GiB" in summary
    assert "64 of 128 weights (50.0%)" in summary


def test_an_unfinished_run_is_called_so(tmp_path: Path):
    assert "unfinished" in rendered(summary_table(write_report(tmp_path, summary=False)))


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes(count: int | None, text: str):
    assert size(count) == text


def test_the_card_takes_over_the_licence_and_claims_no_speed(tmp_path: Path):
    source = "---\nlicense: other\nlicense_name: my-licence\ntags: [chat]\n---\n# Base\n"
    card = model_card(write_report(tmp_path), source_card=source, base_model="org/base")
    _, front, body = card.split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields["library_name"] == "transformers"
    assert fields["base_model"] == "org/base"
    assert (fields["license"], fields["license_name"]) == ("other", "my-licence")
    assert fields["tags"] == ["pruned", "rsprune", "2:4", "sparsegpt"]
    assert "| `mlp.down_proj` | 2 | - | 0.0800 | 0.0800 | 50.0% |" in body
    assert "the files are as large as before" in body
    assert "AutoModelForCausalLM.from_pretrained" in body
    assert "32 windows of 2048 tokens of `c4.jsonl`, 4 of them held out" in body
    assert "rsprune compress org/base OUT --recipe recipe.yaml" in body
    assert "faster" not in body


@pytest.mark.parametrize("source", [None, "# no front matter", "---\n: [broken\n---\n"])
def test_the_card_of_a_local_model_without_a_card(tmp_path: Path, source: str | None):
    card = model_card(write_report(tmp_path), source_card=source, base_model="/models/base")
    fields = yaml.safe_load(card.split("---\n", 2)[1])
    assert "license" not in fields
    assert "base_model" not in fields  # a path is no hub id
    assert "# base, pruned to 2:4" in card
    assert "/models" not in card  # nobody else is told where it lay
