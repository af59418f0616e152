"""Speed of a family on this machine: each member alone, the fusion with and without drafts, many sequences at once, and
the share of the memory's bandwidth that reading the weights takes."""

from __future__ import annotations

import time
import timeit
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from ..answers.requests import Request
from ..engine.backend import Run
from ..engine.ensemble import Ensemble
from ..engine.generation import Generation, GenerationRequest
from ..errors import EdgeDLFError, OutOfMemoryError
from ..families.files import FamilyFiles
from ..families.footprint import footprint
from ..fusion.kernels.memory import read
from ..llama import copy_bytes_s, gpus
from ..params import FusionParams, SamplingParams
from ..system.machine import GPU
from . import costs

if TYPE_CHECKING:
    from ..answers.stream import Report
    from ..api import FusedLlama

PARALLEL = (1, 4, 16)
"""Numbers of sequences that are decoded at once."""
N_CTX = 512

N_PARALLEL_STEPS = 6
"""Steps of them that are timed."""

_N_PREFILL, _N_STEPS = 128, 12
_ANSWERS_S = 50.0
_N_TOKENS = 8, 64
_MOST_ROUNDS = 4
_READ_BYTES = 2**28
_PROMPTS = (
    "Question: Ana has 12 boxes with 8 pencils in each and gives 17 pencils to Boris. How many are left?\nAnswer:",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "User: What should I pack for a week by the sea?\nAssistant:",
    "Text: Three reports on the harbour were heard, and the vote was put off.\nRepeat it twice:\nText: Three reports",
)


