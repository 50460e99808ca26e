"""FISTAPruner and SparseGPT in torch, from their papers: what `solver_speed.py` compares with.

Float32 on the CPU, 2:4 (SparseGPT: 50 % of every block of columns as well).
"""

from __future__ import annotations

import math
from typing import Any

import torch

from rsprune.reference.fista import next_lambda

softshrink = torch.ops.aten.softshrink.out


class TorchFista:
    """FISTAPruner in torch, as good as it gets: every buffer made once, every call with `out=`.

    Rounds and the rule for lambda are those of `rsprune.reference.fista`. Of a step there are two
    forms: `literal` follows the formulas, `fused` makes the gradient step one `addmm` with
    `I - G/L` and the momentum one `lerp`.
    """

    def __init__(self, weight: torch.Tensor, gram: torch.Tensor, form: str) -> None:
        self.weight, self.raw = weight, gram
        self.step = {"literal": self.literal, "fused": self.fused}[form]
        self.gram, self.move = torch.empty_like(self.raw), torch.empty_like(self.raw)
        self.buffers = [torch.empty_like(self.weight) for _ in range(4)]
        self.cross, self.pull, self.d, self.g = (torch.empty_like(self.weight) for _ in range(4))

    def prepare(self) -> torch.Tensor:
        """What precedes the first round; returns Wanda's point."""
        torch.mul(self.raw, 1 / float(self.raw.diagonal().mean()), out=self.gram)
        torch.mm(self.weight, self.gram, out=self.cross)
        self.energy = float(torch.dot(self.cross.view(-1), self.weight.view(-1)))
        v = 1 + 0.5 * torch.sin(0.7 * torch.arange(len(self.gram), dtype=torch.float32))
        for _ in range(60):  # as many power iterations as the core takes, and its margin
            v = self.gram @ (v / v.norm())
        self.lipschitz = 1.02 * float(v.norm())
        torch.mul(self.gram, -1 / self.lipschitz, out=self.move).diagonal().add_(1)
        torch.mul(self.cross, 1 / self.lipschitz, out=self.pull)
        return self.weight * two_of_four(self.weight * self.raw.diagonal().sqrt())

    def literal(self, x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, new: torch.Tensor,
                threshold: float, momentum: float) -> None:  # fmt: skip
        torch.mm(y, self.gram, out=self.g).sub_(self.cross)
        torch.add(y, self.g, alpha=-1 / self.lipschitz, out=u)
        softshrink(u, threshold, out=new)
        torch.sub(new, x, out=u)
        torch.add(new, u, alpha=momentum, out=y)

    def fused(self, x: torch.Tensor, y: torch.Tensor, u: torch.Tensor, new: torch.Tensor,
              threshold: float, momentum: float) -> None:  # fmt: skip
        torch.addmm(self.pull, y, self.move, out=u)
        softshrink(u, threshold, out=new)
        torch.lerp(x, new, 1 + momentum, out=y)

    def iterate(self, start: torch.Tensor, penalty: float, count: int) -> torch.Tensor:
        x, y, u, new = self.buffers
        x.copy_(start)
        y.copy_(start)
        t = 1.0
        for _ in range(count):
            following = (1 + math.sqrt(1 + 4 * t * t)) / 2
            self.step(x, y, u, new, penalty / self.lipschitz, (t - 1) / following)
            x, new, t = new, x, following
        return x

    def form(self, d: torch.Tensor) -> float:
        """`tr(D G D^T)`, relative."""
        torch.mm(d, self.gram, out=self.g)
        return float(torch.dot(d.view(-1), self.g.view(-1))) / self.energy

    def solve(self, rounds: int, options: dict[str, Any]) -> torch.Tensor:
        """`rounds` rounds, however they go, so that both sides take the same number of steps."""
        lambda_, xi = options["lambda_start"], options["xi"]
        best = self.prepare()
        best_error = self.form(torch.sub(best, self.weight, out=self.d))
        rms = float(self.weight.norm()) / math.sqrt(self.weight.numel())
        rounded, low, high = torch.empty_like(best), 0.0, math.inf
        for _ in range(rounds):
            point = self.iterate(best, lambda_ * rms, options["iterations"])
            torch.mul(point, two_of_four(point), out=rounded)
            error = self.form(torch.sub(rounded, self.weight, out=self.d))
            rounding = self.form(torch.sub(point, rounded, out=self.d))
            if error < best_error:
                best, rounded, best_error = rounded, best, error
            low, high = (lambda_, high) if rounding > xi * error else (low, lambda_)
            lambda_ = next_lambda(low, high)
        return best


def two_of_four(score: torch.Tensor) -> torch.Tensor:
    """Which two of every four `|score|` are largest; `topk` on groups of four is slower."""
    size = score.abs().view(-1, 4).t().contiguous()
    larger = torch.zeros(size.shape, dtype=torch.uint8)
    for i in range(4):
        for j in range(i + 1, 4):
            second = size[j] >= size[i]
            larger[i] += second
            larger[j] += second.logical_not_()
    return (larger < 2).t().reshape(score.shape)


def torch_sparsegpt(weight: torch.Tensor, gram: torch.Tensor, pattern: str) -> torch.Tensor:
    """The published column loop: inverse by Cholesky, blocks of 128, lazy updates after them."""
    h = gram.clone()
    h.diagonal().add_(0.01 * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    weight = weight.clone()
    for start in range(0, weight.shape[1], 128):
        part = slice(start, min(start + 128, weight.shape[1]))
        work, local = weight[:, part].clone(), upper[part, part]
        errors, roots = torch.empty_like(work), local.diagonal()
        goes = torch.zeros(work.shape, dtype=torch.bool)
        if pattern == "50%":
            score = (work / roots).square_()
            goes = score <= score.view(-1).kthvalue(score.numel() // 2).values
        for j in range(work.shape[1]):
            if pattern == "2:4" and j % 4 == 0:
                score = (work[:, j : j + 4] / roots[j : j + 4]).square_()
                least = score.topk(2, dim=1, largest=False, sorted=False).indices
                goes[:, j : j + 4].scatter_(1, least, True)
            kept = work[:, j].masked_fill(goes[:, j], 0.0)
            lost = torch.sub(work[:, j], kept).div_(roots[j])
            work[:, j:] -= lost[:, None] @ local[j : j + 1, j:]  # faster than `addr_`
            work[:, j], errors[:, j] = kept, lost
        weight[:, part] = work
        weight[:, part.stop :].addmm_(errors, upper[part, part.stop :], alpha=-1)
    return weight
