"""Drafted against plain answers on real weights: the same tokens, or the margin of the tie that rounding turned.

    python -m tests.lossless --family FAMILY --out ANSWERS.jsonl [--prompts 200] [--tokens 64] [--draft auto 3 8]
                             [--seconds 500]

Each prompt (maths, code, chat, quoting) is answered greedily and sampled, plainly and with each setting of `draft`.
llama.cpp rounds a batch by its shape, so that two choices that all but tie may change places. Where two answers part,
the rows that both were picked from are compared: they must be the same up to `ROUNDING`, and each answer must be what
the float64 oracle picks from its own rows. Then nothing but rounding has parted them; the margin says how near the tie
was.

Each prompt and sampling is a line of ANSWERS; the same command again goes on behind the last, and stops after
`--seconds`. The exit code is 1 if any answers parted for another reason, 3 while there is more to do.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_dlf import FusedLlama, SamplingParams
from edge_dlf.fusion.records import Draw

from . import naive

ROUNDING = 0.5
"""By how many nats llama.cpp's rounding may change a logit: 0.26 was seen on one row."""
SAMPLINGS = {"greedy": SamplingParams(temperature=0.0), "sampled": SamplingParams(temperature=0.8, seed=11)}
THINGS = ("apples", "tickets", "pencils", "cookies", "stamps", "books", "marbles", "shells", "coins", "cards")
NAMES = ("Ana", "Boris", "Chen", "Dora", "Emil", "Fatima", "Goran", "Hana", "Ines", "Jonas")
MATHS = (
    "{a} has {n} boxes with {m} {things} in each. {a} gives {k} {things} to {b}. How many {things} are left?",
    "{a} sells {n} {things} on Monday and half as many on Tuesday. {b} buys {k} of them. How many do others buy?",
    "A shop has {n} shelves with {m} {things} each and sells {k} {things} a day. How many days do they last?",
    "{a} earns ${n} an hour and works {m} hours. {b} earns ${k} more in total. How much does {b} earn?",
)
CODE = (
    "# Return the sum of all numbers below {n} that {m} divides.\ndef total():\n",
    'def {things}_of(name, count={k}):\n    """Give `name` so many {things}."""\n',
    "class {a}:\n    def __init__(self, {things}):\n        self.{things} = {things}\n\n    def add(self, count):\n",
    "SELECT name, COUNT(*) FROM {things} WHERE price > {n}",
)
CHAT = (
    "User: Where can I keep {n} {things} dry?\nAssistant:",
    "User: Write two sentences about {a}, who collects {things}.\nAssistant:",
    "User: Is it better to have {n} or {m} {things}, and why?\nAssistant:",
    "Once upon a time {a} found {k} {things} by the sea, and",
)
QUOTING = (
    "Text: {a} and {b} counted {n} {things}, then {m} more, and wrote it all down before the rain came.\n"
    "Repeat the text twice, word for word:\nText: {a} and {b} counted",
    "{n} {things}, {m} {things}, {k} {things}, {n} {things}, {m} {things}, {k} {things}, {n} {things},",
)
WORKLOADS = {"maths": MATHS, "code": CODE, "chat": CHAT, "quoting": QUOTING}


