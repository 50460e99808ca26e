"""Stand-ins for removed layers: what they compute, that they were measured, and what was chosen."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from replaced_models import OPTIONS, RUNS, blocks_of
from tiny_models import ordinary, tensors_of, token_ids

from rsprune import Config, compress, load_report, perplexity, reference
from rsprune.data import load_texts
from rsprune.driver import estimated_plan
from rsprune.errors import DoesNotFitError, UsageError
from rsprune.flexi.card import stand_ins
from rsprune.flexi.choose import choose
from rsprune.flexi.plan import per_rank
from rsprune.flexi.site import StandIn
from rsprune.mixture import interleaved
from rsprune.replaced_layers import normalised
from rsprune.verify import verify

Made = Callable[[str], Path]


def slow_twin(model: Path, out: Path) -> Any:
    """The output as an ordinary model of transformers: every adapter multiplied out, what follows
    a layer in a hook. Knows nothing of rsprune but the names in its files."""
    twin, tensors = ordinary(model), {n: t.float() for n, t in tensors_of(out).items()}
    blocks, layers = blocks_of(out), []
    count = json.loads((out / "config.json").read_text())["num_hidden_layers"]
    for number in range(count):
        layer = copy.deepcopy(twin.model.layers[0])
        layer.self_attn.layer_idx = number
        block, prefix = blocks.get(number, {}), f"model.layers.{number}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        source = f"model.layers.{block.get('source')}."
        for name, parameter in layer.named_parameters():
            linear = name.removesuffix(".weight")
            a, b = own.get(f"{linear}.lora_A.weight"), own.get(f"{linear}.lora_B.weight")
            if "proj" in name and "source" in block:
                value = tensors[source + name] * own.get(f"{linear}.gain", torch.ones(1))[:, None]
                if f"{linear}.adapter.lora_A.weight" in own:
                    inner = own[f"{linear}.adapter.lora_A.weight"]
                    value = value + own[f"{linear}.adapter.lora_B.weight"] @ inner
            else:
                value = own[name] if a is None or b is None else b @ a
            parameter.copy_(value)
        layer.register_forward_hook(behind(own, block))
        layers.append(layer)
    twin.model.layers = torch.nn.ModuleList(layers)
    twin.config.num_hidden_layers = count
    twin.lm_head.weight.copy_(tensors["lm_head.weight"])
    return twin


def behind(own: dict[str, torch.Tensor], block: dict[str, Any]) -> Any:
    def hook(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        for place in range(len(block.get("maps", []))):
            a, b = (own[f"maps.{place}.lora_{leaf}.weight"] for leaf in "AB")
            output = output + output @ a.T @ b.T
        if block.get("normalised"):
            deviation = output.var(-1, unbiased=False, keepdim=True).add(1e-6).sqrt()
            output = (output - output.mean(-1, keepdim=True)) / deviation * own["output_gamma"]
        return output

    return hook


@pytest.mark.parametrize("name", RUNS)
def test_the_output_computes_what_its_tensors_say(
    name: str, deep: Callable[[str], Path], replaced: Made, text: Path
) -> None:
    import rsprune.hf  # noqa: F401 registers the loader

    out = replaced(name)
    assert verify(out) == []
    assert (name == "fold") == (blocks_of(out) == {})
    twin, ids = slow_twin(deep("llama"), out), token_ids(2, 24)
    expected = twin(ids).logits
    assert not torch.allclose(expected, ordinary(deep("llama"))(ids).logits, atol=1e-2)
    assert torch.allclose(ordinary(out)(ids).logits, expected, atol=2e-4)
    found = perplexity(str(out), text, seq_len=32, windows=3, threads=1)
    tokens = torch.tensor(list(text.read_bytes()[: 3 * 32])).reshape(3, 32)
    logits = twin(tokens).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert found.loss == pytest.approx(float(loss), abs=1e-4)


def hidden_states(model: Any, ids: torch.Tensor, layer: int) -> torch.Tensor:
    """What enters layer `layer` (or leaves the last one), before any final norm."""
    caught = []
    module = model.model.norm if layer == len(model.model.layers) else model.model.layers[layer]
    handle = module.register_forward_pre_hook(
        lambda m, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"]),
        with_kwargs=True,
    )
    model(ids)
    handle.remove()
    return caught[0]


def calibration_of(model: Path, documents: Path) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers import AutoTokenizer

    given = interleaved(
        [load_texts(str(documents))], AutoTokenizer.from_pretrained(model), samples=6, seq_len=32,
        seed=0, heldout=0.34,
    )  # fmt: skip
    return given.calibration, given.heldout


@pytest.mark.parametrize("name", ["default", "map", "shared", "own", "svd", "faithful"])
def test_reported_errors_are_those_of_the_stored_model(
    name: str, deep: Callable[[str], Path], replaced: Made, documents: Path
) -> None:
    model, out = deep("llama"), replaced(name)
    record = stand_ins(load_report(out))[-1]
    dense, twin = ordinary(model), slow_twin(model, out)
    last, positions = record["block"], [
        p["origin"] for layer in load_report(out).layers for p in layer["positions"]
    ]  # fmt: skip
    behind_it = next(n for n, origin in enumerate(positions) if origin > last)
    for ids, reported in zip(calibration_of(model, documents), record["errors"], strict=True):
        y, found = hidden_states(dense, ids, last + 1), hidden_states(twin, ids, behind_it)
        errors = (found - y).square().sum(-1) / y.square().sum(-1)
        assert float(errors.mean()) == pytest.approx(reported, rel=1e-3)


def test_a_map_is_the_best_of_its_rank(
    deep: Callable[[str], Path], documents: Path, tmp_path: Path
) -> None:
    options = {**OPTIONS, "remove": "1", "heldout": 0.0, "replace": ("map",)}
    out = tmp_path / "out"
    compress(deep("llama"), out, Config(calibration=str(documents), **options))
    (record,) = stand_ins(load_report(out))
    dense, index = ordinary(deep("llama")), record["block"]
    ids = torch.cat(calibration_of(deep("llama"), documents))
    x, y = (hidden_states(dense, ids, n).flatten(0, 1).double() for n in (index, index + 1))
    weights = 1 / y.norm(dim=-1, keepdim=True)
    rows, targets = (x * weights).numpy(), ((y - x) * weights).numpy()
    best = reference.reduced_rank(rows, targets, rank=8, damping=0.1)
    tensors = tensors_of(out)
    inner, outer = (
        tensors[f"model.layers.{index - 1}.maps.0.lora_{leaf}.weight"].double().numpy()
        for leaf in "AB"
    )

    def objective(d: np.ndarray) -> float:
        penalty = 0.1 * np.square(d * np.sqrt(np.square(rows).sum(0))).sum()
        return float(np.square(targets - rows @ d.T).sum() + penalty)

    assert objective(outer @ inner) <= 1.002 * objective(best)  # rounded to bfloat16
    assert objective(best) < 0.9 * objective(np.zeros_like(best))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "opt", "gpt_neox", "phi3"])
def test_no_stand_in_is_worse_than_deletion(
    kind: str, deep: Callable[[str], Path], documents: Path, tmp_path: Path
) -> None:
    import rsprune.hf  # noqa: F401 registers the loader

    out, options = tmp_path / "out", {**OPTIONS, "remove": "2"}
    compress(deep(kind), out, Config(calibration=str(documents), **options))
    rows = stand_ins(load_report(out))
    assert len(rows) == 2
    for row in rows:
        deleted = row["candidates"][0]
        assert deleted["option"] == "delete"
        assert row["errors"][0] <= deleted["calibration"]
        assert row["errors"][1] <= deleted["heldout"]
        names = {each["option"] for each in row["candidates"]}
        assert {"delete", "own", "map"} <= names
        assert ("shared" in names) == (kind not in ("gemma2", "gemma3"))
    assert verify(out) == []
    assert torch.isfinite(ordinary(out)(token_ids(1, 12)).logits).all()


def measured(option: str, calibration: float, heldout: float, nbytes: int) -> StandIn:
    tensors = {"t": torch.zeros(nbytes, dtype=torch.uint8)}
    return StandIn(option, tensors=tensors, errors=(calibration, heldout))


def test_the_choice_goes_by_drop_a_byte() -> None:
    deleted = measured("delete", 0.5, 0.5, 0)
    small, large = measured("map", 0.4, 0.4, 100), measured("own", 0.1, 0.1, 1000)
    assert choose([deleted, large, small]).paid is small
    assert choose([deleted, large, measured("map", 0.4, 0.4, 300)]).paid is large
    assert choose([deleted, measured("map", 0.6, 0.1, 100)]).final is deleted  # over-fitted
    assert choose([deleted, measured("map", 0.4, 0.499, 100)]).final is deleted  # not worth it
    fold = measured("fold", 0.3, 0.3, 0)
    chosen = choose([deleted, fold, large, measured("map", 0.29, 0.299, 100)])
    assert (chosen.free, chosen.paid) == (fold, large)
    assert choose([deleted, measured("fold", 0.6, 0.4, 0)]).free is deleted
    assert "the largest drop a stored byte" in chosen.record["why"]


def test_normalisation_is_as_published() -> None:
    hidden = torch.randn(3, 5, 16, dtype=torch.float64)
    gamma = torch.rand(16, dtype=torch.float64)
    found = normalised(hidden, gamma) / gamma
    assert torch.allclose(found.mean(-1), torch.zeros(3, 5, dtype=torch.float64), atol=1e-12)
    deviation = found.std(-1, unbiased=False)
    assert torch.allclose(deviation, torch.ones(3, 5, dtype=torch.float64), atol=1e-5)


def test_published_sizes() -> None:
    """Llama-2-7B: 202 M parameters a block, 78,080 per rank over all seven linears."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=1, num_attention_heads=32
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)

    class Skeleton:
        layers = model.model.layers

    class Opened:
        skeleton = Skeleton()

    assert sum(p.numel() for p in model.model.layers[0].parameters()) == 202_383_360
    assert per_rank(Opened(), 0) == 78_080  # type: ignore[arg-type]


