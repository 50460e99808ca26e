"""Sums of a layer job against a naive computation: whole models, hooks, no replay, no early stop.

The naive side keeps two whole models, the dense one and the one pruned so far, and runs both from
the token ids for every group; it knows nothing of windows that are stored, stages or replays.
"""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ordinary, token_ids

from rsprune import _core
from rsprune.blocks import Group
from rsprune.calibrate import GroupStatistics, LayerJob
from rsprune.checkpoint import Checkpoint
from rsprune.config import Config
from rsprune.data import calibration_windows, load_texts, split_heldout
from rsprune.errors import RspruneError
from rsprune.memory import PeakWatch
from rsprune.methods.base import Inputs
from rsprune.progress import NullProgress
from rsprune.run import _LayerwiseRun
from rsprune.skeleton import Skeleton, load_tokenizer
from rsprune.stream import Stream
from rsprune.timing import Timing
from rsprune.windows import Split, Windows

TOKENS = 12
SPLIT = Split(calibration=3, heldout=2)
ALL_INPUTS = [
    Inputs(propagate, target, sequential)
    for propagate, target, sequential in itertools.product(
        ("layer", "model"), ("dense", "own"), (False, True)
    )
]
CLIPPED = [
    Inputs("model", "dense", True, correction=0.5, clip_tokens=0.9),
    Inputs("model", "own", False, clip_tokens=0.9),
]
BASELINE = Inputs("model", "own", False)
FISTA = Inputs("layer", "dense", True)


def label(inputs: Inputs) -> str:
    order = "sequential" if inputs.true_sequential else "at once"
    clipped = "-clipped" if inputs.clip_tokens else ""
    return f"{inputs.propagate}-{inputs.target}-{order}{clipped}"


