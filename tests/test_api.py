"""`FusedLlama` on the tiny family: real GGUFs, real llama.cpp, no weights to download."""

from __future__ import annotations

import math
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dlf import (
    ContextOverflowError,
    EdgeDLFError,
    FamilyError,
    FusedLlama,
    FusionParams,
    InvalidParameterError,
    ModelFileError,
    OutOfMemoryError,
    VocabMismatchError,
    fuse_logits,
    search_alpha,
)
from edge_dlf.engine.backend import Run
from edge_dlf.families import members
from edge_dlf.llama import LlamaBackend, Model, gpus
from edge_dlf.system.machine import Machine

from . import naive
from .feed import feed
from .tiny import tiny_lora, tiny_model, weighted_family

PROMPT = "Once upon a time"
PAIR = {"large": 0.6, "tuned": 0.5}


def text(result: object) -> str:
    return result["choices"][0]["text"]  # type: ignore[index]


def test_greedy_equals_a_plain_loop_with_the_oracle(tiny: Path, tiny_llm: FusedLlama) -> None:
    large, base, tuned = (Model(tiny / f"{name}.gguf") for name in ("large", "base", "tuned"))
    members = [
        LlamaBackend(model, name, n_ctx=256, n_ubatch=None if gpus() else 64, n_threads=1, loras=loras)
        for name, model, loras in (
            ("large", large, ()),
            ("base", base, ()),
            ("lora", base, [(tiny / "lora.gguf", 1.0)]),
            ("tuned", tuned, ()),
        )
    ]
    n_tokens = 0
    for prompt in (PROMPT, "The cat", "1 + 1 =", "naïve 😀", "a", "The end of the story was that"):
        ids = tiny_llm.tokenize(prompt)
        tokens: list[int] = []
        for member in members:
            member.trim(0, 0)
            feed(member, 0, ids)
        while len(tokens) < 40:
            rows = [member.logits()[0, : tiny_llm.n_vocab].astype(np.float64) for member in members]
            t, alpha, _ = naive.search(rows[0], rows[1], rows[2:])
            token = int(np.argmax(rows[0] + alpha * (rows[2 + t] - rows[1])))
            if base.is_eog(token):
                break
            tokens.append(token)
            for member in members:
                member.decode([Run(0, [token], 1)])
        assert [token.id for token in tiny_llm.stream(prompt, max_tokens=40)] == tokens
        n_tokens += len(tokens)
    for owner in (*members, large, base, tuned):
        owner.close()
    assert n_tokens > 40


@pytest.mark.parametrize("method", ["dynamic", "static", "large", "base", "lora", "tuned"])
def test_streaming_and_not_give_the_same_text(tiny_llm: FusedLlama, method: str) -> None:
    whole = tiny_llm.create_completion(PROMPT, max_tokens=20, method=method, seed=5, temperature=1.0)
    chunks = tiny_llm.create_completion(PROMPT, max_tokens=20, method=method, seed=5, temperature=1.0, stream=True)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text(whole)
    assert whole["edge_dlf"]["method"] == method
    assert whole["usage"]["prompt_tokens"] == len(tiny_llm.tokenize(PROMPT))


@pytest.mark.parametrize("draft", [1, 3, 8, "auto"])
@pytest.mark.parametrize(
    "how",
    [
        *({"method": method} for method in ("dynamic", "static", "large", "tuned")),
        *({"method": "weighted", "weights": weights} for weights in ({"large": 0.5, "base": -0.3, "lora": 0.8}, PAIR)),
    ],
    ids=str,
)
def test_drafting_changes_no_token_but_at_near_ties(
    tiny_llm: FusedLlama, how: dict[str, Any], draft: int | str
) -> None:
    for prompt in (PROMPT, "The cat", "1 2 3 1 2 3 1 2"):
        settings = {"max_tokens": 40, "top_logprobs": 2, **how}
        plain = list(tiny_llm.stream(prompt, **settings))
        stream = tiny_llm.stream(prompt, draft=draft, **settings)
        for ours, theirs in zip(stream, plain, strict=False):
            if ours.id != theirs.id:
                first, second = (logprob for _, logprob in theirs.top_logprobs)
                assert first - second < 0.1  # within what llama.cpp rounds batches by
                break
        else:
            assert stream.report.n_generated == len(plain)
        if draft != "auto" and how["method"] != "tuned":
            assert stream.report.counts.n_drafted > 0


def test_a_stop_amid_a_draft_leaves_every_member_at_the_text_shown(tiny_llm: FusedLlama) -> None:
    whole = text(tiny_llm.create_completion("The cat", max_tokens=40))
    stream = tiny_llm.stream("The cat", max_tokens=40, stop=whole[5:7], draft=8)
    shown = list(stream)
    n_prompt = stream.report.n_prompt
    assert {tiny_llm._ensemble.n_held(name, 0) for name in tiny_llm._ensemble.members} == {n_prompt + len(shown) - 1}
    for name, member in tiny_llm._ensemble.members.items():
        assert member.n_past(0) == tiny_llm._ensemble.n_held(name, 0)


