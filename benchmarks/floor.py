"""How near the floor is a fused step: its time against the sum of its members' own `llama_decode` calls.

    python benchmarks/floor.py --family FAMILY [--family OTHER] [--steps 40] [--rounds 5] [--prompt-tokens 200]
                               [--threads N]

Both are timed in turn, step by step, in one process, on the same text; the table has medians. A member's column
is llama_decode on its context and the wait for its logits, nothing else; "fused" is `Decoder.step` as `edge-dlf` runs
it: the same calls, the search for α if the family's own method has one, the fusion and the greedy choice. "Each on its
own": --steps steps of one member after the other, in a context with the attention that is llama.cpp's default, then as
many fused ones, once a round; so a member finds the caches of the CPU as it left them. Several
families take turns, round by round; the last line compares their fused steps with those of the first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from statistics import median

from edge_dlf import FusedLlama, SamplingParams
from edge_dlf.engine.backend import Run
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.llama import LlamaBackend
from edge_dlf.params import params_of

Times = dict[str, float]
TEXT = "The quick brown fox jumps over the lazy dog. "


class Timer:
    def __enter__(self) -> Timer:
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.ms = 1e3 * (time.perf_counter() - self.started)


def generation_of(llm: FusedLlama, prompt: list[int]) -> Generation:
    """A greedy answer by the family's own method."""
    (_, fusion), sampling = params_of(llm.files.spec.defaults), SamplingParams(temperature=0.0)
    roles = llm.driver.decoder.ensemble.roles(fusion)
    return Generation(GenerationRequest(roles, dict.fromkeys(roles.members, prompt), fusion, sampling))


def measure_each(llm: FusedLlama, prompt: list[int], n_steps: int, n_threads: int | None) -> Times:
    """Median milliseconds of a step while nothing else is run, by what was timed, as in `measure`."""
    decoder, generation, times = llm.driver.decoder, generation_of(llm, prompt), {}

    def median_of(step: Callable[[], object]) -> float:
        steps = []
        for _ in range(n_steps):
            with Timer() as timer:
                step()
            steps.append(timer.ms)
        return median(steps)

    for name in generation.members:
        like = decoder.ensemble.members[name]
        member = LlamaBackend(like.model, name, n_ctx=like.n_ctx, n_threads=n_threads, loras=like.loras)
        with closing(member):
            member.decode([Run(0, prompt, 1)])
            times[name] = median_of(lambda member=member: (member.decode([Run(0, prompt[:1], 1)]), member.logits()))
        decoder.ensemble.shorten(name, 0, 0)
    decoder.begin(generation)
    decoder.step([generation])
    return times | {"fused": median_of(lambda: decoder.step([generation]))}


def measure(llm: FusedLlama, prompt: list[int], n_steps: int) -> tuple[list[Times], list[Times]]:
    """Milliseconds of one prefill, and of each step, by what was timed: each member, and "fused"."""
    decoder, generation = llm.driver.decoder, generation_of(llm, prompt)
    ensemble, names = decoder.ensemble, generation.members

    def rewind(n_tokens: int) -> None:
        for name in names:
            ensemble.shorten(name, 0, n_tokens)

    def fused(_: list[int]) -> Times:
        with Timer() as timer:
            if not ensemble.n_held(names[0], 0):
                decoder.begin(generation)
            decoder.step([generation])
        return {"fused": timer.ms}

    def alone(tokens: list[int]) -> Times:
        times = {}
        for name in names:
            with Timer() as timer:
                ensemble.decode({name: [Run(0, tokens, 1)]})
            times[name] = timer.ms
        return times

    prefills = []
    for order in ((fused, alone), (alone, fused)) * 2:
        times: Times = {}
        for run in order:
            rewind(0)
            generation.tokens = list(prompt)
            times |= run(prompt)
        prefills.append(times)
    steps = []
    for step in range(n_steps):
        tokens, n_held = generation.tokens[-1:], len(generation.tokens) - 1
        times = {}
        for run in (fused, alone) if step % 2 else (alone, fused):
            rewind(n_held)
            times |= run(tokens)
        steps.append(times)
    return prefills, steps


def table(name: str, prompt_tokens: int, prefills: list[Times], steps: list[Times], each: list[Times]) -> None:
    names = [name for name in steps[0] if name != "fused"]
    print(f"| {name}, ms | {' | '.join(names)} | sum | fused | fused / sum |")
    print("|---|" + "---|" * (len(names) + 3))
    labels = f"prefill of {prompt_tokens} tokens", "decoding step", "decoding step, each on its own"
    for label, rows in zip(labels, (prefills, steps, each), strict=True):
        cells = [f"{median(times[name] for times in rows):.1f}" for name in names]
        total = median(sum(times[name] for name in names) for times in rows)
        ratio = median(times["fused"] / sum(times[name] for name in names) for times in rows)
        print(f"| {label} | {' | '.join(cells)} | {total:.1f} | {fused_ms(rows):.1f} | {ratio:.3f} |")


def fused_ms(rows: list[Times]) -> float:
    return median(times["fused"] for times in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True, action="append")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    loading = {"n_ctx": options.prompt_tokens + options.steps + 8, "n_threads": options.threads}
    with ExitStack() as stack:
        llms = [stack.enter_context(FusedLlama.from_family(family, **loading)) for family in options.family]
        prompt = (llms[0].tokenize(TEXT) * options.prompt_tokens)[: options.prompt_tokens]
        for llm in llms:
            measure(llm, prompt, 3)
        rounds = [
            [
                (*measure(llm, prompt, options.steps), [measure_each(llm, prompt, options.steps, options.threads)])
                for llm in llms
            ]
            for _ in range(options.rounds)
        ]
    speeds = []
    for n, llm in enumerate(llms):
        table(llm.name, options.prompt_tokens, *([row for each in rounds for row in each[n][i]] for i in range(3)))
        speeds.append([1 / fused_ms(each[n][1]) for each in rounds])
    for llm, own in list(zip(llms, speeds, strict=True))[1:]:
        ratios = [a / b for a, b in zip(own, speeds[0], strict=True)]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{llm.name}: {median(ratios):.2f} times the tokens a second of {llms[0].name} (by round {spread})")


if __name__ == "__main__":
    main()
