"""What happens to one decoder layer of a run: permute, prune operator after operator, tune.

`changed` collects, by on-disk name, what will be stored in place of the input's tensors; a tensor
that is in it already (its channels have moved) is what later steps start from.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from rsprune import _core, methods
from rsprune.calibrate import GroupStatistics, LayerJob
from rsprune.checkpoint import TORCH_DTYPES, as_stored
from rsprune.config import Config
from rsprune.errors import RspruneError
from rsprune.layer_path import LayerPath
from rsprune.output import OutputFolder
from rsprune.packing import PackedWeight, check_parts, smallest
from rsprune.permute import WINDOWS as PERMUTE_WINDOWS
from rsprune.permute import (
    Coupling,
    consumer_sums,
    expert_couplings,
    find_couplings,
    reorder,
)
from rsprune.plan import Operator, Prepared, is_ignored
from rsprune.progress import Progress
from rsprune.report import DENSE, Journal
from rsprune.scratch import Scratch
from rsprune.windows import Windows


@dataclass
class LayerRun:
    """One layer; its methods stand in the order in which they are called.

    Attributes:
        index: of the layer, which is materialised.
        job: its way through the windows.
        patterns: what every operator is pruned to, by the name of its weight.
        scratch: keeps changed weights of experts; None where the layer has none.
        spill: a folder for what solvers hold, where it is not to be in memory.
        residuals: of weights with a second plane of signs, its codes.
        changed: tensors to be stored, by on-disk name, as they are stored.
        permutations: what `permute` did, as the journal keeps it.
        passes: partial runs over the windows beside those of `job`.
        starved: experts that saw too few tokens for the run's method.
        given: packed forms that the method made itself, by the name of the weight.
        records: what the report says of each operator, by the name of its weight.
    """

    index: int
    prepared: Prepared
    config: Config
    job: LayerJob
    patterns: dict[str, _core.Pattern]
    journal: Journal
    progress: Progress
    scratch: Scratch | None
    spill: Path | None = None
    residuals: Mapping[str, _core.Pattern] = field(default_factory=dict)
    changed: dict[str, NDArray[Any]] = field(default_factory=dict)
    permutations: list[dict[str, Any]] = field(default_factory=list)
    passes: float = 0.0
    starved: set[int] = field(default_factory=set)
    given: dict[str, methods.Packed] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    @cached_property
    def operators(self) -> dict[str, Operator]:
        """What will be pruned in this layer, by module name; ignored linears are not in it."""
        return {o.linear: o for o in self.prepared.plan.operators if o.layer == self.index}

    def permute(self, hidden: Windows) -> None:
        """Brings channels in a better order, in memory and in what will be stored.

        Args:
            hidden: the layer's inputs in the dense model.
        """
        job, layer = self.job, self.job.layer
        with job.timing.stage("permute"):
            sample = hidden.get(0, self.prepared.skeleton.device)
            found = find_couplings(layer, job.structure, job.kwargs, sample)
            group = int(self.config.pattern.partition(":")[2])
            fits = [c for c in found if c.segment % group == 0]  # groups must not straddle heads
            couplings = [c for c in fits if c.consumer in self.operators]
            routed = job.routed("own" if job.needs_own else "dense", hidden)
            path = LayerPath(layer, job.structure, job.kwargs, hidden, None, None, routed)
            count = min(PERMUTE_WINDOWS, job.split.calibration)
            clip, spill = job.inputs.clip_tokens, job.spill_sums
            sums = consumer_sums(path, couplings, count, job.threads, clip=clip, spill=spill)
            for coupling in couplings:
                self._reorder(coupling, sums[coupling.consumer])
            for coupling in expert_couplings(job.structure):
                if coupling.consumer in self.operators:
                    found_sums = consumer_sums(
                        path, [coupling], count, job.threads, clip=clip, spill=spill
                    )
                    self._reorder_expert(coupling, found_sums[coupling.consumer])
            self.passes += path.passes
            path.close()

    def _reorder_expert(self, coupling: Coupling, sums: _core.Statistics) -> None:
        """Orders need no more than norms: as many tokens as Wanda takes."""
        columns = self.operators[coupling.consumer].columns
        if not methods.too_few("wanda", tokens=sums.tokens, columns=columns):
            self._reorder(coupling, sums)

    def _reorder(self, coupling: Coupling, sums: _core.Statistics) -> None:
        task = self._task(self.operators[coupling.consumer], GroupStatistics(sums, None))
        segment, repeats = coupling.segment, coupling.repeats
        found = _core.group_channels(
            task, segment=segment, repeats=repeats, threads=self.job.threads
        )
        order = torch.from_numpy(found)
        reorder(self.job.layer, coupling, order, self.scratch)
        for name in coupling.parameters(self.job.layer):
            on_disk = self._disk_name(name)
            dtype = TORCH_DTYPES[self.prepared.checkpoint.tensors[on_disk].dtype]
            self.changed[on_disk] = as_stored(self.job.layer.get_parameter(name), dtype)
        self.permutations.append({**dataclasses.asdict(coupling), "order": order.tolist()})

    def prune(self, linear: str, statistics: GroupStatistics) -> None:
        """Prunes an operator, unless it is ignored; the layer goes on with what will be stored."""
        if (operator := self.operators.get(linear)) is None:
            return
        started = time.perf_counter()
        method = self._method(operator, statistics)
        with self.job.timing.stage("solve"):
            weight, certificate, given = self._solve(method, operator, statistics)
        if certificate["tokens"] == 0:
            certificate["error"] = None  # not zero: nothing was measured
        if (dead := certificate["dead_channels"]) and certificate["tokens"]:
            self.progress.note(
                f"warning: {operator.name}: {dead} of {operator.columns} input channels carried no "
                "value on the calibration text"
            )
        if operator.expert is not None and self.scratch is not None:
            weight = self.scratch.keep(weight)
        self.changed[operator.name] = self.job.set_weight(linear, weight, operator.dtype)
        if given is not None and self.config.format == "packed":
            self.given[operator.name] = given
        residual = self.residuals.get(operator.name)
        scope = self.config.scope or methods.get(self.config.method).scope
        self.records[operator.name] = {
            "name": operator.name,
            "layer": operator.layer,
            "shape": [operator.rows, operator.columns],
            "dtype": operator.dtype,
            "method": method.name,
            "pattern": str(self.patterns[operator.name]),
            "scope": "matrix" if self.config.allocate else scope,
            "seconds": time.perf_counter() - started,
            **({} if residual is None else {"residual": str(residual)}),
            **certificate,
        }
        self.progress.step(f"{self._place} {linear}", certificate["error"])

    def _method(self, operator: Operator, statistics: GroupStatistics) -> methods.Method:
        """The run's method, or the one that needs no data where an expert saw too few tokens."""
        tokens = statistics.calibration.tokens
        name, columns = self.config.method, operator.columns
        if operator.expert is None or not methods.too_few(name, tokens=tokens, columns=columns):
            return methods.get(name)
        self.starved.add(operator.expert)
        return methods.get(methods.DATA_FREE)

    def _solve(
        self, method: methods.Method, operator: Operator, statistics: GroupStatistics
    ) -> methods.Pruned:
        task, threads = self._task(operator, statistics), self.job.threads
        model_type = self.prepared.skeleton.config.model_type
        try:
            pruned = method.solve(task, self.config, model_type=model_type, threads=threads)
            if method.name != self.config.method:
                return pruned
            return methods.polish(task, pruned, self.config, threads=threads)
        except ValueError as error:
            raise RspruneError(f"{operator.name}: {error}") from None

    def warn(self) -> None:
        """Says which experts were not pruned by the run's method."""
        if self.starved:
            experts = ", ".join(str(expert) for expert in sorted(self.starved))
            self.progress.note(
                f"warning: {self._place}: too few tokens for experts {experts}; pruned by "
                f"{methods.DATA_FREE} (the report's tokens say how many)"
            )

    def tune(self) -> dict[str, float]:
        """Fits the kept weights and norms; returns what the report says of it."""
        tensors = self.prepared.checkpoint.tensors
        disk_names, dtypes = {}, {}
        for name, parameter in self.job.layer.named_parameters():
            on_disk = self._disk_name(name)
            kept = is_ignored(on_disk, self.config.ignore)
            if name.removesuffix(".weight") in self.operators or (
                parameter.dim() == 1 and not kept
            ):
                disk_names[name] = on_disk
                dtypes[name] = TORCH_DTYPES[tensors[on_disk].dtype]
        tuned = self.job.tune(dtypes, self.config)
        for name, value in tuned.values.items():
            self.changed[disk_names[name]] = as_stored(value, dtypes[name])
        self.given.clear()  # of weights that are no more
        self.progress.note(f"{self._place} tuned: {tuned.before:.4f} -> {tuned.after:.4f}")
        return {"before": tuned.before, "after": tuned.after, "steps": tuned.steps}

    def put(self, output: OutputFolder, file: str, names: list[str]) -> dict[str, Any]:
        """Stores the layer's tensors `names` and journals its operators; returns `put_shard`'s."""
        packed = self._packed()
        parts = {name: given.parts for name, given in self.given.items() if name in packed}
        checkpoint = self.prepared.checkpoint
        record = output.put_shard(file, checkpoint, names, self.changed, packed=packed, parts=parts)
        for name, facts in self.records.items():
            form = packed.get(name)
            stored = self.changed[name].nbytes if form is None else form.nbytes
            size = {
                "format": DENSE if form is None else form.format,
                "stored_bytes": stored,
                "true_bits": stored * 8 / math.prod(facts["shape"]),
            }
            self.journal.write("tensor", **facts | size)
        return record

    def _packed(self) -> dict[str, PackedWeight]:
        """How the pruned weights of the layer are packed; those that gain nothing are not."""
        if self.config.format == "dense":
            return {}
        forms = {}
        for name, record in self.records.items():
            weight, given = self.changed[name], self.given.get(name)
            form = smallest(weight, record["dtype"], self.patterns[name], given and given.format)
            if form is None:
                continue
            if given is not None:
                check_parts(name, form, weight, given.parts)
            forms[name] = form
        return forms

    @property
    def _place(self) -> str:
        return f"layer {self.index + 1}/{self.prepared.plan.layers}"

    def _disk_name(self, parameter: str) -> str:
        skeleton = self.prepared.skeleton
        name = skeleton.disk_name(skeleton.layer_name(self.index, parameter))
        assert name is not None  # the skeleton refused missing tensors
        return name

    def _task(self, operator: Operator, statistics: GroupStatistics) -> methods.Operator:
        """The operator as solvers take it, with its channels in their present order."""
        weight = self.changed.get(operator.name)
        return methods.Operator(
            weight=self.prepared.checkpoint.lend(operator.name) if weight is None else weight,
            dtype=operator.dtype,
            pattern=self.patterns[operator.name],
            calibration=statistics.calibration,
            heldout=statistics.heldout,
            spill=self.spill,
            residual=self.residuals.get(operator.name),
        )
