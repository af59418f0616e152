"""Tiny GGUF models and LoRA adapters, written in milliseconds, that llama.cpp loads and runs.

The weights are random, scaled so that the logits spread by a few nats and depend on the whole prompt. The tokenizers
know every byte, so any text comes back as it went in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np

from edge_dlf.gguf.header import header_hash

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (
    "Ġ t", "Ġ a", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o", "e n", "Ġ c", "i t", "i s",
    "a n", "o r", "e s", "Ġ b", "e d", "Ġ f", "in g", "Ġ p", "o u", "Ġa n", "a l", "a r", "Ġt o", "Ġ m", "Ġo f", "Ġ in",
    "Ġ d", "Ġ h", "Ġan d", "i c", "a s", "l e", "Ġt h", "i on", "o m", "l l", "en t", "Ġ n", "Ġ l", "s t", "v e",
)  # fmt: skip
SPM_PIECES = ("▁the", "▁and", "the", "ing", "▁a", "in", "he", "re", "▁t", "▁s", "on", "er", "th")


def _byte_letters() -> list[str]:
    """GPT-2's printable stand-in for every byte, by byte value."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in printable}
    hidden = (byte for byte in range(256) if byte not in letters)
    letters |= {byte: chr(256 + n) for n, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


def bpe_vocabulary() -> tuple[list[str], list[int]]:
    tokens = [*_byte_letters(), *(merge.replace(" ", "") for merge in MERGES), *SPECIAL_TOKENS]
    n_special = len(SPECIAL_TOKENS)
    types = [gguf.TokenType.NORMAL] * (len(tokens) - n_special) + [gguf.TokenType.CONTROL] * n_special
    return tokens, types


def spm_vocabulary() -> tuple[list[str], list[int]]:
    pieces = [*SPM_PIECES, "▁", *(chr(code) for code in range(33, 127))]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL]
    types += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(pieces)
    return tokens, types