class Naive:
    """The dense model, the pruned one, and what their parts see."""

    def __init__(self, folder: Path, inputs: Inputs, ids: torch.Tensor) -> None:
        self.dense = ordinary(folder)
        self.pruned = copy.deepcopy(self.dense)
        self.inputs = inputs
        self.ids = ids

    def own(self, prefix: str, layer: int) -> Any:
        """What the layer's own inputs come from."""
        if self.inputs.propagate == "model":
            return self.pruned
        mixed = copy.deepcopy(self.dense)
        weights = self.pruned.get_submodule(f"{prefix}.{layer}").state_dict()
        mixed.get_submodule(f"{prefix}.{layer}").load_state_dict(weights)
        return mixed

    def weight(self, linear: str) -> torch.Tensor:
        """A weight of the pruned model, to be changed in place."""
        found: torch.Tensor = self.pruned.get_submodule(linear).weight
        return found

    def seen(self, model: Any, modules: list[str], *, outputs: bool = False) -> list[torch.Tensor]:
        """Inputs (or outputs) [windows, tokens, channels] of `modules`."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in modules}

        def hook(name: str) -> Callable[..., None]:
            def note(module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
                result = output[0] if isinstance(output, tuple) else output
                found[name].append(result if outputs else args[0])

            return note

        handles = [model.get_submodule(n).register_forward_hook(hook(n)) for n in modules]
        for ids in self.ids:
            model(ids[None])
        for handle in handles:
            handle.remove()
        return [torch.cat([t.reshape(1, TOKENS, -1) for t in found[n]]) for n in modules]


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    """Relative to the norm, which must not be zero."""
    reference = expected.numpy()
    scale = np.linalg.norm(reference)
    assert scale > 0
    assert np.linalg.norm(found - reference) <= 1e-5 * scale


def check_sums(sums: _core.Statistics, own: torch.Tensor, dense: torch.Tensor) -> None:
    x = own.double().flatten(0, 1)
    assert sums.tokens == len(x)
    close(sums.gram(), x.T @ x)
    np.testing.assert_allclose(sums.diagonal(), np.diag(sums.gram()))
    if torch.equal(own, dense):
        assert sums.cross() is None or not sums.cross().any()
        assert sums.drift() is None or not sums.drift().any()
        return
    d = x - dense.double().flatten(0, 1)
    assert d.norm() > 1e-2 * x.norm()  # earlier weights were changed: there is something to see
    close(sums.cross(), d.T @ x)
    close(sums.drift(), d.T @ d)


def pruned_bits(weight: torch.Tensor) -> np.ndarray:
    """Every other weight zero, the rest doubled, as the bits of bfloat16."""
    changed = weight.clone()
    changed[:, ::2] = 0
    return (2 * changed).bfloat16().view(torch.int16).numpy().view(np.uint16)


class Walk:
    """Runs layer jobs as `run.py` does, and checks every step against `Naive`."""

    def __init__(self, folder: Path, inputs: Inputs) -> None:
        self.ids = token_ids(SPLIT.count, TOKENS)
        self.inputs = inputs
        self.naive = Naive(folder, inputs, self.ids)
        self.skeleton = Skeleton(Checkpoint.open(folder))
        self.stream = Stream(self.skeleton)
        self.opening = self.stream.open(TOKENS)
        self.rooms: dict[str, Windows] = {}

    def room(self, kind: str, channels: int) -> Windows:
        return self.rooms.setdefault(kind, Windows(SPLIT.count, TOKENS, channels))

    def start(self) -> tuple[Windows, Windows]:
        dense = self.room("hidden 0", self.skeleton.channels)
        for window, hidden in enumerate(self.stream.embed(self.ids)):
            dense.put(window, hidden)
        if self.inputs.propagate == "layer" or self.inputs.target == "own":
            return dense, dense
        own = self.room("own", self.skeleton.channels)
        own.copy_from(dense)
        return dense, own

    def job(self, index: int) -> LayerJob:
        self.skeleton.load_layer(index)
        return LayerJob(
            layer=self.skeleton.layers[index],
            structure=self.opening.structures[index],
            kwargs=self.stream.kwargs(index),
            inputs=self.inputs,
            split=SPLIT,
            threads=1,
            store=lambda kind, channels: self.room(
                f"hidden {(index + 1) % 2}" if kind == "next" else kind, channels
            ),
            pool=self.skeleton.pool,
            where=f"layer {index}",
            timing=Timing(),
        )

    def layer(self, index: int, dense: Windows, own: Windows) -> tuple[Windows, Windows, float]:
        """One layer; the next one's inputs and the passes that it took."""
        job, prefix = self.job(index), f"{self.skeleton.layer_prefix}.{index}"
        old = self.expected(index)  # before any weight of this layer is replaced
        for group, sums in job.groups(dense, own):
            now = self.expected(index) if self.inputs.true_sequential else old
            self.check_group(sums, *now[group])
            for linear in group.linears:
                weight = self.naive.weight(f"{prefix}.{linear}")
                bits = pruned_bits(weight)
                job.set_weight(linear, bits, "BF16")
                weight.copy_(torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16))
        dense, own = job.advance()
        passes = job.passes
        self.skeleton.drop_layer(index)
        return dense, own, passes

    def expected(self, index: int) -> dict[Group, tuple[torch.Tensor, torch.Tensor]]:
        """Own and dense inputs of every group, with the weights as they are now."""
        groups = self.opening.structures[index].groups
        prefix = self.skeleton.layer_prefix
        modules = [f"{prefix}.{index}.{group.linears[0]}" for group in groups]
        own = self.naive.seen(self.naive.own(prefix, index), modules)
        dense = self.naive.seen(self.naive.dense, modules)
        return dict(zip(groups, zip(own, dense, strict=True), strict=True))

    def check_group(self, sums: GroupStatistics, own: torch.Tensor, dense: torch.Tensor) -> None:
        if self.inputs.target == "own":
            dense = own
        dense = torch.lerp(own, dense, self.inputs.correction)
        if limit := self.inputs.clip_tokens:
            norms = own.norm(dim=-1, keepdim=True)
            factor = (limit * norms.median(dim=1, keepdim=True).values / norms).clamp(max=1)
            assert (factor < 1).any()
            own, dense = own * factor, dense * factor
        count = SPLIT.calibration
        assert sums.heldout is not None
        check_sums(sums.calibration, own[:count], dense[:count])
        check_sums(sums.heldout, own[count:], dense[count:])


@pytest.mark.parametrize("inputs", [*ALL_INPUTS, *CLIPPED], ids=label)
@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_sums_and_hidden_states(tiny: Callable[..., Path], kind: str, inputs: Inputs):
    walk = Walk(tiny(kind), inputs)
    dense, own = walk.start()
    for index in range(len(walk.skeleton.layers)):
        dense, own, _ = walk.layer(index, dense, own)
        module = [f"{walk.skeleton.layer_prefix}.{index}"]
        (unpruned,) = walk.naive.seen(walk.naive.dense, module, outputs=True)
        (pruned,) = walk.naive.seen(walk.naive.pruned, module, outputs=True)
        assert (unpruned - pruned).norm() > 0.1 * unpruned.norm()
        expected_own = pruned if inputs.propagate == "model" else unpruned
        torch.testing.assert_close(contents(own), expected_own, rtol=1e-4, atol=1e-5)
        if inputs.propagate == "layer" or inputs.target == "dense":
            torch.testing.assert_close(contents(dense), unpruned, rtol=1e-4, atol=1e-5)
        else:
            assert dense is own


