"""Training of what replaced layers bring: adapters, factors, maps, gains, gamma and their norms.

    min  mean next-token loss over windows of a text

The rest of the model stays as it is. It is held whole in float32, as gradients go through all of
it: this is the one step that needs a model's memory, and it is refused before anything is loaded
where that does not suffice. Adam with a short warm-up and cosine decay. Every `SAVED_EVERY` steps
all that training has changed lies in one file, by one rename: a run that is repeated goes on there,
and ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsprune import _core
from rsprune.checkpoint import Checkpoint
from rsprune.data import evaluation_windows, load_texts
from rsprune.errors import DoesNotFitError, RspruneError, UsageError
from rsprune.flexi.card import flexi_card
from rsprune.flexi.positions import NAMES
from rsprune.hf import load
from rsprune.memory import memory_limit, rss_anon
from rsprune.output import OutputFolder, check_output
from rsprune.progress import NullProgress, Progress
from rsprune.replaced import says_blocks
from rsprune.replaced_layers import SharedLinear
from rsprune.report import REPORT_NAME, Journal, load_report
from rsprune.resume import difference, model_hashes, versions
from rsprune.skeleton import Skeleton, load_tokenizer

SAVED_EVERY = 20
STATE = "training.pt"
WARM_UP = 0.05
"""Share of the steps in which the step size rises."""


@dataclass(frozen=True)
class Training:
    """Options of a training run.

    Attributes:
        steps: of Adam.
        seq_len: tokens of a window.
        batch: windows a step.
        rate: the largest step size.
        seed: of the order of the windows.
        threads: of torch; None takes what affinity and cgroup leave.
    """

    steps: int = 200
    seq_len: int = 512
    batch: int = 1
    rate: float = 3e-4
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, least in {"steps": 1, "seq_len": 2, "batch": 1}.items():
            if (found := getattr(self, name)) < least:
                raise UsageError(f"option {name}: expected at least {least}, found {found}")
        if not 0.0 < self.rate < math.inf:
            raise UsageError(f"option rate: expected a positive number, found {self.rate}")


def train(
    folder: str | Path,
    out: str | Path,
    text: str | Path,
    training: Training | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Trains the replaced layers of a folder, and writes it anew.

    Args:
        folder: an output of `flexigpt`.
        out: the folder to write.
        text: any source that calibration takes.
        training: its options.
        overwrite: whether `out` may exist, if rsprune has written it.
        progress: what is told how far it is.

    Returns:
        What the report's summary says of it: steps, and mean losses of the first and last steps.

    Raises:
        UsageError: there is nothing to train, an unfinished training of `out` is another one, or
            the text is shorter than a window.
        DoesNotFitError: the model does not fit in memory.
        RspruneError: a loss is not finite.
    """
    folder, out, training = Path(folder), Path(out), training or Training()
    check_output(out, folder, overwrite=overwrite)
    if not says_blocks(folder):
        raise UsageError(f"{folder}: expected replaced layers to train, found none in config.json")
    skeleton = Skeleton(Checkpoint.open(folder))
    names = trained_names(skeleton)
    _check_memory(skeleton, names, training)
    corpus = load_texts(str(text))
    ids = evaluation_windows("\n".join(corpus.documents), load_tokenizer(folder), training.seq_len)
    threads = training.threads or _core.default_threads()
    torch.set_num_threads(threads)
    own = {
        **versions(),
        "options": {**vars(training), "threads": threads},
        "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        "model files": model_hashes(skeleton.checkpoint),
    }
    output = OutputFolder(out, overwrite=overwrite)
    with output.owned():
        run = _Run(load(folder, dtype=torch.float32), names, ids, training, output.folder / STATE)
        if not run.take_up(own):
            output.begin("training")
        summary = run.run(own, progress or NullProgress())
        _write(skeleton, run.values(), output, summary)
    return summary


def trained_names(skeleton: Skeleton) -> list[str]:
    """Parameters that training changes: all that is a replaced layer's own, and maps behind any."""
    shared = {id(m.weight) for m in skeleton.model.modules() if isinstance(m, SharedLinear)}
    found, prefix = [], f"{skeleton.layer_prefix}."
    for name, parameter in skeleton.model.named_parameters():
        if id(parameter) in shared or not name.startswith(prefix):
            continue
        block = skeleton.blocks.get(int(name.removeprefix(prefix).partition(".")[0]))
        if block is not None and (block.source is not None or block.ranks or ".maps." in name):
            found.append(name)
    return found


def _check_memory(skeleton: Skeleton, names: list[str], training: Training) -> None:
    """The model in float32, gradients and moments of what is trained and what is saved of it,
    activations, logits."""
    model, text = skeleton.model, skeleton.config.get_text_config()
    whole = sum(p.numel() for p in model.parameters())
    moving = 6 * sum(model.get_parameter(name).numel() for name in names)
    tokens = training.seq_len * training.batch
    width = max(p.numel() // skeleton.channels for layer in skeleton.layers
                for p in layer.parameters() if p.dim() == 2)  # fmt: skip
    remembered = tokens * len(skeleton.layers) * (12 * skeleton.channels + 6 * width)
    logits = 4 * tokens * int(text.vocab_size)
    needed = rss_anon() + 4 * (whole + moving + remembered + logits)
    if needed > (limit := memory_limit()):
        raise DoesNotFitError(
            f"training needs {needed / 2**20:.0f} MiB, as it holds the whole model in float32, "
            f"found {limit / 2**20:.0f} MiB",
            smallest=needed,
        )


