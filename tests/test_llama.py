"""The llama.cpp seam, on tiny GGUFs made here."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from pathlib import Path

import llama_cpp as lib
import numpy as np
import pytest

from edge_dlf import (
    ContextOverflowError,
    DecodeError,
    FusedLlama,
    InvalidParameterError,
    LoadError,
    ModelFileError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    RequestInterruptedError,
)
from edge_dlf.engine.backend import N_LENT, Run
from edge_dlf.llama import N_BATCH, Interrupt, LlamaBackend, Model, context, copy_bytes_s
from edge_dlf.llama.runtime import Log

from .feed import feed
from .tiny import tiny_lora, tiny_model

TEXT = list(range(40, 90))
ROUNDING = 0.05
"""By how much logits, which spread by 2.5, may differ between batch shapes: keys and values are rounded to 11 bits."""


@pytest.fixture(scope="module")
def base(tiny: Path) -> Iterator[Model]:
    model = Model(tiny / "base.gguf")
    yield model
    model.close()


def backend(model: Model, **settings: object) -> LlamaBackend:
    return LlamaBackend(model, "base", **{"n_ctx": 1024, "n_threads": 1, **settings})  # type: ignore[arg-type]


def fresh(model: Model, tokens: list[int], **settings: object) -> np.ndarray:
    """The row after `tokens`, from a context of its own."""
    member = backend(model, **settings)
    feed(member, 0, tokens)
    row = member.logits()[0].copy()
    member.close()
    return row


def test_small_members_take_few_threads_unless_told(base: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dlf.llama.context.default_n_threads", lambda: 8)
    for n_bytes, given, n_threads in (
        (base.n_bytes, None, 1),
        (base.n_bytes, 3, 3),
        (13 * 2**20, None, 3),
        (10**9, None, 8),
    ):
        monkeypatch.setattr(base, "n_bytes", n_bytes)
        member = backend(base, n_threads=given)
        assert lib.llama_n_threads(member._ctx) == lib.llama_n_threads_batch(member._ctx) == n_threads
        member.close()


def test_rows_are_read_in_place(base: Model) -> None:
    member = backend(base)
    feed(member, 0, TEXT)
    first, second = member.logits(), member.logits()
    assert not first.flags.owndata
    assert first.dtype == np.float32
    assert first.ctypes.data == second.ctypes.data
    member.close()


def test_what_is_asked_of_llama_cpp_for_gpus(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contexts, models = [], []
    make, load = lib.llama_init_from_model, lib.llama_model_load_from_file
    monkeypatch.setattr(
        lib, "llama_init_from_model", lambda handle, params: contexts.append(params) or make(handle, params)
    )

    def without_gpu(path: bytes, params: object) -> object:
        seen = {name: getattr(params, name) for name in ("n_gpu_layers", "split_mode", "main_gpu")}
        models.append((seen, params.tensor_split[:3] if params.tensor_split else None))  # type: ignore[attr-defined]
        params.split_mode, params.main_gpu = lib.LLAMA_SPLIT_MODE_LAYER, 0  # type: ignore[attr-defined]
        return load(path, params)

    monkeypatch.setattr(lib, "llama_model_load_from_file", without_gpu)
    for split in ((), (1.0,), (0.0, 1.0, 0.0), (3.0, 1.0, 0.0), (0.0,), (0.0, 0.0)):
        model = Model(tiny / "base.gguf", -1, split)
        backend(model).close()
        model.close()
    for params in contexts:
        assert params.offload_kqv
        assert params.op_offload
        assert params.flash_attn_type == lib.LLAMA_FLASH_ATTN_TYPE_AUTO
    layers = {"n_gpu_layers": -1, "split_mode": lib.LLAMA_SPLIT_MODE_LAYER, "main_gpu": 0}
    alone = {**layers, "split_mode": lib.LLAMA_SPLIT_MODE_NONE, "main_gpu": 1}
    no_gpu = {**alone, "main_gpu": -1}
    assert [seen for seen, _ in models] == [layers, layers, alone, layers, no_gpu, no_gpu]
    assert models[0][1] is models[2][1] is models[4][1] is None
    assert models[3][1] == [3.0, 1.0, 0.0]


@pytest.mark.parametrize(("n_ubatch", "flash"), [(None, True), (64, False)])
def test_plain_attention_is_asked_for(
    base: Model, n_ubatch: int | None, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, make = [], lib.llama_init_from_model
    monkeypatch.setattr(
        lib, "llama_init_from_model", lambda handle, params: made.append(params) or make(handle, params)
    )
    backend(base, n_ubatch=n_ubatch).close()
    (params,) = made
    assert (params.flash_attn_type == lib.LLAMA_FLASH_ATTN_TYPE_AUTO) is flash
    assert (params.flash_attn_type == lib.LLAMA_FLASH_ATTN_TYPE_DISABLED) is not flash
    assert (params.n_batch, params.n_ubatch) == (N_BATCH, n_ubatch or N_BATCH)


@pytest.mark.parametrize(
    ("n_seqs", "is_beside_a_gpu", "has_flash", "asked"),
    [
        (N_LENT - 1, True, True, ["AUTO"]),
        (N_LENT, False, True, ["AUTO"]),
        (N_LENT, True, True, ["AUTO", "ENABLED"]),
        (N_LENT, True, False, ["AUTO", "AUTO"]),
    ],
)
def test_many_sequences_attend_as_one_does(
    base: Model, n_seqs: int, is_beside_a_gpu: bool, has_flash: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a step of 32, llama.cpp itself would say that a GPU lacks flash attention where layers are on the host."""
    made, make = [], lib.llama_init_from_model
    monkeypatch.setattr(
        lib, "llama_init_from_model", lambda handle, params: made.append(params) or make(handle, params)
    )
    monkeypatch.setattr(context, "gpus", lambda: ["a GPU"] if is_beside_a_gpu else [])
    monkeypatch.setattr(Log, "says", lambda *_: not has_flash)
    backend(base, n_ctx=64, n_seq_max=n_seqs).close()
    assert [params.flash_attn_type for params in made] == [
        getattr(lib, f"LLAMA_FLASH_ATTN_TYPE_{name}") for name in asked
    ]
    assert [params.n_seq_max for params in made] == [1, n_seqs][-len(asked) :]


