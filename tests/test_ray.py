"""Batches by Ray: everything comes back once, whatever dies. Runs where the extra `ray` is installed."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edge_dlf import (
    EdgeDLFError,
    FusedLlama,
    InvalidParameterError,
    LoadError,
    ModelFileError,
    RequestInterruptedError,
)

pytest.importorskip("ray", reason="the extra `ray` is not installed")

from edge_dlf.answers.batch import LATER
from edge_dlf.batch.ray import N_SHARES, RayLlama

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),  # Ray leaves its own logs open
]
N_PARALLEL = 8
N_ROWS = N_PARALLEL // (N_SHARES // 2)  # of a share


class ScriptedLlama:
    """Echoes prompts, `n_parallel` at a time. "once" kills the process unless the file of that name is there; "always"
    kills it; "wait" never ends; "broken" ends the batch."""

    def __init__(self, folder: Path, **_: Any) -> None:
        self._folder = folder

    def batch(self, requests: Iterable[Any], **settings: Any) -> Iterator[dict[str, Any]]:
        for request in requests:
            if request is LATER:
                continue
            prompt = request["prompt"]
            if prompt == "always" or (prompt == "once" and not (self._folder / "once").exists()):
                (self._folder / "once").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if prompt == "wait":
                threading.Event().wait()
            if prompt == "broken":
                raise ZeroDivisionError("no such thing")
            yield {"custom_id": request["id"], "error": None, "response": f"{prompt} {settings['max_tokens']}"}


def no_file(**_: Any) -> FusedLlama:
    raise ModelFileError("large.gguf", "no such file")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Ray on this machine, for all the tests here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray leaves its processes to the garbage collector
        with RayLlama(partial(ScriptedLlama, tmp_path_factory.mktemp("ray")), n_threads=1):
            yield
        gc.collect()


@pytest.fixture
def scripted(cluster: None, tmp_path: Path) -> RayLlama:
    return RayLlama(partial(ScriptedLlama, tmp_path), n_threads=1, n_parallel=N_PARALLEL)


def test_rows_are_those_of_one_machine(cluster: None, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One at a time, and nothing in common: so that llama.cpp evaluates batches of the same shapes, whatever runs where.
    requests: list[Any] = [{"id": f"row {n}", "prompt": f"{chr(65 + n)} is the"} for n in range(30)]
    requests[3:3] = ["a prompt alone", 5, {"prompt": "unknown", "extra": 1}, {"id": [1], "prompt": "odd id"}]
    requests[9:9] = [{"custom_id": "chat", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user"}]}}]
    settings = {"max_tokens": 6, "temperature": 0.9, "seed": 7}
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
        alone = list(llm.batch(requests, ordered=True, **settings))
    monkeypatch.chdir(tiny.parent)
    many = RayLlama(partial(FusedLlama.from_family, tiny.name), n_ctx=256, n_threads=1, n_parallel=1)
    together = list(many.batch(requests, ordered=True, **settings))
    assert [_told(result) for result in together] == [_told(result) for result in alone]


def test_what_dies_runs_again_and_what_kills_is_an_error(scripted: RayLlama) -> None:
    prompts = [f"row {n}" for n in range(400)]
    prompts[150] = "once"
    prompts[200] = "always"
    n_pulled = 0
    most_ahead = 0
    results: list[dict[str, Any]] = []

    def requests() -> Iterator[Any]:
        nonlocal n_pulled, most_ahead
        for n, prompt in enumerate(prompts):
            n_pulled += 1
            most_ahead = max(most_ahead, n_pulled - len(results))
            yield {"id": n, "prompt": prompt}

    for result in scripted.batch(requests(), max_tokens=3):
        results.append(result)
    assert Counter(result["custom_id"] for result in results) == Counter(map(str, range(400)))
    died = {int(result["custom_id"]) for result in results if result["error"]}
    assert 200 in died <= {200 // N_ROWS * N_ROWS + n for n in range(N_ROWS)}
    assert {result["error"]["code"] for result in results if result["error"]} == {"worker_died"}
    assert {result["response"] for result in results if not result["error"]} == {
        f"{prompt} 3" for n, prompt in enumerate(prompts) if n not in died
    }
    assert most_ahead <= 2 * N_SHARES * N_ROWS * scripted.n_actors


def test_an_error_of_the_batch_itself_is_raised_with_the_machine(scripted: RayLlama) -> None:
    with pytest.raises(EdgeDLFError, match=f"^{socket.gethostname()}: ZeroDivisionError: no such thing$"):
        list(scripted.batch(["fine", "broken"], max_tokens=3))


def test_a_family_that_does_not_load_is_a_load_error(cluster: None) -> None:
    with pytest.raises(LoadError, match=r": large\.gguf: no such file$"):
        list(RayLlama(no_file, n_threads=1).batch(["row"]))


def test_interrupting(scripted: RayLlama) -> None:
    requests = ["row"] * N_ROWS + ["wait"] * 100
    batch = scripted.batch(requests, max_tokens=3)
    assert next(batch)["custom_id"] == "1"
    threading.Thread(target=scripted.interrupt).start()
    with pytest.raises(RequestInterruptedError):
        list(batch)


def test_more_cores_than_a_machine_has(cluster: None) -> None:
    with pytest.raises(InvalidParameterError, match="no machine of the cluster has 100000 cores"):
        RayLlama(no_file, n_threads=100_000)


def _told(result: dict[str, Any]) -> tuple[Any, ...]:
    answer = result["response"] and result["response"]["body"]["choices"][0]
    return result["id"], result["custom_id"], answer, result["error"]