def measure(
    llm: FusedLlama,
    files: FamilyFiles,
    *,
    n_threads: int,
    cache_types: tuple[str | None, str | None],
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Measure a family.

    llm: the family, loaded with a context of N_CTX and room for as many sequences as PARALLEL asks for.
    files, n_threads, cache_types: files, threads, and types of keys and values of the KV cache that it was loaded with.
    tell: called with a few words on what is measured next.

    Returns as JSON has it, each spread as median, least and greatest:
    members: role -> spreads `prefill_tps` and `decode_tps`, tokens a second alone; `token_bytes`, weights and KV cache
        read for each generated token; `read_bytes_s`, the same for each second; `batch_s`, as `costs.Seconds`.
    plain, drafted, large: spreads of tokens a second of the same answers, fused without drafts, fused with drafts, and
        by the large model alone without drafts.
    n_drafted, n_accepted: drafted tokens, and those that were kept, in n_steps steps.
    search_share: part of a plain step that the search for α, the fusion and the choice of a token take.
    parallel: tokens a second of all sequences together, by how many are decoded at once.
    memory_bytes_s: bytes that n_threads threads of this process read in a second. With a `gpu`, bytes that a copy on it
        reads and writes; None where the GPU has no room for the copy.
    notes: sentences on what batches of a few tokens cost, whether drafting pays, and quantizations that are slow.
    verdict: one sentence that compares drafted fusion with the large model and with plain fusion.
    """
    ensemble = llm.driver.decoder.ensemble
    ensemble.require(ensemble.names)
    tell("reading memory")
    gpu = next(iter(gpus()), None)
    memory = gpu_bytes_s(gpu) if gpu else memory_bytes_s(n_threads)
    members = {}
    for name in ensemble.members:
        tell(f"{name} alone")
        members[name] = member_speed(ensemble, name, files, cache_types)
    parallel = {}
    for n in PARALLEL:
        tell("one sequence" if n == 1 else f"{n} sequences at once")
        parallel[n] = parallel_tps(llm, n)
    token_s = {name: 1 / speed["decode_tps"]["median"] for name, speed in members.items()}
    reports = answer_in_turn(llm, 2 * sum(token_s.values()) + token_s["large"], tell)
    spreads = {kind: spread([report.generation_tps for report in own]) for kind, own in reports.items()}
    plain, drafted, large = (own["median"] for own in spreads.values())
    drafting = [report.counts for report in reports["drafted"]]
    return {
        "members": members,
        **spreads,
        "n_drafted": sum(counts.n_drafted for counts in drafting),
        "n_accepted": sum(counts.n_accepted for counts in drafting),
        "n_steps": sum(counts.n_steps for counts in drafting),
        "search_share": search_s(llm) * plain,
        "parallel": parallel,
        "memory_bytes_s": memory,
        "n_threads": n_threads,
        "gpu": gpu.description if gpu else None,
        "notes": _notes(files, {name: speed["batch_s"] for name, speed in members.items()}, gpu is None),
        "verdict": f"drafted fusion runs at {drafted / large:.2f} of the large model alone, "
        f"{drafted / plain:.2f} times plain fusion",
    }


def _notes(files: FamilyFiles, seconds: costs.Seconds, is_on_cpu: bool) -> list[str]:
    return [
        costs.batches(seconds),
        f"by these costs, {costs.fusion(files, seconds)}",
        f"by these costs, drafting {costs.drafting(files, seconds)}",
        *("; ".join(found) for found in (costs.slow_types(files) if is_on_cpu else ())),
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest. Raises EdgeDLFError where nothing could be measured."""
    if not values:
        raise EdgeDLFError("every answer ended at its first token: there is no decoding to measure")
    return {"median": median(values), "least": min(values), "greatest": max(values)}


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
    read(values[:1])  # compiles it
    with ThreadPoolExecutor(n_threads) as pool:
        return values.nbytes / min(timeit.repeat(lambda: list(pool.map(read, parts)), repeat=5, number=1))


def member_speed(
    ensemble: Ensemble, name: str, files: FamilyFiles, cache_types: tuple[str | None, str | None]
) -> dict[str, Any]:
    prompt = [10 + n % 97 for n in range(_N_PREFILL)]
    prefill, decode = [], []
    batch_s: list[list[float]] = [[] for _ in costs.BATCHES]
    for _ in range(3):
        ensemble.forget([0])
        prefill.append(_decode_s(ensemble, name, prompt))
        decode += [_decode_s(ensemble, name, prompt[n : n + 1]) for n in range(_N_STEPS)]
        for n, seconds in zip(costs.BATCHES, batch_s, strict=True):
            seconds += [_decode_s(ensemble, name, prompt[:n], n) for _ in range(3)]
    ensemble.forget([0])
    size = footprint(files.models[name], *cache_types)
    n_bytes = size.read + int(sum(size.kv) * (_N_PREFILL + _N_STEPS // 2))
    n_bytes += sum(path.stat().st_size for path, _ in files.loras.get(name, ()))
    decode_tps = spread([1 / seconds for seconds in decode])
    return {
        "prefill_tps": spread([_N_PREFILL / seconds for seconds in prefill]),
        "decode_tps": decode_tps,
        "token_bytes": n_bytes,
        "read_bytes_s": n_bytes * decode_tps["median"],
        "batch_s": [min(seconds) for seconds in batch_s],
    }


def _decode_s(ensemble: Ensemble, name: str, tokens: Sequence[int], n_rows: int = 1) -> float:
    """Return the seconds in which a member evaluates `tokens`, with logits for the last `n_rows` of them."""
    started = time.perf_counter()
    ensemble.decode({name: [Run(0, tokens, n_rows)]})
    return time.perf_counter() - started


def parallel_tps(llm: FusedLlama, n: int) -> float:
    """Return the tokens per second of plain fusion, all of `n` sequences together."""
    driver, answers = llm.driver, []
    for k in range(n):
        prompt = llm.tokenize(_PROMPTS[k % len(_PROMPTS)])[: 8 + k]
        settings = {"max_tokens": 2 * N_PARALLEL_STEPS, "temperature": 0.0, "method": llm.files.methods[0]}
        answers.append(llm.prepare(Request(False, prompt, settings), draft="off").answer)
    driver.forget()
    for answer in answers:
        driver.add(answer)
    while not all(answer.generation.n_picked for answer in answers):
        driver.step()
    started, n_before = time.perf_counter(), sum(answer.generation.n_picked for answer in answers)
    for _ in range(N_PARALLEL_STEPS):
        driver.step()
    elapsed, n_after = time.perf_counter() - started, sum(answer.generation.n_picked for answer in answers)
    driver.clear()
    driver.forget()
    return (n_after - n_before) / elapsed


def answer_in_turn(llm: FusedLlama, token_s: float, tell: Callable[[str], None]) -> dict[str, list[Report]]:
    """Return reports on greedy answers by each method in turn.

    token_s: seconds that all methods together take for a token.
    """
    methods: dict[str, dict[str, Any]] = {
        "plain": {"draft": "off", "method": llm.files.methods[0]},
        "drafted": {"draft": "auto", "method": llm.files.methods[0]},
        "large": {"draft": "off", "method": "large"},
    }
    fewest, most = _N_TOKENS
    n_affordable = int(_ANSWERS_S / token_s / len(_PROMPTS))
    n_tokens = min(max(n_affordable, fewest), most)
    n_rounds = min(max(n_affordable // n_tokens, 1), _MOST_ROUNDS)
    # The order of the methods changes from prompt to prompt.
    orders = [[*methods][n % 3 :] + [*methods][: n % 3] for n in range(3)]
    jobs = [(kind, prompt) for n, prompt in enumerate(_PROMPTS * n_rounds) for kind in orders[n % 3]]
    reports: dict[str, list[Report]] = {kind: [] for kind in methods}
    for n, (kind, prompt) in enumerate([("drafted", _PROMPTS[0]), *jobs]):
        tell(f"answer {n} of {len(jobs)}, {kind}")
        stream = llm.stream(prompt, max_tokens=n_tokens, temperature=0.0, repeat_penalty=1.0, **methods[kind])
        deque(stream, maxlen=0)
        if n and stream.report.counts.n_steps:  # the first answer measures how long drafts should be
            reports[kind].append(stream.report)
    return reports


def search_s(llm: FusedLlama) -> float:
    """Return the seconds that the search for α, if any, the fusion and the greedy choice take for one row."""
    decoder, fusion = llm.driver.decoder, FusionParams(llm.files.methods[0])
    roles, prompt = decoder.ensemble.roles(fusion), llm.tokenize(_PROMPTS[0])
    request = GenerationRequest(roles, dict.fromkeys(roles.members, prompt), fusion, SamplingParams(temperature=0.0))
    rows = decoder.ensemble.decode({name: [Run(0, prompt, 1)] for name in roles.members})
    logits, draw = [rows[name] for name in roles.members], Generation(request).draw()
    weights = [roles.weights or ()]
    seconds = timeit.repeat(
        lambda: decoder.fuser.pick(logits, roles.members, fusion, weights, [draw]), repeat=9, number=1
    )
    decoder.ensemble.forget()
    return median(seconds)
