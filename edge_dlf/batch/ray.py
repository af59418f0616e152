"""`RayLlama`: one batch over many machines of a Ray cluster, with the face of `FusedLlama`.

Requests travel in shares of a few. Each actor holds a copy of the family and answers up to `N_SHARES` shares at a time.
The results of a share come all at once or not at all, so that one that runs again, because its process or its machine
died, neither loses nor doubles a row.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ..answers.requests import request_id
from ..api import FusedLlama
from ..errors import EdgeDLFError, InvalidParameterError, RequestInterruptedError
from ..llama import default_n_threads
from .ray_worker import Result, Share, Worker, died

logger = logging.getLogger(__name__)

N_SHARES = 8
"""Shares that an actor has at a time: while some wait for their longest row, others keep its sequences busy."""
N_ATTEMPTS = 3
"""Times that a share may be begun; after that its rows are taken for what kills the process."""
_N_PARALLEL = 32
"""Rows decoded at once that shares are made for where each actor finds its own number."""
_POLL_S = 0.1
_LOADING = -1
"""Stands for the number of a share while an actor loads the family."""


class RayLlama(contextlib.AbstractContextManager["RayLlama"]):
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
        self._is_interrupted = threading.Event()

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
        self._is_interrupted.set()

    def batch(self, requests: Iterable[Any], *, ordered: bool = False, **settings: Any) -> Iterator[Result]:
        """FusedLlama.batch on all machines, which load the family anew for it.

        `requests` is pulled in this thread, ahead by no more than twice what the actors hold. A row whose process died
        so often that it is taken for the reason gives an error with the code "worker_died". Raises what loading the
        family or its batch raises, with the machine's name, and EdgeDLFError where Ray fails.
        """
        self._is_interrupted.clear()
        worker = ray.remote(Worker).options(
            num_cpus=self._n_cores, num_gpus=self._n_gpus, max_concurrency=N_SHARES, max_restarts=0
        )
        made = (self._load, self._loading, self._n_cores, settings, str(Path.cwd()))
        pool = _Pool(lambda: worker.remote(*made), self.n_actors)
        shares = enumerate(_shares(requests, self._n_rows))
        n_sent = n_given = 0
        done: dict[int, list[Result]] = {}
        try:
            while True:
                for number, share in islice(shares, n_given + 2 * N_SHARES * self.n_actors - n_sent):
                    pool.waiting.append((number, share))
                    n_sent += 1
                if n_given == n_sent:
                    return
                for number, results in pool.finished():
                    done[number] = results
                    while (ready := done.pop(n_given if ordered else number, None)) is not None:
                        yield from ready
                        n_given += 1
                if self._is_interrupted.is_set():
                    raise RequestInterruptedError("the batch was interrupted")
        except RayError as error:
            raise EdgeDLFError(f"Ray failed: {_one_line(error)}") from error
        finally:
            pool.close()


class _Pool:
    """Actors that load the family, and the shares that wait for them.

    An actor that died is replaced by a new one, and what it held waits again.
    make: starts an actor.
    waiting: shares that no actor has, by number.
    """

    def __init__(self, make: Callable[[], Any], n_actors: int) -> None:
        self._make = make
        self._n_free: Counter[Any] = Counter()  # shares that each living actor has room for
        self._calls: dict[Any, tuple[Any, int, Share]] = {}
        self._n_begun: Counter[int] = Counter()
        self._n_failed_loads = 0
        self.waiting: deque[tuple[int, Share]] = deque()
        for _ in range(n_actors):
            self._add_actor()

    def _add_actor(self) -> None:
        actor = self._make()
        self._n_free[actor] = 0
        self._calls[actor.answer.remote([])] = actor, _LOADING, []

    def finished(self) -> Iterator[tuple[int, list[Result]]]:
        """Hand out shares, and wait a moment for results. Raises what an actor found in their place."""
        self._hand_out()
        for call in ray.wait([*self._calls], timeout=_POLL_S)[0]:
            actor, number, share = self._calls.pop(call)
            try:
                results = ray.get(call)
            except RayActorError:
                self._replace(actor, has_loaded=number != _LOADING)
                if self._n_begun[number] >= N_ATTEMPTS:
                    yield number, [died(custom_id, N_ATTEMPTS) for custom_id, _ in share]
                elif number != _LOADING:
                    self.waiting.append((number, share))
                continue
            if isinstance(results, EdgeDLFError):
                raise results
            if actor in self._n_free:
                self._n_free[actor] += N_SHARES if number == _LOADING else 1
            if number != _LOADING:
                del self._n_begun[number]
                yield number, results

    def _hand_out(self) -> None:
        """Give waiting shares to the actors with the most room.

        What was there at all deaths but the last allowed runs without others of its kind: only the one that kills will
        be there at the next.
        """
        while self.waiting:
            actor, n_free = self._n_free.most_common(1)[0]
            is_tried = any(self._n_begun[number] == N_ATTEMPTS for _, number, _ in self._calls.values())
            most = N_ATTEMPTS - 2 if is_tried else N_ATTEMPTS - 1
            found = next((share for share in self.waiting if self._n_begun[share[0]] <= most), None)
            if not n_free or not found:
                return
            self.waiting.remove(found)
            self._n_free[actor] -= 1
            self._n_begun[found[0]] += 1
            self._calls[actor.answer.remote(found[1])] = actor, *found

    def _replace(self, actor: Any, has_loaded: bool) -> None:
        """Start an actor in place of one that died. Raises the error at hand where none gets as far as to load."""
        self._n_failed_loads = 0 if has_loaded else self._n_failed_loads + 1
        if self._n_failed_loads >= N_ATTEMPTS:
            raise
        if actor in self._n_free:
            del self._n_free[actor]
            self._add_actor()

    def close(self) -> None:
        """End the actors."""
        for actor in self._n_free:
            ray.kill(actor)


def _shares(requests: Iterable[Any], n_rows: int) -> Iterator[Share]:
    """Requests in shares of up to `n_rows`, under the ids that FusedLlama.batch gives them."""
    named = ((request_id(request, number), request) for number, request in enumerate(requests, 1))
    while share := list(islice(named, n_rows)):
        yield share


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
