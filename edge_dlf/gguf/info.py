"""Reads a GGUF model or LoRA adapter by its header, and refuses what cannot be used, before llama.cpp sees it.

llama.cpp aborts the whole process on some files. `read_info` refuses those that can be told by their header, in bounded
time and memory; weights are never read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..errors import ModelFileError
from .header import Array, Header, Scalar, Tensor, Vocabulary, read_header, show
from .rules import NO_WEIGHTS, why_refused
from .shards import shard_names

CONVERT = "convert it to GGUF again, with llama.cpp's convert_lora_to_gguf.py"
MERGE = "merge the adapter into its base (peft: merge_and_unload), convert that to GGUF, and give it as the expert"


@dataclass(frozen=True)
class GGUFInfo:
    """The header of a GGUF, all shards of a split model together.

    architecture: such as "llama" or "qwen2". is_adapter: a LoRA, to be put over a model of the same architecture.
    n_vocab: length of the token list, padding included; None for an adapter.
    metadata: by key; arrays as their type and length, short numeric ones with their values.
    shards: every file of the model, in order. file_bytes: their size. tensor_bytes: of the weights alone.
    """

    path: Path
    architecture: str
    is_adapter: bool
    n_vocab: int | None
    vocabulary: Vocabulary
    metadata: Mapping[str, Scalar | Array]
    tensors: Mapping[str, Tensor]
    shards: tuple[Path, ...]
    file_bytes: int
    tensor_bytes: int

    @property
    def n_ctx_train(self) -> int | None:
        """Positions that the model was trained for, if the file says so."""
        n_ctx = self.metadata.get(f"{self.architecture}.context_length")
        return n_ctx if isinstance(n_ctx, int) else None


def read_info(path: str | Path, like: GGUFInfo | None = None) -> GGUFInfo:
    """Check the GGUF at `path` (the first file of a split model) and say what it holds. `like`, a model that likely has
    the same vocabulary, makes it quicker.

    Raises ModelFileError, with one clear reason, where the file is missing, no GGUF, truncated, damaged, neither a
    language model nor a LoRA adapter, or one on which llama.cpp would abort.
    """
    path = Path(path)
    first = read_header(path, like.vocabulary.lists if like else None)
    shards = _shards(path, first)
    headers = [first, *(read_header(shard) for shard in shards[1:])]
    tensors: dict[str, Tensor] = {}
    for number, (shard, header) in enumerate(zip(shards, headers, strict=True)):
        if number and header.metadata.get("split.no") != number:
            _fail(shard, f"is not file {number + 1} of {len(shards)} of {path.name}")
        twice = tensors.keys() & header.tensors.keys()
        if twice:
            _fail(shard, f"repeats the tensor {show(min(twice))} of an earlier file")
        tensors.update(header.tensors)
    metadata = first.metadata
    if len(shards) > 1 and metadata.get("split.tensors.count") != len(tensors):
        _fail(path, f"has {len(tensors):,} tensors in all its files, not {metadata.get('split.tensors.count')}")

    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        _fail(path, "does not name its architecture (general.architecture)")
    is_adapter = metadata.get("general.type") == "adapter"
    if is_adapter:
        if len(shards) > 1:
            _refuse(path, f"in {len(shards)} files, of which llama.cpp reads only the first")
        _check_adapter(path, metadata, tensors)
    elif any(name.endswith(".lora_a") for name in tensors):
        kind = metadata.get("general.type")
        _misfit(path, f"is a LoRA adapter whose general.type is {show(str(kind))}, not 'adapter'")
    elif reason := why_refused(architecture, metadata, first.vocabulary, tensors):
        _fail(path, reason)
    tokens = metadata.get("tokenizer.ggml.tokens")
    return GGUFInfo(
        path=path,
        architecture=architecture,
        is_adapter=is_adapter,
        n_vocab=tokens.length if isinstance(tokens, Array) else None,
        vocabulary=first.vocabulary,
        metadata=metadata,
        tensors=tensors,
        shards=shards,
        file_bytes=sum(header.file_bytes for header in headers),
        tensor_bytes=sum(tensor.n_bytes for tensor in tensors.values()),
    )


def check_lora_fits(lora: GGUFInfo, base: GGUFInfo) -> None:
    """Raise ModelFileError, naming the file of `lora`, unless each of its pairs fits its tensor of `base`."""
    if not lora.is_adapter:
        advice = "a model is an expert by itself: name it as path, without a scale; an adapter, as lora"
        raise ModelFileError(lora.path, "is a model, not a LoRA adapter", advice)
    if lora.architecture != base.architecture:
        _misfit(lora.path, f"is a LoRA over {show(lora.architecture)}, {base.path.name} is {show(base.architecture)}")
    for name, a, b in _lora_pairs(lora.tensors):
        if name not in base.tensors:
            _misfit(lora.path, f"is a LoRA over the tensor {show(name)}, which {base.path.name} does not have")
        if name == "token_embd.weight" and "output.weight" not in base.tensors:
            _refuse(
                lora.path, f"over {show(name)}, which {base.path.name} also has as its output; llama.cpp aborts on it"
            )
        shape = base.tensors[name].shape
        is_embedding = name.endswith("token_embd.weight")  # its A is looked up by token, not multiplied
        wanted = (b.shape[1], a.shape[1]) if is_embedding else (a.shape[0], b.shape[1])
        if shape[:2] != wanted or shape[2:] != a.shape[2:]:
            _misfit(
                lora.path,
                f"is a LoRA over {show(name)} of shape {(*wanted, *a.shape[2:])}; in {base.path.name} it has {shape}",
            )


def _fail(path: Path, reason: str) -> NoReturn:
    raise ModelFileError(path, reason)


def _misfit(lora: Path, reason: str) -> NoReturn:
    raise ModelFileError(lora, reason, f"give the base that it was trained on, or {CONVERT}")


def _refuse(lora: Path, reason: str) -> NoReturn:
    """Fail over an adapter of which llama.cpp would abort, or leave something out without a word."""
    raise ModelFileError(lora, f"is a LoRA adapter {reason}", MERGE)


def _shards(path: Path, first: Header) -> tuple[Path, ...]:
    """Every file of the model whose first one is `path`."""
    count, number = first.metadata.get("split.count", 1), first.metadata.get("split.no", 0)
    if not isinstance(count, int) or not isinstance(number, int):
        _fail(path, "damaged: its split.count or split.no is not a number")
    if count <= 1:
        return (path,)
    names = shard_names(path.name)
    if number:
        first_name = names[0] if len(names) > 1 else "the first"
        _fail(path, f"is file {number + 1} of a model in {count} files; give {first_name}")
    if len(names) != count or names[0] != path.name:
        _fail(
            path,
            f"is the first of {count} files, and must be named …-00001-of-{count:05d}.gguf for the others to be found",
        )
    shards = [path.with_name(name) for name in names]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        _fail(path, f"is the first of {count} files; there is no {', '.join(missing[:3])}{rest}")
    return tuple(shards)


def _lora_pairs(tensors: Mapping[str, Tensor]) -> list[tuple[str, Tensor, Tensor]]:
    """(tensor of the model, lora_a, lora_b) for each pair."""
    suffix = ".lora_a"
    names = [name[: -len(suffix)] for name in tensors if name.endswith(suffix)]
    return [(name, tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]) for name in names]


def _check_adapter(path: Path, metadata: Mapping[str, Scalar | Array], tensors: Mapping[str, Tensor]) -> None:
    kind, alpha = metadata.get("adapter.type"), metadata.get("adapter.lora.alpha")
    if kind != "lora":
        _misfit(path, f"is an adapter of type {show(str(kind))}; only LoRA adapters can be used")
    if not isinstance(alpha, float) or not math.isfinite(alpha):
        _misfit(path, f"is a LoRA adapter whose adapter.lora.alpha is {alpha}")
    for key in metadata:
        if key.startswith("adapter.alora."):
            _refuse(path, f"that is in effect after certain tokens only ({key}); here it would be from the start")
    for name in tensors:
        stem, _, suffix = name.rpartition(".")
        if suffix in ("lora_a", "lora_b"):
            other = f"{stem}.{'lora_b' if suffix == 'lora_a' else 'lora_a'}"
            if other not in tensors:
                _misfit(path, f"is a LoRA adapter without the tensor {show(other)}")
        elif name.endswith("_norm.weight"):
            _refuse(path, f"with the trained norm {show(name)}, which llama.cpp ignores")
        else:
            _misfit(path, f"is a LoRA adapter with the tensor {show(name)}, which is not half of a pair")
    pairs = _lora_pairs(tensors)
    if not pairs:
        _misfit(path, "is a LoRA adapter that changes nothing: it has no tensors")
    for name, a, b in pairs:
        if min(len(a.shape), len(b.shape)) < 2 or {a.type, b.type} & NO_WEIGHTS:
            _misfit(
                path, f"damaged: its pair for {show(name)} has shapes {a.shape}, {b.shape} of type {a.type}, {b.type}"
            )
        rank = a.shape[0] if name.endswith("token_embd.weight") else a.shape[1]
        if rank != b.shape[0] or a.shape[2:] != b.shape[2:]:
            _misfit(path, f"damaged: the ranks of its pair for {show(name)} differ: shapes {a.shape} and {b.shape}")
