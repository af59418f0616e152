"""Members that overlap: equal tokens in every mode, nothing running after a call, and a mode chosen by the clock."""

from __future__ import annotations

import _thread
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_dlf import DecodeError, FusedLlama, FusionParams, InvalidParameterError, SamplingParams
from edge_dlf.engine.backend import Run
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.engine.overlap import choose_overlap, fastest
from edge_dlf.engine.scheduler import Scheduler
from edge_dlf.engine.threads import GroupThreads
from edge_dlf.families import members
from edge_dlf.families.plan import Plan
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.params import OVERLAPS, Overlap
from edge_dlf.system.machine import GPU, Machine

from .fake_backend import FakeBackend

N_VOCAB = 50
NAMES = ("large", "base", "e0", "e1")
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    return tmp_path / "cache" / "overlap.json"


GROUPS = [("large",), ("base",), ("e0", "e1")]


def family(overlap: Overlap, make: Callable[..., FakeBackend] = FakeBackend) -> Ensemble:
    """A family with a group for each member but e0 and e1, which share one."""
    backends = {name: make(seed, N_VOCAB) for seed, name in enumerate(NAMES)}
    for backend in backends.values():
        backend.common = 0.8
    ensemble = Ensemble(backends, N_VOCAB, GROUPS, clock=lambda: 0.0)
    ensemble.overlap = overlap
    return ensemble


def answers(ensemble: Ensemble, n: int, n_draft: int | None, n_tokens: int = 8) -> list[list[int]]:
    """Greedy and sampled answers to `n` prompts at once."""
    scheduler = Scheduler(Decoder(ensemble, Fuser(N_VOCAB)))
    fusion = FusionParams()
    jobs = [
        Generation(
            GenerationRequest(
                ensemble.roles(fusion),
                {name: [1 + k, 2, 3, 4 + k] for name in NAMES},
                fusion,
                SamplingParams(temperature=0.7 * (k % 2), seed=k),
                n_draft=n_draft,
            )
        )
        for k in range(n)
    ]
    for job in jobs:
        scheduler.add(job)
    while any(job.n_picked < n_tokens for job in jobs):
        scheduler.step()
    ensemble.close()
    return [list(job.tokens[job.n_prompt :][:n_tokens]) for job in jobs]


@functools.cache
def expected(n: int, n_draft: int | None) -> list[list[int]]:
    return answers(family("off"), n, n_draft)


@pytest.mark.parametrize(("n", "n_draft"), [(1, 0), (1, 4), (1, None), (4, 0)])
def test_tokens_do_not_depend_on_the_way(n: int, n_draft: int | None) -> None:
    runs = {way: (ensemble := family(way), answers(ensemble, n, n_draft)) for way in OVERLAPS}
    plain, tokens = runs["off"]
    for ensemble, same in runs.values():
        assert same == tokens
        for name in NAMES:
            assert ensemble.members[name].calls == plain.members[name].calls  # type: ignore[attr-defined]


class Meeting(FakeBackend):
    """A member that goes on only once all groups are at work; keeps the threads that it is used by."""

    barrier: threading.Barrier | None = None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.threads: list[int] = []
        self.n_waits = 0

    def decode(self, runs: Sequence[Run]) -> None:
        self.threads.append(threading.get_ident())
        if self.barrier and self.seed != 3:
            self.barrier.wait(PATIENCE_S)
        super().decode(runs)

    def wait(self) -> None:
        self.n_waits += 1


def step(ensemble: Ensemble, token: int = 5) -> None:
    ensemble.decode({name: [Run(0, [token], 1)] for name in NAMES})


def test_threads_are_one_for_each_group_and_run_at_the_same_time() -> None:
    ensemble = family("threads", Meeting)
    barrier = threading.Barrier(3)
    for backend in ensemble.members.values():
        backend.barrier = barrier  # type: ignore[attr-defined]
    for token in range(4):
        step(ensemble, token)
    used = [set(ensemble.members[name].threads) for name in NAMES]  # type: ignore[attr-defined]
    assert all(len(threads) == 1 for threads in used)
    assert used[2] == used[3] == {threading.get_ident()}
    assert len(used[0] | used[1] | used[2]) == 3
    ensemble.close()


