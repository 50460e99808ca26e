"""Mixture-of-experts: the same mathematics, one Gram an expert, routers as they were."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_calibrate import ALL_INPUTS, SPLIT, TOKENS, Naive, Walk, close, contents, label
from test_streaming import streamed_logits
from tiny_models import LAYERS, Run, make, ordinary, tensors_of, token_ids
from torch.nn.functional import linear, silu

from rsprune.blocks import Group
from rsprune.calibrate import GroupStatistics
from rsprune.checkpoint import Checkpoint
from rsprune.config import Config
from rsprune.errors import UsageError
from rsprune.experts import FUSED, Experts, unfuse
from rsprune.methods.base import Inputs
from rsprune.plan import prepare
from rsprune.progress import NullProgress
from rsprune.report import load_report
from rsprune.run import compress
from rsprune.skeleton import Skeleton

Runs = Callable[[str, str, str], Run]
Tiny = Callable[..., Path]
FAMILIES = ("mixtral", "qwen3_moe", "qwen2_moe", "olmoe")
CASES = [
    (kind, method, "2:4")
    for kind, method in itertools.product(
        ("mixtral", "qwen3_moe"), ("magnitude", "wanda", "sparsegpt")
    )
]
ROUTERS = (".gate.weight", ".shared_expert_gate.weight")


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
    assert {t for n, t in types.items() if ".experts." not in n} == {torch.float32}
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
