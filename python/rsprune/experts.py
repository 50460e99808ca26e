"""Mixture-of-experts layers, one expert in memory at a time.

transformers 5 fuses the experts of a layer into two parameters of three dimensions when it loads
them; on disk there is one matrix per expert and projection. A skeleton therefore holds `Experts`
in the place of the fused module: a list of ordinary linears under the names of the disk.

The walk of a token through such a layer, and of its sums through a run:

    attention, norm         as in any layer; their groups come first
    router                  hidden -> k expert numbers and k shares a token; never pruned
    experts, what enters    noted once a window: hidden states beside the numbers (`RoutedInputs`)
    expert e                x = hidden[tokens routed to e]
                            y = down(act(gate(x)) * up(x))
                            out[those tokens] += share * y

Experts are visited one after another: expert `e`'s tokens are gathered from what was noted, window
after window, and nothing but this expert runs. So the sums of one expert are in memory, and what
comes before the experts runs no more often than without them.

    gate and up     share the expert's input: one group, one Gram over the tokens routed to it
    down            a group of its own

The router decides from the hidden states of the path that is being compressed; where the dense
path is wanted beside it (target dense), its hidden states are gathered for the same tokens, since
two rows must belong to one token to be compared.

Weights of experts are not held in memory as a layer's others are: each is read from its shard and
widened for the product that needs it, and what was pruned lies in a file of its own. They are not
mapped: a shard that is cut under the run must be an error and not a SIGBUS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rsprune.errors import UsageError
from rsprune.stored import StoredLinear
from rsprune.windows import Windows

_GATED = ("gate_proj", "up_proj", "down_proj")
FUSED = {
    "MixtralExperts": ("w1", "w3", "w2"),
    "Qwen2MoeExperts": _GATED,
    "Qwen3MoeExperts": _GATED,
    "OlmoeExperts": _GATED,
}
"""Fused class -> the names of gate, up and down on disk. Others may clamp, scale or transpose:
`tests/test_experts.py` compares each of these with its class."""


class ExpertLinear(StoredLinear):
    """A linear of an expert: its weight is read for every product, or lies in a file of ours.

    Attributes:
        source: reads the weight from its shard, in a type or as it is stored for None.
    """

    source: Callable[[torch.dtype | None], Tensor] | None = None

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False, device="meta")
        self.requires_grad_(False)

    def lend(
        self, source: Callable[[torch.dtype | None], Tensor] | None, stored: torch.dtype
    ) -> None:
        """Reads the weight by `source` from now on; by none it is but a shape."""
        empty = torch.empty(self.out_features, self.in_features, device="meta", dtype=stored)
        self._parameters["weight"] = nn.Parameter(empty, requires_grad=False)
        self.source = source

    def hold(self, weight: Tensor) -> None:
        """Has another weight [outputs, inputs] from now on; a parameter is taken as it is."""
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight, requires_grad=False)
        self._parameters["weight"] = weight
        self.source = None

    def read(self) -> Tensor:
        """The weight as it is stored."""
        return self.weight if self.source is None else self.source(None)

    def forward(self, input: Tensor) -> Tensor:
        """As `StoredLinear`; nothing is read where no token comes."""
        if self.source is None:
            return super().forward(input)
        if input.numel() == 0:
            return input.new_empty(*input.shape[:-1], self.out_features)
        return nn.functional.linear(input, self.source(input.dtype).to(input.device))


class Expert(nn.Module):
    """`down(act(gate(x)) * up(x))`, the linears under the names that they have on disk."""

    def __init__(
        self, names: tuple[str, str, str], channels: int, width: int, act: nn.Module
    ) -> None:
        super().__init__()
        self.names = names
        gate, up, down = names
        self.add_module(gate, ExpertLinear(channels, width))
        self.add_module(up, ExpertLinear(channels, width))
        self.add_module(down, ExpertLinear(width, channels))
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, channels] of the tokens that are routed here; there may be none."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        output: Tensor = down(self.act(gate(x)) * up(x))
        return output


class Experts(nn.ModuleList):
    """Computes what a fused module of `FUSED` does, expert after expert.

    Every expert is called, without tokens too: so a hook on its linears sees every window.
    """

    def forward(self, hidden: Tensor, numbers: Tensor, shares: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs.

        Args:
            hidden: [tokens, channels].
            numbers: [tokens, k] int64, the experts of each token.
            shares: [tokens, k], their weights.
        """
        output = torch.zeros_like(hidden)
        for number, expert in enumerate(self):
            tokens, slots = routed(numbers, number)
            weighted = expert(hidden[tokens]) * shares[tokens, slots, None]
            output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


def routed(numbers: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Where `numbers` [tokens, k] names the expert: tokens, in order, and slots among the k.

    On meta, where nobody knows, every token is taken: shapes are all that is asked for there.
    """
    if numbers.device.type == "meta":
        tokens = torch.arange(len(numbers), device="meta")
        return tokens, torch.zeros_like(tokens)
    tokens, slots = torch.where(numbers == expert)
    return tokens, slots


def unfuse(layers: nn.ModuleList, prefix: str) -> None:
    """Replaces the fused experts of decoder layers, which are on meta, by `Experts`.

    Args:
        layers: the decoder layers; mutated.
        prefix: their name in the model, for errors.

    Raises:
        UsageError: naming a module with experts of a class that is not in `FUSED`.
    """
    for name, module in list(_with_experts(layers)):
        kind = type(module).__name__
        if kind not in FUSED or not isinstance(getattr(module, "gate_up_proj", None), Tensor):
            known = ", ".join(FUSED)
            raise UsageError(
                f"{prefix}.{name}: expected experts of a class whose mathematics is known "
                f"({known}, as transformers 5 has them), found {kind}"
            )
        count, doubled, channels = module.get_parameter("gate_up_proj").shape
        act: nn.Module = module.get_submodule("act_fn")
        parts = (Expert(FUSED[kind], channels, doubled // 2, act) for _ in range(count))
        owner, _, leaf = name.rpartition(".")
        setattr(layers.get_submodule(owner), leaf, Experts(parts))


def _with_experts(layers: nn.ModuleList) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are called `experts`, or that hold a parameter of three dimensions."""
    for name, module in layers.named_modules():
        own = module.parameters(recurse=False)
        fused = any(parameter.dim() == 3 for parameter in own)
        convolution = isinstance(module, nn.modules.conv._ConvNd)
        if name.rpartition(".")[2] == "experts" or (fused and not convolution):
            yield name, module


def stored_bytes(layer: nn.Module) -> int:
    """What the weights of a loaded layer's experts take as they are stored."""
    return sum(m.weight.nbytes for m in layer.modules() if isinstance(m, ExpertLinear))


@dataclass
class RoutedInputs:
    """What enters the experts of a layer, window after window.

    Attributes:
        hidden: [windows, tokens, channels].
        numbers: window -> [tokens, k], the experts of each token.
    """

    hidden: Windows
    numbers: dict[int, Tensor] = field(default_factory=dict)

    def note(self, window: int, hidden: Tensor, numbers: Tensor) -> None:
        """Keeps a window's inputs; `hidden` is [tokens, channels]."""
        self.hidden.put(window, hidden)
        self.numbers[window] = numbers.to("cpu", torch.int32)

    def gather(self, window: int, expert: int, numbers: Tensor, device: torch.device) -> Tensor:
        """[tokens, channels] of those that `numbers` sends to the expert."""
        tokens, _ = routed(numbers, expert)
        return self.hidden.get(window, device)[0, tokens.to(device)]