@pytest.mark.parametrize(("way", "n_waits"), [("off", 1), ("queue", 0)])
def test_other_modes_keep_to_one_thread_and_off_waits_for_each(way: Overlap, n_waits: int) -> None:
    ensemble = family(way, Meeting)
    step(ensemble)
    for backend in ensemble.members.values():
        assert isinstance(backend, Meeting)
        assert backend.threads == [threading.get_ident()]
        assert backend.n_waits == n_waits


def test_members_of_one_group_do_not_overlap() -> None:
    ensemble = Ensemble({name: Meeting(seed, N_VOCAB) for seed, name in enumerate(NAMES)}, N_VOCAB)
    ensemble.overlap = "threads"
    step(ensemble)
    assert {thread for b in ensemble.members.values() for thread in b.threads} == {threading.get_ident()}  # type: ignore[attr-defined]


class Failing(FakeBackend):
    """A member whose next `decode` fails once, before its cache has changed."""

    error: BaseException | None = None

    def decode(self, runs: Sequence[Run]) -> None:
        error, self.error = self.error, None
        if error:
            raise error
        super().decode(runs)


@pytest.mark.parametrize("way", OVERLAPS)
@pytest.mark.parametrize("failing", [("large",), ("e1",), ("base", "e0"), NAMES])
def test_an_error_of_a_member_is_raised_and_the_next_answer_is_right(way: Overlap, failing: tuple[str, ...]) -> None:
    ensemble = family(way, Failing)
    for name in failing:
        ensemble.members[name].error = DecodeError(name)  # type: ignore[attr-defined]
    with pytest.raises(DecodeError) as caught:
        answers(ensemble, 1, 0)
    assert str(caught.value) in failing
    for backend in ensemble.members.values():
        backend.error = None  # type: ignore[attr-defined]
    assert answers(ensemble, 1, 0) == expected(1, 0)


class Slow(FakeBackend):
    """A member that works on while another one is interrupted."""

    interrupted: threading.Event
    is_done = False

    def decode(self, runs: Sequence[Run]) -> None:
        if self.seed == 3:
            super().decode(runs)
            self.interrupted.set()
            raise KeyboardInterrupt
        assert self.interrupted.wait(PATIENCE_S)
        super().decode(runs)
        self.is_done = True


def test_ctrl_c_is_raised_once_nobody_is_at_work() -> None:
    ensemble, event = family("threads", Slow), threading.Event()
    for backend in ensemble.members.values():
        backend.interrupted = event  # type: ignore[attr-defined]
    ensemble.members["e0"] = FakeBackend(2, N_VOCAB)
    with pytest.raises(KeyboardInterrupt):
        step(ensemble)
    assert ensemble.members["large"].is_done  # type: ignore[attr-defined]
    assert ensemble.members["base"].is_done  # type: ignore[attr-defined]
    ensemble.forget([0])
    assert [ensemble.n_held(name, 0) for name in NAMES] == [0, 0, 0, 0]
    ensemble.close()


def test_a_second_ctrl_c_while_others_are_waited_for() -> None:
    threads, failed, done = GroupThreads(), threading.Event(), []

    def work() -> None:
        assert failed.wait(PATIENCE_S)
        _thread.interrupt_main()
        threading.Event().wait(0.05)
        done.append(1)

    def fail() -> None:
        failed.set()
        raise ValueError("the first error")

    with pytest.raises(ValueError, match="the first error"):
        threads.run([work, fail])
    assert done == [1]
    threads.close()