def test_stored_bytes_are_those_of_the_files(replaced: Made, deep: Callable[[str], Path]) -> None:
    for name in ("map", "shared", "own"):
        extra = sum(row["bytes"] for row in stand_ins(load_report(replaced(name))))
        whole = sum(t.nbytes for t in tensors_of(replaced(name)).values())
        layer = sum(
            t.nbytes
            for n, t in tensors_of(deep("llama")).items()
            if n.startswith("model.layers.0.")
        )
        dense = sum(t.nbytes for t in tensors_of(deep("llama")).values())
        assert extra > 0
        assert whole == dense - 3 * layer + extra


def test_recovery_keeps_what_is_better(
    deep: Callable[[str], Path], documents: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = {**OPTIONS, "replace": ("shared",), "recover": True, "tune_steps": 12}
    compress(deep("llama"), out, Config(calibration=str(documents), **options))
    for row in stand_ins(load_report(out)):
        before, after = row["recovery"]["before"], row["recovery"]["after"]
        assert row["recovery"]["kept"] == (after[0] <= before[0] and after[1] <= before[1])
        assert row["errors"] == (after if row["recovery"]["kept"] else before)
        assert not math.isnan(after[1])
    assert any(row["recovery"]["kept"] for row in stand_ins(load_report(out)))
    assert verify(out) == []


REFUSALS = [
    ({"remove": None}, "method flexigpt: expected either remove or extend, found neither"),
    ({"extend": 1}, "method flexigpt: expected either remove or extend, found both"),
    ({"protect": (0, 1)}, "option protect: expected at least 1 layer at the start for flexigpt"),
    ({"remove": "5"}, "option remove: expected at most 4 of 6 layers"),
    ({"remove": None, "extend": 7}, "option extend: expected at most 6, the model's layers"),
]


@pytest.mark.parametrize(("options", "expected"), REFUSALS)
def test_refusals_come_before_any_work(
    options: dict[str, Any], expected: str, deep: Callable[[str], Path], documents: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    config = Config(calibration=str(documents), **{**OPTIONS, **options})
    with pytest.raises(UsageError, match=expected):
        compress(deep("llama"), tmp_path / "out", config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [{}, {"recover": True}, {"remove": None, "extend": 2}])
def test_plans_are_made_from_shapes(
    options: dict[str, Any], deep: Callable[[str], Path], documents: Path, tmp_path: Path
) -> None:
    config = Config(calibration=str(documents), **{**OPTIONS, **options})
    plan, stages = estimated_plan(deep("llama"), config, tmp_path / "out")
    assert plan.layers == 6
    assert plan.peak_bytes == sum(size for _, size in plan.memory)
    assert {"read and check", "write"} <= {stage.name for stage in stages}
    assert not (tmp_path / "out").exists()
    small = Config(calibration=str(documents), **{**OPTIONS, **options, "memory": 2**20})
    with pytest.raises(DoesNotFitError, match="memory 1 MiB: too small for this plan"):
        estimated_plan(deep("llama"), small, tmp_path / "out")


def test_experts_are_refused_by_name(
    tiny: Callable[..., Path], documents: Path, tmp_path: Path
) -> None:
    config = Config(calibration=str(documents), **{**OPTIONS, "remove": "1"})
    with pytest.raises(UsageError, match="layer 0: has experts, for which there is no shared or"):
        compress(tiny("mixtral"), tmp_path / "out", config)


def test_an_option_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match=r"option replace: .*found 'prune'"):
        Config.create(replace="fold,prune")
    assert Config.create(replace="fold,map").replace == ("fold", "map")