def prompts(n_prompts: int) -> Iterator[tuple[str, str]]:
    """Workloads in turn, and a prompt of each, all different."""
    for number, (name, forms) in zip(range(n_prompts), itertools.cycle(WORKLOADS.items())):
        n = number // len(WORKLOADS)
        text = forms[n % len(forms)].format(
            a=NAMES[n % 10],
            b=NAMES[(n + 3) % 10],
            things=THINGS[(n + n // 10) % 10],
            n=3 + n,
            m=4 + 7 * n % 29,
            k=2 + n % 11,
        )
        yield name, f"Question: {text}\nAnswer:" if forms is MATHS else text


@dataclass(frozen=True)
class Parting:
    """Where two answers part.

    token: their number. rounding: by how many nats the rows of any member differ among the tokens that matter.
    margin: how far apart the two choices were, in nats: between the fused logits, noise included, where both have the
    same α (None where a filter lies between them), else between the two √J. is_tie: nothing but rounding has
    parted them.
    """

    token: int
    alphas: tuple[float, float]
    rounding: float
    margin: float | None
    is_tie: bool


@dataclass(frozen=True)
class Choice:
    """A token, the weight it was picked with, and of which expert."""

    id: int
    alpha: float
    expert: str | None


class Recorder:
    """Keeps what each token is picked from, by the seed of its answer and its position, while entered.

    rows: of large, base and experts. choices: what was picked from them, with which draw.
    """

    def __init__(self, llm: FusedLlama) -> None:
        self.llm = llm
        self.rows: dict[tuple[int, int], list[Any]] = {}
        self.choices: dict[tuple[int, int], tuple[Choice, Draw]] = {}
        self._fuser = llm.driver.decoder.fuser
        self._pick = self._fuser.pick

    def __enter__(self) -> Recorder:
        self._fuser.pick = self._record
        return self

    def __exit__(self, *_: object) -> None:
        del self._fuser.pick

    def _record(self, members: Any, names: Any, params: Any, weights: Any, draws: Sequence[Draw]) -> Any:
        picked = self._pick(members, names, params, weights, draws)
        if len(members) > 1:
            for k, draw in enumerate(draws):
                key = draw.seed, draw.position
                self.rows[key] = [member[k][: self.llm.n_vocab].copy() for member in members]
                alpha, expert = max(zip(picked[k].weights, self.llm.experts, strict=True))
                self.choices[key] = Choice(picked[k].token, alpha, expert if alpha else None), draw
        return picked

    def answer(self, prompt: str, n_tokens: int, draft: Any, sampling: SamplingParams) -> Any:
        """Answer anew; returns the report."""
        self.rows.clear()
        self.choices.clear()
        self.llm._ensemble.forget([0])  # the prompt is then evaluated in the same batches
        settings = {**vars(sampling), "seed": sampling.seed or 0}
        tokens = self.llm.stream(prompt, max_tokens=n_tokens, draft=draft, **settings)
        for _ in tokens:
            pass
        return tokens.report


def judge(
    n: int, plain: Choice, other: Choice, rows: Sequence[Sequence[Any]], draw: Draw, experts: Sequence[str]
) -> Parting:
    """What has parted two answers at token `n`, by the rows that each was picked from there."""
    wide = [[row.astype(np.float64) for row in members] for members in rows]
    is_right = all(
        _is_right(members, token, draw, experts) for members, token in zip(wide, (plain, other), strict=True)
    )
    rounding = max(_difference(a, b) for a, b in zip(*wide, strict=True))
    margin = _margin(wide[0], plain, other, draw, experts)
    return Parting(n, (plain.alpha, other.alpha), rounding, margin, is_right and rounding < ROUNDING)


def parting(one: Recorder, other: Recorder, seed: int, n_prompt: int) -> Parting | None:
    """Where the answers with this seed part that two recorders saw, if they do."""
    for n in itertools.count():
        key = seed, n_prompt + n
        if key not in one.choices or key not in other.choices:
            return None
        (plain, draw), (changed, _) = one.choices[key], other.choices[key]
        if plain.id != changed.id:
            return judge(n, plain, changed, (one.rows[key], other.rows[key]), draw, one.llm.experts)
    return None


def _fused(members: Sequence[Any], token: Choice, experts: Sequence[str]) -> Any:
    large, base, *rows = members
    return large + token.alpha * (rows[experts.index(token.expert)] - base) if token.expert else large


def _objective(members: Sequence[Any], token: Choice, experts: Sequence[str]) -> float:
    large, base, *rows = members
    t = experts.index(token.expert) if token.expert else 0
    return float(naive.objectives(large, base, rows, np.array([token.alpha]))[0][t, 0])


def _is_right(members: Sequence[Any], token: Choice, draw: Draw, experts: Sequence[str]) -> bool:
    """Whether the oracle chooses this α and this token from these rows."""
    large, base, *rows = members
    _, _, best = naive.search(large, base, rows)
    picked = naive.select(_fused(members, token, experts), draw.sampling, draw.seed, draw.position, draw.recent)
    return picked == token.id and _objective(members, token, experts) <= best * (1 + 1e-4) + 1e-9


def _difference(a: Any, b: Any) -> float:
    """Nats by which two rows of one member differ, among its hundred likeliest tokens, beyond a constant."""
    likely = np.argpartition(a, -100)[-100:]
    difference = (a - b)[likely]
    return float(np.abs(difference - np.median(difference)).max())


def _margin(members: Sequence[Any], plain: Choice, other: Choice, draw: Draw, experts: Sequence[str]) -> float | None:
    x = draw.sampling
    if (plain.alpha, plain.expert) != (other.alpha, other.expert):
        ours, theirs = (_objective(members, token, experts) for token in (plain, other))
        return math.sqrt(theirs) - math.sqrt(ours)
    fused = _fused(members, plain, experts)
    gap = float(fused[plain.id] - fused[other.id])
    if x.temperature == 0.0:
        return gap
    if not {plain.id, other.id} <= set(map(int, naive.kept(fused, x))):
        return None
    noise = [naive.gumbel(draw.seed, draw.position, token) for token in (plain.id, other.id)]
    return float(gap + x.temperature * (noise[0] - noise[1]))


def compare(
    recorder: Recorder, prompt: str, n_tokens: int, drafts: Sequence[Any], sampling: SamplingParams
) -> Iterator[tuple[Any, Any, Parting | None]]:
    """Answer plainly, then with each of `drafts`: yields it, the report, and where the answers part, if they do."""
    report = recorder.answer(prompt, n_tokens, "off", sampling)
    plain = copy.copy(recorder)
    plain.rows, plain.choices = dict(recorder.rows), dict(recorder.choices)
    for draft in drafts:
        report = recorder.answer(prompt, n_tokens, draft, sampling)
        yield draft, report, parting(plain, recorder, sampling.seed or 0, report.n_prompt)


def work(llm: FusedLlama, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Lines for the cases that ANSWERS does not have yet."""
    done = {(line["prompt"], line["sampling"]) for line in read(options.out)}
    with Recorder(llm) as recorder:
        for (number, (workload, prompt)), sampling in itertools.product(
            enumerate(prompts(options.prompts)), options.sampling
        ):
            if (number, sampling) in done:
                continue
            cases = [
                {
                    "draft": draft,
                    "n_tokens": report.n_generated,
                    "n_drafted": report.counts.n_drafted,
                    "n_accepted": report.counts.n_accepted,
                    "parting": asdict(parting) if parting else None,
                }
                for draft, report, parting in compare(
                    recorder, prompt, options.tokens, options.draft, SAMPLINGS[sampling]
                )
            ]
            yield {"prompt": number, "workload": workload, "sampling": sampling, "cases": cases}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(lines: Sequence[dict[str, Any]]) -> bool:
    """Print what was compared; whether nothing but rounding has parted any answers."""
    groups: dict[tuple[str, str, Any], list[dict[str, Any]]] = {}
    for line in lines:
        for case in line["cases"]:
            groups.setdefault((line["workload"], line["sampling"], case["draft"]), []).append(case)
    print("| workload | sampling | draft | answers | tokens | accepted | equal | parted by rounding | otherwise |")
    print("|---|---|---|---|---|---|---|---|---|")
    for key, cases in groups.items():
        partings = [case["parting"] for case in cases if case["parting"]]
        n_ties = sum(parting["is_tie"] for parting in partings)
        n_drafted, n_accepted = (sum(case[name] for case in cases) for name in ("n_drafted", "n_accepted"))
        cells = [*key, len(cases), sum(case["n_tokens"] for case in cases), f"{n_accepted / max(n_drafted, 1):.0%}"]
        cells += [len(cases) - len(partings), n_ties, len(partings) - n_ties]
        print(f"| {' | '.join(map(str, cells))} |")
    partings = [case["parting"] for cases in groups.values() for case in cases if case["parting"]]
    if partings:
        print("\n| answers | token | α | rounding, nats | margin |\n|---|---|---|---|---|")
    for (workload, sampling, draft), cases in groups.items():
        for parting in (case["parting"] for case in cases if case["parting"]):
            plain, other = parting["alphas"]
            unit = "nats" if plain == other else "nats of √J"
            margin = "at a filter" if parting["margin"] is None else f"{parting['margin']:.3g} {unit}"
            name = f"{workload}, {sampling}, draft {draft}"
            print(f"| {name} | {parting['token']} | {plain:g}, {other:g} | {parting['rounding']:.2f} | {margin} |")
    return all(parting["is_tie"] for parting in partings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draft", nargs="+", default=["auto", 3, 8], type=lambda x: int(x) if x.isdigit() else x)
    parser.add_argument("--sampling", nargs="+", default=list(SAMPLINGS), choices=SAMPLINGS)
    parser.add_argument("--seconds", type=float, default=math.inf)
    options = parser.parse_args()
    started, is_done = time.monotonic(), True
    with FusedLlama.from_family(options.family, n_ctx=512) as llm, options.out.open("a") as out:
        for line in work(llm, options):
            out.write(json.dumps(line) + "\n")
            out.flush()
            if time.monotonic() - started > options.seconds:
                is_done = False
                break
    is_lossless = summarise(read(options.out))
    return (0 if is_done else 3) if is_lossless else 1


if __name__ == "__main__":
    sys.exit(main())
