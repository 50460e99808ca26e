"""One decoder layer with one set of weights, run over windows.

Hooks catch the inputs of the linears that are next to be solved, and the run ends there. What need
not run again is replayed: once the input of a child's last linear is known (the attention's output
projection, say), the child's output is one product away.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rsprune.blocks import Group, LayerStructure, Replay, Stage, StopForwardError
from rsprune.experts import ExpertLinear, RoutedInputs
from rsprune.pool import TensorPool
from rsprune.windows import Windows


class LayerPath:
    """Runs a layer on its windows.

    Args:
        layer: the materialised layer.
        structure: what `blocks.watch` saw in it.
        kwargs: the keyword arguments that the model gives to this layer.
        hidden: the layer's inputs.
        cache: makes room for inputs that replays need; None where every run must be whole.
        pool: lends a buffer for every weight that is replaced; None where the layer's own weights
            may be overwritten.
        routed: keeps what enters the layer's experts; None where it has none.

    Attributes:
        passes: linears run so far, weighted by size, in whole layers over all windows.
    """

    def __init__(
        self,
        layer: nn.Module,
        structure: LayerStructure,
        kwargs: dict[str, Any],
        hidden: Windows,
        cache: Callable[[str, int], Windows] | None,
        pool: TensorPool | None,
        routed: RoutedInputs | None = None,
    ) -> None:
        self.layer = layer
        self.structure = structure
        self.kwargs = kwargs
        self.hidden = hidden
        self.passes = 0.0
        self._device = next(layer.parameters()).device
        self._pool = pool
        self._borrowed: list[Tensor] = []
        self._caught: dict[Group, Tensor] = {}
        self._cache: dict[Replay, Windows] = {}
        self._known: set[tuple[Replay, int]] = set()
        self._routed = routed
        for replay in structure.replays:
            width = _width(structure, replay.linear)
            if cache is not None and width <= hidden.channels:
                self._cache[replay] = cache(replay.linear, width)
        self._count_work()

    def inputs(
        self, window: int, stage: Stage, numbers: Tensor | None = None
    ) -> dict[Group, Tensor]:
        """The inputs [tokens, width] of a stage's groups; the layer runs no further than needed.

        Args:
            window: which window.
            stage: which groups.
            numbers: routing that decides which tokens an expert sees; None for the path's own.
        """
        if not stage.of_expert:
            return self._run(window, stage, stop=True)[0]
        own_numbers = self.routing(window)
        return self._run_expert(window, stage, own_numbers if numbers is None else numbers)

    def routing(self, window: int) -> Tensor:
        """The experts [tokens, k] that this path's router chooses; runs up to there once."""
        assert self._routed is not None
        if window not in self._routed.numbers:
            self._run(window, Stage((), ahead=True), stop=True)
        return self._routed.numbers[window]

    def inputs_and_output(self, window: int, stage: Stage) -> tuple[dict[Group, Tensor], Tensor]:
        """The inputs of a stage's groups and the layer's output [1, tokens, channels]."""
        caught, output = self._run(window, stage, stop=False)
        assert output is not None  # nothing stopped the run
        return caught, output

    def output(self, window: int) -> Tensor:
        """The layer's output [1, tokens, channels]."""
        return self.inputs_and_output(window, Stage(()))[1]

    def set_weight(self, linear: str, weight: Tensor) -> Tensor:
        """Puts a compressed weight [outputs, inputs] in place of the one that the layer holds.

        Returns:
            The same in the layer's memory, so that nobody needs to keep `weight` as well.
        """
        module = self.layer.get_submodule(linear)
        self._put(module, "weight", weight)
        return module.get_parameter("weight").detach()

    def put_parameters(self, values: Iterable[tuple[str, Tensor]]) -> None:
        """Puts tuned or stored parameters, with their names in the layer, in place of its own.

        Inputs that were noted are no longer true, and are forgotten.
        """
        for name, value in values:
            module, _, leaf = name.rpartition(".")
            self._put(self.layer.get_submodule(module), leaf, value)
        self._known.clear()
        if self._routed is not None:
            self._routed.numbers.clear()

    def _put(self, module: nn.Module, leaf: str, value: Tensor) -> None:
        if isinstance(module, ExpertLinear):
            module.hold(value)
            return
        if self._pool is not None:
            buffer = self._pool.take(value.shape, module.get_parameter(leaf).dtype)
            self._borrowed.append(buffer)
            module._parameters[leaf] = nn.Parameter(buffer, requires_grad=False)
        with torch.no_grad():
            module.get_parameter(leaf).copy_(value)

    def _run(
        self, window: int, stage: Stage, *, stop: bool
    ) -> tuple[dict[Group, Tensor], Tensor | None]:
        output: Tensor | None = None
        self._caught = {}
        with contextlib.ExitStack() as stack, torch.no_grad():
            stack.enter_context(self._replays(window))
            kept = {replay.linear for replay in self._cache}
            for group in self.structure.groups:
                if group in stage.groups or kept & set(group.linears):
                    stack.callback(self._catch(window, group, stage if stop else None).remove)
            if stage.ahead:
                stack.callback(self._note_routed(window, stage if stop else None).remove)
            stack.enter_context(contextlib.suppress(StopForwardError))
            output = run_layer(self.layer, self.hidden.get(window, self._device), self.kwargs)
        return {group: self._caught[group] for group in stage.groups}, output

    def _run_expert(self, window: int, stage: Stage, numbers: Tensor) -> dict[Group, Tensor]:
        """Runs a single expert on the tokens that `numbers` sends to it."""
        number, experts = stage.groups[0].expert, self.structure.experts
        assert number is not None
        assert self._routed is not None
        self._caught = {}
        with contextlib.ExitStack() as stack, torch.no_grad():
            for group in stage.groups:
                stack.callback(self._catch(window, group, stage).remove)
            stack.enter_context(contextlib.suppress(StopForwardError))
            x = self._routed.gather(window, number, numbers, self._device)
            self.layer.get_submodule(f"{experts}.{number}")(x)
        return dict(self._caught)

    def _note_routed(self, window: int, until: Stage | None) -> Any:
        """A hook that notes what enters the experts, and ends the run when that was the last."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert self._routed is not None
            self._routed.note(window, args[0], args[1])
            self._end(window, until)

        assert self.structure.experts is not None
        return self.layer.get_submodule(self.structure.experts).register_forward_pre_hook(hook)

    def _end(self, window: int, until: Stage | None) -> None:
        """Ends the run when all that a stage wants is noted; None runs on."""
        if until is None or not all(group in self._caught for group in until.groups):
            return
        if not until.ahead or (self._routed is not None and window in self._routed.numbers):
            raise StopForwardError

    def _catch(self, window: int, group: Group, until: Stage | None) -> Any:
        """A hook that notes the group's input, and ends the run when all of `until` is noted."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._caught[group] = args[0].reshape(-1, group.width)
            for replay, cache in self._cache.items():
                if replay.linear in group.linears and (replay, window) not in self._known:
                    cache.put(window, args[0])
                    self._known.add((replay, window))
            self._end(window, until)

        first = self.layer.get_submodule(group.linears[0])
        return first.register_forward_pre_hook(hook)

    @contextlib.contextmanager
    def _replays(self, window: int) -> Iterator[None]:
        """Children whose last linear's input is known give their output without running."""
        active = [replay for replay in self._cache if (replay, window) in self._known]
        for replay in active:
            known = self._cache[replay].get(window, self._device)
            linear = self.layer.get_submodule(replay.linear)
            self.layer.get_submodule(replay.child).forward = _replayed(linear, known, replay)
        try:
            yield
        finally:
            for replay in active:
                del self.layer.get_submodule(replay.child).forward

    def _count_work(self) -> None:
        linears = [self.layer.get_submodule(n) for g in self.structure.groups for n in g.linears]
        total = sum(_weight(linear).numel() for linear in linears) * len(self.hidden)

        def count(module: nn.Module, args: Any, output: Any) -> None:
            self.passes += _weight(module).numel() / total

        self._counters = [linear.register_forward_hook(count) for linear in linears]

    def close(self) -> None:
        """Takes this path's hooks off the layer and gives its buffers back."""
        for counter in self._counters:
            counter.remove()
        for buffer in self._borrowed:
            assert self._pool is not None
            self._pool.give_back(buffer)


