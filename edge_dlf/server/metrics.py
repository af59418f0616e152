"""What the server counts, for Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..answers.stream import Driver, Report

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
_TOKENS = {
    "prompt_tokens": "Tokens of prompts.",
    "prompt_tokens_cached": "Tokens of prompts that were in the KV cache.",
    "generated_tokens": "Tokens of answers.",
    "drafted_tokens": "Tokens that were drafted.",
    "accepted_tokens": "Drafted tokens that were kept.",
}


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        counter, histogram = partial(Counter, registry=self._registry), partial(Histogram, registry=self._registry)
        self._requests = counter("edge_dlf_requests", "Requests by path and status.", ("path", "status"))
        self._answers = counter("edge_dlf_answers", "Answers by why they ended.", ("method", "finish_reason"))
        self._tokens = [counter(f"edge_dlf_{name}", about) for name, about in _TOKENS.items()]
        about = "From a request to its first token."
        self._first = histogram("edge_dlf_time_to_first_token_seconds", about, buckets=_SECONDS)
        self._tps = histogram("edge_dlf_tokens_per_second", "Of each answer, after its first token.", buckets=_TPS)

    def watch(self, driver: Driver) -> None:
        """Let gauges show what `driver` holds when they are read."""
        gauge = partial(Gauge, registry=self._registry)
        gauge("edge_dlf_answers_running", "Answers that are being decoded.").set_function(lambda: driver.n_active)
        gauge("edge_dlf_answers_waiting", "Answers that wait.").set_function(lambda: driver.n_waiting)
        used = gauge("edge_dlf_kv_cells_used", "Positions held in a KV cache.", ("member",))
        cells = gauge("edge_dlf_kv_cells", "Positions of a KV cache.", ("member",))
        for name, (_, n_cells) in driver.cache_usage().items():
            used.labels(name).set_function(partial(lambda member: driver.cache_usage()[member][0], name))
            cells.labels(name).set(n_cells)

    def request(self, path: str, status: int) -> None:
        """Count a request."""
        self._requests.labels(path, status).inc()

    def first_token(self, seconds: float) -> None:
        """Note how long a first token took."""
        self._first.observe(seconds)

    def ended(self, report: Report) -> None:
        """Count an answer that has ended."""
        self._answers.labels(report.method, report.finish_reason).inc()
        counts = report.n_prompt, report.n_cached, report.n_generated, report.counts.n_drafted, report.counts.n_accepted
        for counter, n_tokens in zip(self._tokens, counts, strict=True):
            counter.inc(n_tokens)
        if report.generation_tps:
            self._tps.observe(report.generation_tps)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)