def test_how_fast_a_device_moves_bytes() -> None:
    assert copy_bytes_s("CPU", 2**20) > 0
    with pytest.raises(OutOfMemoryError, match="CPU: no room"):
        copy_bytes_s("CPU", 2**46)


@pytest.mark.parametrize("n_ubatch", [None, 64])
def test_single_steps_batches_and_prefill_agree(base: Model, n_ubatch: int | None) -> None:
    member = backend(base, n_ubatch=n_ubatch)
    feed(member, 0, TEXT[:20])
    for token in TEXT[20:30]:
        member.decode([Run(0, [token], 1)])
        single = member.logits()[0].copy()
    np.testing.assert_allclose(single, fresh(base, TEXT[:30]), atol=ROUNDING)
    member.decode([Run(0, TEXT[30:34], 4)])
    rows = member.logits()
    assert rows.shape == (4, base.n_vocab)
    for k in range(4):
        np.testing.assert_allclose(rows[k], fresh(base, TEXT[: 31 + k]), atol=ROUNDING)
    member.close()


@pytest.mark.parametrize("n_ubatch", [None, 64])
def test_a_prompt_longer_than_a_batch(base: Model, n_ubatch: int | None) -> None:
    tokens = (TEXT * 20)[: N_BATCH + 100]
    whole = fresh(base, tokens)
    member = backend(base, n_ubatch=n_ubatch)
    for start in range(0, len(tokens), 100):
        feed(member, 0, tokens[start : start + 100])
    np.testing.assert_allclose(member.logits()[0], whole, atol=ROUNDING)
    assert member.n_past(0) == len(tokens)
    member.close()


@pytest.mark.parametrize("n_ubatch", [None, 64])
def test_trimmed_text_is_forgotten(base: Model, n_ubatch: int | None) -> None:
    member = backend(base, n_ubatch=n_ubatch)
    feed(member, 0, TEXT)
    member.trim(0, 10)
    feed(member, 0, TEXT[10:20])
    np.testing.assert_allclose(member.logits()[0], fresh(base, TEXT[:20]), atol=ROUNDING)
    member.close()