@pytest.mark.parametrize("way", OVERLAPS)
@pytest.mark.parametrize("fail_at", range(6))
def test_an_interrupt_amid_drafts_leaves_nothing_behind(way: Overlap, fail_at: int) -> None:
    ensemble = family(way)
    ensemble.members["e1"].fail_at = fail_at  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        answers(ensemble, 1, 3)
    assert answers(ensemble, 1, 3) == expected(1, 3)


class TimedEnsemble(Ensemble):
    """An ensemble whose steps take so many seconds of its own clock by how members overlap, and nothing else."""

    def __init__(self, **costs: float) -> None:
        backends = {name: FakeBackend(seed, N_VOCAB) for seed, name in enumerate(NAMES)}
        super().__init__(backends, N_VOCAB, GROUPS, clock=lambda: self.now)
        self.now, self.n_steps, self.costs = 0.0, 0, costs

    def decode(self, runs: Mapping[str, Sequence[Run]], on_decode: Callable[[], None] | None = None) -> dict[str, Any]:
        logits = super().decode(runs, on_decode)
        self.n_steps += 1
        self.now += self.costs[self.overlap]
        return logits


@pytest.mark.parametrize(
    ("costs", "best"),
    [
        ({"off": 0.010, "queue": 0.008, "threads": 0.006}, "threads"),
        ({"off": 0.010, "queue": 0.006, "threads": 0.008}, "queue"),
        ({"off": 0.006, "queue": 0.010, "threads": 0.008}, "off"),
        ({"off": 0.010, "queue": 0.0099, "threads": 0.0098}, "off"),
        ({"off": 0.010, "queue": 0.008, "threads": 0.0079}, "queue"),
        ({"off": 0.05, "queue": 0.04, "threads": 0.05}, "queue"),
    ],
)
def test_the_fastest_way_by_the_clock(costs: dict[str, float], best: str) -> None:
    ensemble = TimedEnsemble(**costs)
    assert fastest(ensemble) == best
    assert ensemble.now < 1.0
    assert ensemble.n_free() == ensemble.members["large"].n_cells
    ensemble.close()


def test_only_ways_that_are_allowed_are_tried() -> None:
    ensemble = TimedEnsemble(off=0.02, queue=0.01)
    assert fastest(ensemble, ("off", "queue")) == "queue"


def test_where_a_second_does_not_suffice_nothing_is_chosen(cache: Path) -> None:
    ensemble = TimedEnsemble(off=0.3, queue=0.3, threads=0.1)
    choose_overlap(ensemble, "key")
    assert ensemble.overlap == "queue"
    assert ensemble.n_steps == 3
    assert not cache.exists()
    ensemble.close()


def test_it_is_measured_once(cache: Path) -> None:
    costs = {"off": 0.01, "queue": 0.02, "threads": 0.02}
    for key, n_steps in (("a", 27), ("a", 0), ("b", 27)):
        ensemble = TimedEnsemble(**costs)
        choose_overlap(ensemble, key)
        assert (ensemble.overlap, ensemble.n_steps) == ("off", n_steps)
        ensemble.close()
    assert json.loads(cache.read_bytes()) == {"a": "off", "b": "off"}
    cache.write_text('{"a": "sideways"}')
    ensemble = TimedEnsemble(**costs)
    choose_overlap(ensemble, "a")
    assert ensemble.n_steps == 27
    choose_overlap(ensemble, "a", ("queue", "threads"))  # what was remembered is not allowed now
    assert ensemble.overlap == "queue"
    ensemble.close()


