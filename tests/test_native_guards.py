"""No call from Python ends the process: after close(), from many threads, in a forked child, from a signal handler.

`python -m tests.test_native_guards 60` asks, forks and closes from four threads for a minute.
"""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_dlf import EdgeDLFError, FusedLlama, RequestInterruptedError

from .tiny import tiny_family

MESSAGES = [{"role": "user", "content": "hello"}]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")


@pytest.fixture
def llm(tiny: Path) -> Iterator[FusedLlama]:
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=2) as llm:
        yield llm


CALLS: dict[str, Callable[[FusedLlama], Any]] = {
    "tokenize": lambda llm: llm.tokenize("hello"),
    "detokenize": lambda llm: llm.detokenize([104, 5]),
    "answer": lambda llm: llm.tokenize_answer("hello"),
    "template": lambda llm: llm.apply_chat_template(MESSAGES),
    "completion": lambda llm: llm.create_completion("hello", max_tokens=2),
    "chat": lambda llm: llm.create_chat_completion(MESSAGES, max_tokens=2),
    "stream": lambda llm: list(llm.stream("hello", max_tokens=2)),
    "batch": lambda llm: list(llm.batch(["hello"], max_tokens=2)),
    "score": lambda llm: list(llm.score([("hello", [104, 5])])),
    "grammar": lambda llm: llm.create_completion("hello", max_tokens=2, grammar='root ::= "a"'),
    "schema": lambda llm: llm.create_completion("hello", max_tokens=2, json_schema={"enum": [1]}),
    "context": lambda llm: llm.n_ctx,
    "vocabulary": lambda llm: llm.n_vocab,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_after_close_is_an_error(llm: FusedLlama, name: str) -> None:
    CALLS[name](llm)
    llm.close()
    llm.close()
    if name in ("context", "vocabulary"):
        CALLS[name](llm)
    else:
        with pytest.raises(EdgeDLFError, match="closed"):
            CALLS[name](llm)


@pytest.mark.parametrize(
    "make",
    [
        lambda llm: llm.stream("hello"),
        lambda llm: llm.create_completion("hello", stream=True, logprobs=3),
        lambda llm: llm.create_chat_completion(MESSAGES, stream=True, logprobs=True, top_logprobs=5),
        lambda llm: llm.batch(["hello", "you"] * 3, max_tokens=20),
        lambda llm: llm.score([("hello", [104, 5])] * 8),
        lambda llm: llm.stream("hello", grammar='root ::= "a"+'),
    ],
)
def test_what_is_kept_after_close_is_an_error(llm: FusedLlama, make: Callable[[FusedLlama], Iterator[Any]]) -> None:
    kept = make(llm)
    assert next(kept)
    llm.close()
    with pytest.raises(EdgeDLFError, match=r"close\(\)|closed"):
        list(kept)
    getattr(kept, "close", lambda: None)()
    del kept
    gc.collect()


def test_an_iterator_that_was_not_begun_before_close(llm: FusedLlama) -> None:
    chunks, results = llm.create_completion("hello", stream=True), llm.batch(["hello"])
    llm.close()
    for kept in (chunks, results):
        with pytest.raises(EdgeDLFError, match="close"):
            next(kept)  # type: ignore[call-overload]


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_can_be_neither_pickled_nor_copied(llm: FusedLlama, how: Callable[[object], object]) -> None:
    with pytest.raises(TypeError, match="neither pickled nor copied; load the family in each process"):
        how(llm)
    with pytest.raises((TypeError, pickle.PicklingError), match="pickle"):
        pickle.dumps(llm.stream("hello"))


class TestOneThread:
    def test_a_generator_of_requests_may_ask_too(self, llm: FusedLlama) -> None:
        def requests() -> Iterator[str]:
            yield "hello"
            assert llm.tokenize("hello")
            assert llm.apply_chat_template(MESSAGES)
            yield "you"

        assert len(list(llm.batch(requests(), max_tokens=2))) == 2

    def test_one_that_begins_another_request_ends_its_batch(self, llm: FusedLlama) -> None:
        def requests() -> Iterator[str]:
            yield "hello"
            llm.create_completion("you", max_tokens=2)
            yield "again"

        with pytest.raises(EdgeDLFError, match="ended by a newer request"):
            list(llm.batch(requests(), max_tokens=9))
        assert llm.create_completion("hello", max_tokens=2)["choices"]

    def test_one_that_closes_it_ends_its_batch(self, llm: FusedLlama) -> None:
        def requests() -> Iterator[str]:
            yield "hello"
            llm.close()
            yield "again"

        with pytest.raises(EdgeDLFError, match="close"):
            list(llm.batch(requests(), max_tokens=9))

    def test_within_a_step_no_request_begins_or_ends(self, llm: FusedLlama) -> None:
        """As from a signal handler, or from a generator that is collected then."""
        stream, caught = llm.stream("hello", max_tokens=4), []

        def amid() -> None:
            for call in (lambda: llm.stream("you"), llm.close):
                with pytest.raises(EdgeDLFError, match="decoding already") as error:
                    call()
                caught.append(error)
            assert llm.tokenize("hello")
            stream.close()

        with pytest.raises(RequestInterruptedError):  # close() has asked the request to stop
            llm.driver.step(on_decode=amid)
        assert len(caught) == 2
        assert (llm.driver.n_active, llm.driver.n_waiting) == (0, 0)


class TestManyThreads:
    def test_one_stream_read_by_two_threads_loses_no_token(self, llm: FusedLlama) -> None:
        expected = [token.id for token in llm.stream("hello", max_tokens=60)]
        stream, got = llm.stream("hello", max_tokens=60), []
        threads = [threading.Thread(target=lambda: got.extend(token.id for token in stream)) for _ in range(3)]
        _run(threads)
        assert sorted(got) == sorted(expected)

    def test_close_ends_what_another_thread_runs(self, llm: FusedLlama) -> None:
        errors: list[str] = []
        begun = threading.Event()

        def ask() -> None:
            try:
                while True:
                    for _ in llm.stream("hello", max_tokens=100):
                        begun.set()
            except EdgeDLFError as error:
                errors.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(2)]
        for thread in threads:
            thread.start()
        begun.wait()
        llm.close()
        for thread in threads:
            thread.join()
        assert len(errors) == 2


