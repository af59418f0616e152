"""What the server counts, for Prometheus."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..answers.stream import Driver, Report

_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
_TPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "edge_dlf_requests", "Requests by path and status.", ("path", "status"), registry=registry
        )
        self._answers = Counter(
            "edge_dlf_answers", "Answers by why they ended.", ("method", "finish_reason"), registry=registry
        )
        self._prompt = Counter("edge_dlf_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._cached = Counter(
            "edge_dlf_prompt_tokens_cached", "Tokens of prompts that were in the KV cache.", registry=registry
        )
        self._generated = Counter("edge_dlf_generated_tokens", "Tokens of answers.", registry=registry)
        self._drafted = Counter("edge_dlf_drafted_tokens", "Tokens that were drafted.", registry=registry)
        self._accepted = Counter("edge_dlf_accepted_tokens", "Drafted tokens that were kept.", registry=registry)
        self._first = Histogram(
            "edge_dlf_time_to_first_token_seconds", "From a request to its first token.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._tps = Histogram(
            "edge_dlf_tokens_per_second", "Of each answer, after its first token.", buckets=_TPS, registry=registry
        )

    def watch(self, driver: Driver) -> None:
        """Let gauges show what `driver` holds when they are read."""
        running = Gauge("edge_dlf_answers_running", "Answers that are being decoded.", registry=self._registry)
        waiting = Gauge("edge_dlf_answers_waiting", "Answers that wait.", registry=self._registry)
        used = Gauge("edge_dlf_kv_cells_used", "Positions held in a KV cache.", ("member",), registry=self._registry)
        cells = Gauge("edge_dlf_kv_cells", "Positions of a KV cache.", ("member",), registry=self._registry)
        running.set_function(lambda: driver.n_active)
        waiting.set_function(lambda: driver.n_waiting)
        for name, (_, n_cells) in driver.cache_usage().items():
            used.labels(name).set_function(partial(_n_used, driver, name))
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
        self._prompt.inc(report.n_prompt)
        self._cached.inc(report.n_cached)
        self._generated.inc(report.n_generated)
        self._drafted.inc(report.counts.n_drafted)
        self._accepted.inc(report.counts.n_accepted)
        if report.generation_tps:
            self._tps.observe(report.generation_tps)

    def text(self) -> bytes:
        """All of them in Prometheus's text format."""
        return generate_latest(self._registry)


def _n_used(driver: Driver, member: str) -> float:
    return driver.cache_usage()[member][0]
