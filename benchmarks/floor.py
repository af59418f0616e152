"""How near the floor is a fused step: its time against the sum of its members' own `llama_decode` calls.

    python benchmarks/floor.py --family FAMILY [--steps 40] [--rounds 5] [--prompt-tokens 200]

Both are timed in turn in one process, on the same text at the same positions; the table has medians. A member's column
is llama_decode on its context and the wait for its logits, nothing else; "fused" is `Decoder.step` as `edge-dlf` runs
it: the same calls, the search for α, the fusion and the greedy choice.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

from edge_dlf import FusedLlama, FusionParams, SamplingParams
from edge_dlf.decode import Decoder, Generation

TEXT = "The quick brown fox jumps over the lazy dog. "


class Timer:
    def __enter__(self) -> Timer:
        self.started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.ms = 1e3 * (time.perf_counter() - self.started)


def measure(llm: FusedLlama, prompt: list[int], n_steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of one prefill and of each step, by what was timed: each member, and "fused"."""
    decoder: Decoder = llm._decoder
    ensemble = decoder.ensemble
    fusion = FusionParams()
    generation = Generation(0, ensemble.roles(fusion), fusion, SamplingParams(temperature=0.0))
    prompts = dict.fromkeys(generation.roles.members, prompt)
    prefill, step = {}, {}

    empty(llm)
    with Timer() as timer:
        decoder.start(generation, prompts)
    prefill["fused"] = timer.ms
    times = []
    for _ in range(n_steps):
        with Timer() as timer:
            decoder.step([generation])
        times.append(timer.ms)
    step["fused"] = median(times)
    tokens = generation.tokens[len(prompt) :]

    for name in generation.roles.members:
        member = ensemble.members[name]
        member.trim(0, 0)
        with Timer() as timer:
            member.prefill(0, prompt)
            member.logits()
        prefill[name] = timer.ms
    times_of = {name: [] for name in generation.roles.members}
    for token in tokens[:n_steps]:
        for name in generation.roles.members:
            with Timer() as timer:
                ensemble.members[name].decode([(0, [token])])
                ensemble.members[name].logits()
            times_of[name].append(timer.ms)
    step |= {name: median(times) for name, times in times_of.items()}
    return prefill, step


def empty(llm: FusedLlama) -> None:
    """Forget all text, so that the next prompt is evaluated whole."""
    for name, member in llm._ensemble.members.items():
        member.trim(0, 0)
        llm._ensemble._held[name].clear()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=200)
    options = parser.parse_args()
    with FusedLlama.from_family(options.family, n_ctx=options.prompt_tokens + options.steps + 8) as llm:
        prompt = (llm.tokenize(TEXT) * options.prompt_tokens)[: options.prompt_tokens]
        measure(llm, prompt, 3)
        rounds = [measure(llm, prompt, options.steps) for _ in range(options.rounds)]
    names = [name for name in rounds[0][1] if name != "fused"]
    print("| ms | " + " | ".join(names) + " | sum | fused | fused / sum |")
    print("|---|" + "---|" * (len(names) + 3))
    for index, label in enumerate((f"prefill of {options.prompt_tokens} tokens", "decoding step")):
        each = {name: median(r[index][name] for r in rounds) for name in [*names, "fused"]}
        ratio = median(r[index]["fused"] / sum(r[index][name] for name in names) for r in rounds)
        cells = [f"{each[name]:.1f}" for name in names]
        total = sum(each[name] for name in names)
        print(f"| {label} | {' | '.join(cells)} | {total:.1f} | {each['fused']:.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
