"""The server against a batch: the same questions, as many at once, in turn.

    python benchmarks/serve.py --family FAMILY [--parallel 32] [--clients 32] [--answers 640] [--tokens 16]
        [--rounds 3] [--threads N]

Each round answers every question by `FusedLlama.batch` in this process, by `edge-dlf serve` whole and streamed, and by
the batch again beside a process that keeps a core as busy as the streams' clients did: where clients and server share
the cores, that is what a batch would make of what is left to the server. Clients are one process that reads raw
sockets. A client asks again once it has its answer: with more clients than places, none is empty until then. Shown:
tokens a second of all rounds together, against the batch and against the hindered one; milliseconds of processor time a
token that the server (or the batch) takes, and its clients.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import selectors
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

import psutil
from soak import QUESTIONS

from edge_dlf import FusedLlama

WAYS = "batch", "served whole", "served streamed", "batch, hindered"


@dataclass
class Tally:
    """Of all rounds of one way: tokens, seconds, and seconds of the processor that the engine and the clients took."""

    n_tokens: int = 0
    seconds: float = 0.0
    engine_s: float = 0.0
    clients_s: float = 0.0

    def add(self, n_tokens: int, seconds: float, engine_s: float, clients_s: float) -> None:
        self.n_tokens += n_tokens
        self.seconds += seconds
        self.engine_s += engine_s
        self.clients_s += clients_s

    @property
    def tps(self) -> float:
        return self.n_tokens / self.seconds


def request(question: str, tokens: int, stream: bool) -> bytes:
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": tokens, "temperature": 0}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps(body).encode()
    return b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s" % (len(raw), raw)


def has_ended(answer: bytearray, stream: bool) -> bool:
    if stream:
        return answer.endswith(b"\r\n0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    return bool(length) and len(body) >= int(length[1])


def clients(pipe: Connection) -> None:
    """Asks as many questions at once as there are sockets, all of them once; sends tokens, seconds, processor time."""
    while (job := pipe.recv()) is not None:
        address, n_clients, requests, stream = job
        waiting, n_tokens = list(reversed(requests)), 0
        started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        with selectors.DefaultSelector() as selector:
            for _ in range(min(n_clients, len(waiting))):
                connected = socket.create_connection(address)
                selector.register(connected, selectors.EVENT_READ, bytearray())
                connected.sendall(waiting.pop())
            while selector.get_map():
                for key, _ in selector.select():
                    key.data.extend(key.fileobj.recv(65536))
                    if not has_ended(key.data, stream):
                        continue
                    n_tokens += int(re.search(rb'"completion_tokens":(\d+)', key.data)[1])
                    key.data.clear()
                    if waiting:
                        key.fileobj.sendall(waiting.pop())
                    else:
                        selector.unregister(key.fileobj)
                        key.fileobj.close()
        after = resource.getrusage(resource.RUSAGE_SELF)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        pipe.send((n_tokens, time.perf_counter() - started, busy))


def hinder(pipe: Connection) -> None:
    """Takes the share of a core that it is told, in turns of 2 ms, until it is told another."""
    share = 0.0
    while True:
        if pipe.poll(None if share == 0.0 else 2e-3 * (1 - share)):
            share = pipe.recv()
            if share is None:
                return
        until = time.process_time() + 2e-3 * share
        while time.process_time() < until:
            pass


@contextmanager
def beside(work: Callable[[Connection], None]) -> Iterator[Connection]:
    """A process that does `work`, and a pipe to it."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(theirs,), daemon=True)
    process.start()
    yield ours
    ours.send(None)
    process.join()


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[tuple[psutil.Process, tuple[str, int]]]:
    """`edge-dlf serve`, and its address."""
    command = [sys.executable, "-m", "edge_dlf", "serve", options.family, "--port", "0", "--ctx-size", "512"]
    command += ["--parallel", str(options.parallel)]
    command += ["--threads", str(options.threads)] if options.threads else []
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        found = next(filter(None, (re.search(r"at http://([\d.]+):(\d+)", line) for line in process.stderr)))
        try:
            yield psutil.Process(process.pid), (found[1], int(found[2]))
        finally:
            process.terminate()


def busy_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--parallel", type=int, default=32)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--answers", type=int, default=640)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    asked = [QUESTIONS[n % len(QUESTIONS)] for n in range(options.answers)]
    own = psutil.Process()
    tallies = {way: Tally() for way in WAYS}

    def batch(questions: list[str]) -> tuple[int, float, float, float]:
        rows = [
            {"messages": [{"role": "user", "content": question}], "max_tokens": options.tokens}
            for question in questions
        ]
        started, before = time.perf_counter(), busy_s(own)
        results = list(llm.batch(rows, temperature=0.0))
        seconds, busy = time.perf_counter() - started, busy_s(own) - before
        return sum(r["response"]["body"]["usage"]["completion_tokens"] for r in results), seconds, busy, 0.0

    with (
        FusedLlama.from_family(
            options.family, n_ctx=512, n_parallel=options.parallel, n_threads=options.threads
        ) as llm,
        serving(options) as (server, address),
        beside(clients) as asking,
        beside(hinder) as hindering,
    ):

        def served(questions: list[str], stream: bool) -> tuple[int, float, float, float]:
            before = busy_s(server)
            requests = [request(question, options.tokens, stream) for question in questions]
            asking.send((address, options.clients, requests, stream))
            n_tokens, seconds, busy = asking.recv()
            return n_tokens, seconds, busy_s(server) - before, busy

        for stream in (False, True):
            served(asked[:64], stream)
        batch(asked[:64])
        for number in range(options.rounds):
            order = WAYS[:3] if number % 2 == 0 else WAYS[2::-1]
            for way in order:
                done = batch(asked) if way == "batch" else served(asked, way == "served streamed")
                tallies[way].add(*done)
            streamed = tallies["served streamed"]
            hindering.send(streamed.clients_s / streamed.seconds)
            tallies["batch, hindered"].add(*batch(asked))
            hindering.send(0.0)
    print("| | tokens/s | of the batch | of the hindered one | ms of the processor a token | of the clients |")
    print("|---|---|---|---|---|---|")
    for way, tally in tallies.items():
        shares = (f"{tally.tps / tallies[other].tps:.2f}" for other in ("batch", "batch, hindered"))
        busy = (f"{1e3 * s / tally.n_tokens:.2f}" for s in (tally.engine_s, tally.clients_s))
        print(f"| {way} | {tally.tps:.0f} | {' | '.join(shares)} | {' | '.join(busy)} |")


if __name__ == "__main__":
    main()
