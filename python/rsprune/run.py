"""compress(): the loop to read first.

plan            headers and shapes only; all refusals happen here
take up         a new journal, or that of a run that ended early
embed           token windows -> hidden states that enter the first layer
for each decoder layer that an earlier run has finished: replay
for each other decoder layer:
    load        its weights, float32
    permute     channels change places, where asked for
    for each stage (all operators at once, or group after group):
        collect Grams of the stage's inputs, window after window
        prune   each operator; the layer now holds what will be stored
    tune        kept weights to the dense layer's output, where asked for
    put         one output shard
    advance     hidden states to the next layer
    note        one journal line: from now on the layer is finished
finish          shard of the rest, other files, card, index; one rename
"""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from rsprune import _core, budget, methods
from rsprune.calibrate import LayerJob
from rsprune.card import model_card
from rsprune.config import Config
from rsprune.driver import Driver
from rsprune.experts import stored_bytes
from rsprune.layer_run import LayerRun
from rsprune.memory import PeakWatch, give_freed_pages_back, keep_freed_pages, rss_anon
from rsprune.mixture import interleaved, load_corpora
from rsprune.other_files import other_files
from rsprune.output import OutputFolder, check_output
from rsprune.plan import Plan, Prepared, parse_pattern, prepare
from rsprune.progress import NullProgress, Progress
from rsprune.report import REPORT_NAME, Report, load_report, read_records
from rsprune.resume import fingerprint, packed_in, put_down, replay, take_up
from rsprune.scratch import Scratch
from rsprune.skeleton import load_tokenizer
from rsprune.sources import resolve
from rsprune.survey import Spill
from rsprune.timing import Timing
from rsprune.windows import Split, Windows


def compress(
    model: str | Path,
    out: str | Path,
    config: Config | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    progress: Progress | None = None,
    base_model: str | None = None,
) -> Report:
    """Prunes a checkpoint, one decoder layer in memory at a time.

    A run that ended early goes on where it was when it is repeated with the same arguments, and
    ends in the same bytes.

    Args:
        model: folder, hub id or GGUF file.
        out: folder of the result: an ordinary Hugging Face checkpoint.
        config: the options; see `Config`.
        overwrite: whether `out` may exist. It is replaced when the run has finished, not before.
        restart: whether an unfinished run of this output is discarded instead of gone on with.
        progress: what is told how far the run is.
        base_model: what the card calls the base model, if it is not `model`.

    Returns:
        The report that also lies in `out`.

    Raises:
        UsageError: refused before any work, naming what was expected and found; nothing is written.
        RspruneError: the run cannot go on; nothing is left in `out`, finished layers stay in
            `<out>.partial`.
    """
    keep_freed_pages()
    config = config or Config()
    progress = progress or NullProgress()
    folder = resolve(str(model), progress=progress.note)
    given = Path(model).expanduser()  # a GGUF file lies apart from the folder made of it
    sources = (folder, given) if given.exists() else (folder,)
    check_output(Path(out), *sources, overwrite=overwrite)
    with PeakWatch() as peak:
        run = driver(config.method)(folder, config, Path(out), progress, peak)
        run.read_inputs()
        output = OutputFolder(Path(out), overwrite=overwrite)
        with output.owned():
            try:
                run.take_up(output, restart=restart)
                run.write_layers(output)
                run.finish(output, base_model or str(model))
            except BaseException:
                run.leave(output)
                raise
    return load_report(Path(out))


def driver(method: str) -> type[Driver]:
    """What runs a method; raises `UsageError` for a method that nobody knows."""
    if method == "flexigpt":
        from rsprune.flexi.run import FlexiRun

        return FlexiRun
    if methods.removes_layers(method):
        from rsprune.depth.run import DepthRun

        return DepthRun
    return _LayerwiseRun


Patterns = dict[str, _core.Pattern]


