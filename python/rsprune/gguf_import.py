"""GGUF file -> ordinary Hugging Face folder, one tensor in memory at a time.

    for every tensor of the file:
        values <- dequantise(tensor)                  gguf.quants
        values <- undo what llama.cpp's converter did transformers' TensorProcessor (q/k rows, ...)
        put    <- round to the nearest bf16, ties to even

`AutoModelForCausalLM.from_pretrained(gguf_file=...)` does the same with the whole model in float32
in memory, and its result cannot be saved without surgery. Two things are longer here than above:

- Everything is planned, and every name is checked both ways, before a byte is written: a tensor of
  the file that the model does not know is refused (transformers skips it without a word; for Llama
  3.1 that loses the scaled rotary frequencies), and so is a weight that the file does not hold.
- Stacked experts are written as one tensor per expert, the names that checkpoints have on disk.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsprune.errors import RspruneError, UsageError
from rsprune.gguf_header import check_header
from rsprune.gguf_tokenizer import PRE_TOKENIZERS, WHOLE_WORDS
from rsprune.gguf_types import decode
from rsprune.guard import refusing, refusing_panics

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["convert"]

# torch name of the stored type -> its name in a safetensors header
STORED_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
STACKED_EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
# GGUF architectures whose experts are `model.layers.*.mlp.experts.*.{gate,up,down}_proj` on disk
STACKED_ARCHITECTURES = ("qwen2moe", "qwen3moe")


@dataclass(frozen=True)
class _Part:
    """One tensor of the output: where it comes from in the GGUF file and what it is called."""

    name: str
    shape: tuple[int, ...]
    source: Any  # gguf.ReaderTensor, data still on the file
    expert: int | None = None  # index into the first dimension of `source`


@dataclass(frozen=True)
class _Names:
    """What transformers knows about the architecture."""

    architecture: str
    processor: Any  # transformers TensorProcessor: undoes llama.cpp's changes of values
    on_disk: dict[str, str]  # GGUF name -> checkpoint name
    shapes: dict[str, tuple[int, ...]]  # every weight to be written, tied ones once
    tied: frozenset[str]  # other names of weights in `shapes`, not to be written


def convert(
    gguf_path: Path,
    out_dir: Path,
    *,
    dtype: str = "bfloat16",
    progress: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write the model in `gguf_path` as a Hugging Face folder that plain transformers loads.

    Arguments: `out_dir` is created and must be empty if it exists; `dtype` is the stored type,
    "bfloat16", "float16" or "float32"; `progress` receives one line of text at a time.
    Returns `out_dir`, with config.json, the tokenizer, generation_config.json, README.md and
    model.safetensors (written last; a tied output layer is not stored).
    Raises UsageError for a missing extra, file or unknown `dtype`, and for a file that is damaged
    or of an unknown architecture; RspruneError where its tensors are not exactly the model's.
    """
    if dtype not in STORED_DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(STORED_DTYPES)}, found {dtype!r}")
    reader = _open(gguf_path)
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise UsageError(f"{out_dir}: expected a new or empty folder for the converted model")
    with refusing(f"{gguf_path}: cannot be converted"):
        model = _empty_model(gguf_path, reader.tensors, dtype)
        names = _names(reader, model)
        parts = _plan(reader.tensors, names)
    out_dir.mkdir(parents=True, exist_ok=True)
    progress(f"converting {gguf_path.name}: {len(parts)} tensors to {dtype}")
    _write_companions(gguf_path, reader, model, out_dir)
    _restore_pre_tokenizer(reader, out_dir, progress)
    _write_weights(parts, names, out_dir / "model.safetensors", dtype)
    progress(f"converted {gguf_path.name}")
    return out_dir


