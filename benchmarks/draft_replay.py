"""Draft lengths compared without noise: recorded answers, measured batch costs, and a clock that only they turn.

    python benchmarks/draft_replay.py record --family FAMILY --out answers.jsonl [--tokens 96] [--temperatures 0,1.5]
                                             [--prompts N] [--questions FILE] [--settings JSON]
    python benchmarks/draft_replay.py costs --family FAMILY --out costs.json [--rounds 5]
    python benchmarks/draft_replay.py replay answers.jsonl --costs costs.json [--rows 1] [--set NAME=VALUE] [--out FILE]
    python benchmarks/draft_replay.py sure answers.jsonl --costs costs.json

`record` answers the prompts of draft.py plainly, and keeps at each position what was picked and what each member alone
would have picked under the same noise: what it drafts there while all guesses before are right. `--settings
'{"method": "static", "alpha": 0}'` records the large model alone, for which the base drafts. `costs` times batches of 1
to 9 tokens of each member. `replay` lets the decoder go through the recorded answers, with scripted members whose
batches take what was measured, each 5% more or less and one in 200 five times as long. It prints the tokens a second of
`draft="auto"` relative to plain decoding, by workload, the noise left out. --set gives a constant of
edge_dlf/engine/draft_length.py another value.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from draft import WORKLOADS, asked

from edge_dlf import FusedLlama, FusionParams, SamplingParams
from edge_dlf.answers.tokenizer import Prompt
from edge_dlf.engine import draft_length
from edge_dlf.engine.backend import N_ROWS, Logits, Run
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Draw, Pick
from edge_dlf.params import MAX_DRAFT

N_VOCAB = 1024
END = 0
LEAST_TOKENS = 400


def record(options: argparse.Namespace) -> None:
    """Answer every prompt plainly, and write what each member alone would have picked at each position."""
    with FusedLlama.from_family(options.family, n_ctx=512) as llm, options.out.open("a", encoding="utf-8") as out:
        prompts: dict[str, list[Prompt]] = {name: [*texts] for name, texts in WORKLOADS.items()}
        if options.questions:
            questions = options.questions.read_text("utf-8").splitlines()
            prompts["own"] = [llm.apply_chat_template(asked(text)) for text in questions]
        for temperature in options.temperatures:
            for workload, texts in prompts.items():
                for prompt in texts[: options.prompts]:
                    tokens = llm.tokenize(prompt) if isinstance(prompt, str) else [*prompt]
                    line: dict[str, Any] = {"workload": workload, "temperature": temperature, "prompt": tokens}
                    line |= recorded(llm, tokens, options.tokens, temperature, options.settings)
                    print(json.dumps(line), file=out, flush=True)
                print(f"{workload} at {temperature}", file=sys.stderr, flush=True)


def recorded(
    llm: FusedLlama, prompt: Prompt, n_tokens: int, temperature: float, settings: dict[str, Any]
) -> dict[str, Any]:
    """The answer's tokens and weights, whether it ended by itself, and each member's own choices and probabilities."""
    sampling = {"temperature": temperature, "seed": 1, **settings}
    stream = llm.stream(prompt, max_tokens=n_tokens, draft="off", trace=True, **sampling)
    tokens: list[int] = []
    weights: list[tuple[str | None, float]] = []
    alone: dict[str, list[tuple[int, float]]] = {}
    for token in stream:
        tokens.append(token.id)
        weights.append((token.expert, round(token.alpha, 2)))
        assert token.trace
        for name, picked in token.trace.members.items():
            alone.setdefault(name, []).append((picked.token, round(math.exp(picked.logprob), 6)))
    ended = stream.report.finish_reason == "stop"
    return {"tokens": tokens, "weights": weights, "ended": ended, "alone": alone}


def costs(options: argparse.Namespace) -> None:
    """Time batches of each member, in milliseconds, after 96 tokens. "switch": more after a batch of another size."""
    found: dict[str, Any] = {"members": {}, "pick": options.pick, "guess": options.guess}
    switches = []
    with FusedLlama.from_family(options.family, n_ctx=512) as llm:
        text = llm.tokenize("The committee met on Tuesday and put off the vote until spring.\n" * 40)
        for name, member in llm._ensemble.members.items():
            member.trim(0, 0)
            member.decode([Run(0, text[:96], 0)])
            times = defaultdict(list)
            for n in [*range(1, N_ROWS + 1)] * options.rounds:
                first, second = (batch_ms(member, text[96 : 96 + n]) for _ in range(2))
                times[n].append(second)
                switches.append(first - second)
            found["members"][name] = [round(median(times[n]), 3) for n in range(1, N_ROWS + 1)]
            member.trim(0, 0)
    found["switch"] = max(0.0, round(median(switches), 3))
    options.out.write_text(json.dumps(found) + "\n", "utf-8")


def batch_ms(member: Any, tokens: Sequence[int]) -> float:
    member.trim(0, 96)
    started = time.perf_counter()
    member.decode([Run(0, tokens, len(tokens))])
    member.logits()
    return 1e3 * (time.perf_counter() - started)


class Clock:
    """Seconds that only scripted work takes. nominal: without the noise that the decoder sees."""

    def __init__(self, seed: int) -> None:
        self.now = self.nominal = 0.0
        self._random = np.random.default_rng(seed)

    def __call__(self) -> float:
        return self.now

    def advance(self, ms: float) -> None:
        noise = math.exp(0.05 * self._random.standard_normal()) * (5 if self._random.random() < 0.005 else 1)
        self.nominal += ms / 1e3
        self.now += ms / 1e3 * noise


class Member:
    """A member that says what was recorded, wherever its text stands, and takes what was measured."""

    n_ctx, n_batch, can_trim, n_rollback, has_streams = 4096, 512, True, 0, False

    def __init__(self, clock: Clock, costs: Sequence[float], switch: float, n_seqs: int) -> None:
        self.n_bytes = int(1e6 * costs[0])
        self.n_seq_max, self.n_cells = n_seqs, self.n_ctx * n_seqs
        self.scripts: dict[int, tuple[Logits, int]] = {}
        self._clock, self._costs, self._switch = clock, costs, switch
        self._n_held = [0] * n_seqs
        self._n_last = 0

    def decode(self, runs: Sequence[Run]) -> None:
        rows = []
        for seq, tokens, n_rows in runs:
            self._n_held[seq] += len(tokens)
            script, n_prompt = self.scripts[seq]
            first = self._n_held[seq] - n_rows - n_prompt
            rows.append(script[np.clip(np.arange(first, first + n_rows), 0, len(script) - 1)])
        self._rows = np.concatenate(rows)
        n = sum(len(run.tokens) for run in runs)
        ms = self._costs[min(n, len(self._costs)) - 1] * max(1.0, n / len(self._costs))
        self._clock.advance(ms + self._switch * (n != self._n_last))
        self._n_last = n

    def logits(self) -> Logits:
        return self._rows

    def wait(self) -> None:
        pass

    def n_past(self, seq: int) -> int:
        return self._n_held[seq]

    def trim(self, seq: int, n_past: int) -> None:
        self._n_held[seq] = min(n_past, self._n_held[seq])

    def reach(self, seq: int, n_past: int) -> int:
        return n_past

    def checkpoint(self, seq: int, *, lasting: bool) -> None:
        pass

    def copy(self, source: int, target: int, n_past: int) -> None:
        self._n_held[target] = n_past

    def swap(self, a: int, b: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Answer:
    """A recorded answer, in a vocabulary of its own tokens. rows: member -> its logits at each position."""

    def __init__(self, line: Mapping[str, Any]) -> None:
        ids: dict[int, int] = {}

        def known(token: int) -> int:
            return ids.setdefault(token, len(ids) + 1)

        self.prompt = [known(token) for token in line["prompt"]]
        picks = [known(token) for token in line["tokens"]] + [END] * line["ended"]
        self.n_tokens, self.weights = len(picks), line["weights"]
        n_rows = self.n_tokens + MAX_DRAFT + 1
        self.rows = {name: np.zeros((n_rows, N_VOCAB), np.float32) for name in line["alone"]}
        self.rows["large"][np.arange(n_rows), [*picks, *[END] * (MAX_DRAFT + 1)]] = 1e3
        for name, choices in line["alone"].items():
            guesses = [*((known(token), p) for token, p in choices), *[(END, 0.9)] * n_rows][:n_rows]
            for n, (token, p) in enumerate(guesses if name != "large" else []):
                p = min(max(p, 1.5 / N_VOCAB), 0.9995)
                self.rows[name][n, token] = math.log(p * (N_VOCAB - 1) / (1 - p))
        assert len(ids) < N_VOCAB


class Replay:
    """Decodes recorded answers on scripted members, `n_rows` at once. Each seed numbers an answer."""

    def __init__(self, costs: Mapping[str, Any], names: Sequence[str], method: str, seed: int, n_rows: int) -> None:
        self._clock, self._costs, self._fuser = Clock(seed), costs, Fuser(N_VOCAB)
        batches = costs["members"]
        self._members = {
            name: Member(self._clock, batches.get(name) or batches["base"], costs["switch"], n_rows) for name in names
        }
        self._ensemble = Ensemble(self._members, N_VOCAB, clock=self._clock)
        self._decoder = Decoder(self._ensemble, self._fuser)
        self._fusion = FusionParams(method=method, **({"alpha": 1.0} if method == "static" else {}))
        self._pick = self._fuser.pick
        self._fuser.pick = self.pick  # type: ignore[method-assign]

    def pick(
        self, rows: Any, names: Sequence[str], fusion: FusionParams, weights: Any, draws: Sequence[Draw]
    ) -> list[Pick]:
        """Pick with the recorded weights, by which the drafting expert is chosen. One member alone makes a guess."""
        step, row = self._costs["pick"]
        self._clock.advance(self._costs["guess"] if len(names) == 1 else step + row * len(draws))
        picks = self._pick(rows, names, fusion, weights, draws)
        if len(names) == 1:
            return picks
        for k, draw in enumerate(draws):
            answer = self._answers[draw.seed]
            n = draw.position - len(answer.prompt)
            expert, alpha = answer.weights[n] if n < len(answer.weights) else (None, 0.0)
            picks[k] = picks[k]._replace(weights=tuple(alpha * (name == expert) for name in names[2:]))
        return picks

    def seconds(self, answers: Sequence[Answer], n_draft: int | None) -> float:
        """Nominal time of all answers, from the first token of each on."""
        self._answers, waiting = answers, deque(range(len(answers)))
        total, active, idle = 0.0, dict[int, Generation](), list(range(self._ensemble.n_seq_max))
        while waiting or active:
            while waiting and idle:
                seq = idle.pop()
                active[seq] = self._begun(waiting.popleft(), seq, n_draft)
            started = self._clock.nominal
            self._decoder.step([generation for generation in active.values() if generation.n_left > 0])
            total += self._clock.nominal - started
            idle += [seq for seq, generation in active.items() if generation.n_left <= 0]
            active = {seq: generation for seq, generation in active.items() if generation.n_left > 0}
        return total

    def _begun(self, number: int, seq: int, n_draft: int | None) -> Generation:
        """An answer with its first token."""
        answer = self._answers[number]
        self._ensemble.forget([seq])
        for name, member in self._members.items():
            member.scripts[seq] = answer.rows[name], len(answer.prompt)
        request = GenerationRequest(
            self._ensemble.roles(self._fusion),
            dict.fromkeys(self._members, answer.prompt),
            self._fusion,
            SamplingParams(temperature=0.0, seed=number),
            max_tokens=answer.n_tokens,
            n_draft=n_draft,
            is_end=lambda token: token == END,
        )
        generation = Generation(request, seq=seq)
        self._decoder.begin(generation)
        self._decoder.step([generation])
        return generation


def replay(options: argparse.Namespace) -> None:
    """Print, for each workload, the speed with drafts relative to plain decoding."""
    for setting in options.set:
        name, value = setting.split("=")
        assert hasattr(draft_length, name)
        setattr(draft_length, name, float(value))
    workloads: dict[str, list[Answer]] = defaultdict(list)
    for text in options.answers.read_text("utf-8").splitlines():
        line = json.loads(text)
        if line["tokens"]:
            workloads[f"{line['workload']}, {line['temperature']}"].append(Answer(line))
    turns = [answers[n : n + 1] for n in range(6) for answers in workloads.values()]
    workloads["in turn"] = [answer for answers in turns for answer in answers]
    costs = json.loads(options.costs.read_text("utf-8"))
    ratios = {}
    for workload, answers in workloads.items():
        answers *= 1 + options.rows * LEAST_TOKENS // sum(answer.n_tokens for answer in answers)
        names = [*answers[0].rows]
        plain = Replay(costs, names, options.method, 0, options.rows).seconds(answers, 0)
        seconds = [
            Replay(costs, names, options.method, seed, options.rows).seconds(answers, None)
            for seed in range(options.seeds)
        ]
        ratios[workload] = plain * options.seeds / sum(seconds)
        print(f"| {workload} | {ratios[workload]:.2f} |", flush=True)
    if options.out:
        options.out.write_text(json.dumps(ratios) + "\n", "utf-8")


def sure(options: argparse.Namespace) -> None:
    """Print how often the large model's best token has 0.99 or more, how often the fusion picks another one there, and
    the speed, relative to plain decoding, if base and experts read the tokens of such steps later in one batch."""
    costs = json.loads(options.costs.read_text("utf-8"))["members"]
    runs, counts = defaultdict[str, list[int]](list), defaultdict[str, Counter[str]](Counter)
    for text in options.answers.read_text("utf-8").splitlines():
        line = json.loads(text)
        name, n = f"{line['workload']}, {line['temperature']}", 0
        for token, (own, p) in zip(line["tokens"], line["alone"]["large"], strict=True):
            counts[name].update(tokens=1, sure=p >= 0.99, other=p >= 0.99 and own != token)
            n += 1
            if p < 0.99 or n == options.most:
                runs[name].append(n)
                n = 0
        runs[name] += [n] * (n > 0)
    for name, own in runs.items():
        count = counts[name]
        plain = count["tokens"] * sum(each[0] for each in costs.values())
        late = sum(
            costs[member][0] * length if member == "large" else costs[member][length - 1]
            for length in own
            for member in costs
        )
        cells = f"{count['sure'] / count['tokens']:.0%}", f"{count['other']} of {count['sure']}", f"{plain / late:.2f}"
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("record")
    command.set_defaults(run=record)
    command.add_argument("--family", required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--tokens", type=int, default=96)
    command.add_argument("--prompts", type=int, help="of each workload [all]")
    command.add_argument("--temperatures", type=lambda text: [float(part) for part in text.split(",")], default="0,1.5")
    command.add_argument("--questions", type=Path)
    command.add_argument("--settings", type=json.loads, default={}, help="of the fusion, JSON")
    command = commands.add_parser("costs")
    command.set_defaults(run=costs)
    command.add_argument("--family", required=True)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--rounds", type=int, default=5)
    command.add_argument("--pick", type=json.loads, default=[0.4, 0.6], help="ms of search and choice: a step, a row")
    command.add_argument("--guess", type=float, default=0.4, help="ms that a guess takes beside decoding")
    command = commands.add_parser("replay")
    command.set_defaults(run=replay)
    command.add_argument("answers", type=Path)
    command.add_argument("--costs", type=Path, required=True)
    command.add_argument("--method", default="static", help='"large" for the large model alone [static]')
    command.add_argument("--seeds", type=int, default=2)
    command.add_argument("--rows", type=int, default=1, help="answers that are decoded at once")
    command.add_argument("--set", action="append", default=[], help="NAME=VALUE")
    command.add_argument("--out", type=Path)
    command = commands.add_parser("sure")
    command.set_defaults(run=sure)
    command.add_argument("answers", type=Path)
    command.add_argument("--costs", type=Path, required=True)
    command.add_argument("--most", type=int, default=MAX_DRAFT + 1, help="tokens that are read at once")
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