class _LayerwiseRun:
    """Prunes operator after operator."""

    def __init__(
        self, folder: Path, config: Config, out: Path, progress: Progress, peak: PeakWatch
    ) -> None:
        self.prepared: Prepared = prepare(folder, config, out)
        self.plan: Plan = self.prepared.plan
        self.config = config
        self.progress = progress
        self.peak = peak
        self.start_rss = rss_anon()
        self.timing = Timing()
        self.method = methods.get(config.method)
        self.permutes = self.method.permute if config.permute is None else config.permute
        self.permutes &= ":" in config.pattern  # a ratio has no groups
        self.threads = config.threads or _core.default_threads()
        self.done: list[dict[str, Any]] = []
        self._windows: dict[str, Windows] = {}
        torch.set_num_threads(self.threads)

    def read_inputs(self) -> None:
        """Reads what decides whether the run can be done: text, tokenizer, every weight."""
        for warning in self.plan.warnings:
            self.progress.note(f"warning: {warning}")
        other_files(self.plan.model)  # a link that leaves the folder is refused now
        with self.timing.stage("read"):
            corpora = load_corpora(self.config.calibration, field=self.config.calibration_field)
            self.notes = [corpus.note for corpus in corpora if corpus.note]
            for note in self.notes:
                self.progress.note(note)
            given = interleaved(
                corpora,
                load_tokenizer(self.plan.model, self.config.trust_remote_code),
                samples=self.config.samples,
                seq_len=self.config.seq_len,
                seed=self.config.seed,
                heldout=self.config.heldout,
            )
            self.sources = given.sources
            self.windows = torch.cat([given.calibration, given.heldout])
            self.prepared.stream.check_ids(self.windows)
            self.split = Split(len(given.calibration), len(given.heldout))
            self.prepared.checkpoint.check_finite(self.prepared.checkpoint.tensors)

    def take_up(self, output: OutputFolder, *, restart: bool) -> None:
        """Opens the journal: a new one, or that of the unfinished run that lies there."""
        device = str(self.prepared.skeleton.device)
        own = fingerprint(self.prepared.checkpoint, self.windows, self.config, self.threads, device)
        self.journal, self.done = take_up(output, own, self._run_record(), restart=restart)
        if self.done:
            count = len(self._done("layer"))
            self.progress.note(f"going on after {count} of {self.plan.layers} layers")

    def _done(self, kind: str) -> list[dict[str, Any]]:
        """What an earlier run has journaled of a kind."""
        return [record for record in self.done if record["kind"] == kind]

    def leave(self, output: OutputFolder) -> None:
        """Closes a run that cannot go on; what is finished stays, for the next one."""
        journal = getattr(self, "journal", None)
        put_down(journal, output, self.progress, kind="layer", total=self.plan.layers)

    def write_layers(self, output: OutputFolder) -> None:
        """Embeds, then takes the decoder layers one after another."""
        with self.timing.stage("embed"):
            channels = self.prepared.skeleton.channels
            dense = self._store(output, "hidden 0", channels)
            for window, hidden in enumerate(self.prepared.stream.embed(self.windows)):
                dense.put(window, hidden)
        own = dense
        inputs = self.prepared.inputs
        two = inputs.target == "dense" or self.config.tune_block
        if inputs.propagate == "model" and two:
            own = self._store(output, "own", channels)
            own.copy_from(dense)
        self.patterns, self.residuals = self._codes(output)
        self.progress.stage("layers", len(self.plan.operators))
        finished_layers = self._done("layer")
        for record in finished_layers:
            dense, own = self._replay_layer(output, record, dense, own)
        for index in range(len(finished_layers), self.plan.layers):
            dense, own = self._write_layer(output, index, dense, own)

    def _codes(self, output: OutputFolder) -> tuple[Patterns, Patterns]:
        """What every operator is pruned to, and second planes of signs, by names of weights."""
        operators = self.plan.operators
        if not methods.differ(self.config):
            return dict.fromkeys((o.name for o in operators), parse_pattern(self.config)), {}
        decided = self._decided(output)
        return budget.patterns(decided, operators, self.config), budget.residuals(decided)

    def _decided(self, output: OutputFolder) -> dict[str, Any]:
        """What is decided about all operators before the first is pruned, now or before."""
        if known := self._done("allocation"):
            return known[0]
        with self.timing.stage("allocate"):
            self.progress.stage("allocate", self.plan.layers)
            spill = Spill(self._spill(output, "Grams"), self._spill(output, "solver's matrices"))
            decided = budget.decide(
                self.prepared, self.windows, self.config, self.threads, self.progress, spill
            )
        self.journal.write("allocation", **decided)
        return decided

    def _write_layer(
        self, output: OutputFolder, index: int, dense: Windows, own: Windows
    ) -> tuple[Windows, Windows]:
        """Prunes and stores one decoder layer; returns the next layer's inputs on both paths."""
        started = time.perf_counter()
        skeleton = self.prepared.skeleton
        job = self._job(output, index)
        layer = LayerRun(
            index, self.prepared, self.config, job, self.patterns, self.journal, self.progress,
            self._scratch(output, job), self._spill(output, "solver's matrices"), self.residuals,
        )  # fmt: skip
        if self.permutes:
            layer.permute(dense)
        for group, statistics in job.groups(dense, own):
            for linear in group.linears:
                layer.prune(linear, statistics)
            del statistics  # or they would be held while the next group's are summed
        layer.warn()
        tuning = {"tuning": layer.tune()} if self.config.tune_block else {}
        with self.timing.stage("write"):
            record = layer.put(output, self._shard(index + 1), self._names(index))
        layer.changed.clear()  # they lie in the memory of the layer, which goes on
        dense, own = job.advance()
        passes = job.passes + layer.passes
        skeleton.drop_layer(index)
        give_freed_pages_back()
        moved = {"permutations": layer.permutations} if layer.permutations else {}
        self.journal.write(
            "layer", layer=index, passes=passes, seconds=time.perf_counter() - started,
            rss_anon=self.peak.sample(), **record, **tuning, **moved,
        )  # fmt: skip
        return dense, own

    def _replay_layer(
        self, output: OutputFolder, record: dict[str, Any], dense: Windows, own: Windows
    ) -> tuple[Windows, Windows]:
        """Takes the windows through a layer that an earlier run has finished."""
        index, skeleton = record["layer"], self.prepared.skeleton
        job = self._job(output, index)
        job.open(dense, own)
        names = {}
        for name, _ in skeleton.layers[index].named_parameters():
            names[name] = skeleton.disk_name(skeleton.layer_name(index, name)) or name
        scratch = self._scratch(output, job)
        packed = packed_in(self._done("tensor"), index)
        replay(job, output.folder / record["file"], packed, names, record, scratch)
        output.keep_shard(
            record["file"], self.prepared.checkpoint, self._names(index), packed=packed
        )
        dense, own = job.advance()
        skeleton.drop_layer(index)
        give_freed_pages_back()
        for each in self._done("tensor"):
            if each["layer"] == index:
                self.progress.step(f"layer {index + 1}/{self.plan.layers}, finished before")
        return dense, own

    def _scratch(self, output: OutputFolder, job: LayerJob) -> Scratch | None:
        """Room for every expert of a layer twice: permuted, and pruned."""
        nbytes = stored_bytes(job.layer)
        return Scratch(output.scratch, 2 * nbytes) if nbytes else None

    def _job(self, output: OutputFolder, index: int) -> LayerJob:
        """A layer in memory, on its way through the windows."""
        skeleton = self.prepared.skeleton
        with self.timing.stage("load"):
            skeleton.load_layer(index)
        return LayerJob(
            layer=skeleton.layers[index],
            structure=self.prepared.opening.structures[index],
            kwargs=self.prepared.stream.kwargs(index),
            inputs=self.prepared.inputs,
            split=self.split,
            threads=self.threads,
            store=lambda kind, channels: self._store(
                output, f"hidden {(index + 1) % 2}" if kind == "next" else kind, channels
            ),
            pool=skeleton.pool,
            where=f"layer {index}",
            timing=self.timing,
            tuned=self.config.tune_block,
            spill_sums=self._spill(output, "Grams"),
        )

    def finish(self, output: OutputFolder, model: str) -> None:
        """Writes what is not a decoder layer, the card and the index, and names the folder."""
        checkpoint, skeleton = self.prepared.checkpoint, self.prepared.skeleton
        with self.timing.stage("write"):
            rest = [n for n in self._names(None) if not skeleton.is_tied_copy(n)]
            record = output.put_shard(self._shard(0), checkpoint, rest, {})
            self.journal.write("file", **record)
            output.copy_other_files(self.plan.model)
            output.write_config()
        self.journal.write("summary", **self._summary(output))
        self.journal.close()
        report = load_report(output.folder)
        card = output.folder / "README.md"
        source_card = card.read_text("utf-8", errors="replace") if card.exists() else None
        text = model_card(report, source_card=source_card, base_model=model)
        output.write_text("README.md", text)
        output.write_text("recipe.yaml", self.config.to_recipe())
        output.write_index()
        output.commit()

    def _names(self, layer: int | None) -> list[str]:
        """On-disk tensors of a decoder layer; of everything outside of the layers for None."""
        skeleton = self.prepared.skeleton
        return [n for n in self.prepared.checkpoint.tensors if skeleton.layer_of(n) == layer]

    def _store(self, output: OutputFolder, kind: str, channels: int) -> Windows:
        """Room for hidden states, made once for every kind and used again layer after layer."""
        if kind not in self._windows:
            folder = self._spill(output, "hidden states")
            spill = folder and folder / kind.replace(" ", "-")
            shape = (self.split.count, self.config.seq_len, channels)
            self._windows[kind] = Windows(*shape, spill=spill)
        return self._windows[kind]

    def _spill(self, output: OutputFolder, part: str) -> Path | None:
        """Where a part of the plan's memory lies; None in memory."""
        return output.scratch if part in self.plan.spill else None

    def _shard(self, number: int) -> str:
        """File names as the hub counts them, the shard outside of the layers first."""
        return f"model-{number + 1:05d}-of-{self.plan.layers + 1:05d}.safetensors"

    def _run_record(self) -> dict[str, Any]:
        return {
            "version": _core.__version__,
            "config": self.config.model_dump(mode="json"),
            "inputs": dataclasses.asdict(self.prepared.inputs),
            "model": str(self.plan.model.name),
            "architecture": self.plan.architecture,
            "layers": self.plan.layers,
            "operators": len(self.plan.operators),
            "calibration": {
                "source": ", ".join(source.name for source in self.sources),
                "sources": [dataclasses.asdict(source) for source in self.sources],
                "note": "; ".join(self.notes) or None,
                "samples": self.split.count,
                "heldout": self.split.heldout,
                "seq_len": self.config.seq_len,
                "tokens": self.windows.numel(),
            },
            "kernel": _core.kernel_name(),
            "threads": self.threads,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }

    def _summary(self, output: OutputFolder) -> dict[str, Any]:
        self.peak.sample()
        records = [record for _, record in read_records(output.folder / REPORT_NAME)]
        passes = [record["passes"] for record in records if record["kind"] == "layer"]
        tensors = [record for record in records if record["kind"] == "tensor"]
        return {
            "seconds": {name: round(value, 3) for name, value in self.timing.seconds.items()},
            "peak_rss_anon": self.peak.peak,
            "import_rss_anon": self.start_rss,
            "planned_peak": self.plan.peak_bytes,
            "passes_per_layer": round(sum(passes) / self.plan.layers, 3),
            "bytes_written": output.total_bytes,
            "weights": sum(o.rows * o.columns for o in self.plan.operators),
            "zeros": sum(round(t["sparsity"] * math.prod(t["shape"])) for t in tensors),
            "stored_bytes": sum(t["stored_bytes"] for t in tensors),
            "parameters": output.total_parameters,
        }
