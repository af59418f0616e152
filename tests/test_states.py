"""Recurrent and hybrid models, whose memory is a state: drafted answers equal plain ones, a prefix is read once, and a
next turn reads what is new. On scripted models for every method, and on a tiny model of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from edge_dlf import FusedLlama, FusionParams, SamplingParams
from edge_dlf.engine.backend import N_CHECKPOINTS, N_ROLLBACK, Run
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.errors import RequestInterruptedError
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.llama import Interrupt, LlamaBackend, Model

from .fake_backend import FakeBackend
from .test_decode import N_VOCAB, EachThird, begin, generate
from .test_scheduler import FUSIONS, SAMPLINGS, make, run, scheduler_of
from .tiny import HYBRIDS, tiny_model

STATEFUL = ("mamba", *HYBRIDS)
ROLLS_BACK = ("lfm2", "qwen35")
GREEDY = SamplingParams(temperature=0.0)


def family(agreement: float = 0.0, n_experts: int = 1, **settings: Any) -> dict[str, FakeBackend]:
    """Scripted members whose memory is a state."""
    names = ["large", "base", *(f"e{t}" for t in range(n_experts))]
    members = {name: FakeBackend(seed, N_VOCAB, can_trim=False, **settings) for seed, name in enumerate(names)}
    for member in members.values():
        member.common = agreement
    return members


def read(members: dict[str, FakeBackend]) -> dict[str, int]:
    """Tokens that each member has read since it was last asked."""
    counts = {name: member.n_evaluated for name, member in members.items()}
    for member in members.values():
        member.n_evaluated = 0
    return counts


@pytest.mark.parametrize("n_rollback", [0, 4])
@pytest.mark.parametrize("fusion", [*FUSIONS[:4], FUSIONS[6]], ids=lambda fusion: fusion.method)
def test_drafting_changes_no_token(fusion: FusionParams, n_rollback: int) -> None:
    sampling = SamplingParams(temperature=0.9, seed=3)
    for agreement in (0.7, 1.0):
        expected = generate(family(agreement, 2), [1, 2], 30, fusion, sampling)
        for n_draft in (None, 1, 3, 8):
            members = family(agreement, 2, n_rollback=n_rollback)
            picks = generate(members, [1, 2], 30, fusion, sampling, n_draft=n_draft)
            assert [(p.token, p.weights) for p in picks] == [(p.token, p.weights) for p in expected]
            drafts = n_draft is not None and agreement == 1.0 and fusion.method in ("dynamic", "static", "large")
            assert not drafts or sum(pick.from_draft for pick in picks) >= 14


def test_what_a_wrong_guess_costs_is_read_again_beside_the_next_draft() -> None:
    """A verifying member reads its last token and the draft, and again what was right of the one before."""
    members = family(0.9)
    picks = generate(members, [1, 2], 40, FusionParams(), GREEDY, n_draft=3)
    calls = [[len(run.tokens) for run in call] for call in members["large"].calls[1:]]
    assert all(len(call) == 1 and call[0] <= 5 + 4 + 3 for call in calls)
    n_from_draft = sum(pick.from_draft for pick in picks)
    assert 5 < n_from_draft < 30
    assert len(calls) < 40 - n_from_draft / 2
    rolling = family(0.9, n_rollback=4)
    generate(rolling, [1, 2], 40, FusionParams(), GREEDY, n_draft=3)
    assert {tuple(len(run.tokens) for run in call) for call in rolling["large"].calls[1:]} <= {
        (n,) for n in (1, 2, 3, 4)
    }


@pytest.mark.parametrize("n_draft", [0, 2])
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("member", ["large", "base", "e0"])
def test_an_interrupt_leaves_no_trace(member: str, n_draft: int, begins: bool) -> None:
    """Whether the generation begins anew then or goes on."""
    prompt = np.random.default_rng(2).integers(N_VOCAB, size=90).tolist()
    expected = [pick.token for pick in generate(family(0.9), prompt, 20, FusionParams(), GREEDY)]
    for when in range(7):
        members = family(0.9)
        decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
        generation = begin(decoder, dict.fromkeys(members, prompt), FusionParams(), GREEDY, n_draft=n_draft)
        members[member].fail_at = when
        n_interrupts = 0
        while generation.n_picked < 20:
            try:
                decoder.step([generation])
            except KeyboardInterrupt:
                n_interrupts += 1
                if begins:
                    decoder.begin(generation)
        assert n_interrupts == 1
        assert list(generation.tokens[90:110]) == expected


@pytest.mark.parametrize("n_draft", [0, None, 3])
def test_a_constraint_is_kept_to(n_draft: int | None) -> None:
    sampling = SamplingParams(seed=3, temperature=0.9)
    expected = generate(family(0.8), [1, 2], 15, FusionParams(), sampling, constraint=EachThird())
    picks = generate(family(0.8), [1, 2], 15, FusionParams(), sampling, constraint=EachThird(2), n_draft=n_draft)
    assert [pick.token for pick in picks][:15] == [pick.token for pick in expected]


def test_a_common_prefix_is_read_once() -> None:
    head = list(range(40))
    members = family(n_seq_max=8)
    scheduler = scheduler_of(members)
    run(scheduler, {make(scheduler, [*head, n, n], FUSIONS[0], SAMPLINGS[0]): 3 for n in range(20)})
    assert set(read(members).values()) == {len(head) + 20 * (2 + 2)}


def test_a_prefix_that_is_seen_again_is_read_twice_at_most() -> None:
    """The first text does not know where others will part from it, the second finds out."""
    head = list(range(40))
    members = family()
    scheduler = scheduler_of(members)
    n_read = []
    for n in range(4):
        run(scheduler, {make(scheduler, [*head, n + 1, n], FUSIONS[0], SAMPLINGS[0]): 1})
        n_read.append(read(members)["large"])
    assert n_read == [42, 42, 2, 2]


def turns(decoder: Decoder, members: dict[str, FakeBackend], texts: Sequence[list[int]]) -> list[int]:
    """Tokens that the large model reads for an answer of 10 to each text."""
    n_read = []
    for text in texts:
        generation = begin(decoder, dict.fromkeys(members, text), FusionParams(), GREEDY)
        while generation.n_picked < 10:
            step_of = decoder.step([generation])
            assert step_of[0].error is None
        n_read.append(read(members)["large"] - 9)
    return n_read


def test_a_next_turn_reads_what_is_new() -> None:
    rng = np.random.default_rng(0)
    first, question = rng.integers(N_VOCAB, size=100).tolist(), rng.integers(N_VOCAB, size=20).tolist()
    answer = [pick.token for pick in generate(family(), first, 10, FusionParams(), GREEDY)]
    members = family()
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    # The next turn, another answer to the first, and a turn in which the first answer is told otherwise.
    texts = [first, [*first, *answer, *question], first, [*first, 1, 2, 3, *question]]
    assert turns(decoder, members, texts) == [100, 1 + 20, 16, 16 + 3 + 20]


def test_checkpoints_are_given_up_oldest_first(tmp_path: Path) -> None:
    model = Model(tiny_model(tmp_path / "m.gguf", arch="mamba"))
    member = LlamaBackend(model, "base", n_ctx=64, n_threads=1)
    for n in range(1, N_CHECKPOINTS + 3):
        member.decode([Run(0, [n], 1)])
        member.checkpoint(0, lasting=True)
    member.decode([Run(0, [7], 1)])
    assert [member.reach(0, n) for n in range(5)] == [0, 0, 0, 3, 4]
    member.close()
    model.close()


@pytest.fixture(scope="module", params=STATEFUL)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    model = Model(tiny_model(tmp_path_factory.mktemp("models") / f"{request.param}.gguf", arch=request.param, seed=1))
    yield model
    model.close()


TEXT = np.random.default_rng(0).integers(0, 256, 60).tolist()


def rows(member: LlamaBackend, *runs: tuple[int, Sequence[int]]) -> np.ndarray:
    member.decode([Run(seq, tokens, 1) for seq, tokens in runs])
    return member.logits().copy()


def test_a_sequence_goes_back_to_a_checkpoint(model: Model) -> None:
    member = LlamaBackend(model, "base", n_ctx=128, n_threads=1)
    (expected,) = rows(member, (0, TEXT))
    member.trim(0, 0)
    rows(member, (0, TEXT[:40]))
    member.checkpoint(0, lasting=True)
    rows(member, (0, [1, 2, 3, 4, 5, 6, 7, 8]))
    member.checkpoint(0, lasting=False)
    rows(member, (0, [9]))
    assert (member.reach(0, 48), member.reach(0, 45)) == (48, 40)
    member.trim(0, 40)
    assert member.reach(0, 39) == 0
    np.testing.assert_allclose(rows(member, (0, TEXT[40:]))[0], expected, atol=1e-4)
    member.close()


def test_a_draft_is_taken_back_without_a_checkpoint_where_llama_cpp_can(model: Model) -> None:
    member = LlamaBackend(model, "base", n_ctx=128, n_threads=1)
    assert member.n_rollback == (N_ROLLBACK if model.path.stem in ROLLS_BACK else 0)
    (expected,) = rows(member, (0, TEXT))
    for n_wrong in range(1, N_ROLLBACK + 1):
        for start in (0, 50):  # a batch of the whole text, and one of a draft
            member.trim(0, 0)
            for tokens in filter(None, (TEXT[:start], [*TEXT[start : 60 - N_ROLLBACK - 1], *[3] * n_wrong])):
                member.decode([Run(0, tokens, 1)])
            length = 60 - N_ROLLBACK - 1
            if not member.n_rollback:
                assert member.reach(0, length) == 0
                continue
            assert member.reach(0, length) == length
            member.trim(0, length)
            assert member.reach(0, length - 1) == 0, "the states are gone back to once"
            np.testing.assert_allclose(rows(member, (0, TEXT[length:]))[0], expected, atol=1e-4)
    member.close()


def test_sequences_share_states(model: Model) -> None:
    member = LlamaBackend(model, "base", n_ctx=128, n_seq_max=4, n_threads=1)
    (expected,) = rows(member, (0, TEXT))
    member.trim(0, 0)
    rows(member, (0, TEXT[:40]))
    member.copy(0, 2, 40)  # the present state
    member.checkpoint(0, lasting=True)
    both = rows(member, (0, TEXT[40:]), (2, TEXT[40:]))
    member.copy(0, 3, 40)  # the checkpoint
    own, _ = rows(member, (3, TEXT[40:]), (2, [5, 6]))
    member.trim(0, 0)
    assert member.reach(3, 45) == 40, "the copy has the checkpoint too"
    member.copy(3, 1, 40)
    again = rows(member, (1, TEXT[40:]))
    for row in (*both, own, *again):
        np.testing.assert_allclose(row, expected, atol=1e-4)
    member.close()


def test_an_interrupted_batch_is_not_gone_on_with(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt, decode = Interrupt(), llama_cpp.llama_decode

    def interrupted(*args: Any) -> int:
        interrupt.set()
        return int(decode(*args))

    member = LlamaBackend(model, "base", n_ctx=128, n_threads=1, interrupt=interrupt)
    (expected,) = rows(member, (0, TEXT))
    member.trim(0, 0)
    rows(member, (0, TEXT[:40]))
    member.checkpoint(0, lasting=True)
    rows(member, (0, TEXT[40:45]))
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "llama_decode", interrupted)
        with pytest.raises(RequestInterruptedError):
            member.decode([Run(0, TEXT[45:], 1)])
    interrupt.clear()
    assert member.n_past(0) == 45
    assert member.reach(0, 45) == 40
    member.trim(0, 40)
    np.testing.assert_allclose(rows(member, (0, TEXT[40:]))[0], expected, atol=1e-4)
    member.close()


@pytest.fixture(scope="module", params=STATEFUL)
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp(request.param)
    drifts = {"large": 0.1, "base": 0.0, "expert": 0.15}
    return [tiny_model(folder / f"{name}.gguf", arch=request.param, drift=drift) for name, drift in drifts.items()]


def fused(files: list[Path], **settings: Any) -> FusedLlama:
    return FusedLlama(files[0], files[1], {"expert": files[2]}, n_ctx=512, n_threads=1, **settings)


PROMPTS = ["The cat sat on the mat, the cat sat on the", "In the beginning"]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_drafted_answers_are_the_plain_ones(files: list[Path], temperature: float) -> None:
    n_accepted = 0
    with fused(files) as llm:
        for prompt in PROMPTS:
            settings: dict[str, Any] = {"max_tokens": 24, "temperature": temperature, "seed": 5}
            plain = [token.id for token in llm.stream(prompt, draft="off", **settings)]
            for draft in (2, 8, "auto"):
                tokens = list(llm.stream(prompt, draft=draft, **settings))
                assert [token.id for token in tokens] == plain
                n_accepted += sum(token.from_draft for token in tokens)
    assert n_accepted > 20


@pytest.fixture
def n_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Tokens that each member has read."""
    counts: Counter[str] = Counter()
    decode = LlamaBackend.decode

    def counted(self: LlamaBackend, runs: Sequence[Run]) -> None:
        counts[self.name] += sum(len(run.tokens) for run in runs)
        decode(self, runs)

    monkeypatch.setattr(LlamaBackend, "decode", counted)
    return counts


