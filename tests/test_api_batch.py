"""`FusedLlama.batch`: as many single requests, whatever shares a step with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_dlf import EdgeDLFError, FusedLlama, InvalidParameterError, RequestInterruptedError
from edge_dlf.answers.batch import LATER, row_seed

PROMPTS = [f"{head} {n} is" for n in range(8) for head in ("The number", "Nobody knows why", "1 + 1 and")]
CHAT = [{"role": "user", "content": "Hello"}]


def load(tiny: Path, **settings: Any) -> FusedLlama:
    return FusedLlama.from_family(tiny, **{"n_ctx": 256, "n_threads": 1, **settings})


@pytest.fixture(scope="module", params=[False, True], ids=["one cache", "streams"])
def llm(tiny: Path, request: pytest.FixtureRequest) -> Iterator[FusedLlama]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param:
            patch.setattr("edge_dlf.families.members._STREAMS_WEIGHTS", 0)
        with load(tiny, n_parallel=6) as llm:
            assert llm._ensemble.has_streams == request.param
            yield llm


@pytest.mark.parametrize(
    ("settings", "moved"),
    [({"n_parallel": 1}, 2**27), ({"n_ctx": 200}, 2**27), ({"n_ctx": 2048}, 2**27), ({}, 2**10)],
    ids=["one sequence", "no multiple of 256", "room that is shared", "much to move"],
)
def test_where_sequences_share_one_cache(
    tiny: Path, settings: dict[str, int], moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_dlf.families.members._STREAMS_WEIGHTS", 0)
    monkeypatch.setattr("edge_dlf.families.members._MOVED_BYTES", moved)
    with load(tiny, **{"n_parallel": 6, **settings}) as llm:
        assert not llm._ensemble.has_streams


def test_sequences_with_a_cache_of_their_own_attend_plainly(one: FusedLlama, llm: FusedLlama) -> None:
    assert None not in {member.n_ubatch for member in one._members.backends.values()}
    kinds = {member.n_ubatch for member in llm._members.backends.values()}
    assert (None in kinds) is not llm._ensemble.has_streams


@pytest.fixture(scope="module")
def one(tiny: Path) -> Iterator[FusedLlama]:
    with load(tiny) as llm:
        yield llm


def texts(results: Iterator[dict[str, Any]]) -> dict[str, Any]:
    return {result["custom_id"]: result["response"]["body"]["choices"][0] for result in results}


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}, {"temperature": 0.0, "repeat_penalty": 1.3}], ids=str)
def test_a_batch_equals_single_requests(one: FusedLlama, llm: FusedLlama, sampling: dict[str, float]) -> None:
    requests = [{"id": n, "prompt": prompt, "max_tokens": 3 + 5 * n % 17} for n, prompt in enumerate(PROMPTS)]
    choices = texts(llm.batch(requests, seed=3, **sampling))
    n_same = 0
    for request in requests:
        single = one.create_completion(
            request["prompt"], max_tokens=request["max_tokens"], seed=row_seed(3, str(request["id"])), **sampling
        )
        n_same += choices[str(request["id"])] == single["choices"][0]
    assert n_same >= 22  # of 24: llama.cpp rounds by the shape of a batch, and two choices may tie within that


def test_messages_equal_a_single_chat(one: FusedLlama, llm: FusedLlama) -> None:
    (result,) = llm.batch([{"messages": CHAT, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}], draft="off")
    single = one.create_chat_completion(CHAT, max_tokens=6, logprobs=True, top_logprobs=2, draft="off")
    body = result["response"]["body"]
    ((choice,), (expected,)) = body["choices"], single["choices"]
    (found, wanted) = (each.pop("logprobs")["content"] for each in (choice, expected))
    assert choice == expected
    for token, other in zip(found, wanted, strict=True):  # attention differs, and so does what it rounds
        tops = [entry["logprob"] for entry in token.pop("top_logprobs")]
        assert tops == pytest.approx([entry["logprob"] for entry in other.pop("top_logprobs")], abs=0.05)
        assert token.pop("logprob") == pytest.approx(other.pop("logprob"), abs=0.05)
        assert token == other
    assert body["object"] == "chat.completion"
    assert body["usage"] == single["usage"]
    assert set(body["edge_dlf"]) == set(single["edge_dlf"])
    assert body["edge_dlf"]["generation_tps"] > 0


def test_a_prompt_is_raw_or_a_users_message(one: FusedLlama, llm: FusedLlama) -> None:
    line = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Hello"}}
    raw, chat, always_raw = (
        texts(llm.batch([request], raw=raw, max_tokens=4)).popitem()[1]["text"]
        for request, raw in ((line["body"], True), (line["body"], False), (line, False))
    )
    assert raw == always_raw == one.create_completion("Hello", max_tokens=4)["choices"][0]["text"]
    message = one.create_chat_completion(CHAT, max_tokens=4)["choices"][0]["message"]["content"]
    assert chat == message != raw


def test_a_system_message_comes_before_messages_without_one(one: FusedLlama, llm: FusedLlama) -> None:
    system = {"role": "system", "content": "Be brief."}
    own = {"role": "system", "content": "Be long."}
    requests = [{"messages": CHAT}, {"messages": [own, *CHAT]}, {"prompt": "Hello"}]
    bodies = [result["response"]["body"] for result in llm.batch(requests, system="Be brief.", raw=False, max_tokens=2)]
    expected = [len(one.apply_chat_template([first, *CHAT])) for first in (system, own, system)]
    assert sorted(body["usage"]["prompt_tokens"] for body in bodies) == sorted(expected)


def test_rows_override_what_holds_for_all_and_methods_mix(one: FusedLlama, llm: FusedLlama) -> None:
    methods = ["dynamic", "static", "large", "base", "lora", "tuned"]
    requests = [{"id": m, "prompt": "The", "edge_dlf": {"method": m}} for m in methods]
    weighted = {"method": "weighted", "weights": {"large": 0.6, "tuned": 0.5}}
    requests.append({"id": "weighted", "prompt": "The", "edge_dlf": weighted})
    choices = texts(llm.batch([*requests, {"id": "short", "prompt": "The", "max_tokens": 1}], max_tokens=8, alpha=0.5))
    for method in methods:
        single = one.create_completion("The", max_tokens=8, method=method, alpha=0.5)
        assert choices[method] == single["choices"][0]
    assert choices["weighted"] == one.create_completion("The", max_tokens=8, **weighted)["choices"][0]
    assert choices["short"]["finish_reason"] == "length"


def test_results_come_as_they_are_done_or_in_order(llm: FusedLlama) -> None:
    requests = [{"id": n, "prompt": "The", "max_tokens": 40 if n == 0 else 1} for n in range(60)]
    done = [result["custom_id"] for result in llm.batch(requests)]
    assert sorted(done, key=int) == [str(n) for n in range(60)]
    assert done[0] != "0"
    assert [result["custom_id"] for result in llm.batch(requests, ordered=True)] == [str(n) for n in range(60)]


def test_a_request_that_cannot_be_answered_ends_no_other(llm: FusedLlama) -> None:
    requests = [
        "The",
        {"prompt": "x" * 2000},
        {"prompt": "x", "temperature": -1},
        {"prompt": "x", "max_tokens": 300.5},
        {"prompt": "x", "edge_dlf": {"method": "poetry"}},
        {"prompt": "x", "logprobs": -1},
        {"prompt": [10**9]},
        {"messages": [{"role": "user"}]},
        7,
        {"id": "last", "prompt": "The"},
    ]
    results = {result["custom_id"]: result for result in llm.batch(requests, max_tokens=3)}
    assert results["1"]["response"]["body"]["choices"] == results["last"]["response"]["body"]["choices"]
    errors = {n: results[str(n)]["error"] for n in range(2, 10)}
    assert all(results[str(n)]["response"] is None for n in errors)
    assert [error["code"] for error in errors.values()] == [
        "context_length_exceeded",
        *["invalid_request"] * 7,
    ]
    assert "poetry" in errors[5]["message"]


def test_a_nan_is_its_rows_error(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with load(tiny, n_parallel=3) as llm:
        base = llm._ensemble.members["base"]
        logits = base.logits

        def broken() -> Any:
            rows = logits()
            rows[1 % len(rows), 5] = float("nan")
            return rows

        monkeypatch.setattr(base, "logits", broken)
        results = {result["custom_id"]: result for result in llm.batch(["a", "b", "c"], max_tokens=2)}
    assert {n: result["error"] for n, result in results.items()} == {
        "1": None,
        "2": {"code": "non_finite_logits", "message": "base returned NaN in its logits"},
        "3": results["3"]["error"],
    }


def test_requests_are_pulled_as_there_is_room(llm: FusedLlama) -> None:
    pulled = 0

    def requests() -> Iterator[str]:
        nonlocal pulled
        while pulled < 1000:
            pulled += 1
            yield "The"

    results = llm.batch(requests(), max_tokens=2)
    next(results)
    assert pulled <= 2 * 6 + 1
    results.close()  # type: ignore[attr-defined]
    assert llm.create_completion("The", max_tokens=2)["usage"]["completion_tokens"] == 2


def test_requests_may_come_later(llm: FusedLlama) -> None:
    done: list[str] = []

    def requests() -> Iterator[Any]:
        yield {"id": "long", "prompt": "The", "max_tokens": 30}
        yield {"id": "short", "prompt": "The", "max_tokens": 1}
        while not done:
            yield LATER
        yield {"id": "late", "prompt": "The", "max_tokens": 1}

    for result in llm.batch(requests()):
        done.append(result["custom_id"])
    assert done == ["short", "late", "long"]


def test_settings_that_concern_all_rows_are_refused_at_once(llm: FusedLlama) -> None:
    with pytest.raises(InvalidParameterError, match="temperature"):
        llm.batch(["a"], temperature=-1)
    with pytest.raises(TypeError, match="batch.*beams"):
        llm.batch(["a"], beams=4)


def test_a_newer_request_ends_a_batch_and_a_batch_ends_an_older_one(llm: FusedLlama) -> None:
    older = llm.stream("The", max_tokens=20)
    next(older)
    results = llm.batch(["a"] * 20, max_tokens=2)
    with pytest.raises(EdgeDLFError, match="newer request"):
        next(older)
    next(results)
    llm.create_completion("The", max_tokens=1)
    with pytest.raises(EdgeDLFError, match="newer request"):
        list(results)


def test_an_interrupted_batch_leaves_a_model_that_works(llm: FusedLlama) -> None:
    results = llm.batch(PROMPTS, max_tokens=30)
    next(results)
    llm.interrupt()
    with pytest.raises(RequestInterruptedError):
        list(results)
    assert len(list(llm.batch(PROMPTS[:7], max_tokens=2))) == 7


def test_one_at_a_time_drafts(one: FusedLlama) -> None:
    requests = [{"id": n, "prompt": "la la la la la la", "max_tokens": 20} for n in range(3)]
    bodies = [result["response"]["body"] for result in one.batch(requests, draft=2)]
    plain = [result["response"]["body"] for result in one.batch(requests)]
    assert [body["choices"] for body in bodies] == [body["choices"] for body in plain]
    assert all(body["edge_dlf"]["n_drafted"] > 0 for body in bodies)


@pytest.mark.parametrize("n_parallel", [0, 257, "many", True, 1.5])
def test_a_number_of_requests_that_cannot_be(tiny: Path, n_parallel: Any) -> None:
    with pytest.raises(InvalidParameterError, match="n_parallel must be auto or 1 to 256"):
        load(tiny, n_parallel=n_parallel)


def test_auto_takes_several(tiny: Path) -> None:
    with load(tiny, n_parallel="auto") as llm:
        assert llm._ensemble.n_seq_max >= 4
        assert len(list(llm.batch(PROMPTS, max_tokens=3))) == len(PROMPTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_tokens": True}, "max_tokens must be an integer"),
        ({"seed": "x"}, "seed must be an integer"),
        ({"stop": 5}, "stop must be text"),
        ({"draft": "x"}, "draft must be"),
        ({"method": "poetry"}, "method must be one of dynamic, .*, not 'poetry'"),
        ({"method": "weighted"}, "needs weights"),
        ({"grammar": "root = x"}, "grammar"),
    ],
)
def test_what_concerns_every_request_is_raised(llm: FusedLlama, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        llm.batch(["The"], **settings)


@pytest.mark.parametrize("requests", [None, 5, "ab", b"ab", {"prompt": "x"}], ids=repr)
def test_requests_are_several(llm: FusedLlama, requests: Any) -> None:
    with pytest.raises(InvalidParameterError, match="requests must be a list"):
        llm.batch(requests)


def test_rows_as_pandas_and_numpy_write_them(llm: FusedLlama, caplog: pytest.LogCaptureFixture) -> None:
    plain, table, array = llm.batch(
        [
            {"id": "1", "prompt": [40, 41], "max_tokens": 3},
            {
                "id": 2.0,
                "prompt": [40, 41],
                "max_tokens": 3.0,
                "top_k": 40.0,
                "seed": -1.0,
                "answer": "x",
                "topic": None,
            },
            {"id": np.int64(3), "prompt": np.array([40, 41]), "max_tokens": np.int64(3), "answer": "y"},
        ],
        ordered=True,
    )
    assert [plain["custom_id"], table["custom_id"], array["custom_id"]] == ["1", "2", "3"]
    texts = {row["response"]["body"]["choices"][0]["text"] for row in (plain, table, array)}
    assert len(texts) == 1
    assert caplog.text.count("no request uses these columns: answer, topic") == 1