@needs_fork
class TestAForkedChild:
    @pytest.mark.parametrize("name", CALLS)
    def test_it_works_or_is_an_error(self, llm: FusedLlama, name: str) -> None:
        CALLS[name](llm)
        said = _in_child(lambda: CALLS[name](llm))
        assert said == ("works" if name in WORKS_IN_A_CHILD else "this family was loaded in the parent of this process")
        CALLS[name](llm)

    def test_forms_of_the_parent_go_on(self, llm: FusedLlama) -> None:
        stream = llm.stream("hello", max_tokens=5, grammar='root ::= "a" "b" "c" "d" "e"')
        assert next(stream).text == "a"
        assert _in_child(llm.close) == "works"
        assert "".join(token.text for token in stream) == "bcde"

    def test_what_it_closes_is_the_parents(self, llm: FusedLlama) -> None:
        stream = llm.stream("hello", max_tokens=5)
        assert next(stream)
        llm.apply_chat_template(MESSAGES)

        def close() -> None:
            stream.close()
            llm.close()
            gc.collect()

        assert _in_child(close) == "works"
        assert len(list(stream)) == 4
        assert llm.apply_chat_template(MESSAGES)

    def test_a_pool_of_processes(self, llm: FusedLlama) -> None:
        llm.apply_chat_template(MESSAGES)
        global _shared
        _shared = llm
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map(_ask_shared, range(8)) == [f"text {n}" for n in range(8)]


WORKS_IN_A_CHILD = ("tokenize", "detokenize", "answer", "template", "context", "vocabulary")
_shared: FusedLlama