def test_sequences_are_kept_apart(base: Model) -> None:
    member = backend(base, n_seq_max=2, n_ctx=128)
    feed(member, 0, TEXT[:10])
    feed(member, 1, TEXT[20:25])
    member.decode([Run(0, TEXT[10:11], 1), Run(1, TEXT[25:26], 1)])
    rows = member.logits()
    np.testing.assert_allclose(rows[0], fresh(base, TEXT[:11]), atol=ROUNDING)
    np.testing.assert_allclose(rows[1], fresh(base, TEXT[20:26]), atol=ROUNDING)
    member.close()


def test_prompts_and_steps_of_several_sequences_in_one_batch(base: Model) -> None:
    member = backend(base, n_seq_max=3, n_ctx=128)
    feed(member, 0, TEXT[:10])
    member.decode([Run(1, TEXT[:7], 0), Run(0, TEXT[10:11], 1), Run(2, TEXT[20:30], 2)])
    rows = member.logits()
    for row, text in zip(rows, (TEXT[:11], TEXT[20:29], TEXT[20:30]), strict=True):
        np.testing.assert_allclose(row, fresh(base, text), atol=ROUNDING)
    member.decode([Run(1, TEXT[7:9], 1)])
    np.testing.assert_allclose(member.logits()[0], fresh(base, TEXT[:9]), atol=ROUNDING)
    member.close()


def test_a_shared_prefix_takes_its_cells_once_and_outlives_its_source(base: Model) -> None:
    member = backend(base, n_seq_max=8, n_ctx=48, n_cells=64)
    feed(member, 0, TEXT[:40])
    for seq in range(1, 8):  # 8 x 40 positions in a cache of 64
        member.copy(0, seq, 40)
    member.trim(0, 0)
    member.decode([Run(seq, [TEXT[40 + seq]], 1) for seq in range(1, 8)])
    rows = member.logits()
    for seq in range(1, 8):
        np.testing.assert_allclose(rows[seq - 1], fresh(base, [*TEXT[:40], TEXT[40 + seq]]), atol=ROUNDING)
    member.close()


@pytest.fixture
def streams(base: Model) -> Iterator[LlamaBackend]:
    member = backend(base, n_ctx=256, n_seq_max=4, streams=True)
    yield member
    member.close()


def test_streams_give_the_rows_of_runs_in_any_order(base: Model, streams: LlamaBackend) -> None:
    for seqs in ((0, 1, 2, 3), (3, 1, 0, 2), (2, 0)):
        for seq in range(4):
            streams.trim(seq, 0)
        texts = {seq: TEXT[seq : 10 + 3 * seq] for seq in seqs}
        streams.decode([Run(seq, texts[seq][:6], 0) for seq in seqs])
        streams.decode([Run(seq, texts[seq][6:], 1 + (seq == 1)) for seq in seqs])
        rows = iter(streams.logits())
        assert streams.logits() is streams.logits()
        for seq in seqs:
            if seq == 1:
                np.testing.assert_allclose(next(rows), fresh(base, texts[seq][:-1]), atol=ROUNDING)
            np.testing.assert_allclose(next(rows), fresh(base, texts[seq]), atol=ROUNDING)
        assert next(rows, None) is None


def test_a_stream_takes_a_prefix_over_and_grows_to_the_whole_context(base: Model, streams: LlamaBackend) -> None:
    feed(streams, 0, TEXT[:40])
    streams.copy(0, 2, 30)
    streams.copy(2, 3, 20)
    streams.trim(0, 0)
    streams.decode([Run(2, [5], 1), Run(3, [6], 1)])
    for row, text in zip(streams.logits(), ([*TEXT[:30], 5], [*TEXT[:20], 6]), strict=True):
        np.testing.assert_allclose(row, fresh(base, text), atol=ROUNDING)
    for seq in range(4):
        feed(streams, seq, [9] * (256 - streams.n_past(seq)))
        with pytest.raises(ContextOverflowError, match="256 tokens and 1 more"):
            streams.decode([Run(seq, [1], 1)])