def _open(gguf_path: Path) -> Any:
    """A gguf.GGUFReader, whose tensors are views of the mapped file."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        message = f"{gguf_path}: reading GGUF needs the gguf package: pip install 'rsprune[gguf]'"
        raise UsageError(message) from error
    if not gguf_path.is_file():
        raise UsageError(f"{gguf_path}: no such file")
    check_header(gguf_path)
    with refusing(f"{gguf_path}: not a whole GGUF file"):
        return GGUFReader(gguf_path)


def _empty_model(gguf_path: Path, tensors: list[Any], dtype: str) -> Any:
    """The model that the file describes, on torch's `meta` device: names and shapes, no values."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from rsprune.checkpoint import TensorInfo
    from rsprune.model_config import check_model

    with refusing(f"{gguf_path}: transformers cannot read this architecture from GGUF"):
        config = AutoConfig.from_pretrained(
            gguf_path.parent, gguf_file=gguf_path.name, trust_remote_code=False
        )
        config.dtype = getattr(torch, dtype)
        _set_expert_widths(config, tensors)
        infos = {t.name: TensorInfo(t.name, "", "", tuple(map(int, t.shape)), 0) for t in tensors}
        check_model(config, infos, gguf_path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    return model


def _set_expert_widths(config: Any, tensors: list[Any]) -> None:
    """Take the experts' widths from the tensors: transformers 5.23 leaves its own defaults."""
    widths = {"ffn_gate_exps": "moe_intermediate_size"}
    widths["ffn_gate_shexp"] = "shared_expert_intermediate_size"
    for tensor in tensors:
        name = widths.get(tensor.name.removesuffix(".weight").rpartition(".")[2], "")
        if hasattr(config, name):
            setattr(config, name, int(tensor.shape[1]))


def _names(reader: Any, model: Any) -> _Names:
    """Names, shapes and value fixes of the architecture, from transformers' own GGUF tables."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    architecture = str(read_field(reader, "general.architecture")[0])
    processor_class = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = processor_class(config=model.config.to_dict())
    shapes: dict[str, tuple[int, ...]] = {}
    seen: set[int] = set()
    tied: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            tied.add(name)
            continue
        seen.add(id(tensor))
        shapes[name] = tuple(tensor.shape)
    try:
        on_disk = get_gguf_hf_weights_map(model, processor)
    except NotImplementedError as error:
        raise RspruneError(f"architecture {architecture!r}: unknown to gguf: {error}") from error
    return _Names(architecture, processor, on_disk, shapes, frozenset(tied))


def _plan(tensors: list[Any], names: _Names) -> list[_Part]:
    """Every output tensor, or a refusal that lists the tensors without a counterpart."""
    parts: list[_Part] = []
    unknown: list[str] = []
    stacks: Counter[str] = Counter()  # stacked tensors of a layer, of three
    for tensor in tensors:
        stacked = STACKED_EXPERTS.fullmatch(tensor.name)
        name = names.on_disk.get(tensor.name, "")
        if stacked and names.architecture in STACKED_ARCHITECTURES:
            experts = f"model.layers.{stacked[1]}.mlp.experts."
            stacks[experts] += 1
            parts += _expert_parts(tensor, experts, stacked[2])
        elif name in names.shapes:
            parts.append(_Part(name, names.shapes[name], tensor))
        elif name not in names.tied:
            unknown.append(tensor.name)
    whole = tuple(experts for experts, count in stacks.items() if count == 3)
    missing = names.shapes.keys() - {part.name for part in parts}
    missing = {name for name in missing if not name.startswith(whole)}
    if unknown:
        raise RspruneError(_mismatch("GGUF tensors without a place in the model", unknown, names))
    if missing:
        raise RspruneError(_mismatch("model weights that the file lacks", sorted(missing), names))
    return parts


def _mismatch(what: str, found: list[str], names: _Names) -> str:
    listed = ", ".join(found[:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    return f"architecture {names.architecture!r}: expected none, found {what}: {listed}"


def _expert_parts(tensor: Any, experts: str, projection: str) -> Iterator[_Part]:
    """One part per expert of a stacked tensor `[expert, out, in]` (GGUF lists sizes reversed)."""
    inputs, outputs, count = (int(size) for size in tensor.shape)
    for expert in range(count):
        name = f"{experts}{expert}.{projection}_proj.weight"
        yield _Part(name, (outputs, inputs), tensor, expert)


def _write_weights(parts: list[_Part], names: _Names, path: Path, dtype: str) -> None:
    """Stream the parts into one safetensors file; an exception leaves no file at `path`."""
    from rsprune import _core

    header = [(part.name, STORED_DTYPES[dtype], part.shape) for part in parts]
    writer = _core.ShardWriter(str(path), header, {"format": "pt"})
    try:
        for part in parts:
            writer.put(part.name, _stored_bytes(_values(part, names.processor), part.name, dtype))
        writer.finish()
    finally:
        writer.abort()  # nothing after finish


def _values(part: _Part, processor: Any) -> npt.NDArray[np.float32]:
    """The part's values as transformers would load them, float32, in the shape of `part`."""
    import numpy as np
    from gguf.quants import dequantize

    source = part.source
    data = source.data if part.expert is None else source.data[part.expert]
    try:
        if source.tensor_type.name == "Q1_0":  # which gguf names, but does not read
            values = decode(data.reshape(-1), "Q1_0").reshape(*data.shape[:-1], -1)
        else:
            values = dequantize(data, source.tensor_type)
    except NotImplementedError as error:
        message = f"{source.name}: no dequantisation for {source.tensor_type.name}"
        raise RspruneError(message) from error
    if part.expert is None:
        scratch: dict[str, dict[str, Any]] = {"tensors": {}}
        result = processor.process(
            weights=values, name=source.name, tensor_key_mapping={}, parsed_parameters=scratch
        )
        # some processors file the tensor themselves and return no name
        values = result.weights if result.name else scratch["tensors"][part.name].numpy()
    if values.shape != part.shape:
        message = f"{part.name}: expected shape {list(part.shape)}, found {list(values.shape)}"
        raise RspruneError(f"{message} in GGUF tensor {source.name}")
    # a copy only of float32 tensors, which are still the read-only file
    return np.require(values, np.float32, ["C", "W"])


def _stored_bytes(values: npt.NDArray[np.float32], name: str, dtype: str) -> npt.NDArray[np.uint8]:
    """float32 -> little-endian bytes of `dtype`, uint8 `[size]`, rounded to nearest even."""
    import torch

    stored = torch.from_numpy(values).to(getattr(torch, dtype))
    if not bool(torch.isfinite(stored).all()):
        raise RspruneError(f"{name}: expected finite values in {dtype}, found infinity or NaN")
    flat: npt.NDArray[np.uint8] = stored.reshape(-1).view(torch.uint8).numpy()
    return flat


def _restore_pre_tokenizer(reader: Any, out_dir: Path, progress: Callable[[str], None]) -> None:
    """Cuts text into words as the file says: transformers cuts all but Qwen's as GPT-2 did."""
    from transformers.modeling_gguf_pytorch_utils import read_field

    kind, name = (read_field(reader, f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != ["gpt2"]:
        return
    if not name or name[0] not in PRE_TOKENIZERS:
        found = name[0] if name else "none"
        progress(f"note: the tokenizer cuts words as transformers guesses; the file says: {found}")
        return
    path = out_dir / "tokenizer.json"
    content = json.loads(path.read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": PRE_TOKENIZERS[name[0]]}
    content["model"]["ignore_merges"] = name[0] in WHOLE_WORDS
    path.write_text(json.dumps(content, ensure_ascii=False))


def _write_companions(gguf_path: Path, reader: Any, model: Any, out_dir: Path) -> None:
    """config.json, generation_config.json, tokenizer files and a model card with the licence."""
    from transformers import AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import read_field

    config = model.config
    config.architectures = [type(model).__name__]
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    config.save_pretrained(out_dir)
    ids = {key: getattr(config, f"{key}_token_id", None) for key in ("bos", "eos", "pad")}
    if ids["eos"] is not None:
        known = {f"{key}_token_id": value for key, value in ids.items() if value is not None}
        GenerationConfig(**known).save_pretrained(out_dir)
    with refusing_panics(f"{gguf_path}: no tokenizer could be made of it"):
        tokenizer = AutoTokenizer.from_pretrained(
            gguf_path.parent, gguf_file=gguf_path.name, trust_remote_code=False
        )
        tokenizer.save_pretrained(out_dir)
    licence = read_field(reader, "general.license")
    front = f"license: {licence[0]}\n" if licence else ""
    body = f"Converted from {gguf_path.name} by rsprune; its values are those of the GGUF file.\n"
    (out_dir / "README.md").write_text(f"---\nlibrary_name: transformers\n{front}---\n\n{body}")
