"""Random and hostile grammars and schemas against a running server, beside eight clients who only want an answer.

    python benchmarks/form_attack.py [--forms 1000] [--attackers 4] [--seed 1] [--tokens 40] [--json]

Starts `edge-dlf serve -f demo`. The attackers send one form after the other: ambiguous, deep, wide and recursive
grammars, broken ones, and JSON schemas of the same kinds. Each asks for some tokens, with a bias towards those that
lead on. The other clients ask the same short question over and over. In the end SIGTERM comes while the worst forms
are being read.

Shown: what became of the forms, the longest that another client waited, answers to others that differ from what a
client gets alone, and how the server ended. The exit code is 1 if it crashed, an answer failed for a reason of the
server's own, another client waited for more than 2 s, or the end took more than 5 s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

N_OTHERS = 8
MOST_WAIT_S, MOST_END_S = 2.0, 5.0
QUESTION = {"messages": [{"role": "user", "content": "How much is 21 and 39 together?"}], "temperature": 0}
BIAS = {"87": 12, "64": 6, "32": 4}
Form = dict[str, Any]


class Grammars:
    """A random GBNF grammar of some kind."""

    def __init__(self, generator: random.Random) -> None:
        self.random = generator
        self.kinds: tuple[Callable[[], str], ...] = (
            self.plain, self.ambiguous, self.deep, self.wide, self.chain, self.repeated, self.broken, self.hidden,
        )  # fmt: skip

    def grammar(self) -> tuple[str, Form]:
        kind = self.random.choice(self.kinds)
        return kind.__name__, {"grammar": kind()}

    def size(self, *sizes: int) -> int:
        return self.random.choice(sizes)

    def item(self, names: list[str], depth: int) -> str:
        """A random expression over these rules."""
        choose = self.random.choice
        kind = choose(["text", "text", "set", "name", "group", "times"]) if depth else "text"
        if kind == "text":
            return choose(['"x"', '"x"', '"yes"', '"\\n"', '"é["', '""', '"\\u20ac)"', '"xx"'])
        if kind == "set":
            return choose(["[a-z]", "[^x]", "[ \\t\\n]", "[x]", ".", "[^]", "[]", "[\\x00-\\U0010ffff]"])
        if kind == "name":
            return choose(names)
        parts = [self.item(names, depth - 1) for _ in range(self.random.randint(1, 4))]
        group = "(" + choose([" ", " | "]).join(parts) + ")"
        return group + choose(["*", "+", "?", "{2}", "{0,3}", "{1,}"]) if kind == "times" else group

    def plain(self) -> str:
        names = ["root", *(f"r{n}" for n in range(self.random.randint(0, 6)))]
        return "\n".join(f"{name} ::= {self.item(names, 3)} {self.item(names, 2)}" for name in names)

    def ambiguous(self) -> str:
        tail = self.random.choice(["root?", "root", "(root | root?)", "root*", "(root root)?"])
        return f'root ::= "x" {" ".join([tail] * self.random.randint(1, 12))} | "x" | {tail.rstrip("?*")} "x"'

    def deep(self) -> str:
        n = self.size(10, 300, 3000, 60_000)
        return "root ::= " + "(" * n + self.item(["root"], 2) + self.random.choice([")", ")?", ' "x")', ")*"]) * n

    def wide(self) -> str:
        n = self.size(100, 3000, 30_000)
        return "root ::= (" + " | ".join(f'"x{n:x}"' for n in range(n)) + ")" + self.random.choice(["", "*", " root?"])

    def chain(self) -> str:
        n = self.size(100, 1000, 5000, 50_000, 300_000)
        last = self.random.choice(['"x"', "root", "r0?", '"x" r1'])
        link = self.random.choice(["r{}", '"x" r{}', "r{} r{}", "r{}? r{}?", '( r{} "x" )*'])
        return (
            "root ::= r0\n"
            + "\n".join(f"r{k} ::= {link.format(k + 1, k + 1)}" for k in range(n))
            + f"\nr{n} ::= {last}"
        )

    def repeated(self) -> str:
        text = self.item(["root"], 1)
        for _ in range(self.random.randint(1, 5)):
            text = f"({text}){{{self.size(0, 1, 9)},{self.size(10, 1000, 100_000, 2**40)}}}"
        return f"root ::= {text}"

    def broken(self) -> str:
        text = list(self.plain())
        for _ in range(self.random.randint(1, 4)):
            text[self.random.randrange(len(text))] = self.random.choice(
                ["(", ")", '"', "[", "\\", "{9", "\0", "|", "\n", "::="]
            )
        return "".join(text)

    def hidden(self) -> str:
        n = self.size(100, 20_000)
        return f'#{")" * n}\nroot ::= {"(" * n}"x" "y"{")?" * n}'


class Schemas:
    """A random JSON schema."""

    def __init__(self, generator: random.Random) -> None:
        self.random = generator

    def schema(self) -> tuple[str, Form]:
        if self.random.random() < 0.3:
            return "schema chain", self.wrapped(self.chain())
        return "schema", self.wrapped({**self.tree(4), "$defs": {"a": self.tree(2), "b": self.tree(2)}})

    @staticmethod
    def wrapped(schema: Any) -> Form:
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}

    def chain(self) -> dict[str, Any]:
        n = self.random.choice([50, 90, 2000, 20_000])
        if n < 100:
            schema: dict[str, Any] = {"type": "integer"}
            for _ in range(n):
                schema = {"type": "array", "items": schema, "minItems": 1}
            return schema
        keyword = self.random.choice(["$ref", "allOf", "anyOf"])
        links = [{"$ref": f"#/$defs/r{k + 1}"} for k in range(n)]
        defs = {f"r{k}": link if keyword == "$ref" else {keyword: [link, link]} for k, link in enumerate(links)}
        return {"$ref": "#/$defs/r0", "$defs": {**defs, f"r{n}": {"type": "null"}}}

    def tree(self, depth: int) -> dict[str, Any]:
        choose, randint = self.random.choice, self.random.randint
        kinds = ["string", "integer", "pattern", "enum", "ref"] + (["object", "array", "of", "of"] if depth else [])
        kind = choose(kinds)
        if kind == "string":
            return {"type": "string", "maxLength": choose([3, 1000, 10**9]), "minLength": choose([0, 2, 500])}
        if kind == "integer":
            return {
                "type": choose(["integer", "number"]),
                "minimum": choose([-5, 0, 1e-9]),
                "multipleOf": choose([1, 7, 0.1]),
            }
        if kind == "pattern":
            inner = choose(["a", "x|y", "[a-z]", "aa?", ".", "\\\\w", "(a|aa)*b"])
            return {
                "type": "string",
                "pattern": f"^(({inner}){{0,{choose([2, 90, 5000])}}}){choose(['*', '{0,90}', ''])}$",
            }
        if kind == "enum":
            return {"enum": [choose([f"x{k}", k, None]) for k in range(choose([1, 20, 5000]))]}
        if kind == "ref":
            return {"$ref": choose(["#", "#/$defs/a", "#/$defs/b", "#/$defs/none"])}
        if kind == "array":
            return {
                "type": "array",
                "items": self.tree(depth - 1),
                "minItems": randint(0, 3),
                "maxItems": choose([3, 10**6]),
            }
        if kind == "of":
            return {choose(["anyOf", "allOf", "oneOf"]): [self.tree(depth - 1) for _ in range(choose([1, 2, 8]))]}
        names = [f"k{k}" for k in range(choose([1, 3, 200]))]
        schema: dict[str, Any] = {"type": "object", "properties": {name: self.tree(depth - 1) for name in names[:8]}}
        schema["required"] = names[: randint(0, 2)]
        if choose([True, False]):
            schema["patternProperties"] = {choose(["^k0$", "k", "^(a|aa)*$"]): self.tree(depth - 1)}
        return {**schema, "additionalProperties": choose([True, False, self.tree(0)])}


@dataclass
class Report:
    """What came of an attack."""

    n_forms: dict[str, int] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    n_others: int = 0
    n_different: int = 0
    longest_wait_s: float = 0.0
    slowest_form_s: float = 0.0
    ended_after_s: float = 0.0
    exit_code: int | None = None
    faults: list[str] = field(default_factory=list)


def outcome(response: httpx.Response) -> str:
    """What became of a form."""
    if response.status_code == 200:
        return str(response.json()["choices"][0]["finish_reason"])
    error = response.json()["error"]
    reason = re.split(r"[:;,]", error["message"])[0] if response.status_code == 400 else error["message"]
    return f"{response.status_code} {reason:.60}"


class Attack:
    def __init__(self, url: str, seed: int, n_forms: int, n_attackers: int, n_tokens: int) -> None:
        self.url, self.seed, self.left, self.n_attackers, self.n_tokens = url, seed, n_forms, n_attackers, n_tokens
        self.report = Report()
        self.lock = threading.Lock()
        self.is_over = threading.Event()
        with httpx.Client(base_url=url, timeout=120) as client:
            self.alone = self.ask(client)

    @staticmethod
    def ask(client: httpx.Client) -> str:
        response = client.post("/v1/chat/completions", json=QUESTION)
        response.raise_for_status()
        return str(response.json()["choices"][0]["message"]["content"])

    def run(self) -> None:
        attackers = [threading.Thread(target=self.attack, args=(k,)) for k in range(self.n_attackers)]
        others = [threading.Thread(target=self.wait_and_see) for _ in range(N_OTHERS)]
        for thread in (*attackers, *others):
            thread.start()
        for thread in attackers:
            thread.join()
        self.is_over.set()
        for thread in others:
            thread.join()

    def attack(self, k: int) -> None:
        generator = random.Random(f"{self.seed} {k}")
        grammars, schemas = Grammars(generator), Schemas(generator)
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while True:
                with self.lock:
                    if self.left == 0:
                        return
                    self.left -= 1
                kind, form = grammars.grammar() if generator.random() < 0.6 else schemas.schema()
                body = {"prompt": "Answer:", "max_tokens": self.n_tokens, "seed": 1, "logit_bias": BIAS, **form}
                started = time.perf_counter()
                try:
                    found = outcome(client.post("/v1/completions", json=body))
                except Exception as error:
                    found = f"no answer: {error!r}"
                with self.lock:
                    self.report.n_forms[kind] = self.report.n_forms.get(kind, 0) + 1
                    self.report.outcomes[found] = self.report.outcomes.get(found, 0) + 1
                    self.report.slowest_form_s = max(self.report.slowest_form_s, time.perf_counter() - started)
                    if not (found in ("stop", "length") or found.startswith(("400", "413"))):
                        self.report.faults.append(f"{kind}: {found}: {json.dumps(form):.300}")

    def wait_and_see(self) -> None:
        with httpx.Client(base_url=self.url, timeout=120) as client:
            while not self.is_over.is_set():
                started = time.perf_counter()
                try:
                    text = self.ask(client)
                except Exception as error:
                    with self.lock:
                        self.report.faults.append(f"another client: {error!r}")
                    return
                with self.lock:
                    self.report.n_others += 1
                    self.report.n_different += text != self.alone
                    self.report.longest_wait_s = max(self.report.longest_wait_s, time.perf_counter() - started)
                self.is_over.wait(0.05)

    def last_blow(self) -> list[threading.Thread]:
        """Send forms that are read, or that each token computes, for as long as they may."""
        endless = 'root ::= s\ns ::= s s | s s s | "x" | ""'
        rules = "\n".join(f'r{n} ::= "x"' for n in range(100_000))
        huge = f"root ::= {' '.join(f'r{n}' for n in range(100_000))}\n{rules}"

        def send(grammar: str) -> None:
            body = {"prompt": "a", "grammar": grammar, "logit_bias": {"87": 100}}
            with httpx.Client(base_url=self.url, timeout=120) as client:
                for _ in range(50):
                    try:
                        client.post("/v1/completions", json=body)
                    except httpx.HTTPError:
                        return

        threads = [threading.Thread(target=send, args=(grammar,)) for grammar in (endless, huge) * (N_OTHERS // 2)]
        for thread in threads:
            thread.start()
        return threads


def run(n_forms: int, n_attackers: int, seed: int, n_tokens: int) -> Report:
    """Attack a server of the shipped family."""
    command = [sys.executable, "-m", "edge_dlf", "serve", "-f", "demo", "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ}) as server:
        assert server.stderr
        url = next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        drain = threading.Thread(target=server.stderr.read)
        drain.start()
        try:
            attack = Attack(url, seed, n_forms, n_attackers, n_tokens)
            attack.run()
            report = attack.report
            if server.poll() is not None:
                report.faults.append(f"the server has ended: {server.returncode}")
            last = attack.last_blow()
            time.sleep(1)
            started = time.perf_counter()
            server.send_signal(signal.SIGTERM)
            report.exit_code = server.wait(60)
            report.ended_after_s = time.perf_counter() - started
            for thread in last:
                thread.join()
        finally:
            server.kill()
            drain.join()
    if report.exit_code not in (143, -signal.SIGTERM):
        report.faults.append(f"the server ended with {report.exit_code}")
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", type=int, default=1000)
    parser.add_argument("--attackers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=40, help="of each answer that keeps to a form")
    parser.add_argument("--json", action="store_true", help="one object")
    args = parser.parse_args()
    report = run(args.forms, args.attackers, args.seed, args.tokens)
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        for name, value in asdict(report).items():
            print(f"{name}: {value}")
    is_late = report.longest_wait_s > MOST_WAIT_S or report.ended_after_s > MOST_END_S
    raise SystemExit(1 if report.faults or is_late else 0)


if __name__ == "__main__":
    main()