def test_the_second_turn_of_a_chat_reads_what_is_new(files: list[Path], n_read: Counter[str]) -> None:
    user = {"role": "user", "content": "Tell me a story about the sea and the ships that sail on it. " * 3}
    settings: dict[str, Any] = {"temperature": 0, "draft": "off"}
    with fused(files) as llm:
        settings["logit_bias"] = {llm.n_vocab - n: -100 for n in (1, 3)}  # no answer ends
        first = llm.apply_chat_template([user])
        answer = [token.id for token in llm.stream(first, max_tokens=12, **settings)]
        assert set(n_read.values()) == {len(first) + len(answer) - 1}
        n_read.clear()
        # Token for token as it was said, then told otherwise: then the end of the first prompt is read again.
        next(llm.stream([*first, *answer, *llm.tokenize("And then?")], **settings))
        assert set(n_read.values()) == {1 + len(llm.tokenize("And then?"))}
        turn = [user, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Go on."}]
        second = llm.apply_chat_template(turn)
        n_read.clear()
        tokens = [token.id for token in llm.stream(second, max_tokens=8, **settings)]
        assert set(n_read.values()) == {16 + len(second) - len(first) + len(tokens) - 1}
    with fused(files) as fresh:
        assert [token.id for token in fresh.stream(second, max_tokens=8, **settings)] == tokens


def test_rows_that_share_a_prefix_are_right_and_read_it_once(files: list[Path], n_read: Counter[str]) -> None:
    head = "All of these begin alike, with one long sentence that is the same for each of them. "
    prompts = [head + text for text in ("The cat", "A dog", "No bird", "One fish", "Two ants", "Red bees")]
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 0}
    with fused(files) as llm:
        alone = [llm.create_completion(prompt, **settings)["choices"][0]["text"] for prompt in prompts]
        n_head, n_all = len(llm.tokenize(head)), sum(len(llm.tokenize(prompt)) for prompt in prompts)
    n_read.clear()
    with fused(files, n_parallel=4) as llm:
        found = {int(row["custom_id"]): row["response"]["body"] for row in llm.batch(prompts, draft="off", **settings)}
    assert [found[n]["choices"][0]["text"] for n in sorted(found)] == alone
    n_answers = sum(body["usage"]["completion_tokens"] for body in found.values())
    assert n_read["large"] <= n_all - (len(prompts) - 1) * n_head + n_answers
