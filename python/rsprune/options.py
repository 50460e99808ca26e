"""The options of a run, said once for all the commands that take them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

if TYPE_CHECKING:
    from rsprune.config import Config

__all__ = ["Device", "Threads", "config_of", "configs_of", "takes_options"]

Device = Annotated[str | None, Option(help="Where the model runs: cpu, cuda or auto.")]
Threads = Annotated[int | None, Option(help="Worker threads [all that this process may use].")]
RemoteCode = Annotated[
    bool | None, Option("--trust-remote-code", help="Run code that lies in the model's folder.")
]
Text = str | None
Number = int | None
Fraction = float | None


def run_options(
    recipe: Annotated[Path | None, Option(help="File of these options; explicit ones win.")] = None,
    method: Annotated[
        Text,
        Option(
            help="best, admm, fista-plus, fista, sparsegpt, wanda, magnitude; pbs2p-exact, pbs2p, "
            "billm, arb, gptq; whole layers: flexigpt, pip, bi, taylor, perplexity, "
            "perplexity-greedy, random, given."
        ),
    ] = None,
    pattern: Annotated[Text, Option(help="keep:of (2:4, 4:8, ...) or a sparsity (50%).")] = None,
    bits: Annotated[
        Fraction, Option(help="PBS2P-exact: true bits a weight; GPTQ: 2, 3 or 4.")
    ] = None,
    scope: Annotated[Text, Option(help="Over what a sparsity counts: row or matrix.")] = None,
    allocate: Annotated[
        bool | None, Option(help="Spread a ratio over operators by measured error curves.")
    ] = None,
    permute: Annotated[
        bool | None, Option(help="Permute channels so that a keep-of pattern keeps more.")
    ] = None,
    format: Annotated[Text, Option(help="Store weights dense, or packed.")] = None,
    ignore: Annotated[
        list[str] | None, Option(help="Glob of tensors that stay dense; repeatable.")
    ] = None,
    calibration: Annotated[
        list[str] | None,
        Option(help="Text, JSON-lines, parquet file; hub:NAME; repeatable, interleaved."),
    ] = None,
    calibration_field: Annotated[Text, Option(help="Field of the records with the text.")] = None,
    samples: Annotated[Number, Option(help="Calibration windows, held-out ones included.")] = None,
    seq_len: Annotated[Number, Option(help="Tokens of a window.")] = None,
    heldout: Annotated[Fraction, Option(help="Share of windows that no solver sees.")] = None,
    seed: Annotated[Number, Option(help="Seed of the choice of windows.")] = None,
    propagate: Annotated[Text, Option(help="Layers start from: layer (dense) or model.")] = None,
    target: Annotated[Text, Option(help="Compare outputs with: dense or own inputs.")] = None,
    true_sequential: Annotated[
        bool | None, Option(help="Operators see pruned earlier ones.")
    ] = None,
    correction: Annotated[Fraction, Option(help="Target dense: share of drift made up.")] = None,
    clip_tokens: Annotated[
        Fraction, Option(help="Massive tokens count at most so many median norms; 0: as they are.")
    ] = None,
    refit: Annotated[bool | None, Option(help="Solve kept weights again afterwards.")] = None,
    search: Annotated[bool | None, Option(help="Search better masks afterwards.")] = None,
    polish_steps: Annotated[
        Number, Option(help="Refit, search, fista-plus: steps on the final mask.")
    ] = None,
    damping: Annotated[Fraction, Option(help="SparseGPT, ADMM, codes: relative.")] = None,
    rho_schedule: Annotated[Text, Option(help="ADMM: published or slow.")] = None,
    budget: Annotated[Number, Option(help="Best: products with the Gram an operator.")] = None,
    warm_start: Annotated[Text, Option(help="FISTA: auto, wanda or sparsegpt.")] = None,
    iterations: Annotated[Number, Option(help="FISTA: iterations a round.")] = None,
    xi: Annotated[Fraction, Option(help="FISTA: rounding's share that raises lambda.")] = None,
    patience: Annotated[Number, Option(help="FISTA: rounds without gain until it stops.")] = None,
    max_rounds: Annotated[Number, Option(help="FISTA: most rounds.")] = None,
    lambda_start: Annotated[
        Fraction, Option(help="FISTA: first lambda, in relative units.")
    ] = None,
    remove: Annotated[
        Text, Option(help="Depth: how many layers go, a number or 20%; given: which, as 17,18.")
    ] = None,
    protect: Annotated[Text, Option(help="Depth: layers that stay at both ends, as 4,2.")] = None,
    fold: Annotated[
        bool | None, Option(help="Depth: fold the removed layers' linear map into the last one.")
    ] = None,
    pip_norm: Annotated[Text, Option(help="PIP: taylor, l1 or l2.")] = None,
    edit_rate: Annotated[Fraction, Option(help="PIP: share of words that are edited.")] = None,
    texts: Annotated[Number, Option(help="Depth: texts that score the layers.")] = None,
    text_tokens: Annotated[Number, Option(help="Depth: tokens of such a text.")] = None,
    rank: Annotated[Number, Option(help="FlexiGPT: of adapters, factors and maps.")] = None,
    replace: Annotated[
        Text, Option(help="FlexiGPT: what may stand in: fold,map,shared,own,svd.")
    ] = None,
    flexigpt_mode: Annotated[Text, Option(help="FlexiGPT: default or faithful.")] = None,
    recover: Annotated[
        bool | None, Option(help="FlexiGPT: fit stand-ins to the dense outputs by Adam.")
    ] = None,
    extend: Annotated[
        Number, Option(help="FlexiGPT: layers to repeat, for training, instead of removing any.")
    ] = None,
    tune_block: Annotated[
        bool | None, Option(help="Fit kept weights to the dense layer's output.")
    ] = None,
    tune_steps: Annotated[Number, Option(help="Tuning: most Adam steps a layer.")] = None,
    tune_rate: Annotated[Fraction, Option(help="Tuning: first relative step size.")] = None,
    tune_batch: Annotated[Number, Option(help="Tuning: windows a step.")] = None,
    memory: Annotated[Text, Option(help="Bound on memory, such as 4GiB.")] = None,
    device: Device = None,
    threads: Threads = None,
    trust_remote_code: RemoteCode = None,
) -> None:
    """The options of a run. Those that are not given have their default in `Config` alone."""


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replaces `**options` of a command by the parameters of `run_options`, for typer to see."""
    own = inspect.signature(command, eval_str=True)
    shared = inspect.signature(run_options, eval_str=True).parameters.values()
    keyword = [p.replace(kind=p.KEYWORD_ONLY) for p in shared]
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    merged = own.replace(parameters=sorted([*kept, *keyword], key=lambda p: p.kind))
    command.__signature__ = merged  # type: ignore[attr-defined]
    return command


def configs_of(options: dict[str, Any]) -> list[Config]:
    """As `config_of`, of every stage that the recipe lists."""
    recipe: Path | None = options.get("recipe")
    if recipe is None:
        return [config_of(options)]
    from rsprune.config import read_stages

    return read_stages(recipe, _given({**options, "recipe": None}))


def config_of(options: dict[str, Any]) -> Config:
    """Only what was given explicitly: a recipe's values win over defaults, not over options."""
    from rsprune.config import Config

    recipe: Path | None = options.pop("recipe")
    given = _given(options)
    return Config.create(**given) if recipe is None else Config.from_recipe(recipe, **given)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value not in (None, [])}
