"""Mixture-of-experts: the same mathematics, one Gram an expert, routers as they were."""

import itertools
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_calibrate import ALL_INPUTS, Naive, Walk, close, contents, label
from test_streaming import streamed_logits
from tiny_models import LAYERS, SIZES, Run, make, ordinary, tensors_of, token_ids
from torch.nn.functional import linear, silu

from rsprune.blocks import Group
from rsprune.calibrate import GroupStatistics
from rsprune.checkpoint import Checkpoint
from rsprune.config import Config
from rsprune.driver import make_plan
from rsprune.errors import UsageError
from rsprune.experts import FUSED, Experts, unfuse
from rsprune.methods.base import Inputs
from rsprune.methods.few_tokens import DATA_FREE, too_few
from rsprune.progress import NullProgress
from rsprune.report import load_report
from rsprune.run import compress
from rsprune.skeleton import Skeleton
from rsprune.tables import certificate_table
from rsprune.verify import verify
from rsprune.windows import Split

Runs = Callable[[str, str, str], Run]
Tiny = Callable[..., Path]
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
CASES = [
    (kind, method, "2:4")
    for kind, method in itertools.product(
        ("mixtral", "qwen3_moe"), ("magnitude", "wanda", "sparsegpt")
    )
]


def experts_of(layer: Any) -> Any:
    return layer.mlp.experts


def moe_layers(model: Any) -> list[Any]:
    """Those decoder layers of a model that have experts."""
    return [layer for layer in model.model.layers if hasattr(layer.mlp, "experts")]


@pytest.mark.parametrize("kind", FAMILIES)
def test_experts_compute_what_the_fused_ones_do(tiny: Tiny, kind: str):
    fused = experts_of(ordinary(tiny(kind)).model.layers[2])
    assert type(fused).__name__ in FUSED
    skeleton = Skeleton(Checkpoint.open(tiny(kind)))
    skeleton.load_layer(2)
    ours = experts_of(skeleton.layers[2])
    assert isinstance(ours, Experts)
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(40, 32, generator=generator)
    numbers = torch.rand(40, len(ours), generator=generator).topk(2).indices
    numbers[numbers == 1] = 0  # no token reaches expert 1
    numbers[:, 1] = torch.where(numbers[:, 0] == numbers[:, 1], 3, numbers[:, 1])
    shares = torch.rand(40, 2, generator=generator)
    expected = fused(hidden, numbers, shares)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(hidden, numbers, shares), expected, rtol=1e-5, atol=1e-5)


def test_every_known_class_is_compared():
    classes = {type(experts_of(moe_layers(make(kind))[0])).__name__ for kind in FAMILIES}
    assert classes == set(FUSED)


def test_weights_of_experts_stay_on_the_disk(tiny: Tiny):
    skeleton = Skeleton(Checkpoint.open(tiny("mixtral")))
    skeleton.load_layer(0)
    layer = skeleton.layers[0]
    types = {name: p.dtype for name, p in layer.named_parameters()}
    assert {t for n, t in types.items() if ".experts." in n} == {torch.bfloat16}
    others = {n: t for n, t in types.items() if ".experts." not in n}
    assert {t for n, t in others.items() if "proj" in n} == {torch.bfloat16}  # stored, in memory
    assert {t for n, t in others.items() if "proj" not in n} == {torch.float32}
    skeleton.drop_layer(0)
    assert all(p.device.type == "meta" for p in skeleton.model.parameters())


