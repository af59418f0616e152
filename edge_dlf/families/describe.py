"""Describes a family for people, by its headers: kinds, quantization, tokenizer, template, licence and memory."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from typing import Any

from ..gguf.header import Array, Scalar
from ..gguf.info import GGUFInfo
from ..system.machine import Machine
from .files import FamilyFiles
from .plan import KERNELS_BYTES, Planner

_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
}  # fmt: skip
"""`general.file_type` (llama.cpp's llama_ftype) -> its name."""


def describe(files: FamilyFiles) -> dict[str, Any]:
    """Take from the headers what a person wants to know, without what they do not say.

    tokenizer: kind, n_vocab (tokens that all share) and the sha256 of their texts.
    template: the large model's.
    n_ctx_train: the shortest context that a member was made for.
    members: kind, quantization, n_vocab and license of each file, in the order of `FamilySpec.members`.
    """
    members = [
        {
            "kind": _kind(files, role, info),
            "quantization": quantization(info),
            "n_vocab": info.n_vocab,
            "license": _text(info.metadata.get("general.license")),
        }
        for role, info in ((role, files.infos[source.local_path()]) for role, source, _ in files.spec.members)
    ]
    large = files.models["large"]
    texts = large.vocabulary.tokens
    shared = hashlib.sha256(texts.data[: texts.starts[files.n_vocab]])
    kind = _text(large.metadata.get("tokenizer.ggml.model"))
    licenses = dict.fromkeys(str(member["license"]) for member in members if member["license"])
    told = {
        "license": ", ".join(licenses),
        "tokenizer": {"kind": kind, "n_vocab": files.n_vocab, "sha256": shared.hexdigest()},
        "template": _text(large.metadata.get("tokenizer.chat_template")),
        "n_ctx_train": min((n_ctx for model in files.models.values() if (n_ctx := model.n_ctx_train)), default=None),
        "members": members,
    }
    return {name: value for name, value in told.items() if value}


def _kind(files: FamilyFiles, role: str, info: GGUFInfo) -> str:
    kind = f"LoRA over {info.architecture}" if info.is_adapter else info.architecture
    if role in files.correctors:
        return f"corrector, {kind}"
    return kind if role in files.models else f"{kind}, for LoRAs to go over"


def _text(value: Scalar | Array | None) -> str | None:
    return value if isinstance(value, str) and value else None


def quantization(info: GGUFInfo) -> str:
    """The quantization that the file names, else the type that most of its weights have."""
    file_type = info.metadata.get("general.file_type")
    if isinstance(file_type, int) and file_type in _FILE_TYPES:
        return _FILE_TYPES[file_type]
    n_bytes: Counter[str] = Counter()
    for tensor in info.tensors.values():
        n_bytes[tensor.type] += tensor.n_bytes
    return n_bytes.most_common(1)[0][0]


def memory_bytes(files: FamilyFiles, n_ctx: int) -> dict[str, int]:
    """Memory to run the family on a CPU with a context of `n_ctx`: weights, KV cache in f16, and the rest."""
    members = Planner(files, Machine(sys.maxsize)).plan(n_ctx).members
    weights, kv = (sum(getattr(member, f"{what}_bytes") for member in members) for what in ("weights", "cache"))
    other = sum(member.buffer_bytes for member in members) + KERNELS_BYTES
    return {"n_ctx": n_ctx, "weights": weights, "kv": kv, "other": other, "total": weights + kv + other}