class _Run:
    """A model in training."""

    def __init__(
        self, model: nn.Module, names: list[str], ids: Tensor, training: Training, state: Path
    ) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.training, self.ids, self.state = training, ids, state
        self.leaves = {name: model.get_parameter(name).requires_grad_() for name in names}
        self.adam = torch.optim.Adam(self.leaves.values(), lr=training.rate, betas=(0.9, 0.95))
        self.losses: list[float] = []

    def take_up(self, own: dict[str, Any]) -> bool:
        """Goes on with what an earlier run has saved; False where it has saved nothing.

        Raises:
            UsageError: it was another training.
        """
        if not self.state.exists():
            return False
        saved = torch.load(self.state, weights_only=True)
        if found := difference(saved["fingerprint"], own):
            part, then, now = found
            raise UsageError(
                f"{self.state}: an unfinished training whose {part} differs: expected {then!r}, "
                f"found {now!r}; repeat it to finish it, or remove {self.state.parent}"
            )
        with torch.no_grad():
            for name, value in saved["values"].items():
                self.leaves[name].copy_(value)
        self.adam.load_state_dict(saved["adam"])
        self.losses = saved["losses"]
        return True

    def run(self, own: dict[str, Any], progress: Progress) -> dict[str, Any]:
        """All steps that are left; returns what the summary says."""
        total = self.training.steps
        progress.stage("train", total)
        for done in range(total):
            if done >= len(self.losses):
                self.losses.append(self._step(done))
                if len(self.losses) % SAVED_EVERY == 0:
                    self._save(own)
            progress.step(f"loss {self.losses[done]:.4f}")
        some = max(1, min(20, total // 4))
        first, last = self.losses[:some], self.losses[-some:]
        return {"steps": total, "loss_first": sum(first) / some, "loss_last": sum(last) / some}

    def _step(self, step: int) -> float:
        training = self.training
        for group in self.adam.param_groups:
            group["lr"] = training.rate * schedule(step, training.steps)
        self.adam.zero_grad()
        loss = self.model(self._batch(step), labels=self._batch(step), use_cache=False).loss
        if not torch.isfinite(loss):
            raise RspruneError(f"training: expected a finite loss, found {float(loss)} at {step}")
        loss.backward()
        nn.utils.clip_grad_norm_(self.leaves.values(), 1.0)
        self.adam.step()
        return float(loss.detach())

    def _batch(self, step: int) -> Tensor:
        """Windows of a step; every pass over the text has an order of its own."""
        size, count = self.training.batch, len(self.ids)
        places = range(step * size, (step + 1) * size)
        chosen = []
        for place in places:
            generator = torch.Generator().manual_seed(self.training.seed + place // count)
            chosen.append(torch.randperm(count, generator=generator)[place % count])
        return self.ids[torch.stack(chosen)]

    def _save(self, own: dict[str, Any]) -> None:
        saved = {
            "fingerprint": json.loads(json.dumps(own)),
            "values": self.values(),
            "adam": self.adam.state_dict(),
            "losses": self.losses,
        }
        content = io.BytesIO()  # torch says nothing of why a file could not be written
        torch.save(saved, content)
        _core.write_file(self.state, content.getvalue())

    def values(self) -> dict[str, Tensor]:
        """What is trained, in float32."""
        return {name: leaf.detach() for name, leaf in self.leaves.items()}


def schedule(step: int, steps: int) -> float:
    """The share of the largest step size: a linear rise, then half a cosine."""
    rise = max(1, round(WARM_UP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _write(
    skeleton: Skeleton, values: dict[str, Tensor], output: OutputFolder, summary: dict[str, Any]
) -> None:
    """The folder with trained tensors, shard by shard, under the names that they had."""
    checkpoint, trained = skeleton.checkpoint, {}
    for name, value in values.items():
        on_disk = skeleton.disk_name(name)
        assert on_disk is not None  # the skeleton refused missing tensors
        stored = value.to(skeleton.stored_dtype(name))
        trained[on_disk] = (NAMES[stored.dtype], stored)
    report, records = load_report(checkpoint.folder), []
    for file in sorted({info.file for info in checkpoint.tensors.values()}):
        names = [n for n, info in checkpoint.tensors.items() if info.file == file]
        copied = {name: name for name in names if name not in trained}
        new = {name: trained[name] for name in names if name in trained}
        records.append(output.put_tensors(file, checkpoint, copied, new))
    output.copy_other_files(checkpoint.folder)
    (output.folder / REPORT_NAME).unlink(missing_ok=True)  # of an end that was cut short
    journal = Journal(output.folder)
    journal.write("run", **report.run)
    for removal in report.removals:
        journal.write("removal", **removal)
    hashes = {record["file"]: record for record in records}
    for layer in report.layers:
        journal.write("layer", **{**layer, **hashes.pop(layer["file"], {})})
    for record in hashes.values():
        journal.write("file", **record)
    journal.write("summary", **{**(report.summary or {}), "training": summary})
    journal.close()
    card = checkpoint.folder / "README.md"
    source_card = card.read_text("utf-8", errors="replace") if card.exists() else None
    text = flexi_card(load_report(output.folder), source_card, str(report.run.get("model")))
    output.write_text("README.md", text)
    output.write_index()
    output.commit(STATE)
