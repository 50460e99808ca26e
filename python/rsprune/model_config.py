"""config.json: read as a stranger's data, and weighed before a model is built of it.

A model class builds whatever its configuration says: a billion layers, or a rotary table that no
memory holds. So it is built once on torch's `meta` device, where nothing has a value, and every
parameter is compared with what the shards hold as it is registered.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rsprune.checkpoint import TensorInfo
from rsprune.errors import UsageError
from rsprune.guard import refusing
from rsprune.packing import METHOD

__all__ = ["check_model", "parameters_registered_by", "read_config"]

MAX_CONFIG_BYTES = 16 * 2**20
MAX_BUFFER_BYTES = 2**30
"""Of all buffers together. They are computed, not stored: tables of angles and masks."""
PARAMETERS_PER_TENSOR = 100
"""A stack of experts is one tensor for many parameters; what is missing is told elsewhere."""


def read_config(folder: Path, trust_remote_code: bool) -> Any:
    """The configuration of a checkpoint.

    Raises:
        UsageError: it is no JSON object, is not known to transformers, names code to be
            downloaded, or belongs to quantized weights.
    """
    path = folder / "config.json"
    with refusing(str(path)):
        _check_text(path, trust_remote_code)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        known = isinstance(quantization, dict)
        method = quantization.get("quant_method", "unknown") if known else quantization
        if method != METHOD:
            raise UsageError(
                f"{folder}: expected unquantized weights, found {method} in config.json"
            )
        del config.quantization_config  # the checkpoint lends these weights as dense ones
    config.use_cache = False
    return config


def _check_text(path: Path, trust_remote_code: bool) -> None:
    """Refuses what transformers would stumble over, or follow."""
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise UsageError(f"{path}: expected at most {MAX_CONFIG_BYTES} bytes, found {size}")
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(content).__name__}")
    for part in (content, *(value for value in content.values() if isinstance(value, dict))):
        for key, value in part.items():
            # transformers takes such a name for a repository of compiled kernels to download.
            if key.endswith("attn_implementation") and "/" in str(value) and not trust_remote_code:
                raise UsageError(f"{path}: {key} names code to be downloaded, found {value!r}")


def check_model(
    config: Any, tensors: Mapping[str, TensorInfo], where: Path, trust_remote_code: bool
) -> None:
    """Refuses a configuration whose model the tensors cannot fill, before it takes memory.

    Args:
        config: as read.
        tensors: what the files hold.
        where: the file that the configuration was read from.
        trust_remote_code: whether code that lies in the model's folder may run.

    Raises:
        UsageError: naming the parameter, the number of parameters or the bytes of the buffers.
    """
    stored = sum(math.prod(info.shape) for info in tensors.values())
    most = PARAMETERS_PER_TENSOR * max(len(tensors), 1)
    seen = 0

    def check(name: str, parameter: nn.Parameter) -> nn.Parameter:
        nonlocal seen
        seen += 1
        if seen > most:
            raise UsageError(
                f"{where}: describes a model of more than {most} parameters, the files hold "
                f"{len(tensors)} tensors"
            )
        if not 0 < parameter.numel() <= max(stored, 1):
            raise UsageError(
                f"{where}: describes a parameter {name!r} of shape {list(parameter.shape)}, "
                f"expected 1 to {stored} values, as many as all files hold"
            )
        return parameter

    with torch.device("meta"), parameters_registered_by(check):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    if buffers > MAX_BUFFER_BYTES:
        raise UsageError(
            f"{where}: describes buffers of {buffers} bytes, expected at most {MAX_BUFFER_BYTES}"
        )


@contextlib.contextmanager
def parameters_registered_by(change: Any) -> Iterator[None]:
    """Every module registers `change(name, parameter)` in place of a new parameter."""
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = change(name, parameter)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