def contents(windows: Windows) -> torch.Tensor:
    device = torch.device("cpu")
    return torch.cat([windows.get(index, device) for index in range(len(windows))])


def shares(walk: Walk) -> list[float]:
    """The share of each group in the weights of a layer."""
    layer, structure = walk.skeleton.layers[0], walk.opening.structures[0]
    sizes = [
        sum(layer.get_submodule(name).weight.numel() for name in group.linears)
        for group in structure.groups
    ]
    return [size / sum(sizes) for size in sizes]


def passes_of(folder: Path, inputs: Inputs) -> tuple[float, list[float]]:
    walk = Walk(folder, inputs)
    *_, passes = walk.layer(0, *walk.start())
    return passes, shares(walk)


def test_passes_of_the_baselines(tiny_llama: Path):
    passes, (*_, down) = passes_of(tiny_llama, BASELINE)
    assert passes == pytest.approx(2 - down)
    assert 1.5 < passes < 1.9


def test_passes_of_independent_layers(tiny_llama: Path):
    passes, _ = passes_of(tiny_llama, Inputs("layer", "own", False))
    assert passes == pytest.approx(1)


def test_passes_of_corrected_sequential_inputs(tiny_llama: Path):
    """Attention runs once on each path; then only the output projection and the MLP do."""
    passes, (qkv, o, gate_up, _) = passes_of(tiny_llama, FISTA)
    dense = 1 + o + (o + gate_up)
    own = qkv + o + (o + gate_up)
    assert passes == pytest.approx(dense + own)


def test_layers_are_left_as_they_were_found(tiny_llama: Path):
    walk = Walk(tiny_llama, FISTA)
    walk.layer(0, *walk.start())
    layer = walk.skeleton.layers[0]
    assert not any("forward" in vars(module) for module in layer.modules())
    hooks = [m for m in layer.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert all(p.device.type == "meta" for p in walk.skeleton.model.parameters())


def test_no_held_out_windows_no_held_out_sums():
    assert GroupStatistics.empty(4, Split(3, 0), corrected=False).heldout is None


def test_activations_that_are_not_finite_are_located(tiny_llama: Path):
    walk = Walk(tiny_llama, BASELINE)
    dense, own = walk.start()
    dense.put(4, torch.full((1, TOKENS, walk.skeleton.channels), torch.inf))
    with pytest.raises(RspruneError, match=r"layer 0, inputs of self_attn\.q_proj, window 4"):
        next(walk.job(0).groups(dense, own))


def test_windows_in_a_file_are_the_same(tmp_path: Path):
    held, spilled = Windows(3, 5, 4), Windows(3, 5, 4, tmp_path / "spill")
    for window in range(3):
        value = torch.randn(1, 5, 4)
        held.put(window, value)
        spilled.put(window, value)
    assert torch.equal(contents(held), contents(spilled))
    assert (tmp_path / "spill").stat().st_size == 3 * 5 * 4 * 4
    assert len(spilled) == 3


def test_calibration_windows_come_before_the_held_out_ones(
    tiny_llama: Path, text: Path, tmp_path: Path
):
    options = {"samples": 8, "seq_len": 16, "heldout": 0.25, "threads": 1}
    config = Config(calibration=str(text), **options)
    run = _LayerwiseRun(tiny_llama, config, tmp_path / "out", NullProgress(), PeakWatch())
    run.read_inputs()
    windows = calibration_windows(
        load_texts(str(text)), load_tokenizer(tiny_llama), samples=8, seq_len=16, seed=0
    )
    calibration, heldout = split_heldout(windows, 0.25)
    assert (run.split.calibration, run.split.heldout) == (6, 2) == (len(calibration), len(heldout))
    assert torch.equal(run.windows[:6], calibration)
    assert torch.equal(run.windows[6:], heldout)
    assert not torch.equal(run.windows, windows)  # the held-out ones were not last in the text
