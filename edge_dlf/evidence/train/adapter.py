"""LoRA updates of a torch model → an adapter in GGUF."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from ...system.durable import replacing
from .model import Linear, Llama
from .shape import Shape


def write_lora(path: Path, model: Llama, keys: Mapping[str, str]) -> None:
    """Write the model's LoRA updates alone, all at once, in F16.

    keys: texts for the file's metadata.
    """
    with replacing(path) as file:
        writer = gguf.GGUFWriter(file.name, model.shape.arch)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        for key, text in keys.items():
            writer.add_string(key, text)
        for name, module in model.named_modules():
            if not isinstance(module, Linear) or module.lora_a is None or module.lora_b is None:
                continue
            a, b = (matrix.detach().float().cpu().numpy() for matrix in (module.lora_a, module.lora_b))
            if (n_head := n_paired_heads(name, model.shape)) is not None:
                b = paired(b, n_head)
            writer.add_tensor(f"{name}.weight.lora_a", a.astype(np.float16))
            writer.add_tensor(f"{name}.weight.lora_b", b.astype(np.float16))
            alpha = module.lora_scale * len(a)
        writer.add_float32("adapter.lora.alpha", alpha)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def n_paired_heads(name: str, shape: Shape) -> int | None:
    """Heads of a projection whose rows llama.cpp has in pairs where torch has halves; None of any other."""
    if not shape.traits.is_paired:
        return None
    return {"attn_q": shape.n_head, "attn_k": shape.n_head_kv or shape.n_head}.get(name.rpartition(".")[2])


def paired(rows: npt.NDArray[np.float32], n_head: int) -> npt.NDArray[np.float32]:
    """Rows of a query or key projection reordered from halves of a head to llama.cpp's pairs."""
    parts = rows.reshape(n_head, 2, -1, *rows.shape[1:])
    return np.swapaxes(parts, 1, 2).reshape(rows.shape)


def halved(rows: npt.NDArray[np.float32], n_head: int) -> npt.NDArray[np.float32]:
    """The rows of `paired` in the order that they had; of a matrix or a bias."""
    parts = rows.reshape(n_head, -1, 2, *rows.shape[1:])
    return np.swapaxes(parts, 1, 2).reshape(rows.shape)
