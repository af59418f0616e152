"""Speed of a family on this machine: each member alone, the fusion with and without drafts, many sequences at once, and
the share of the memory's bandwidth that reading the weights takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import EdgeDLFError, OutOfMemoryError
from ..families.files import FamilyFiles
from ..families.footprint import footprint
from ..fusion import kernels
from ..fusion.fuser import Fuser
from ..fusion.records import Draw
from ..llama import copy_bytes_s, gpus
from ..params import FusionParams, SamplingParams
from ..system.machine import GPU

if TYPE_CHECKING:
    from ..answers.stream import Report
    from ..api import FusedLlama

PARALLEL = (1, 4, 16)
"""Numbers of sequences that are decoded at once."""
N_CTX = 512

_N_PARALLEL_TOKENS = 7
_N_PREFILL, _N_STEPS, _N_RUNS = 128, 12, 5
_ANSWERS_S = 50.0
_N_TOKENS = 8, 64
_MOST_ROUNDS = 4
_READ_BYTES = 2**28
_GREEDY: Mapping[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0}
_PROMPTS = (
    "Question: Ana has 12 boxes with 8 pencils in each and gives 17 pencils to Boris. How many are left?\nAnswer:",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "User: What should I pack for a week by the sea?\nAssistant:",
    "Text: Three reports on the harbour were heard, and the vote was put off.\nRepeat it twice:\nText: Three reports",
)


@dataclass(frozen=True)
class Spread:
    """Median, least and greatest of some measurements."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises EdgeDLFError where nothing could be measured."""
        if not values:
            raise EdgeDLFError("every answer ended at its first token: there is no decoding to measure")
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class MemberSpeed:
    """Speed of one member alone.

    prefill_tps: tokens of a prompt that it reads in a second.
    decode_tps: tokens that it generates in a second.
    token_bytes: weights and KV cache that it reads for each generated token.
    read_bytes_s: the same for each second.
    """

    prefill_tps: Spread
    decode_tps: Spread
    token_bytes: int
    read_bytes_s: float


@dataclass(frozen=True)
class Speeds:
    """Every measurement of one family.

    members: speed of each member, by its role.
    plain, drafted, large: tokens a second of the same answers, fused without drafts, fused with drafts, and by the
        large model alone without drafts.
    n_drafted, n_accepted: drafted tokens, and those that were kept, in n_steps steps.
    search_share: part of a plain step that the search for α, the fusion and the choice of a token take.
    parallel: tokens a second of all sequences together, by how many are decoded at once.
    memory_bytes_s: bytes that n_threads threads of this process read in a second. With a `gpu`, bytes that a copy on it
        reads and writes; None where the GPU has no room for the copy.
    """

    members: Mapping[str, MemberSpeed]
    plain: Spread
    drafted: Spread
    large: Spread
    n_drafted: int
    n_accepted: int
    n_steps: int
    search_share: float
    parallel: Mapping[int, float]
    memory_bytes_s: float | None
    n_threads: int
    gpu: str | None = None

    @property
    def verdict(self) -> str:
        """One sentence that compares drafted fusion with the large model and with plain fusion."""
        to_large, to_plain = self.drafted.median / self.large.median, self.drafted.median / self.plain.median
        return f"drafted fusion runs at {to_large:.2f} of the large model alone, {to_plain:.2f} times plain fusion"


def measure(
    llm: FusedLlama,
    files: FamilyFiles,
    *,
    n_threads: int,
    cache_types: tuple[str | None, str | None],
    tell: Callable[[str], None],
) -> Speeds:
    """Measure a family.

    llm: the family, loaded with a context of N_CTX and room for as many sequences as PARALLEL asks for.
    files: the files that it was loaded from.
    n_threads, cache_types: threads, and types of keys and values of the KV cache, that it was loaded with.
    tell: called with a few words on what is measured next.
    """
    tell("reading memory")
    gpu = next(iter(gpus()), None)
    memory = gpu_bytes_s(gpu) if gpu else memory_bytes_s(n_threads)
    members = {}
    for name in ("large", "base", *llm.experts):
        tell(f"{name} alone")
        members[name] = _member_speed(llm, name, files, cache_types)
    parallel = {}
    for n in PARALLEL:
        tell("one sequence" if n == 1 else f"{n} sequences at once")
        parallel[n] = _parallel_tps(llm, n)
    step_s = sum(1 / speed.decode_tps.median for speed in members.values())
    runs: dict[str, list[Report]] = {"plain": [], "drafted": [], "large": []}
    for n, n_answers, kind, report in _answers(llm, 2 * step_s + 1 / members["large"].decode_tps.median):
        tell(f"answer {n} of {n_answers}, {kind}")
        runs[kind].append(report)
    plain, drafted, large = (Spread.of([r.generation_tps for r in reports]) for reports in runs.values())
    return Speeds(
        members=members,
        plain=plain,
        drafted=drafted,
        large=large,
        n_drafted=sum(report.n_drafted for report in runs["drafted"]),
        n_accepted=sum(report.n_accepted for report in runs["drafted"]),
        n_steps=sum(report.n_steps for report in runs["drafted"]),
        search_share=_search_s(llm.n_vocab, len(llm.experts), n_threads) * plain.median,
        parallel=parallel,
        memory_bytes_s=memory,
        n_threads=n_threads,
        gpu=gpu.description if gpu else None,
    )


