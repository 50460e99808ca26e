"""A run that removes decoder layers, in the order in which things happen.

plan            headers and shapes only; all refusals happen here
read            texts, tokenizer, every weight
take up         a new journal, or that of a run that ended early
remove          scores, the lowest layer goes, a journal line; until enough are gone
for each layer that stays:
    fold        the map of a removed span behind it, where asked for
    put         one output shard under its new number, one journal line
finish          shard of the rest, config.json cut, card, index; one rename
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from rsprune import _core
from rsprune.config import Config
from rsprune.depth.card import depth_card
from rsprune.depth.cut import cut_config, new_names
from rsprune.depth.fold import Fold, fold_spans, spans
from rsprune.depth.picture import SCORES_NAME, removal_page
from rsprune.depth.plan import Prepared, prepare, read_config_text
from rsprune.depth.remove import choose
from rsprune.depth.scores import Scoring
from rsprune.depth.views import Texts, choose_texts
from rsprune.depth.walk import Walk
from rsprune.memory import PeakWatch, rss_anon
from rsprune.mixture import Calibration, interleaved, load_corpora
from rsprune.other_files import other_files
from rsprune.output import OutputFolder
from rsprune.progress import Progress
from rsprune.report import Journal, load_report
from rsprune.resume import fingerprint, put_down, take_up
from rsprune.skeleton import load_tokenizer
from rsprune.timing import Timing
from rsprune.windows import Split


class DepthRun:
    """One run; its methods stand in the order in which they are called."""

    prepare = staticmethod(prepare)
    card = staticmethod(depth_card)

    def __init__(
        self, folder: Path, config: Config, out: Path, progress: Progress, peak: PeakWatch
    ) -> None:
        self.prepared: Prepared = self.prepare(folder, config, out)
        self.opened = self.prepared.opened
        self.plan = self.prepared.plan
        self.config = config
        self.progress = progress
        self.peak = peak
        self.start_rss = rss_anon()
        self.timing = Timing()
        self.threads = config.threads or _core.default_threads()
        self.journal: Journal | None = None
        self.done: list[dict[str, Any]] = []
        torch.set_num_threads(self.threads)

    def read_inputs(self) -> None:
        """Reads what decides whether the run can be done: texts, tokenizer, every weight."""
        for warning in self.plan.warnings:
            self.progress.note(f"warning: {warning}")
        with self.timing.stage("read"):
            other_files(self.plan.model)
            config = self.config
            corpora = load_corpora(config.calibration, field=config.calibration_field)
            self.notes = [corpus.note for corpus in corpora if corpus.note]
            for note in self.notes:
                self.progress.note(note)
            self.tokenizer = load_tokenizer(self.plan.model, config.trust_remote_code)
            self.texts: Texts = choose_texts(
                corpora, self.tokenizer, count=config.texts, tokens=config.text_tokens,
                seed=config.seed,
            )  # fmt: skip
            self.windows: Calibration | None = None
            if self.needs_windows:
                self.windows = interleaved(
                    corpora, self.tokenizer, samples=config.samples, seq_len=config.seq_len,
                    seed=config.seed, heldout=config.heldout,
                )  # fmt: skip
            for ids in self._all_ids():
                self.opened.stream.check_ids(ids)
            self.opened.checkpoint.check_finite(self.opened.checkpoint.tensors)

    @property
    def needs_windows(self) -> bool:
        """Whether anything is fitted."""
        return self.config.fold

    def _all_ids(self) -> list[torch.Tensor]:
        windows = self.windows
        folded = [] if windows is None else [windows.calibration, windows.heldout]
        return [ids for ids in (self.texts.plain, *folded) if len(ids)]

    def take_up(self, output: OutputFolder, *, restart: bool) -> None:
        """Opens the journal: a new one, or that of the unfinished run that lies there."""
        tokens = torch.cat([ids.flatten() for ids in self._all_ids()])
        device = str(self.opened.skeleton.device)
        own = fingerprint(self.opened.checkpoint, tokens, self.config, self.threads, device)
        self.journal, self.done = take_up(output, own, self._run_record(), restart=restart)
        if self.done:
            removed, written = len(self._done("removal")), len(self._done("layer"))
            self.progress.note(f"going on after {removed} removals and {written} written layers")

    def _done(self, kind: str) -> list[dict[str, Any]]:
        """What an earlier run has journaled of a kind."""
        return [record for record in self.done if record["kind"] == kind]

    def leave(self, output: OutputFolder) -> None:
        """Closes a run that cannot go on; what is finished stays, for the next one."""
        total = self.prepared.removal.count
        put_down(self.journal, output, self.progress, kind="removal", total=total)

    def write_layers(self, output: OutputFolder) -> None:
        """Chooses the layers that stay, and writes them under their new numbers."""
        with Walk(self.opened.stream, self.threads, output.scratch) as walk:
            self.kept = self._choose(walk)
            content = read_config_text(self.plan.model)
            trusted = self.config.trust_remote_code
            self.cut = cut_config(
                content, self.opened.skeleton, self.kept, trust_remote_code=trusted
            )
            self.names = new_names(self.opened.skeleton, self.kept)
            self._write(output, walk)

    def _choose(self, walk: Walk) -> list[int]:
        removal, done = self.prepared.removal, self._done("removal")
        self.progress.stage("remove", removal.count)
        for record in done:
            self.progress.step(f"layer {record['removed']}, removed before")

        def note(**fields: Any) -> None:
            assert self.journal is not None
            self.journal.write("removal", rss_anon=self.peak.sample(), **fields)
            removed = fields["removed"]
            self.progress.step(f"layer {removed} removed, score {fields['scores'][removed]:.4g}")

        with self.timing.stage("score"):
            scoring = Scoring(walk, self.texts, self.tokenizer, self.config)
            return choose(self.prepared.method, removal, scoring, done, note)

    def _write(self, output: OutputFolder, walk: Walk) -> None:
        """One shard for every layer that stays; finished ones are only counted in."""
        self.progress.stage("write", len(self.kept))
        finished = {record["layer"]: record for record in self._done("layer")}
        before_spans = spans(self.kept, self.plan.layers) if self.config.fold else {}
        folds = self._folds(walk)
        for new, old in enumerate(self.kept):
            fold = None
            if old in before_spans and any(n not in finished for n in range(new, len(self.kept))):
                with self.timing.stage("fold"):
                    fold = next(folds)
            if new in finished:
                source, names = self.opened.checkpoint, self.names[new]
                output.keep_shard(finished[new]["file"], source, list(names), renamed=names)
                self.progress.step(f"layer {new}, written before")
            else:
                self._write_layer(output, new, old, fold)

    def _folds(self, walk: Walk) -> Iterator[Fold]:
        if self.windows is None:
            return iter(())
        split = Split(len(self.windows.calibration), len(self.windows.heldout))
        ids = torch.cat([self.windows.calibration, self.windows.heldout])
        return fold_spans(walk, self.kept, ids, split)

    def _write_layer(self, output: OutputFolder, new: int, old: int, fold: Fold | None) -> None:
        started, names = time.perf_counter(), self.names[new]
        folded = {} if fold is None else {"fold": fold.record}
        with self.timing.stage("write"):
            record = output.put_shard(
                self._shard(new + 1),
                self.opened.checkpoint,
                list(names),
                {} if fold is None else fold.tensors,
                renamed=names,
            )
        assert self.journal is not None
        self.journal.write(
            "layer", layer=new, dense_layer=old, seconds=time.perf_counter() - started,
            rss_anon=self.peak.sample(), **record, **folded,
        )  # fmt: skip
        if fold is not None:
            self.progress.note(f"layer {new} (dense {old}): {_told(fold.record)}")
        self.progress.step(f"layer {new}, dense {old}")

    def finish(self, output: OutputFolder, model: str) -> None:
        """Writes what is no decoder layer, the card and the index, and names the folder."""
        assert self.journal is not None
        with self.timing.stage("write"):
            names = self.names[None]
            record = output.put_shard(
                self._shard(0), self.opened.checkpoint, list(names), {}, renamed=names
            )
            self.journal.write("file", **record)
            output.copy_other_files(self.plan.model)
        self.journal.write("summary", **self._summary(output))
        self.journal.close()
        output.write_text("config.json", json.dumps(self.cut, indent=2) + "\n")
        report = load_report(output.folder)
        card = output.folder / "README.md"
        source_card = card.read_text("utf-8", errors="replace") if card.exists() else None
        output.write_text("README.md", self.card(report, source_card, model))
        if report.removals:
            output.write_text(SCORES_NAME, removal_page(report))
        output.write_text("recipe.yaml", self.config.to_recipe())
        output.write_index()
        output.commit()

    def _shard(self, number: int) -> str:
        """File names as the hub counts them, the shard outside of the layers first."""
        count = self.plan.layers - self.prepared.removal.count + 1
        return f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _run_record(self) -> dict[str, Any]:
        sources = self.texts.sources
        record: dict[str, Any] = {
            "version": _core.__version__,
            "config": self.config.model_dump(mode="json"),
            "model": str(self.plan.model.name),
            "architecture": self.plan.architecture,
            "layers": self.plan.layers,
            "removed": self.prepared.removal.count,
            "protected": sorted(self.prepared.removal.protected),
            "texts": {
                "source": ", ".join(source.name for source in sources),
                "sources": [dataclasses.asdict(source) for source in sources],
                "note": "; ".join(self.notes) or None,
                "texts": self.config.texts,
                "tokens": self.config.text_tokens,
            },
            "kernel": _core.kernel_name(),
            "threads": self.threads,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        if self.windows is not None:
            record["calibration"] = {
                "sources": [dataclasses.asdict(source) for source in self.windows.sources],
                "samples": self.config.samples,
                "heldout": len(self.windows.heldout),
                "seq_len": self.config.seq_len,
            }
        return record

    def _summary(self, output: OutputFolder) -> dict[str, Any]:
        self.peak.sample()
        return {
            "seconds": {name: round(value, 3) for name, value in self.timing.seconds.items()},
            "peak_rss_anon": self.peak.peak,
            "import_rss_anon": self.start_rss,
            "planned_peak": self.plan.peak_bytes,
            "bytes_written": output.total_bytes,
            "kept_layers": self.kept,
        }


def _told(record: dict[str, Any]) -> str:
    """What became of a map, as a sentence."""
    if "skipped" in record:
        return f"nothing folded: {record['skipped']}"
    which = 1 if record["before"][1] is not None else 0
    before, after = record["before"][which], record["after"][which]
    return f"map folded, error behind the removed layers {before:.4f} -> {after:.4f}"
