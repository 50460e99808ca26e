"""The main job on the real model of the demo; texts are what CPython ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rsprune
from rsprune.checkpoint import Checkpoint
from rsprune.data import evaluation_windows, load_texts
from rsprune.eval_journal import Journal
from rsprune.evaluate import window_losses
from rsprune.memory import memory_limit
from rsprune.progress import NullProgress
from rsprune.scoring import Scorer
from rsprune.skeleton import Skeleton, load_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.shared]


def test_streamed_losses_equal_those_of_the_whole_model(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM

    text = "\n".join(load_texts(None).documents[:40])
    windows = evaluation_windows(text, load_tokenizer(smollm2), 256)[:3]
    assert len(windows) == 3
    scorer = Scorer(Skeleton(Checkpoint.open(smollm2)), memory_limit(), 2, NullProgress())
    streamed = window_losses(scorer, windows, Journal(None, {}))

    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    for ids, loss in zip(windows, streamed, strict=True):
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1].double()
        expected = float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        assert expected > 100  # the model does not know the text by heart
        assert abs(loss - expected) < 1e-5 * expected


LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=5, do_sample=False)[0]))
assert "rsprune" not in sys.modules
"""


def test_the_real_model_is_pruned_and_loads_without_rsprune(smollm2: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = rsprune.Config.create(method="sparsegpt", pattern="2:4", samples=16, seq_len=256)
    report = rsprune.compress(smollm2, out, config)

    assert len(report.tensors) == 30 * 7
    assert all(t["sparsity"] >= 0.5 for t in report.tensors)
    assert all(0 < t["error"] < 0.5 for t in report.tensors)
    assert rsprune.verify(out) == []
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(out)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("The capital of France is")
    # Flat over layers: the last third of the layers needs no more memory than the second.
    memory = [layer["rss_anon"] for layer in report.layers]
    assert len(memory) == 30
    assert max(memory[20:]) < max(memory[10:20]) + 32 * 2**20