def run_layer(layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The layer's output [1, tokens, channels]; some classes give it as the first of a tuple."""
    result = layer(hidden, **kwargs)
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


def one_thread() -> None:
    """Starts a worker that runs windows beside others: torch gets one thread, of this one alone."""
    torch.set_num_threads(1)


def as_rows(activations: Tensor) -> NDArray[np.float32]:
    """Activations [tokens, width] as the core takes them."""
    rows: NDArray[np.float32] = activations.detach().to("cpu", torch.float32).contiguous().numpy()
    return rows


def twin(layer: nn.Module) -> nn.Module:
    """A second layer that shares all tensors with `layer` until a weight is replaced."""
    memo = {id(tensor): tensor for tensor in [*layer.parameters(), *layer.buffers()]}
    return copy.deepcopy(layer, memo)


def with_parameters(layer: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A twin of `layer` with other parameters and no hooks; windows may run in it side by side."""
    copied = twin(layer)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    for name, value in values.items():
        module_name, _, leaf = name.rpartition(".")
        module = copied.get_submodule(module_name)
        if isinstance(module, ExpertLinear):
            module.hold(value)
            continue
        parameter = value if isinstance(value, nn.Parameter) else nn.Parameter(value, False)
        module._parameters[leaf] = parameter
    return copied


def relative_error(
    layer: nn.Module, kwargs: dict[str, Any], inputs: Windows, targets: Windows, window: int
) -> Tensor:
    """Mean over the tokens of a window of `|layer(x) - y|^2 / |y|^2`; a scalar, differentiable."""
    device = next(layer.parameters()).device
    target = targets.get(window, device)
    output = run_layer(layer, inputs.get(window, device), kwargs)
    energy = target.square().sum(-1).clamp_min(torch.finfo(target.dtype).tiny)
    return ((output - target).square().sum(-1) / energy).mean()


def _replayed(linear: nn.Module, known: Tensor, replay: Replay) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        output = linear(known)
        return output if replay.extras is None else (output, *[None] * replay.extras)

    return forward


def _weight(linear: nn.Module) -> Tensor:
    return linear.get_parameter("weight")


def _width(structure: LayerStructure, linear: str) -> int:
    return next(group.width for group in structure.groups if linear in group.linears)