def add_tokenizer(
    writer: gguf.GGUFWriter,
    tokenizer: str,
    tokens: list[str],
    types: list[int],
    chat_template: str | None,
    pre: str = "qwen2",
    renamed: Mapping[str, str] | None = None,
) -> None:
    writer.add_token_list([(renamed or {}).get(token, token) for token in tokens])
    writer.add_token_types(types)
    if tokenizer == "bpe":
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(list(MERGES))
        writer.add_bos_token_id(tokens.index("<|endoftext|>"))
        writer.add_eos_token_id(tokens.index("<|im_end|>"))
        writer.add_add_bos_token(False)
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores([-float(token) for token in range(len(tokens))])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def transformer_shapes(arch: str, n_embd: int, n_kv: int, n_ff: int) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors, rows first."""
    shapes: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (n_embd,),
        "attn_q.weight": (n_embd, n_embd),
        "attn_k.weight": (n_kv, n_embd),
        "attn_v.weight": (n_kv, n_embd),
        "attn_output.weight": (n_embd, n_embd),
        "ffn_norm.weight": (n_embd,),
        "ffn_gate.weight": (n_ff, n_embd),
        "ffn_up.weight": (n_ff, n_embd),
        "ffn_down.weight": (n_embd, n_ff),
    }
    if arch in ("qwen3", "gemma3", "lfm2", "qwen35"):
        shapes |= {"attn_q_norm.weight": (16,), "attn_k_norm.weight": (16,)}
    if arch in ("gemma2", "gemma3", "olmo2"):
        shapes |= {"post_attention_norm.weight": (n_embd,), "post_ffw_norm.weight": (n_embd,)}
    if arch == "olmo2":
        shapes |= {"attn_q_norm.weight": (n_embd,), "attn_k_norm.weight": (n_kv,)}
        del shapes["attn_norm.weight"], shapes["ffn_norm.weight"]
    if arch == "phi3":
        for name in ("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight"):
            del shapes[name]
        shapes |= {"attn_qkv.weight": (n_embd + 2 * n_kv, n_embd), "ffn_up.weight": (2 * n_ff, n_embd)}
    if arch == "qwen2":
        shapes |= {"attn_q.bias": (n_embd,), "attn_k.bias": (n_kv,), "attn_v.bias": (n_kv,)}
    return shapes


OWN_KEYS: Mapping[str, Mapping[str, int | float | str]] = {
    "qwen3": {"attention.key_length": 16, "attention.value_length": 16},
    "gemma": {"attention.key_length": 16, "attention.value_length": 16},
    "gemma2": {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 64}
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3": {"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 64}
    | {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "phi3": {"rope.dimension_count": 12, "rope.scaling.attn_factor": 1.2, "rope.scaling.original_context_length": 512},
    "granite": {"embedding_scale": 1.5, "residual_scale": 0.7, "logit_scale": 1.3, "attention.scale": 0.4},
    "olmo2": {"attention.sliding_window": 64},
}
"""What a header of an architecture says beside that of Llama."""


def _mamba_shapes(n_embd: int) -> dict[str, tuple[int, ...]]:
    inner = 2 * n_embd
    return {
        "attn_norm.weight": (n_embd,),
        "ssm_in.weight": (2 * inner, n_embd),
        "ssm_conv1d.weight": (inner, 4),
        "ssm_conv1d.bias": (inner,),
        "ssm_x.weight": (2 + 2 * 8, inner),
        "ssm_dt.weight": (inner, 2),
        "ssm_dt.bias": (inner,),
        "ssm_a": (inner, 8),
        "ssm_d": (inner,),
        "ssm_out.weight": (n_embd, inner),
    }


HYBRIDS = ("lfm2", "granitehybrid", "qwen35")
"""Architectures whose layers are recurrent and attentive in turn."""


def _hybrid_shapes(arch: str, n_embd: int) -> list[dict[str, tuple[int, ...]]]:
    """Shapes of the tensors of a recurrent layer, and of one that attends."""
    attention = transformer_shapes(arch, n_embd, 16, 2 * n_embd)
    shared = {name: shape for name, shape in attention.items() if name.startswith(("attn_norm", "ffn_"))}
    inner, n_heads, size = 2 * n_embd, 2 * n_embd // 16, 16
    if arch == "lfm2":
        own: dict[str, tuple[int, ...]] = {
            "shortconv.conv.weight": (n_embd, 3),
            "shortconv.in_proj.weight": (3 * n_embd, n_embd),
            "shortconv.out_proj.weight": (n_embd, n_embd),
        }
    elif arch == "granitehybrid":
        own = {
            "ssm_in.weight": (2 * inner + 2 * size + n_heads, n_embd),
            "ssm_conv1d.weight": (inner + 2 * size, 4),
            "ssm_conv1d.bias": (inner + 2 * size,),
            "ssm_dt.bias": (n_heads,),
            "ssm_a": (n_heads, 1),
            "ssm_d": (n_heads, 1),
            "ssm_norm.weight": (1, inner),
            "ssm_out.weight": (n_embd, inner),
        }
    else:
        own = {
            "attn_qkv.weight": (3 * inner, n_embd),
            "attn_gate.weight": (inner, n_embd),
            "ssm_conv1d.weight": (3 * inner, 4),
            "ssm_dt.bias": (n_heads,),
            "ssm_a": (n_heads,),
            "ssm_beta.weight": (n_heads, n_embd),
            "ssm_alpha.weight": (n_heads, n_embd),
            "ssm_norm.weight": (size,),
            "ssm_out.weight": (n_embd, inner),
        }
        attention["attn_q.weight"] = (2 * n_embd, n_embd)
        for shapes in (shared, attention):
            del shapes["ffn_norm.weight"]
            shapes["post_attention_norm.weight"] = (n_embd,)
    return [{**shared, **own}, attention]


def _add_hybrid(writer: gguf.GGUFWriter, arch: str, n_embd: int, n_layer: int) -> None:
    """Write what llama.cpp asks of a hybrid model's header, beside what it asks of all."""
    if arch == "lfm2":
        writer.add_shortconv_l_cache(3)
    else:
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * n_embd)
        writer.add_ssm_state_size(16)
        writer.add_ssm_time_step_rank(2 * n_embd // 16)
        writer.add_ssm_group_count(1 if arch == "granitehybrid" else 2 * n_embd // 16)
    if arch == "qwen35":
        writer.add_key_length(16)
        writer.add_value_length(16)
        writer.add_rope_dimension_sections([4, 2, 2, 0])
        writer.add_full_attention_interval(2)
        writer.add_head_count_kv(1)
    else:
        writer.add_head_count_kv([layer % 2 for layer in range(n_layer)])


def _weights(name: str, shape: tuple[int, ...], rng: np.random.Generator, spread: float) -> np.ndarray:
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    if name.startswith("rope_factors"):
        return rng.uniform(1.0, 4.0, shape).astype(np.float32)
    if name.endswith("ssm_a"):
        return -rng.uniform(0.005, 0.1, shape).astype(
            np.float32
        )  # slow decay: a token is felt dozens of positions later
    scale = 1.0 if name == "token_embd.weight" else 0.1 if name.endswith(".bias") else shape[-1] ** -0.5
    if name == "output.weight":
        scale *= spread
    elif "attn_" in name or "ssm_" in name:
        scale *= 1.5  # attention that picks few positions, and as strong as the token itself
    return rng.standard_normal(shape, np.float32) * np.float32(scale)


def tiny_model(
    path: Path,
    *,
    arch: str = "llama",
    tokenizer: str = "bpe",
    pre: str = "qwen2",
    seed: int = 0,
    drift: float = 0.0,
    n_embd: int = 32,
    head_dim: int = 16,
    n_layer: int = 2,
    n_ctx: int = 512,
    spread: float = 2.5,
    dtype: type[np.float32] | type[np.float16] | gguf.GGMLQuantizationType = np.float32,
    pad_vocab: int = 0,
    tokens: Mapping[int, str] | None = None,
    control: Sequence[str] = (),
    order: Mapping[int, int] | None = None,
    renamed: Mapping[str, str] | None = None,
    chat_template: str | None = CHATML,
    nan: bool = False,
    tied: bool = False,
    file_type: int | None = None,
) -> Path:
    """Write a model of `arch` "llama", "qwen2", "mamba" (recurrent: its memory is a state) or one of `OWN_KEYS` and
    `HYBRIDS`, and return `path`. Most layers of "gemma3" see a window, and every second one of "gemma2".

    pre: llama.cpp's pre-tokenizer of a BPE vocabulary. seed: of the weights.
    drift: adds noise of this relative size to them: a model fine-tuned from the one without.
    head_dim: width of an attention head of "llama" and "qwen2".
    spread: standard deviation of the logits, in nats. pad_vocab: entries that only lengthen the vocabulary.
    tokens: id -> text that replaces that entry of the vocabulary. control: control tokens at its end.
    order: id -> id of the token that stands there instead, with its weights. renamed: text -> text of a token that is
    otherwise the same.
    nan: every logit is NaN.
    tied: the token embeddings are the output too. file_type: llama.cpp's number of the quantization that was asked for.
    """
    vocabulary, types = bpe_vocabulary() if tokenizer == "bpe" else spm_vocabulary()
    for token, text in (tokens or {}).items():
        vocabulary[token] = text
    vocabulary += control
    types += [gguf.TokenType.CONTROL] * len(control)
    vocabulary += [f"[PAD{len(vocabulary) + n}]" for n in range(pad_vocab)]
    types += [gguf.TokenType.UNUSED] * pad_vocab
    ids = [(order or {}).get(token, token) for token in range(len(vocabulary))]
    vocabulary, types = [vocabulary[token] for token in ids], [types[token] for token in ids]

    writer = gguf.GGUFWriter(path, arch)
    writer.add_name(path.stem)
    writer.add_context_length(n_ctx)
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layer)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(vocabulary))
    if arch == "mamba":
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_inner_size(2 * n_embd)
        writer.add_ssm_state_size(8)
        writer.add_ssm_time_step_rank(2)
        layer_shapes = [_mamba_shapes(n_embd)]
    elif arch in HYBRIDS:
        writer.add_feed_forward_length(2 * n_embd)
        writer.add_head_count(n_embd // 16)
        writer.add_rope_dimension_count(16)
        _add_hybrid(writer, arch, n_embd, n_layer)
        layer_shapes = _hybrid_shapes(arch, n_embd)
    else:
        writer.add_feed_forward_length(2 * n_embd)
        writer.add_head_count(n_embd // head_dim)
        writer.add_head_count_kv(1)
        for key, value in OWN_KEYS.get(arch, {"rope.dimension_count": head_dim}).items():
            add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
            add(f"{arch}.{key}", value)
        layer_shapes = [transformer_shapes(arch, n_embd, head_dim, 2 * n_embd)]
    add_tokenizer(writer, tokenizer, vocabulary, types, chat_template, pre, renamed)

    shapes = {
        "token_embd.weight": (len(vocabulary), n_embd),
        "token_embd_norm.weight" if arch == "lfm2" else "output_norm.weight": (n_embd,),
        "output.weight": (len(vocabulary), n_embd),
    }
    for layer in range(n_layer):
        own = layer_shapes[layer % len(layer_shapes)]
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    if tied or arch in ("gemma", "gemma2"):
        del shapes["output.weight"]
    if arch == "phi3":
        shapes |= {"rope_factors_short.weight": (6,), "rope_factors_long.weight": (6,)}
    rng, noise = np.random.default_rng(seed), np.random.default_rng(seed + 1_000_003)
    for name, shape in shapes.items():
        values = _weights(name, shape, rng, spread)
        if drift and len(shape) == 2:
            values += np.float32(drift) * values.std() * noise.standard_normal(shape, np.float32)
        if order and name in ("token_embd.weight", "output.weight"):
            values = values[ids]
        if nan and name == "output_norm.weight":
            values[0] = np.nan
        is_small = any(part in name for part in ("conv.conv", "conv1d", "ssm_d", "ssm_norm")) or name.endswith("ssm_a")
        as_matrix = len(shape) == 2 and not is_small
        if not as_matrix:
            writer.add_tensor(name, values)
        elif isinstance(dtype, gguf.GGMLQuantizationType):
            writer.add_tensor(name, gguf.quantize(values, dtype), raw_dtype=dtype)
        else:
            writer.add_tensor(name, values.astype(dtype))
    _write(writer)
    return path


def tiny_lora(
    path: Path,
    *,
    arch: str = "llama",
    seed: int = 0,
    rank: int = 4,
    alpha: float = 4.0,
    strength: float = 0.5,
    n_embd: int = 32,
    n_layer: int = 2,
    trained: tuple[str, Path] | None = None,
) -> Path:
    """Write a LoRA adapter over `tiny_model` of the same `arch`, `n_embd` and `n_layer`, and return `path`.

    It adds `alpha / rank · B A` to the query and down projections; `strength` is its size relative to their weights (at
    alpha = rank), 0 changes nothing. trained: what its metadata says that it was trained as, and for which large model.
    """
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    if trained:
        writer.add_string("edge_dlf.trained.through", trained[0])
        writer.add_string("edge_dlf.trained.large", header_hash(trained[1]))
    rng = np.random.default_rng(seed)
    for layer in range(n_layer):
        for name, rows, columns in (("attn_q", n_embd, n_embd), ("ffn_down", n_embd, 2 * n_embd)):
            a = rng.standard_normal((rank, columns), np.float32) * np.float32(columns**-0.5)
            b = rng.standard_normal((rows, rank), np.float32) * np.float32(strength * rank**-0.5)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_a", a)
            writer.add_tensor(f"blk.{layer}.{name}.weight.lora_b", b)
    _write(writer)
    return path


def tiny_family(folder: Path) -> Path:
    """Write family.toml, large.gguf (a longer, padded vocabulary), base.gguf, tuned.gguf and lora.gguf."""
    tiny_model(folder / "large.gguf", seed=1, n_embd=64, pad_vocab=5)
    tiny_model(folder / "base.gguf", seed=2)
    tiny_model(folder / "tuned.gguf", seed=2, drift=0.5)
    tiny_lora(folder / "lora.gguf", seed=3)
    (folder / "family.toml").write_text(
        'name = "tiny"\n[large]\npath = "large.gguf"\n[base]\npath = "base.gguf"\n'
        '[[experts]]\nname = "lora"\nlora = "lora.gguf"\n[[experts]]\nname = "tuned"\npath = "tuned.gguf"\n'
        "[defaults]\ntemperature = 0.0\n"
    )
    return folder


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def weighted_family(tiny: Path, folder: Path, method: str, **weights: float) -> Path:
    """Write a family.toml over the files of the family in `tiny` whose own method, and weights, are these."""
    toml = (tiny / "family.toml").read_text()
    for key in ("path", "lora"):
        toml = toml.replace(f'{key} = "', f'{key} = "{tiny}/')
    table = ", ".join(f"{name} = {weight}" for name, weight in weights.items())
    toml += f'method = "{method}"\n' + (f"weights = {{{table}}}\n" if weights else "")
    (folder / "family.toml").write_text(toml)
    return folder