def gpu_bytes_s(gpu: GPU) -> float | None:
    """Bytes that a GPU reads and writes in a second of copying; None where it has no room for a copy."""
    try:
        return copy_bytes_s(gpu.name, _READ_BYTES)
    except OutOfMemoryError:
        return None


def memory_bytes_s(n_threads: int) -> float:
    """Bytes that `n_threads` threads read in a second from arrays too large for any cache: the best of five passes."""
    values = np.ones(_READ_BYTES // 8, np.int64)
    parts = np.array_split(values, n_threads)
    kernels.read(values[:1])  # compiles it
    with ThreadPoolExecutor(n_threads) as pool:
        return values.nbytes / min(_timed(lambda: list(pool.map(kernels.read, parts)), 5))


def _member_speed(
    llm: FusedLlama, name: str, files: FamilyFiles, cache_types: tuple[str | None, str | None]
) -> MemberSpeed:
    reports = []
    for run in range(_N_RUNS):
        text = llm.tokenize(f"{run}. {_PROMPTS[run % len(_PROMPTS)]}\n")  # no two begin alike: nothing is cached
        prompt = (text * _N_PREFILL)[:_N_PREFILL]
        reports.append(_answer(llm, prompt, method=name, draft="off", max_tokens=_N_STEPS))
    size = footprint(files.models[name], *cache_types)
    n_bytes = size.read + int(sum(size.kv) * (_N_PREFILL + _N_STEPS // 2))
    n_bytes += sum(path.stat().st_size for path, _ in files.loras.get(name, ()))
    decode_tps = Spread.of([report.generation_tps for report in reports if report.n_steps])
    prefill_tps = Spread.of([report.prompt_tps for report in reports])
    return MemberSpeed(prefill_tps, decode_tps, n_bytes, n_bytes * decode_tps.median)


def _answer(llm: FusedLlama, prompt: str | Sequence[int], **settings: Any) -> Report:
    """Report on a greedy answer to `prompt`."""
    stream = llm.stream(prompt, **_GREEDY, **settings)
    for _ in stream:
        pass
    return stream.report


def _parallel_tps(llm: FusedLlama, n: int) -> float:
    """Tokens a second of plain fusion, all of `n` sequences together."""
    prompts = [llm.tokenize(f"{k}. {_PROMPTS[k % len(_PROMPTS)]}")[: 8 + k] for k in range(n)]

    def run(max_tokens: int) -> int:
        rows = llm.batch([{"prompt": prompt} for prompt in prompts], draft="off", max_tokens=max_tokens, **_GREEDY)
        return sum(row["response"]["body"]["usage"]["completion_tokens"] for row in rows)

    run(1)  # reads the prompts: the KV cache then holds them
    started = time.perf_counter()
    n_tokens = run(_N_PARALLEL_TOKENS)
    return n_tokens / (time.perf_counter() - started)


def _answers(llm: FusedLlama, token_s: float) -> Iterator[tuple[int, int, str, Report]]:
    """Yield greedy answers by each method in turn: the number of the answer, of how many, the method, the report.

    token_s: seconds that all methods together take for a token.
    """
    methods: dict[str, dict[str, Any]] = {
        "plain": {"draft": "off"},
        "drafted": {"draft": "auto"},
        "large": {"draft": "off", "method": "large"},
    }
    fewest, most = _N_TOKENS
    n_affordable = int(_ANSWERS_S / token_s / len(_PROMPTS))
    n_tokens = min(max(n_affordable, fewest), most)
    n_rounds = min(max(n_affordable // n_tokens, 1), _MOST_ROUNDS)
    # The order of the methods changes from prompt to prompt.
    orders = [[*methods][n % 3 :] + [*methods][: n % 3] for n in range(3)]
    jobs = [(kind, prompt) for n, prompt in enumerate(_PROMPTS * n_rounds) for kind in orders[n % 3]]
    for n, (kind, prompt) in enumerate([("drafted", _PROMPTS[0]), *jobs]):
        report = _answer(llm, prompt, max_tokens=n_tokens, **{"method": "dynamic", **methods[kind]})
        if n and report.n_steps:  # the first answer measures how long drafts should be
            yield n, len(jobs), kind, report


def _search_s(n_vocab: int, n_experts: int, n_threads: int) -> float:
    """Seconds that the search for α, the fusion and the greedy choice take for one token."""
    large, base, *experts = np.random.default_rng(0).normal(0, 3, (2 + n_experts, 1, n_vocab)).astype(np.float32)
    experts = [base + 0.3 * expert for expert in experts]
    fuser, names = Fuser(n_vocab, n_threads), ["large", "base", *(f"expert {t}" for t in range(n_experts))]
    draw = Draw(SamplingParams(temperature=0.0), seed=0, position=0, recent=np.empty(0, np.int32))

    def step() -> None:
        (choice,) = fuser.search(large, base, experts, FusionParams(), names)
        assert not isinstance(choice, Exception)
        alphas = [choice.alpha * (t == choice.expert) for t in range(n_experts)]
        fuser.pick(large, base, experts, [alphas], [draw], names)

    return median(_timed(step, 9))


def _timed(work: Callable[[], object], n: int) -> list[float]:
    """Seconds of each of `n` runs of `work`."""
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds
