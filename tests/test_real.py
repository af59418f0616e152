"""On real weights: EDGE_DLF_TEST_FAMILY names a family with one expert, `pytest -m real` runs these."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from edge_dlf import FusedLlama, SamplingParams
from edge_dlf.engine.backend import Logits, Run
from edge_dlf.llama import LlamaBackend

from . import lossless, naive
from .feed import feed

pytestmark = pytest.mark.real

PROMPTS = [
    "Question: Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many "
    "clips did Natalia sell altogether in April and May?\nAnswer:",
    "Question: A robe takes 2 bolts of blue fiber and half that much white fiber. How many bolts in total does it take?"
    "\nAnswer:",
    "Question: Weng earns $12 an hour for babysitting. Yesterday, she just did 50 minutes of babysitting. How much did "
    "she earn?\nAnswer:",
    "Question: Is 91 a prime number?\nAnswer:",
    "def fibonacci(n):\n",
    "SELECT name FROM users WHERE",
    "Once upon a time, in a village by the sea,",
    "Die Hauptstadt von Frankreich ist",
    "😀 means",
    "1, 2, 4, 8, 16,",
]
N_TOKENS = 64
N_IN_BATCH = 32


@pytest.fixture(scope="module")
def llm(real_family: str) -> Iterator[FusedLlama]:
    with FusedLlama.from_family(real_family, n_ctx=512) as llm:
        yield llm


def rows_of(llm: FusedLlama, members: list[LlamaBackend]) -> list[Logits]:
    return [member.logits()[0, : llm.n_vocab].astype(np.float64) for member in members]


def plain_loop(llm: FusedLlama, members: list[LlamaBackend], prompt: list[int]) -> Iterator[tuple[int, str]]:
    """Tokens of greedy decoding one step at a time with the float64 oracle, and the margins of both choices."""
    for member in members:
        feed(member, 0, prompt)
    while True:
        large, base, *experts = rows_of(llm, members)
        objectives = naive.objectives(large, base, experts, np.round(np.arange(21) * 0.1, 12))[0].ravel()
        t, alpha, best = naive.search(large, base, experts)
        fused = large + alpha * (experts[t] - base)
        second, first = np.partition(fused, -2)[-2:]
        next_best = np.partition(objectives, 1)[1]
        margin = f"α = {alpha}, J {best:.6g} before {next_best:.6g}, logits {first - second:.2g} apart"
        token = int(fused.argmax())
        yield token, margin
        for member in members:
            member.decode([Run(0, [token], 1)])


@pytest.mark.parametrize("prompt", PROMPTS, ids=range(len(PROMPTS)))
def test_greedy_equals_a_plain_loop_with_the_oracle(llm: FusedLlama, prompt: str) -> None:
    # llama.cpp rounds a batch by its shape (on Q4_K_M by 0.1 nats and more), so both evaluate the prompt whole.
    llm._ensemble.forget([0])
    engine = [llm._ensemble.members[name] for name in ("large", "base", *llm.experts)]
    members = [
        LlamaBackend(member.model, member.name, n_ctx=512, n_ubatch=member.n_ubatch, loras=member.loras)
        for member in engine
    ]
    try:
        expected = plain_loop(llm, members, llm.tokenize(prompt))
        for n, token in enumerate(llm.stream(prompt, temperature=0.0, max_tokens=N_TOKENS, draft="off")):
            wanted, margin = next(expected)
            assert token.id == wanted, f"token {n}: {llm.detokenize([token.id, wanted])!r}; {margin}"
    finally:
        for member in members:
            member.close()


def test_an_expert_changes_the_answer_and_methods_share_the_weights(llm: FusedLlama) -> None:
    texts = {
        method: llm.create_completion(PROMPTS[0], temperature=0.0, max_tokens=32, method=method)["choices"][0]["text"]
        for method in ("dynamic", "static", "large", "base", *llm.experts)
    }
    assert texts["dynamic"] != texts["large"]
    assert texts["base"] != texts[llm.experts[0]]


def test_a_cached_prefix_is_not_evaluated_again(llm: FusedLlama) -> None:
    prompt = "Question: How many legs do three cats have?\nAnswer:"
    first = "".join(token.text for token in llm.stream(prompt, temperature=0.0, max_tokens=24))
    again = llm.stream(prompt + first, temperature=0.0, max_tokens=4)
    next(again, None)
    assert again.report.counts.n_prefilled <= 3


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.8}], ids=["greedy", "seeded"])
@pytest.mark.parametrize("head", ["", "Answer briefly and in the language of the text.\n" * 8], ids=["apart", "shared"])
def test_a_batch_equals_single_requests_but_for_near_ties(
    llm: FusedLlama, real_family: str, sampling: dict[str, float], head: str
) -> None:
    """Up to the first choice that llama.cpp's rounding, by the shape of the batch, can turn."""
    requests = [{"id": n, "prompt": head + prompt, "seed": n} for n, prompt in enumerate(PROMPTS)]
    partings = []
    with FusedLlama.from_family(real_family, n_ctx=512, n_parallel=8) as many, lossless.Recorder(many) as batch:
        list(many.batch(requests, max_tokens=N_IN_BATCH, **sampling))
        for seed, request in enumerate(requests):
            with lossless.Recorder(llm) as single:
                report = single.answer(request["prompt"], N_IN_BATCH, "off", SamplingParams(seed=seed, **sampling))
                parting = lossless.parting(single, batch, seed, report.n_prompt)
            if parting:
                print(f"row {seed}: {parting}")
                assert parting.is_tie, (request, parting)
                partings.append(parting)
    print(f"{len(requests) - len(partings)} of {len(requests)} equal token for token")
    assert len(partings) < len(requests)


@pytest.mark.parametrize("sampling", lossless.SAMPLINGS)
def test_drafting_changes_no_token_but_where_rounding_turns_a_tie(llm: FusedLlama, sampling: str) -> None:
    """A few of the hundreds of prompts of `python -m tests.lossless`."""
    n_same = n_answers = n_drafted = 0
    with lossless.Recorder(llm) as recorder:
        for workload, prompt in lossless.prompts(8):
            for draft, report, parting in lossless.compare(
                recorder, prompt, N_TOKENS, ["auto", 3], lossless.SAMPLINGS[sampling]
            ):
                n_answers += 1
                n_same += parting is None
                n_drafted += report.counts.n_drafted
                if parting:
                    print(f"{workload}, draft {draft}: {parting}")
                    assert parting.is_tie, (prompt, draft, parting)
    print(f"{n_same} of {n_answers} equal token for token")
    assert n_drafted > 0
    assert n_same >= n_answers / 2