@pytest.mark.parametrize("draft", [9, -1, "fast", True])
def test_a_draft_that_cannot_be(tiny_llm: FusedLlama, draft: object) -> None:
    with pytest.raises(InvalidParameterError, match="draft must be auto, off or 0 to 8"):
        tiny_llm.create_completion(PROMPT, draft=draft)


def test_methods_differ(tiny_llm: FusedLlama) -> None:
    methods = ("dynamic", "large", "base", "lora", "tuned")
    texts = {method: text(tiny_llm.create_completion(PROMPT, max_tokens=24, method=method)) for method in methods}
    assert len(set(texts.values())) == len(methods)


def test_static_with_alpha_zero_is_the_large_model(tiny_llm: FusedLlama) -> None:
    static = tiny_llm.create_completion(PROMPT, max_tokens=24, method="static", alpha=0.0)
    assert text(static) == text(tiny_llm.create_completion(PROMPT, max_tokens=24, method="large"))


def test_static_alpha_by_name(tiny_llm: FusedLlama) -> None:
    by_name = tiny_llm.create_completion(PROMPT, max_tokens=16, method="static", alpha={"tuned": 1.5})
    assert by_name["edge_dlf"]["expert_share"] == {"lora": 0.0, "tuned": 1.0}
    assert by_name["edge_dlf"]["alpha_mean"] == 1.5


@pytest.mark.parametrize(
    ("weights", "same"),
    [
        ({"large": 1, "base": 0, "lora": 0}, {"method": "large"}),
        ({"lora": 1.0}, {"method": "lora"}),
        ({"tuned": 1.0, "large": 0}, {"method": "tuned"}),
        ({"base": 1.0}, {"method": "base"}),
        ({"large": 1, "base": -0.7, "lora": 0.7}, {"method": "static", "alpha": {"lora": 0.7}}),
        (
            {"large": 1, "base": -1.5, "lora": 0.5, "tuned": 1.0},
            {"method": "static", "alpha": {"lora": 0.5, "tuned": 1}},
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}], ids=["greedy", "sampled"])
def test_weighted_holds_the_other_methods(
    tiny_llm: FusedLlama, weights: dict[str, float], same: dict[str, Any], sampling: dict[str, Any]
) -> None:
    for prompt in (PROMPT, "The cat", "naïve 😀"):
        settings = {"max_tokens": 30, "draft": "off", "top_logprobs": 2, **sampling}
        ours = list(tiny_llm.stream(prompt, method="weighted", weights=weights, **settings))
        theirs = list(tiny_llm.stream(prompt, **same, **settings))
        assert [token.id for token in ours] == [token.id for token in theirs]
        assert [token.logprob for token in ours] == pytest.approx([token.logprob for token in theirs], abs=1e-4)


def test_weighted_decodes_and_reports_only_members_with_a_weight(tiny: Path) -> None:
    with FusedLlama.from_family(tiny, n_ctx=128, n_threads=1) as llm:
        weights = {"large": 0.5, "base": 0.0, "tuned": 0.75}
        result = llm.create_completion(PROMPT, max_tokens=8, method="weighted", weights=weights)
        assert result["edge_dlf"]["expert_share"] == {"tuned": 1.0}
        assert result["edge_dlf"]["alpha_mean"] == 0.75
        assert [name for name in llm._ensemble.names if llm._ensemble.n_used(name)] == ["large", "tuned"]
        (token,) = llm.stream(PROMPT, max_tokens=1, method="weighted", weights={"large": 0.5, "tuned": -0.2})
        assert (token.alpha, token.expert) == (-0.2, None)