def _ask_shared(n: int) -> str:
    text = _shared.detokenize(_shared.apply_chat_template([{"role": "user", "content": f"text {n}"}]))
    return text[text.index("text") : text.index("text") + 6]


def _in_child(call: Callable[[], Any]) -> str:
    """What came of `call` in a forked child: "works", or its error."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        try:
            call()
            said = "works"
        except EdgeDLFError as error:
            said = str(error).partition(";")[0]
        except BaseException as error:
            said = repr(error)
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        said = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return said


EXITS = {
    "open streams": "streams = [llm.stream('hello') for _ in range(3)]; next(streams[-1])",
    "open chunks": "kept = llm.create_completion('hello', stream=True); next(kept)",
    "a batch": "kept = llm.batch(['hello', 'you'] * 9); next(kept)",
    "a grammar": "kept = llm.stream('hello', grammar='root ::= \"a\"+'); next(kept)",
    "a cycle": "kept = [llm.stream('hello')]; kept.append(kept); del llm",
    "only a stream": "kept = llm.stream('hello'); next(kept); del llm; gc.collect(); next(kept)",
    "a thread": "threading.Thread(target=lambda: list(llm.stream('hello')), daemon=True).start()",
    "an error": "kept = llm.stream('hello'); sys.exit(7)",
}


@pytest.mark.parametrize("code", EXITS.values(), ids=EXITS)
def test_the_interpreter_ends_in_order(tiny: Path, code: str) -> None:
    head = "import gc, sys, threading\nfrom edge_dlf import FusedLlama\n"
    load = "llm = FusedLlama.from_family(sys.argv[1], n_ctx=256, n_threads=1)\n"
    done = subprocess.run([sys.executable, "-c", head + load + code, str(tiny)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (7 if "exit" in code else 0, "")


def _run(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def stress(folder: Path, seconds: float, seed: int = 0) -> dict[str, int]:
    """Ask, fork, close and load again from several threads. Returns how often each outcome came; any other fails."""
    counts: dict[str, int] = {}
    failures: list[str] = []
    holder = [FusedLlama.from_family(folder, n_ctx=256, n_threads=1, n_parallel=2)]
    deadline = time.monotonic() + seconds

    def count(what: str) -> None:
        counts[what] = counts.get(what, 0) + 1

    def template(llm: FusedLlama, mark: str) -> None:
        if mark not in llm.detokenize(llm.apply_chat_template([{"role": "user", "content": mark}])):
            raise AssertionError(f"{mark} is not in its prompt")

    def ask(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.monotonic() < deadline and not failures:
            llm, name = holder[0], rng.choice([*CALLS, "prompt", "prompt", "fork", "reload", "abandoned"])
            try:
                if name == "prompt":
                    template(llm, f"thread {number} says {rng.random()}")
                elif name == "fork" and rng.random() < 0.2:
                    said = _in_child(lambda: template(llm, f"child of {number} says {rng.random()}"))  # noqa: B023
                    assert said in ("works", "this model has been closed", "this FusedLlama has been closed"), said
                elif name == "reload" and number == 0 and rng.random() < 0.2:
                    llm.close()
                    holder[0] = FusedLlama.from_family(folder, n_ctx=256, n_threads=1, n_parallel=2)
                elif name == "abandoned":
                    next(llm.create_completion("hello", stream=True))
                elif name in CALLS:
                    CALLS[name](llm)
                count(name)
            except EdgeDLFError as error:
                count(f"error: {str(error)[:60]}")
            except BaseException as error:
                failures.append(f"{name}: {error!r}")

    _run([threading.Thread(target=ask, args=(number,)) for number in range(4)])
    holder[0].close()
    assert not failures, failures
    return counts


@needs_fork
def test_a_few_seconds_of_threads_forks_and_closes(tiny: Path) -> None:
    counts = stress(tiny, 3.0)
    assert counts["prompt"] > 10


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for what, n in sorted(stress(tiny_family(Path(folder)), float(sys.argv[1])).items()):
            print(f"{n:8,}  {what}")