@pytest.fixture
def as_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member but `tuned` is taken to be on a GPU of its own."""
    monkeypatch.setattr(Plan, "on_gpu", frozenset({"large", "base", "lora"}))


@pytest.mark.usefixtures("as_on_gpus")
@pytest.mark.parametrize("draft", ["off", 3])
def test_llama_cpp_gives_the_same_tokens_in_every_way(tiny: Path, draft: Any) -> None:
    found = []
    for overlap in OVERLAPS:
        with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=4, overlap=overlap) as llm:
            assert llm._ensemble.groups == (("large",), ("base",), ("lora",), ("tuned",))
            single = [token.id for token in llm.stream("Once upon a time", max_tokens=24, draft=draft)]
            rows = [{"id": n, "prompt": f"Row {n}: once", "max_tokens": 8} for n in range(6)]
            batch = {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in llm.batch(rows, raw=True)}
        found.append((single, batch))
    assert found[0] == found[1] == found[2]


@pytest.mark.usefixtures("as_on_gpus")
def test_auto_is_chosen_at_load_and_remembered(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dlf.engine.overlap.fastest", lambda *_: "off")
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
        assert llm._ensemble.overlap == "off"
    monkeypatch.setattr("edge_dlf.engine.overlap.fastest", pytest.fail)
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
        assert llm._ensemble.overlap == "off"
        assert len(list(llm.stream("a", max_tokens=4))) == 4
    assert list(json.loads(cache.read_bytes()).values()) == ["off"]


@pytest.mark.usefixtures("as_on_gpus")
def test_what_the_choice_depends_on(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dlf.engine.overlap.fastest", lambda *_: "queue")
    common = {"n_ctx": 64, "n_threads": 1}
    kinds = ({}, {}, {"n_parallel": 2}, {"n_gpu_layers": 1}, {"n_threads": 2}, {"type_k": "f32"})
    for own in kinds:
        FusedLlama.from_family(tiny, **{**common, **own}).close()
    (tiny / "large.gguf").touch()
    FusedLlama.from_family(tiny, **common).close()
    keys = json.loads(cache.read_bytes())
    assert len(keys) == 6
    assert all(str(tiny / "lora.gguf") in key for key in keys)


@pytest.mark.usefixtures("as_on_gpus")
def test_a_family_measures_itself(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dlf.engine.overlap._PATIENCE_S", 60.0)  # a device in software is slow
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1, n_parallel=3) as llm:
        assert llm._ensemble.overlap in OVERLAPS
        assert llm._ensemble.n_used("large") == 0
        assert len(list(llm.stream("a", max_tokens=4))) == 4
    assert cache.exists()


def test_on_the_cpu_nothing_is_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "gpus", lambda: [])
    monkeypatch.setattr(members, "choose_overlap", pytest.fail)
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1) as llm:
        assert llm._ensemble.groups == (("large", "base", "lora", "tuned"),)


@pytest.mark.parametrize(("overlap", "n_notices"), [("threads", 1), ("off", 0)])
def test_on_the_cpu_members_do_not_overlap(
    tiny: Path, overlap: Overlap, n_notices: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(members, "gpus", lambda: [])
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1, overlap=overlap) as llm:
        assert len(list(llm.stream("a", max_tokens=3))) == 3
    assert len([record for record in caplog.records if "decoded in turn" in record.message]) == n_notices


def test_members_that_have_a_group_of_their_own(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = (GPU("CUDA0", "a GPU", 10**10, 10**10),)
    monkeypatch.setattr(members, "this_machine", lambda _: Machine(10**10, gpus=gpus))
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1, n_gpu_layers={"base": 1}, overlap="off") as llm:
        assert llm._ensemble.groups == (("large",), ("tuned",), ("base", "lora"))


@pytest.mark.parametrize(
    ("names", "ways"),
    [
        (("CUDA0", "CUDA1"), OVERLAPS),
        (("MTL0",), OVERLAPS),
        (("Vulkan0",), ("off", "queue")),
        (("CUDA0", "SYCL0"), ("off", "queue")),
    ],
)
def test_threads_are_tried_only_where_they_are_safe(
    names: tuple[str, ...], ways: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(members, "gpus", lambda: [GPU(name, "a GPU", 1, 1) for name in names])
    assert members.ways_to_overlap() == ways


def test_a_way_that_does_not_exist(tiny: Path) -> None:
    with pytest.raises(InvalidParameterError, match="overlap must be auto, off, queue, threads, not 'always'"):
        FusedLlama.from_family(tiny, overlap="always")