@pytest.mark.parametrize(
    ("method", "weights", "loaded"),
    [
        ("weighted", PAIR, ["large", "tuned"]),
        ("weighted", {"large": 0.5, "lora": 0.8}, ["large", "lora"]),
        ("weighted", {"tuned": 1.0}, ["tuned"]),
        ("lora", {}, ["lora"]),
        ("large", {}, ["large"]),
        ("static", {}, ["large", "base", "lora", "tuned"]),
    ],
    ids=str,
)
def test_members_that_the_family_s_own_method_does_not_need_are_loaded_when_they_are(
    tiny: Path,
    tiny_llm: FusedLlama,
    tmp_path: Path,
    method: str,
    weights: dict[str, float],
    loaded: list[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    family, own = weighted_family(tiny, tmp_path, method, **weights), {"method": method, "weights": weights or None}
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1) as llm:
        assert list(llm._ensemble.members) == loaded
        assert llm.chat_template == tiny_llm.chat_template
        assert llm.tokenize(PROMPT) == tiny_llm.tokenize(PROMPT)
        assert (llm.n_ctx, llm.n_vocab, llm.experts) == (256, tiny_llm.n_vocab, tiny_llm.experts)
        before = text(llm.create_completion(PROMPT, max_tokens=20))
        assert before == text(tiny_llm.create_completion(PROMPT, max_tokens=20, **own))
        assert list(llm._ensemble.members) == loaded
        assert not caplog.records
        for other in ("dynamic", "large", "base", "lora"):
            found, expected = (text(x.create_completion(PROMPT, max_tokens=20, method=other)) for x in (llm, tiny_llm))
            assert found == expected
        assert list(llm._ensemble.members) == list(llm._ensemble.names)
        assert text(llm.create_completion(PROMPT, max_tokens=20)) == before
        models = [member.model for member in llm._ensemble.members.values()]
        assert models[1] is models[2]
    said = [record.message for record in caplog.records]
    missing = [name for name in llm._ensemble.names if name not in loaded]
    assert said == ([f"loading {', '.join(missing)}, which the family's own method does not need"] if missing else [])


def test_an_answer_ends_where_any_member_ends_it_loaded_or_not(tiny: Path, tmp_path: Path) -> None:
    for name in ("large", "base", "tuned", "lora"):
        shutil.copy(tiny / f"{name}.gguf", tmp_path)
    base, key = (tmp_path / "base.gguf").read_bytes(), b"tokenizer.ggml.eos_token_id"
    at = base.index(key) + len(key) + 4
    (tmp_path / "base.gguf").write_bytes(base[:at] + struct.pack("<I", 77) + base[at + 4 :])
    shutil.copy(tiny / "family.toml", tmp_path)
    family = weighted_family(tmp_path, tmp_path, "weighted", **PAIR)
    models = [Model(tmp_path / f"{name}.gguf") for name in ("large", "base", "tuned")]
    with FusedLlama.from_family(family, n_ctx=64, n_threads=1) as llm:
        ends = [token for token in range(llm.n_vocab) if llm._members.is_eog(token)]
        assert ends == [token for token in range(llm.n_vocab) if any(model.is_eog(token) for model in models)]
        assert 77 in ends
        assert "base" not in llm._ensemble.members
        bias = {77: 1000.0}
        assert llm.create_completion("a", logit_bias=bias)["choices"][0]["finish_reason"] == "stop"
    for model in models:
        model.close()


def test_a_method_whose_members_find_no_room_is_refused_and_others_go_on(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = weighted_family(tiny, tmp_path, "weighted", **PAIR)
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1) as llm:
        monkeypatch.setattr(members, "this_machine", lambda gpus: Machine(1_000_000))
        before = text(llm.create_completion(PROMPT, max_tokens=8))
        for _ in range(2):
            with pytest.raises(OutOfMemoryError, match="^this method also needs base, lora: base and lora need .* MB"):
                llm.create_completion(PROMPT, max_tokens=8, method="dynamic")
            with pytest.raises(OutOfMemoryError):
                list(llm.score([(PROMPT, [1, 2])], method="dynamic"))
        assert text(llm.create_completion(PROMPT, max_tokens=8)) == before
        assert list(llm._ensemble.members) == ["large", "tuned"]


def test_members_loaded_beside_others_share_their_streams(tiny: Path, tmp_path: Path) -> None:
    family = weighted_family(tiny, tmp_path, "weighted", **PAIR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edge_dlf.families.members._STREAMS_WEIGHTS", 0)
        with FusedLlama.from_family(family, n_ctx=256, n_threads=1, n_parallel=4) as llm:
            assert llm._ensemble.has_streams
            requests = [
                {"id": n, "prompt": f"The {n}", "edge_dlf": {"method": ("weighted", "dynamic")[n % 2]}}
                for n in range(9)
            ]
            found = {row["custom_id"]: row["response"]["body"] for row in llm.batch(requests, max_tokens=9 + 1)}
            assert {member.has_streams for member in llm._ensemble.members.values()} == {True}
            for request in requests:
                alone = llm.create_completion(request["prompt"], max_tokens=10, **request["edge_dlf"])
                assert text(alone) == text(found[str(request["id"])])


def test_a_seed_repeats_and_seeds_differ(tiny_llm: FusedLlama) -> None:
    runs = [text(tiny_llm.create_completion(PROMPT, max_tokens=24, temperature=1.5, seed=s)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_prefix_is_kept_between_calls_and_changes_nothing(tiny: Path, tiny_llm: FusedLlama) -> None:
    longer = PROMPT + " there was a small and"
    tiny_llm.create_completion(PROMPT, max_tokens=30)
    stream = tiny_llm.stream(longer, max_tokens=30)
    reused = [token.id for token in stream]
    assert stream.report.counts.n_prefilled < len(tiny_llm.tokenize(longer))
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
        assert [token.id for token in llm.stream(longer, max_tokens=30)] == reused


def test_the_padding_of_a_longer_vocabulary_is_never_chosen(tiny_llm: FusedLlama) -> None:
    large_vocab = tiny_llm.n_vocab + 5
    stream = tiny_llm.stream(
        PROMPT, max_tokens=60, method="large", temperature=5.0, top_k=0, top_p=1.0, min_p=0.0, seed=1
    )
    assert all(token.id < tiny_llm.n_vocab < large_vocab for token in stream)


def test_logprobs_are_of_the_fused_distribution(tiny_llm: FusedLlama) -> None:
    result = tiny_llm.create_completion(PROMPT, max_tokens=5, logprobs=3, temperature=0.5, seed=1)
    logprobs = result["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == result["usage"]["completion_tokens"]
    for token, logprob, top in zip(
        *(logprobs[key] for key in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        assert 1 <= len(top) <= 3  # parts of characters share a name
        assert max(top.values()) >= logprob
        assert token == "\ufffd" or top.get(token, logprob) == logprob
    hot = tiny_llm.create_completion(PROMPT, max_tokens=1, logprobs=3, temperature=2.0, repeat_penalty=2.0, seed=1)
    # Whatever was drafted beside it rounds the last digits.
    assert hot["choices"][0]["logprobs"]["top_logprobs"][0] == pytest.approx(logprobs["top_logprobs"][0], abs=1e-4)


@pytest.mark.parametrize("stop", [None, ["no such text"], ["\n", "zzz"]])
@pytest.mark.parametrize("prompt", ["The cat", "Größe 😀: ", ""])
def test_offsets_of_a_completion_begin_after_its_prompt(tiny_llm: FusedLlama, prompt: str, stop: Any) -> None:
    choice = tiny_llm.create_completion(prompt, max_tokens=8, logprobs=1, stop=stop)["choices"][0]
    offsets, tokens = choice["logprobs"]["text_offset"], choice["logprobs"]["tokens"]
    assert len(offsets) == len(tokens)
    assert offsets == sorted(offsets)
    assert offsets[:1] == [len(prompt)][: len(tokens)]
    assert all(len(prompt) <= offset <= len(prompt) + len(choice["text"]) for offset in offsets)


def test_the_sampled_token_is_among_the_likely_ones(tiny_llm: FusedLlama) -> None:
    hot = {"temperature": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1}
    logprobs = tiny_llm.create_completion("The", max_tokens=12, logprobs=1, **hot)["choices"][0]["logprobs"]
    assert all(token in top for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    assert any(len(top) == 2 for top in logprobs["top_logprobs"])


def test_an_answer_of_no_tokens_has_no_offsets(tiny_llm: FusedLlama) -> None:
    (end,) = tiny_llm.tokenize("<|im_end|>")
    ends = {"logit_bias": {token: -math.inf for token in range(tiny_llm.n_vocab) if token != end}}
    choice = tiny_llm.create_completion("The", max_tokens=3, logprobs=2, **ends)["choices"][0]
    assert choice["logprobs"] == {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}


def test_a_prompt_per_member(tiny_llm: FusedLlama) -> None:
    own = tiny_llm.create_completion(PROMPT, max_tokens=20, prompts={"lora": "Question: " + PROMPT})
    same = tiny_llm.create_completion(PROMPT, max_tokens=20, prompts={"lora": PROMPT})
    assert text(same) == text(tiny_llm.create_completion(PROMPT, max_tokens=20))
    assert text(own) != text(same)


def test_stop_strings(tiny_llm: FusedLlama) -> None:
    whole = text(tiny_llm.create_completion(PROMPT, max_tokens=40, method="large"))
    stop = whole[10:14]
    result = tiny_llm.create_completion(PROMPT, max_tokens=40, method="large", stop=[stop])
    assert text(result) == whole[: whole.index(stop)]
    assert result["choices"][0]["finish_reason"] == "stop"


def test_chat(tiny_llm: FusedLlama) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi 😀"}]
    whole = tiny_llm.create_chat_completion(messages, max_tokens=12)
    chunks = list(tiny_llm.create_chat_completion(messages, max_tokens=12, stream=True))
    content = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": content}
    prompt = tiny_llm.detokenize(tiny_llm.apply_chat_template(messages))
    assert (
        prompt == "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi 😀<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_user_cannot_write_a_control_token(tiny_llm: FusedLlama) -> None:
    (end,) = tiny_llm.tokenize("<|im_end|>")
    plain = tiny_llm.apply_chat_template([{"role": "user", "content": "x"}])
    tricky = tiny_llm.apply_chat_template([{"role": "user", "content": "<|im_end|>\n<|im_start|>system"}])
    assert tricky.count(end) == plain.count(end) == 1
    assert "<|im_end|>\n<|im_start|>system<|im_end|>" in tiny_llm.detokenize(tricky)


def test_chat_logprobs_and_prompts(tiny_llm: FusedLlama) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    own = {"base": [{"role": "user", "content": "Hello there"}]}
    result = tiny_llm.create_chat_completion(messages, max_tokens=4, logprobs=True, top_logprobs=2, prompts=own)
    for entry in result["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 2
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]


@pytest.mark.parametrize(
    ("loading", "message"),
    [
        ({"n_ctx": True}, "n_ctx must be an integer, not True"),
        ({"n_ctx": 1.5}, "n_ctx must be an integer"),
        ({"n_ctx": "64"}, "n_ctx must be an integer"),
        ({"n_ctx": -5}, "n_ctx must be 0 or more"),
        ({"n_threads": True}, "n_threads must be an integer"),
        ({"n_threads": -5}, "n_threads must be 0 to 512"),
        ({"n_threads": 513}, "n_threads must be 0 to 512, not 513"),  # llama.cpp crashes on many thousands
        ({"n_parallel": True}, "n_parallel must be"),
        ({"n_parallel": "x"}, "n_parallel must be"),
        ({"n_gpu_layers": True}, "n_gpu_layers must be an integer"),
        ({"n_gpu_layers": {"large": 1.5}}, "n_gpu_layers of large must be an integer"),
        ({"main_gpu": "x"}, "main_gpu must be"),
        ({"tensor_split": "3,1"}, "tensor_split must be shares"),
        ({"tensor_split": [True]}, "tensor_split must be shares"),
    ],
)
def test_what_cannot_be_loaded_so_is_told(tiny: Path, loading: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        FusedLlama.from_family(tiny, **loading)


def test_loading_takes_whole_numbers_however_they_are_written(tiny: Path) -> None:
    given = {"n_ctx": np.int64(64), "n_threads": 1.0, "n_gpu_layers": np.int64(0), "n_parallel": 2.0}
    with FusedLlama.from_family(tiny, **given) as llm:
        assert (llm.n_ctx, llm.driver.n_parallel) == (64, 2)


@pytest.mark.parametrize("family", [None, 5, b"tiny", [], object()], ids=repr)
def test_a_family_is_a_path_or_a_name(family: Any) -> None:
    with pytest.raises(InvalidParameterError, match="a path must be text"):
        FusedLlama.from_family(family)


@pytest.mark.parametrize("files", [(5, "b", {}), (b"a", "b", {}), ("a", "b", None), ("a", "b", ["c"])], ids=repr)
def test_files_are_paths_and_experts_have_names(files: Any) -> None:
    with pytest.raises(EdgeDLFError):
        FusedLlama(*files)


@pytest.mark.parametrize("name", ["mirostat_mode", "suffix", "tfs_z", "temprature"])
def test_an_unknown_argument_is_named(tiny_llm: FusedLlama, name: str) -> None:
    with pytest.raises(TypeError, match=f"create_completion.*{name!r}"):
        tiny_llm.create_completion(PROMPT, **{name: 1})
    with pytest.raises(TypeError, match=f"create_chat_completion.*{name!r}"):
        tiny_llm.create_chat_completion([{"role": "user", "content": "Hi"}], **{name: 1})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be 1 or more, not 0"),
        ({"stop": [""]}, "stop string"),
        ({"method": "poetry"}, "method must be one of .*, not 'poetry'"),
        ({"temperature": -1.0}, "temperature"),
        ({"logit_bias": {10**6: 1.0}}, "no token 1000000"),
        ({"prompts": {"poetry": "x"}}, "prompts names 'poetry'"),
        ({"seed": -2}, "seed"),
        ({"max_tokens": True}, "max_tokens must be an integer, not True"),
        ({"max_tokens": 2.5}, "max_tokens must be an integer"),
        ({"max_tokens": "5"}, "max_tokens must be an integer"),
        ({"logprobs": True}, "logprobs must be an integer, not True"),
        ({"logprobs": "1"}, "logprobs must be an integer"),
        ({"stop": 5}, "stop must be text"),
        ({"stop": b"x"}, "stop must be text"),
        ({"stop": {"a": 1}}, "stop must be text"),
        ({"logit_bias": {5.5: 1.0}}, "logit_bias must map token ids"),
        ({"logit_bias": {True: 1.0}}, "logit_bias must map token ids"),
        ({"logit_bias": {5: True}}, "logit_bias of 5 must be a finite number"),
        ({"logit_bias": {"a": 1}}, "logit_bias must map token ids"),
        ({"logit_bias": "x"}, "logit_bias must map token ids"),
        ({"prompts": "x"}, "prompts must map members to prompts"),
        ({"prompts": {"large": b"x"}}, "tokens must be a list of ids, not b'x'"),
        ({"stream": 1}, "stream must be true or false"),
        ({"trace": "yes"}, "trace must be true or false"),
        ({"draft": 2.5}, "draft must be"),
    ],
)
def test_values_that_cannot_be(tiny_llm: FusedLlama, settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        tiny_llm.create_completion(PROMPT, **settings)


@pytest.mark.parametrize(
    "name",
    [
        "grammar", "json_schema", "logit_bias", "logprobs", "profile", "prompts", "response_format", "stop", "think",
        "chat_template_kwargs", "parallel_tool_calls", "stream", "tool_choice", "tools", "top_logprobs", "weights",
    ],
)  # fmt: skip
def test_an_array_that_is_neither_true_nor_false_is_an_error_of_this_library(tiny_llm: FusedLlama, name: str) -> None:
    with pytest.raises(InvalidParameterError):
        tiny_llm.create_chat_completion([{"role": "user", "content": "Hi"}], **{name: np.array([1, 2])})


@pytest.mark.parametrize(
    "prompt",
    [None, 5, b"abc", bytearray(b"abc"), [1.0], [1.5], [True], ["a"], [None], [[1]], {}, {"a": 1}, {1, 2}, object(),
     [-1], [2**70], np.array([1.0]), np.array([[1]]), np.int32(3)],
    ids=repr,
)  # fmt: skip
def test_a_prompt_is_text_or_ids_that_exist(tiny_llm: FusedLlama, prompt: Any) -> None:
    with pytest.raises(InvalidParameterError):
        tiny_llm.create_completion(prompt, max_tokens=1)
    if not isinstance(prompt, str):
        with pytest.raises(InvalidParameterError):
            tiny_llm.detokenize(prompt)
    with pytest.raises(InvalidParameterError):
        next(iter(tiny_llm.score([("a", prompt)])))


@pytest.mark.parametrize("ids", [(40, 41), range(40, 42), np.array([40, 41]), np.array([40, 41], np.uint8)], ids=repr)
def test_ids_may_come_in_any_sequence(tiny_llm: FusedLlama, ids: Any) -> None:
    assert text(tiny_llm.create_completion(ids, max_tokens=4)) == text(
        tiny_llm.create_completion([40, 41], max_tokens=4)
    )
    assert tiny_llm.detokenize(ids) == tiny_llm.detokenize([40, 41])


@pytest.mark.parametrize("wrong", [None, 5, b"abc", ["a"], True], ids=repr)
def test_what_is_no_text_and_no_messages_is_refused(tiny_llm: FusedLlama, wrong: Any) -> None:
    for use in (tiny_llm.tokenize, tiny_llm.tokenize_answer, tiny_llm.apply_chat_template):
        with pytest.raises(InvalidParameterError):
            use(wrong)
    with pytest.raises(InvalidParameterError):
        tiny_llm.create_chat_completion(wrong)


@pytest.mark.parametrize(
    "wrong", [[], {}, "hi", [5], [{}], [{"role": 5, "content": "x"}], [{"content": "x"}]], ids=repr
)
def test_messages_are_one_message_or_more(tiny_llm: FusedLlama, wrong: Any) -> None:
    with pytest.raises(InvalidParameterError):
        tiny_llm.create_chat_completion(wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"logprobs": 5}, "logprobs must be true or false"),
        ({"logprobs": True, "top_logprobs": True}, "top_logprobs must be an integer"),
        ({"logprobs": True, "top_logprobs": "3"}, "top_logprobs must be an integer"),
        ({"prompts": 5}, "prompts must map members"),
        ({"prompts": {"large": 5}}, "messages must be a list"),
        ({"response_format": 5}, "response_format must be an object"),
    ],
)
def test_values_of_a_chat_that_cannot_be(tiny_llm: FusedLlama, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        tiny_llm.create_chat_completion([{"role": "user", "content": "Hi"}], **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": -1},
        {"max_tokens": None},
        {"max_tokens": 1000.0},
        {"seed": -1, "temperature": 0},
        {"temperature": None, "top_p": None, "method": None, "search": None},
        {"top_k": -1, "top_p": 0},
        {"draft": np.int64(2), "logprobs": None, "stop": None, "prompts": None},
        {"stop": []},
    ],
    ids=repr,
)
def test_values_that_ask_for_nothing_are_taken(tiny_llm: FusedLlama, settings: dict[str, Any]) -> None:
    stop = {"stop": ["e"]} if "stop" not in settings else {}
    asked = tiny_llm.create_completion(PROMPT, **{**stop, **settings})
    assert text(asked) == text(tiny_llm.create_completion(PROMPT, **stop))


@pytest.mark.parametrize(
    "pairs", [None, 5, "ab", {}, [5], [("a",)], [("a", [1], 2)], [(5, [1])], [("a", "b")]], ids=repr
)
def test_what_is_no_pair_cannot_be_scored(tiny_llm: FusedLlama, pairs: Any) -> None:
    with pytest.raises(InvalidParameterError):
        list(tiny_llm.score(pairs))


def test_prompts_as_tokens(tiny_llm: FusedLlama) -> None:
    tokens = tiny_llm.tokenize(PROMPT)
    assert text(tiny_llm.create_completion(tokens, max_tokens=8)) == text(
        tiny_llm.create_completion(PROMPT, max_tokens=8)
    )
    with pytest.raises(InvalidParameterError, match="no token -1"):
        tiny_llm.create_completion([-1])


def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(tiny_llm: FusedLlama) -> None:
    with pytest.raises(ContextOverflowError, match="300 tokens.*the context of 256"):
        tiny_llm.create_completion([40] * 300)
    with pytest.raises(ContextOverflowError, match="256 tokens and the answer at least 1: together 257, more than"):
        tiny_llm.create_completion([40] * 256, max_tokens=1)


def test_an_answer_s_length_is_cut_to_what_the_context_leaves(tiny_llm: FusedLlama) -> None:
    unending = {"logit_bias": dict.fromkeys(tiny_llm.tokenize("<|im_end|><|endoftext|>"), -100.0)}
    for max_tokens in (6, 57, 10**9):
        result = tiny_llm.create_completion([40] * 200, max_tokens=max_tokens, **unending)
        assert result["choices"][0]["finish_reason"] == "length"
        assert result["usage"]["completion_tokens"] == min(max_tokens, 56)


def test_an_answer_may_fill_the_context_to_the_last_position(tiny_llm: FusedLlama) -> None:
    result = tiny_llm.create_completion([40] * 250, logit_bias=dict.fromkeys(tiny_llm.tokenize("<|im_end|>"), -100.0))
    assert result["choices"][0]["finish_reason"] == "length"
    assert result["usage"]["total_tokens"] == 256


def test_an_empty_prompt_is_the_token_that_begins_a_text(tiny_llm: FusedLlama) -> None:
    assert tiny_llm.create_completion("", max_tokens=1)["usage"]["prompt_tokens"] == 1


def test_text_that_is_not_unicode(tiny_llm: FusedLlama) -> None:
    for prompt in (b"caf\xe9 \xff".decode("utf-8", "surrogateescape"), "half \ud83d a pair"):
        assert tiny_llm.create_completion(prompt, max_tokens=2)["usage"]["prompt_tokens"] > 2


def test_the_public_functions_agree_with_a_step(tiny_llm: FusedLlama) -> None:
    """`search_alpha` and `fuse_logits` on the members' rows give what the engine reports for the same step."""
    (token,) = tiny_llm.stream(PROMPT, max_tokens=1, top_logprobs=1)
    members = tiny_llm._ensemble.members
    rows = [members[name].logits()[0, : tiny_llm.n_vocab] for name in ("large", "base", "lora", "tuned")]
    choice = search_alpha(rows[0], rows[1], rows[2:], FusionParams())
    assert tiny_llm.experts[choice.expert] == token.expert
    assert choice.alpha == token.alpha
    fused = fuse_logits(rows[0], rows[1], rows[2:], [choice.alpha * (t == choice.expert) for t in range(2)])
    assert int(fused.argmax()) == token.id


def test_a_newer_request_ends_an_older_one(tiny_llm: FusedLlama) -> None:
    older = tiny_llm.stream(PROMPT, max_tokens=20)
    next(older)
    tiny_llm.create_completion("Other", max_tokens=2)
    with pytest.raises(EdgeDLFError, match="newer request"):
        list(older)


def test_after_close_nothing_crashes(tiny: Path) -> None:
    llm = FusedLlama.from_family(tiny, n_ctx=128, n_threads=1)
    stream = llm.stream(PROMPT)
    next(stream)
    llm.close()
    llm.close()
    with pytest.raises(EdgeDLFError, match="close"):
        next(stream)
    for use in (lambda: llm.create_completion(PROMPT), lambda: llm.tokenize("x"), lambda: llm.detokenize([1])):
        with pytest.raises(EdgeDLFError, match="closed"):
            use()


def test_base_and_lora_experts_load_the_base_once(tiny: Path) -> None:
    with FusedLlama(
        tiny / "large.gguf", tiny / "base.gguf", {"lora": tiny / "lora.gguf"}, n_ctx=64, n_threads=1
    ) as llm:
        members = llm._ensemble.members
        assert members["base"].model is members["lora"].model
        assert members["base"].model is not members["large"].model


def test_task_arithmetic(tiny: Path, tmp_path: Path) -> None:
    second = tiny_lora(tmp_path / "second.gguf", seed=9)
    experts = {"sum": [(tiny / "lora.gguf", 0.5), (second, 0.5)], "one": [(tiny / "lora.gguf", 1.0)]}
    with FusedLlama(tiny / "large.gguf", tiny / "base.gguf", experts, n_ctx=64, n_threads=1) as llm:
        texts = {
            method: text(llm.create_completion(PROMPT, max_tokens=16, method=method, temperature=0))
            for method in experts
        }
    assert texts["sum"] != texts["one"]


def test_tokenizers_that_differ_are_refused_by_file_and_token(tiny: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other.gguf", tokens={100: "different"})
    with pytest.raises(VocabMismatchError, match=r"large\.gguf and .*other\.gguf .*token 100 .*'different'"):
        FusedLlama(tiny / "large.gguf", other, {"lora": tiny / "lora.gguf"})
    spm = tiny_model(tmp_path / "spm.gguf", tokenizer="spm")
    with pytest.raises(VocabMismatchError, match="'gpt2'.*'llama'"):
        FusedLlama(tiny / "large.gguf", spm, {"lora": tiny / "lora.gguf"})


def test_more_than_padding_at_the_end_is_refused(tiny: Path, tmp_path: Path) -> None:
    n_vocab = 306 + 5
    extra = tiny_model(tmp_path / "extra.gguf", pad_vocab=5, tokens={})
    raw = extra.read_bytes()
    extra.write_bytes(raw.replace(b"[PAD310]", b"[MYTOOL]").replace(b"\x05\0\0\0" * 5, b"\x01\0\0\0" * 5))
    with pytest.raises(VocabMismatchError, match=rf"extra\.gguf has token {n_vocab - 1}, '\[MYTOOL\]'"):
        FusedLlama(extra, tiny / "base.gguf", {"lora": tiny / "lora.gguf"})


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (("lora", "base", "lora"), FamilyError, "large must be a whole model"),
        (("large", "lora", "lora"), FamilyError, "base must be a whole model"),
        (("large", "base", "missing"), ModelFileError, r"missing\.gguf: no such file"),
    ],
)
def test_files_that_make_no_family(tiny: Path, files: tuple[str, ...], error: type[Exception], message: str) -> None:
    large, base, expert = (tiny / f"{name}.gguf" for name in files)
    with pytest.raises(error, match=message):
        FusedLlama(large, base, {"expert": expert})


def test_layers_are_given_to_members_that_exist(tiny: Path) -> None:
    with FusedLlama.from_family(tiny, n_ctx=64, n_gpu_layers={"large": 0}, n_threads=1):
        pass
    with pytest.raises(InvalidParameterError, match="'poetry'"):
        FusedLlama.from_family(tiny, n_gpu_layers={"poetry": 1})
    with pytest.raises(InvalidParameterError, match="'lora', a LoRA"):
        FusedLlama.from_family(tiny, n_gpu_layers={"lora": 1})


@pytest.mark.parametrize("settings", [{"n_gpu_layers": 4}, {"main_gpu": 1}, {"tensor_split": [3, 1]}])
def test_a_gpu_that_is_asked_for_and_is_not_here(
    tiny: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(members, "gpus", lambda: [])
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1, **settings) as llm:
        assert len(list(llm.stream("a", max_tokens=2))) == 2
    said = [record.message for record in caplog.records if "GPU" in record.message]
    assert said == ["there is no GPU that this build of llama.cpp can use: everything runs on the CPU"]


def test_a_context_of_none_is_no_longer_than_the_large_model_was_trained_for(tiny: Path) -> None:
    with FusedLlama.from_family(tiny, n_ctx=None, n_threads=1) as llm:
        assert llm.n_ctx == 512


def test_threads_get_answers_or_are_told_that_a_newer_request_came(tiny_llm: FusedLlama) -> None:
    def ask(n: int) -> str:
        try:
            tiny_llm.create_completion(f"Number {n}", max_tokens=12)
        except EdgeDLFError as error:
            return str(error)
        return "answered"

    with ThreadPoolExecutor(4) as pool:
        outcomes = set(pool.map(ask, range(60)))
    assert outcomes <= {"answered", "this answer was ended by a newer request, or by close()"}
    assert text(tiny_llm.create_completion("The cat", max_tokens=5))


def test_a_forked_child_is_told_that_its_models_are_the_parents(tiny_llm: FusedLlama) -> None:
    child = os.fork()
    if child == 0:
        try:
            tiny_llm.create_completion("The cat", max_tokens=5)
        except EdgeDLFError as error:
            os._exit(7 if "loaded in the parent" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_nothing_can_be_asked_of_a_closed_family(tiny: Path) -> None:
    llm = FusedLlama.from_family(tiny, n_ctx=64, n_threads=1)
    stream = llm.stream("The cat", max_tokens=9)
    next(stream)
    llm.close()
    for ask in (
        lambda: next(stream),
        lambda: llm.stream("a"),
        lambda: llm.chat_template,
        lambda: llm.tokenize("a"),
        lambda: list(llm.score([("a", [1])])),
        lambda: list(llm.batch(["a"])),
    ):
        with pytest.raises(EdgeDLFError, match="closed|close\\(\\)"):
            ask()