class FusedNaive(Naive):
    """`Naive` for models whose experts are fused."""

    def weight(self, linear: str) -> torch.Tensor:
        if ".experts." not in linear:
            return super().weight(linear)
        owner, _, rest = linear.partition(".experts.")
        expert, leaf = rest.split(".")
        return projection(self.pruned.get_submodule(f"{owner}.experts"), int(expert), leaf)

    def routed(self, model: Any, module: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per window, what enters the experts: hidden states and expert numbers."""
        found = []
        hooked = model.get_submodule(module)
        handle = hooked.register_forward_pre_hook(lambda _, args: found.append(args[:2]))
        for ids in self.ids:
            model(ids[None])
        handle.remove()
        return found


def projection(fused: Any, expert: int, leaf: str) -> torch.Tensor:
    """An expert's matrix as a view of the fused ones."""
    gate, up = fused.gate_up_proj[expert].chunk(2)
    down = fused.down_proj[expert]
    return {"w1": gate, "w3": up, "w2": down, "gate_proj": gate, "up_proj": up, "down_proj": down}[
        leaf
    ]


class MoeWalk(Walk):
    """`Walk` over a model with experts; what they see is worked out from the fused ones."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        super().__init__(folder, inputs)
        self.naive = FusedNaive(folder, inputs, self.ids)
        self.tokens: dict[tuple[int, int], int] = {}

    def expected(self, index: int) -> dict[Group, Any]:
        naive, prefix = self.naive, self.skeleton.layer_prefix
        structure = self.opening.structures[index]
        own_model = naive.own(prefix, index)
        found: dict[Group, Any] = {}
        for group in structure.groups:
            module = f"{prefix}.{index}.{group.linears[0]}"
            if group.expert is None:
                found[group] = tuple(naive.seen(m, [module])[0] for m in (own_model, naive.dense))
        if structure.experts is None:
            return found
        name = f"{prefix}.{index}.{structure.experts}"
        own, dense = naive.routed(own_model, name), naive.routed(naive.dense, name)
        for group in structure.groups:
            if group.expert is not None:
                found[group] = tuple(
                    self.gathered(group, own, path, model.get_submodule(name))
                    for path, model in ((own, own_model), (dense, naive.dense))
                )
        return found

    def gathered(self, group: Group, own: Any, path: Any, fused: Any) -> list[torch.Tensor]:
        """Per window the group's inputs, for the tokens that the own path's router chose."""
        inputs = []
        for (_, numbers), (hidden, _) in zip(own, path, strict=True):
            x = hidden[(numbers == group.expert).any(1)]
            if len(group.linears) == 1:
                gate, up = (projection(fused, group.expert, n) for n in ("w1", "w3"))
                x = silu(linear(x, gate)) * linear(x, up)
            inputs.append(x)
        return inputs

    def check_group(self, sums: GroupStatistics, own: Any, dense: Any) -> None:
        if isinstance(own, torch.Tensor):
            super().check_group(sums, own, dense)
            return
        if self.inputs.target == "own":
            dense = own
        assert sums.heldout is not None
        for part, chosen in ((sums.calibration, slice(3)), (sums.heldout, slice(3, None))):
            x, y = (torch.cat(rows[chosen]).double() for rows in (own, dense))
            assert part.tokens == len(x)
            if len(x) == 0:
                assert not part.gram().any()
                continue
            close(part.gram(), x.T @ x)
            if torch.equal(x, y):
                assert part.cross() is None or not part.cross().any()
            else:
                close(part.cross(), (x - y).T @ x)
                close(part.drift(), (x - y).T @ (x - y))


@pytest.mark.parametrize("inputs", ALL_INPUTS, ids=label)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_sums_of_every_expert(tiny: Tiny, kind: str, inputs: Inputs):
    walk = MoeWalk(tiny(kind), inputs)
    dense, own = walk.start()
    for index in range(LAYERS):
        dense, own, _ = walk.layer(index, dense, own)
        module = [f"{walk.skeleton.layer_prefix}.{index}"]
        (unpruned,) = walk.naive.seen(walk.naive.dense, module, outputs=True)
        (pruned,) = walk.naive.seen(walk.naive.pruned, module, outputs=True)
        assert (unpruned - pruned).norm() > 0.1 * unpruned.norm()
        expected = pruned if inputs.propagate == "model" else unpruned
        torch.testing.assert_close(contents(own), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_compressed_models(compressed: Runs, case: Any):
    """Plain transformers loads what was written, and gives the logits that the streaming gives."""
    run, (kind, method, _) = compressed(*case), case
    report, ids = load_report(run.out), token_ids(2, 16)
    assert verify(run.out) == []
    before, after = tensors_of(run.model), tensors_of(run.out)
    assert set(before) == set(after)
    experts = {name for name in before if ".experts." in name}
    assert len(experts) == (3 * 4 * 3 if kind == "mixtral" else 2 * 6 * 3)
    assert experts < {record["name"] for record in report.tensors}
    for record in report.tensors:
        zeros = after[record["name"]] == 0
        assert zeros.reshape(-1, 4).sum(1).min() >= 2
        few = too_few(method, tokens=record["tokens"], columns=record["shape"][1])
        rule = DATA_FREE if few and record["name"] in experts else method
        assert record["method"] == rule
    for name in before:
        if ".mlp.gate.weight" in name or ".block_sparse_moe.gate.weight" in name:
            assert torch.equal(before[name], after[name])
    loaded = ordinary(run.out)(ids).logits
    streamed = streamed_logits(Skeleton(Checkpoint.open(run.out)), ids)
    torch.testing.assert_close(streamed, loaded, rtol=1e-5, atol=1e-5)
    assert (loaded - ordinary(run.model)(ids).logits).abs().max() > 0.1  # it was pruned


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_tokens_are_counted(compressed: Runs, kind: str):
    """Every token goes to two experts; the middle layer of the Qwen model has none."""
    run = compressed(kind, "wanda", "2:4")
    tokens = 4 * 32  # calibration windows without the held-out ones
    found: dict[tuple[int, str], int] = {}
    for record in load_report(run.out).tensors:
        if ".experts." in record["name"]:
            key = record["layer"], record["name"].split(".")[-2]
            found[key] = found.get(key, 0) + record["tokens"]
        else:
            assert record["tokens"] == tokens
    assert set(found.values()) == {2 * tokens}
    assert {layer for layer, _ in found} == ({0, 1, 2} if kind == "mixtral" else {0, 2})


@pytest.fixture(scope="module")
def unreached(tiny: Tiny, documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A model whose first router never chooses expert 2, pruned by SparseGPT."""
    folder = tmp_path_factory.mktemp("unreached")
    model, out = folder / "model", folder / "out"
    shutil.copytree(tiny("qwen3_moe"), model)
    tensors = load_file(model / "model.safetensors")
    gate = tensors["model.layers.0.mlp.gate.weight"]
    gate[1], gate[4], gate[2] = -gate[0], -gate[3], 0  # two of the others have positive logits
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    options: dict[str, Any] = {"samples": 60, "seq_len": 32, "heldout": 0.34, "threads": 1}
    notes = Notes()
    config = Config(calibration=str(documents), method="sparsegpt", **options)
    compress(model, out, config, progress=notes)
    assert [n for n in notes.lines if "layer 1/3" in n and "experts 2" in n and "magnitude" in n]
    return Run(model, out, config)


class Notes(NullProgress):
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_an_expert_that_no_token_reaches(unreached: Run):
    """Pruned by magnitude, with no error claimed; all others by the method of the run."""
    report = load_report(unreached.out)
    before, after = tensors_of(unreached.model), tensors_of(unreached.out)
    starved = [r for r in report.tensors if r["method"] != "sparsegpt"]
    assert {r["name"].rpartition(".experts.")[2] for r in starved} == {
        f"2.{leaf}_proj.weight" for leaf in ("gate", "up", "down")
    }
    for record in starved:
        assert (record["layer"], record["tokens"], record["method"]) == (0, 0, "magnitude")
        assert record["error"] is None
        assert record["heldout_error"] is None
        dense = before[record["name"]].float().abs().reshape(-1, 4)
        kept = (after[record["name"]] != 0).reshape(-1, 4)
        assert (kept.sum(1) == 2).all()
        lost = torch.where(kept, 0.0, dense).amax(1)
        assert (torch.where(kept, dense, torch.inf).amin(1) >= lost).all()
    assert verify(unreached.out) == []
    loaded = ordinary(unreached.out)(token_ids(2, 16)).logits
    streamed = streamed_logits(Skeleton(Checkpoint.open(unreached.out)), token_ids(2, 16))
    torch.testing.assert_close(streamed, loaded, rtol=1e-5, atol=1e-5)


def test_too_few_tokens_are_shown(unreached: Run):
    report = load_report(unreached.out)
    sentence = "3 of 51 tensors lie in experts that saw too few tokens (0 to 0)"
    assert report.few_tokens is not None
    assert sentence in report.few_tokens
    assert sentence in (unreached.out / "README.md").read_text()
    assert sentence in str(certificate_table(report).caption)
    assert report.tensors[0]["tokens"] == 40 * 32


def test_an_unknown_class_of_experts_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(FUSED, "MixtralExperts")
    with pytest.raises(UsageError, match=r"model\.layers\.0\.mlp\.experts: .*found MixtralExperts"):
        Skeleton(Checkpoint.open(tiny("mixtral")))


def test_a_family_that_is_not_known_is_refused(tmp_path: Path):
    from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

    sizes = {**SIZES, "num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
    GraniteMoeForCausalLM(GraniteMoeConfig(**sizes)).save_pretrained(tmp_path)
    pattern = r"model\.layers\.0\.block_sparse_moe\.experts: .*found GraniteMoeExperts"
    with pytest.raises(UsageError, match=pattern):
        Skeleton(Checkpoint.open(tmp_path))


def test_fused_parameters_are_refused_under_any_name():
    class Stack(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = torch.nn.Parameter(torch.empty(2, 3, 4))

    layers = torch.nn.ModuleList([torch.nn.ModuleDict({"mix": Stack()})])
    with pytest.raises(UsageError, match=r"layers\.0\.mix: .*found Stack"):
        unfuse(layers, "layers")
    convolution = torch.nn.ModuleList([torch.nn.Conv1d(2, 3, 4)])
    unfuse(convolution, "layers")


OPTIONS: dict[str, Any] = {"samples": 6, "seq_len": 32, "heldout": 0.34, "threads": 1}
CHOICES: dict[str, dict[str, Any]] = {
    "tuned": {"method": "wanda", "tune_block": True, "tune_steps": 4},
    "allocated": {"method": "sparsegpt", "pattern": "70%", "allocate": True},
    "coded": {"method": "pbs2p-exact", "bits": 2.2},
    "best": {"method": "best", "budget": 1},
    "polished": {"method": "sparsegpt", "refit": True, "search": True},
    "corrected": {"method": "sparsegpt", "target": "dense", "correction": 0.5},
}


@pytest.mark.parametrize("case", CHOICES)
def test_other_options_keep_working(tiny: Tiny, documents: Path, tmp_path: Path, case: str):
    config = Config(calibration=str(documents), **OPTIONS, **CHOICES[case])
    model, out, ids = tiny("mixtral"), tmp_path / "out", token_ids(2, 16)
    report = compress(model, out, config)
    assert verify(out) == []
    methods = {r["method"] for r in report.tensors}
    assert {config.method} <= methods <= {config.method, DATA_FREE}
    streamed = streamed_logits(Skeleton(Checkpoint.open(out)), ids)
    torch.testing.assert_close(streamed, ordinary(out)(ids).logits, rtol=1e-5, atol=1e-5)
    for name, before in tensors_of(model).items():
        if name.endswith("block_sparse_moe.gate.weight"):
            assert torch.equal(tensors_of(out)[name], before)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "fista"])
def test_sums_of_one_expert_at_a_time(
    tiny: Tiny, documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    """Whenever sums are made, those of every other expert are gone."""
    alive: list[weakref.ref[GroupStatistics]] = []
    most, original = [0], GroupStatistics.empty

    def empty(width: int, split: Split, **options: Any) -> GroupStatistics:
        made = original(width, split, **options)
        alive.append(weakref.ref(made))
        most.append(sum(ref() is not None for ref in alive))
        return made

    monkeypatch.setattr(GroupStatistics, "empty", empty)
    config = Config(calibration=str(documents), method=method, **OPTIONS)
    compress(tiny("mixtral"), tmp_path / "out", config)
    assert len(alive) == LAYERS * (2 + 4 * 2)
    assert max(most) == (1 if method == "fista" else 2)


def test_the_plan_counts_one_expert(tiny: Tiny):
    """Grams of the widest stage; weights of experts are not held."""
    options = {**OPTIONS, "heldout": 0.0}
    dense, moe = (
        dict(make_plan(tiny(kind), Config(method="wanda", **options)).memory)
        for kind in ("llama", "mixtral")
    )
    one = [width * (width + 112) // 2 * 4 for width in (32, 64)]
    assert dense["Grams"] == 3 * one[0] + one[1]
    assert moe["Grams"] == one[0] + one[1]
    attention, matrix, router = 32 * 32 * 2 + 32 * 16 * 2, 32 * 64, 4 * 32
    assert dense["decoder layer (as stored)"] == 2 * (attention + 3 * matrix) + 4 * 64
    assert moe["decoder layer (as stored)"] == 2 * attention + 4 * (router + 64)
    assert moe["hidden states"] == dense["hidden states"] * 2  # and what enters the experts


def test_the_plan_warns_of_few_tokens_an_expert(tiny: Tiny):
    enough = make_plan(tiny("mixtral"), Config(**{**OPTIONS, "samples": 8, "heldout": 0.0}))
    assert enough.warnings == []  # 256 tokens, of which an expert sees 128: twice 64
    fewer = make_plan(tiny("mixtral"), Config(**{**OPTIONS, "samples": 6, "heldout": 0.0}))
    assert [w for w in fewer.warnings if "w2.weight: on average 96 of 192" in w and "256" in w]
