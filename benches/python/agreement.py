"""Wanda by plain torch, whole model in memory: an independent figure for the same windows.

    python benches/python/agreement.py MODEL --calibration c4.jsonl --text wiki.test.raw

Nothing of rsprune but the choice of windows enters: transformers' own layers, torch products,
masks by `topk`. Prints the perplexity on the first `--windows` windows of the text.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rsprune.data import calibration_windows, evaluation_windows, load_texts


def file_order(texts: list[str], tokenizer: object, samples: int, seq_len: int) -> torch.Tensor:
    """Documents as the file has them, joined by blank lines: another common convention."""
    ids = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[0]
    return ids[: samples * seq_len].reshape(samples, seq_len)


def add_norms(
    norms: dict[str, torch.Tensor], name: str, module: torch.nn.Module, args: tuple, out: object
) -> None:
    norms[name] = norms.get(name, 0) + args[0][0].double().pow(2).sum(0)


@torch.no_grad()
def prune(model: torch.nn.Module, windows: torch.Tensor) -> None:
    """Wanda 2:4 as usually run: each layer on the inputs that the pruned layers before it give."""
    base = model.model
    hidden = [base.embed_tokens(ids[None]) for ids in windows]
    positions = torch.arange(windows.shape[1])[None]
    rotary = base.rotary_emb(hidden[0], positions)
    for layer in base.layers:
        norms: dict[str, torch.Tensor] = {}
        linears = {n: m for n, m in layer.named_modules() if isinstance(m, torch.nn.Linear)}

        hooks = [m.register_forward_hook(partial(add_norms, norms, n)) for n, m in linears.items()]
        for states in hidden:
            layer(states, position_embeddings=rotary, position_ids=positions)
        for hook in hooks:
            hook.remove()
        for name, linear in linears.items():
            groups = (linear.weight.abs() * norms[name].sqrt().float()).reshape(-1, 4)
            dropped = groups.topk(2, dim=1, largest=False).indices
            linear.weight.reshape(-1, 4).scatter_(1, dropped, 0.0)
        for index, states in enumerate(hidden):
            out = layer(states, position_embeddings=rotary, position_ids=positions)
            hidden[index] = out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def perplexity(model: torch.nn.Module, windows: torch.Tensor) -> float:
    total = 0.0
    for ids in windows:
        logits = model(ids[None], use_cache=False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--order", choices=("seed", "file"), default="seed")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    corpus = load_texts(args.calibration)
    if args.order == "file":
        windows = file_order(corpus.documents, tokenizer, args.samples, 2048)
    else:
        windows = calibration_windows(
            corpus, tokenizer, samples=args.samples, seq_len=2048, seed=args.seed
        )
    text = "\n".join(load_texts(args.text).documents)
    prune(model, windows)
    model.to(torch.bfloat16).to(torch.float32)
    test = evaluation_windows(text, tokenizer, 2048)[: args.windows]
    print(args.order, args.seed, perplexity(model, test))


if __name__ == "__main__":
    main()
