"""The options of a run: frozen, validated, and at the same time the schema of a recipe file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rsprune.errors import UsageError

DEFAULT_IGNORE = ("lm_head", "*embed*", "*router*", "*gate.weight")
"""Globs over on-disk names (with or without `.weight`) of what is never pruned by default."""

_UNITS = {"": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


class Config(BaseModel):
    """Options of `compress`. A field that is None takes the default of the method.

    Raises `UsageError` (through `Config.create`) naming the option, what was expected and found.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "best"
    """Name in the registry of methods."""
    pattern: str = "2:4"
    """`keep:of` with groups of 4, 8 or 16, or a sparsity such as `50%` or `0.5`."""
    bits: float | None = Field(default=None, gt=0.0)
    """PBS2P-exact: true bits a weight, all operators together (1); GPTQ: 2, 3 or 4 (4)."""
    scope: Literal["row", "matrix"] | None = None
    """Over what a sparsity is counted."""
    allocate: bool = False
    """Whether a ratio is spread over all operators by measured error curves; pays from 60 % on."""
    permute: bool | None = None
    """Whether channels change places so that a keep-of pattern keeps more."""
    format: Literal["dense", "packed"] = "dense"
    """How pruned weights are stored: with their zeros, or packed, for `import rsprune` to load."""
    ignore: tuple[str, ...] = DEFAULT_IGNORE
    """Globs over on-disk tensor names that stay dense."""

    calibration: tuple[str, ...] = ()
    """Text files and `hub:` datasets, their windows interleaved; none is the offline default."""
    calibration_field: str | None = None
    """Field of a JSON-lines or parquet file that holds the text; None guesses and says so."""
    samples: int = Field(default=128, ge=1)
    """Calibration windows, the held-out ones included."""
    seq_len: int = Field(default=2048, ge=8)
    """Tokens of a window."""
    heldout: float = Field(default=0.125, ge=0.0, le=0.5)
    """Fraction of the windows that no solver sees."""
    seed: int = Field(default=0, ge=0)
    """Seed of the choice of windows."""

    propagate: Literal["layer", "model"] | None = None
    """What a decoder layer starts from: the dense or the compressed model's hidden states."""
    target: Literal["dense", "own"] | None = None
    """What an operator's output is compared with: `W X` (dense inputs) or `W X*` (its own)."""
    true_sequential: bool | None = None
    """Whether later operators of a layer see the inputs that pruned earlier ones give."""

    correction: float | None = Field(default=None, ge=0.0, le=1.0)
    """Target dense: how much of an input's drift is made up for; 0 is target own."""
    clip_tokens: float | None = Field(default=None, ge=0.0)
    """Tokens above so many median norms count as if they had that norm; 0 takes all as they are."""

    refit: bool = False
    """Whether kept weights are solved again after the method, guarded by held-out error."""
    search: bool = False
    """Whether a local search over the mask follows the method, guarded by held-out error."""
    polish_steps: int = Field(default=20, ge=0)
    """Steps of a refit; a local search has a quarter as many sweeps. With 0 there is neither."""

    damping: float = Field(default=0.01, ge=0.0, le=1.0)
    """SparseGPT, ADMM, binary methods: added to the Gram's diagonal, relative to its mean."""
    rho_schedule: Literal["published", "slow"] = "slow"
    """ADMM: how fast the penalty grows; slow takes twice the iterations."""
    budget: int = Field(default=330, ge=1)
    """Best: products with the Gram that may be spent on an operator."""
    warm_start: Literal["auto", "wanda", "sparsegpt"] = "auto"
    """FISTA: first point; auto is the published choice (sparsegpt for OPT, else wanda)."""
    iterations: int = Field(default=20, ge=1)
    """FISTA: iterations a round."""
    xi: float = Field(default=0.3, gt=0.0, lt=1.0)
    """FISTA: largest share of the error that rounding may cause before lambda rises."""
    patience: int = Field(default=3, ge=1)
    """FISTA: rounds without a gain after which it stops."""
    max_rounds: int | None = Field(default=None, ge=1)
    """FISTA: most rounds; by default 40, FISTA-plus 12."""

    lambda_start: float | None = Field(default=None, gt=0.0)
    """FISTA: first lambda, in units of the mean squared input times the weights' rms."""

    remove: str | None = None
    """Depth pruning: how many decoder layers go, as a number or a share such as `20%`; with the
    method `given`, which ones, as `17,18,16`."""
    protect: tuple[int, int] = (4, 2)
    """Depth pruning: how many layers at the start and at the end stay."""
    fold: bool = True
    """Depth pruning: whether a removed span's linear map goes into the layer before it."""
    pip_norm: Literal["l1", "l2", "taylor"] = "taylor"
    """PIP: the size of a difference of gradients."""
    edit_rate: float = Field(default=0.15, gt=0.0, le=1.0)
    """PIP: share of the words of four letters or more that the second view changes."""
    texts: int = Field(default=20, ge=1)
    """Depth pruning: texts by which layers are scored."""
    text_tokens: int = Field(default=256, ge=8)
    """Depth pruning: tokens of such a text."""

    rank: int = Field(default=64, ge=1, le=2**16)
    """FlexiGPT: rank of adapters, factors and maps."""
    replace: tuple[Literal["fold", "map", "shared", "own", "svd"], ...] = (
        "fold", "map", "shared", "own", "svd",
    )  # fmt: skip
    """FlexiGPT: what may stand in for a removed layer."""
    flexigpt_mode: Literal["default", "faithful"] = "default"
    """FlexiGPT: the best stand-in by what it gains a byte, or the published one."""
    recover: bool = False
    """FlexiGPT: whether stand-ins are then fitted to the dense outputs by Adam; the options of the
    tuning hold for it."""
    extend: int = Field(default=0, ge=0)
    """FlexiGPT: how many layers are repeated, for training, instead of any being removed."""

    tune_block: bool = False
    """Whether a layer's kept weights and norms are then fitted to the dense layer's output."""
    tune_steps: int = Field(default=128, ge=1)
    """Tuning: most Adam steps a decoder layer."""
    tune_rate: float = Field(default=0.008, gt=0.0)
    """Tuning: first step size, relative to the rms of a tensor's kept weights."""
    tune_batch: int = Field(default=2, ge=1)
    """Tuning: windows a step."""

    memory: int | None = None
    """Bound on anonymous resident memory in bytes; None is 90 % of what the system has left."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where calibration passes run; solvers run on the CPU."""
    threads: int | None = Field(default=None, ge=1)
    """Worker threads; None is what affinity and cgroup leave."""
    trust_remote_code: bool = False
    """Whether code that lies in the model's folder may run."""

    @field_validator("memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        return parse_bytes(value) if isinstance(value, str) else value

    @field_validator("ignore", "calibration", mode="before")
    @classmethod
    def _tuple(cls, value: Any) -> Any:
        return () if value is None else (value,) if isinstance(value, str) else value

    @field_validator("replace", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("remove", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, (int, float)) else value

    @field_validator("protect", mode="before")
    @classmethod
    def _pair(cls, value: Any) -> Any:
        return tuple(value.split(",")) if isinstance(value, str) else value

    @field_validator("protect")
    @classmethod
    def _counts(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 0:
            raise ValueError("expected two counts of 0 or more, such as 4,2")
        return value

    @classmethod
    def create(cls, **options: Any) -> Config:
        """A validated configuration; raises `UsageError` that names the bad option."""
        try:
            return cls(**options)
        except ValidationError as error:
            raise UsageError(_explain(error)) from None

    @classmethod
    def from_recipe(cls, path: Path, **overrides: Any) -> Config:
        """Reads `recipe.yaml`; `overrides` win. Unknown keys are refused by name."""
        content = read_recipe(path)
        if "stages" in content:
            raise UsageError(f"recipe {path}: lists stages, which only `compress` runs")
        return cls.create(**{**content, **overrides})

    def to_recipe(self) -> str:
        """The recipe file that gives this configuration again."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys and values of a recipe file; raises `UsageError` where it has none."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"recipe {path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"recipe {path}: expected keys and values, found {content!r}")
    return content


def read_stages(recipe: Path, overrides: dict[str, Any]) -> list[Config]:
    """The configurations of a recipe's stages; of its only one where it lists none.

    Args:
        recipe: the file.
        overrides: options that win over those of every stage.

    Raises:
        UsageError: the recipe cannot be read or an option is wrong, with the number of the stage;
            or the method is overridden.
    """
    content = read_recipe(recipe)
    stages = content.pop("stages", None)
    if stages is None:
        return [Config.create(**{**content, **overrides})]
    if not isinstance(stages, list) or not stages or not all(isinstance(s, dict) for s in stages):
        raise UsageError(
            f"recipe {recipe}: expected a list of stages, each with options, found {stages!r}"
        )
    if "method" in overrides:
        raise UsageError(f"option method: recipe {recipe} lists stages with methods of their own")
    configs = []
    for number, stage in enumerate(stages, start=1):
        try:
            configs.append(Config.create(**{**content, **stage, **overrides}))
        except UsageError as error:
            raise UsageError(f"recipe {recipe}, stage {number}: {error}") from None
    return configs


def parse_bytes(text: str) -> int:
    """`4GiB`, `500 MB` or `123` as bytes; raises `ValueError`."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmg]i?b)?\s*", text.lower())
    if match is None:
        raise ValueError(f"expected a size such as 4GiB or 500MB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _explain(error: ValidationError) -> str:
    lines = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"][:1])
        if item["type"] == "extra_forbidden":
            known = ", ".join(Config.model_fields)
            lines.append(f"unknown option {name!r}; known are: {known}")
        else:
            lines.append(f"option {name}: {item['msg']}, found {item['input']!r}")
    return "; ".join(lines)
