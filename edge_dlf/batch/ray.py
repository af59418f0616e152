"""`RayLlama`: one batch over many machines by Ray Data, with the face of `FusedLlama`.

Requests travel in shares of a few, each a row of a dataset. The driver hands shares to a feed, an actor beside it; a
read task makes them a stream of blocks, `map_batches` runs these on a pool of actors, and the results come back the
same way. What runs where, what waits, and what runs again because a process or a machine died is Ray's business. The
results of a share come all at once or not at all, so that one that runs again neither loses nor doubles a row.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import pickle
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, Dataset, Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from ..answers.requests import request_id
from ..api import FusedLlama
from ..errors import EdgeDLFError, InvalidParameterError, RequestInterruptedError
from ..llama import default_n_threads
from .ray_worker import Result, Share, Worker

logger = logging.getLogger(__name__)

N_SHARES = 8
"""Shares that an actor has at a time: while some wait for their longest row, others keep its sequences busy."""
_N_PARALLEL = 32
"""Rows decoded at once that shares are made for where each actor finds its own number."""
_PATIENCE_S = 30.0

_Arrivals: TypeAlias = "queue.SimpleQueue[tuple[int, bytes] | BaseException]"


class RayLlama:
    """Copies of one family on the machines of a Ray cluster, which answer a batch together. A context manager.

    load: makes a FusedLlama from `n_threads`, `n_gpu_layers`, `n_parallel` and `settings`, in every actor: each machine
    has the files at the same place. address: the cluster's, as `ray.init` takes it; None starts Ray on this machine.
    n_threads: cores of each actor; None gives every GPU an actor, or, where there is none or n_gpu_layers is 0, every
    machine. Raises EdgeDLFError where the cluster cannot be reached, InvalidParameterError where it has no such cores.
    """

    def __init__(
        self,
        load: Callable[..., FusedLlama],
        *,
        address: str | None = None,
        n_threads: int | None = None,
        n_gpu_layers: int | Mapping[str, int] = -1,
        n_parallel: int | str = "auto",
        **settings: Any,
    ) -> None:
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _start(address)
        layers = n_gpu_layers.values() if isinstance(n_gpu_layers, Mapping) else [n_gpu_layers]
        self.n_actors, self._n_cores, self._n_gpus = _divide(n_threads, use_gpus=any(layers))
        if not self.n_actors:
            self.close()
            raise InvalidParameterError(f"no machine of the cluster has {n_threads or 1} cores")
        self._load = load
        self._loading = {"n_gpu_layers": n_gpu_layers, "n_parallel": n_parallel, **settings}
        if n_threads:
            self._loading["n_threads"] = n_threads
        self._n_rows = max(1, (n_parallel if isinstance(n_parallel, int) else _N_PARALLEL) // (N_SHARES // 2))
        self._arrivals: _Arrivals = queue.SimpleQueue()

    def __enter__(self) -> RayLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def n_picked(self) -> int:
        """0: what the actors are at, they do not tell."""
        return 0

    def close(self) -> None:
        """Leave the cluster, which ends the actors. Calling it twice is no error."""
        if self._owns_ray:
            ray.shutdown()
        self._owns_ray = False

    def interrupt(self) -> None:
        """Stop the running batch, which raises RequestInterruptedError; for other threads."""
        self._arrivals.put(RequestInterruptedError("the batch was interrupted"))

    def batch(self, requests: Iterable[Any], *, ordered: bool = False, **settings: Any) -> Iterator[Result]:
        """FusedLlama.batch on all machines, which load the family anew for it.

        `requests` is pulled in this thread, ahead by no more than twice what the actors hold. A row whose process died
        so often that it is taken for the reason gives an error with the code "worker_died". Raises what loading the
        family or its batch raises, with the machine's name, and EdgeDLFError where Ray fails.
        """
        arrivals: _Arrivals = queue.SimpleQueue()
        self._arrivals = arrivals
        feed = ray.remote(num_cpus=0)(_Feed).remote()
        collector = threading.Thread(target=_collect, args=(self._dataset(feed, settings), arrivals), daemon=True)
        collector.start()
        shares = _shares(requests, self._n_rows)
        n_sent = n_given = 0
        running: dict[int, int] = {}
        done: dict[int, list[Result]] = {}
        try:
            while True:
                for share in islice(shares, n_given + 2 * N_SHARES * self.n_actors - n_sent):
                    feed.put.remote(n_sent, pickle.dumps(share))
                    running[n_sent] = len(share)
                    n_sent += 1
                if n_given == n_sent:
                    return
                number, results = _opened(arrivals.get())
                if number not in running:
                    continue
                if len(results) != running.pop(number):
                    raise EdgeDLFError("Ray returned fewer results than it was given requests")
                feed.drop.remote(number)
                done[number] = results
                while (ready := done.pop(n_given if ordered else number, None)) is not None:
                    yield from ready
                    n_given += 1
        finally:
            ray.kill(feed)  # which ends the read task, and so the dataset and its actors
            collector.join(_PATIENCE_S)  # a thread that calls Ray after its end would start it again

    def _dataset(self, feed: Any, settings: Mapping[str, Any]) -> Dataset:
        """Results of the shares that `feed` gives, each a row and a block."""
        context = DataContext.get_current().copy()
        context.target_max_block_size = 1
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        with DataContext.current(context):
            shares = ray.data.read_datasource(_Shares(feed), override_num_blocks=1, num_cpus=0)
            return shares.map_batches(
                Worker,
                fn_constructor_args=(feed, self._load, self._loading, self._n_cores, settings, str(Path.cwd())),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=self._n_cores,
                num_gpus=self._n_gpus,
                compute=ActorPoolStrategy(
                    size=self.n_actors,
                    max_tasks_in_flight_per_actor=N_SHARES,
                    max_concurrent_calls_per_actor=N_SHARES,
                    enable_true_multi_threading=True,
                ),
            )


class _Feed:
    """Shares by number, kept until their results are in, for what may have to run again; how often each was begun."""

    def __init__(self) -> None:
        self._shares: dict[int, bytes] = {}
        self._n_begun: Counter[int] = Counter()
        self._n_shares = 0
        self._has_more = asyncio.Condition()

    async def put(self, number: int, share: bytes) -> None:
        """Take in a share."""
        async with self._has_more:
            self._shares[number] = share
            while self._n_shares in self._shares:  # calls may overtake each other
                self._n_shares += 1
            self._has_more.notify_all()

    async def get(self, number: int) -> bytes:
        """A share, once it is there; empty if its results are in."""
        async with self._has_more:
            await self._has_more.wait_for(lambda: number < self._n_shares)
            return self._shares.get(number, b"")

    async def drop(self, number: int) -> None:
        """Forget a share."""
        self._shares.pop(number, None)
        self._n_begun.pop(number, None)

    async def n_begun(self, number: int) -> int:
        """Times that a share was begun so far."""
        return self._n_begun[number]

    async def begin(self, number: int) -> None:
        """Note that a share is begun."""
        self._n_begun[number] += 1


class _Shares(Datasource):  # type: ignore[misc]
    """The shares of a feed, in one read task beside it that ends with the feed."""

    def __init__(self, feed: Any) -> None:
        super().__init__()
        self._feed = feed

    @property
    def supports_distributed_reads(self) -> bool:
        return False

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(partial(_read, self._feed), metadata)]


def _read(feed: Any) -> Iterator[pa.Table]:
    for number in count():
        share = ray.get(feed.get.remote(number))
        yield pa.table({"number": [number], "share": pa.array([share], pa.large_binary())})


def _shares(requests: Iterable[Any], n_rows: int) -> Iterator[Share]:
    """Requests in shares of up to `n_rows`, under the ids that FusedLlama.batch gives them."""
    named = ((request_id(request, number), request) for number, request in enumerate(requests, 1))
    while share := list(islice(named, n_rows)):
        yield share


def _collect(dataset: Dataset, arrivals: _Arrivals) -> None:
    """Put results into `arrivals` as they come, or what Ray failed of."""
    try:
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for row in table.to_pylist():
                arrivals.put((row["number"], row["results"]))
    except Exception as error:
        arrivals.put(error)


def _opened(arrival: tuple[int, bytes] | BaseException) -> tuple[int, list[Result]]:
    """Number and results of a share. Raises what was found in their place."""
    if isinstance(arrival, EdgeDLFError):
        raise arrival
    if isinstance(arrival, BaseException):
        raise EdgeDLFError(f"Ray failed: {_one_line(arrival)}") from arrival
    number, pickled = arrival
    results = pickle.loads(pickled)
    if isinstance(results, EdgeDLFError):
        raise results
    return number, results


def _one_line(error: BaseException) -> str:
    """The last line of what Ray says, which holds the reason."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def _divide(n_threads: int | None, use_gpus: bool) -> tuple[int, int, int]:
    """How many actors the cluster holds, and the cores and GPUs of each."""
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    with_gpu = [machine for machine in machines if use_gpus and machine.get("GPU")]
    n_each = [int(machine.get("GPU", 1)) if with_gpu else 1 for machine in with_gpu or machines]
    n_cores = n_threads or max(1, min(int(m["CPU"]) // n for m, n in zip(with_gpu or machines, n_each, strict=True)))
    if with_gpu:
        n_actors = sum(min(int(machine["CPU"]) // n_cores, int(machine["GPU"])) for machine in with_gpu)
    else:
        n_actors = sum(int(machine["CPU"]) // n_cores for machine in machines)
    return n_actors, n_cores, int(bool(with_gpu))


def _start(address: str | None) -> None:
    """Join the cluster at `address`, or start one here. What Ray has to say goes to its logs, not to the terminal."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    for handler in logging.getLogger("ray.data").handlers:
        if not isinstance(handler, logging.FileHandler):
            handler.setLevel(logging.CRITICAL)
    own = {"num_cpus": default_n_threads(), "include_dashboard": False} if address is None else {}
    ray._private.worker.print_to_stdstream = _log  # it writes of every death to stdout
    sigterm = signal.getsignal(signal.SIGTERM)
    try:
        with _no_stderr():
            ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **own)
    except Exception as error:
        where = f"at {address}" if address else "on this machine"
        raise EdgeDLFError(f"cannot reach Ray {where}: {_one_line(error)}") from error
    finally:
        if sigterm is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, sigterm)  # Ray takes it for itself


def _log(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
    for line in data["lines"]:
        logger.info("Ray: %s", line)


@contextlib.contextmanager
def _no_stderr() -> Iterator[None]:
    """Turn the process's stderr off: starting, Ray's C++ part reports there which log level it was given."""
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)