def test_streams_change_places(base: Model, streams: LlamaBackend) -> None:
    texts = {0: TEXT[:12], 1: TEXT[12:40], 2: [], 3: TEXT[3:5]}
    for seq, text in texts.items():
        if text:
            feed(streams, seq, text)
    for a, b in ((0, 1), (1, 2), (3, 0), (2, 3)):
        streams.swap(a, b)
        texts[a], texts[b] = texts[b], texts[a]
    assert [streams.n_past(seq) for seq in range(4)] == [len(texts[seq]) for seq in range(4)]
    streams.decode([Run(seq, [7], 1) for seq in range(4)])
    for seq, row in enumerate(streams.logits()):
        np.testing.assert_allclose(row, fresh(base, [*texts[seq], 7]), atol=ROUNDING)


def test_what_llama_cpp_does_not_take_back_is_an_error(streams: LlamaBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    feed(streams, 0, TEXT)
    monkeypatch.setattr(lib, "llama_state_seq_set_data", lambda *_: 0)
    with pytest.raises(DecodeError, match="base: llama.cpp does not take back"):
        streams.swap(0, 1)


def test_a_lora_changes_its_own_context_only(tiny: Path, base: Model) -> None:
    lora = tiny / "lora.gguf"
    alone = fresh(base, TEXT)
    tuned = fresh(base, TEXT, loras=[(lora, 1.0)])
    assert np.abs(tuned - alone).max() > 0.1
    np.testing.assert_array_equal(fresh(base, TEXT), alone)
    np.testing.assert_array_equal(fresh(base, TEXT, loras=[(lora, 0.0)]), alone)
    np.testing.assert_allclose(fresh(base, TEXT, loras=[(lora, 1.0)]), tuned, atol=1e-6)


def test_adapters_add_up(tmp_path: Path, base: Model) -> None:
    first, second = tiny_lora(tmp_path / "a.gguf", seed=5), tiny_lora(tmp_path / "b.gguf", seed=5)
    both = fresh(base, TEXT, loras=[(first, 0.25), (second, 0.75)])
    np.testing.assert_allclose(both, fresh(base, TEXT, loras=[(first, 1.0)]), atol=1e-3)


def test_text_beyond_the_context_is_refused_with_the_numbers(base: Model) -> None:
    member = backend(base, n_ctx=64)
    with pytest.raises(ContextOverflowError, match="base: 0 tokens and 65 more exceed its context of 64"):
        feed(member, 0, [1] * 65)
    feed(member, 0, [1] * 64)
    with pytest.raises(ContextOverflowError, match="64 tokens and 1 more"):
        member.decode([Run(0, [1], 1)])
    member.close()


def test_more_rows_than_reserved_is_an_error_not_an_abort(base: Model) -> None:
    member = backend(base, n_rows=4)
    with pytest.raises(InvalidParameterError, match="5 rows"):
        member.decode([Run(0, TEXT[:5], 5)])
    member.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type_k": "q9_9"}, "f16.*q8_0.*not 'q9_9'"),
        ({"n_ctx": 0}, "n_ctx must lie in 1 to"),
        ({"n_ctx": 10**11}, "n_ctx must lie in 1 to 2147483647"),
    ],
)
def test_settings_that_cannot_be(base: Model, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        backend(base, **settings)


def test_cache_types(base: Model) -> None:
    exact = fresh(base, TEXT)
    for cache_type in ("f32", "f16"):
        np.testing.assert_allclose(fresh(base, TEXT, type_k=cache_type, type_v=cache_type), exact, atol=ROUNDING)
    assert 0 < np.abs(fresh(base, TEXT, type_k="bf16", type_v="bf16") - exact).max() < 0.5


def test_a_cache_type_that_the_model_cannot_have_is_refused(base: Model) -> None:
    with pytest.raises(LoadError, match="base: llama.cpp cannot make a context of 1024 tokens"):
        backend(base, type_k="q8_0", type_v="q8_0")  # its heads are narrower than a block


def test_a_lora_for_another_width_is_refused(tmp_path: Path, base: Model) -> None:
    lora = tiny_lora(tmp_path / "wide.gguf", n_embd=64)
    with pytest.raises(ModelFileError, match="wide.gguf: not a LoRA adapter for base.gguf"):
        backend(base, loras=[(lora, 1.0)])


def evaluate_for_ever(member: LlamaBackend) -> None:
    while True:
        feed(member, 0, TEXT[:10])
        member.trim(0, 10)


def test_an_interrupt_stops_an_evaluation_and_the_next_one_is_right(base: Model) -> None:
    interrupt = Interrupt()
    member = backend(base, interrupt=interrupt)
    feed(member, 0, TEXT[:10])
    other = threading.Thread(target=interrupt.set)
    other.start()
    with pytest.raises(RequestInterruptedError, match="interrupted"):
        evaluate_for_ever(member)
    other.join()
    interrupt.clear()
    member.trim(0, 10)
    feed(member, 0, TEXT[10:20])
    np.testing.assert_allclose(member.logits()[0], fresh(base, TEXT[:20]), atol=ROUNDING)
    member.close()


def test_llama_cpp_asks_the_flag_while_it_evaluates(base: Model) -> None:
    """Set in the buffer that llama.cpp reads alone: it is llama.cpp itself that stops."""
    interrupt = Interrupt()
    member = backend(base, interrupt=interrupt)
    interrupt.set()
    interrupt.text, flag = ctypes.create_string_buffer(2), interrupt.text
    assert flag.value
    with pytest.raises(RequestInterruptedError, match="base: interrupted while it evaluated 10 tokens"):
        feed(member, 0, TEXT[:10])
    member.close()


def test_closing_twice(tiny: Path) -> None:
    model = Model(tiny / "base.gguf")
    member = backend(model)
    for _ in range(2):
        member.close()
    for _ in range(2):
        model.close()


@pytest.mark.parametrize("text", ["Hello, world", "naïve 😀 → 漢字", "a\0b", "<|im_end|>", "\n\n  x"])
def test_text_comes_back_from_its_tokens(base: Model, text: str) -> None:
    tokens = base.tokenize(text.encode(), special=False)
    assert not set(tokens) & set(base.control_tokens())
    assert b"".join(map(base.piece, tokens)).decode() == text


def test_names_of_control_tokens_are_read_on_request_only(base: Model) -> None:
    (token,) = base.tokenize(b"<|im_end|>", special=True)
    assert token in base.control_tokens()
    assert base.is_eog(token)
    assert base.piece(token) == b""
    assert base.piece(token, special=True) == b"<|im_end|>"


def test_bytes_that_are_no_text_do_no_harm(base: Model) -> None:
    assert base.tokenize(b"\xff\xfe ok \xf0\x9f", special=False)


def test_a_recurrent_model_forgets_what_other_prompts_were(tmp_path: Path) -> None:
    for seed, name in enumerate(("large", "base", "expert")):
        tiny_model(tmp_path / f"{name}.gguf", arch="mamba", seed=seed)
    files = [tmp_path / f"{name}.gguf" for name in ("large", "base", "expert")]
    with FusedLlama(files[0], files[1], {"expert": files[2]}, n_ctx=128, n_threads=1) as llm:
        prompts = ["Hello, my", "Hello, your", "Hello, my"]
        first, second, third = (llm.create_completion(p, temperature=0, max_tokens=8) for p in prompts)
    assert first["choices"] == third["choices"] != second["choices"]


@pytest.mark.parametrize("member", ["large", "base", "expert"])
def test_a_member_that_returns_nan_is_named(tmp_path: Path, member: str) -> None:
    for seed, name in enumerate(("large", "base", "expert")):
        tiny_model(tmp_path / f"{name}.gguf", seed=seed, nan=name == member)
    files = [tmp_path / f"{name}.gguf" for name in ("large", "base", "expert")]
    with (
        FusedLlama(files[0], files[1], {"expert": files[2]}, n_ctx=128, n_threads=1) as llm,
        pytest.raises(NonFiniteLogitsError, match=f"^{member} returned NaN"),
    ):
        llm.create_completion("Hello")
