"""Families whose control tokens are renamed, moved or missing in some of their models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from edge_dlf import FusedLlama, SamplingParams, VocabMismatchError
from edge_dlf.answers.template import MemberPrompts
from edge_dlf.cli import main
from edge_dlf.engine.backend import Run
from edge_dlf.evidence import answer_rows, examples, tune
from edge_dlf.evidence.doctor import examine_family
from edge_dlf.families.files import check_files
from edge_dlf.families.spec import FamilySpec
from edge_dlf.llama import LlamaBackend, Model

from . import naive
from .tiny import bpe_vocabulary, tiny_lora, tiny_model

N = len(bpe_vocabulary()[0])
BOS, START, END, THINK, TOOL = range(N - 3, N + 2)
"""Ids in the large model: of <|endoftext|>, <|im_start|>, <|im_end|>, which ends texts, <think> and <tool>."""
CONTROL = ("<think>", "<tool>")
ORDER = {BOS: TOOL, START: BOS, END: THINK, THINK: START, TOOL: END}
RENAMED = {"<|endoftext|>": "<begin>", "<|im_end|>": "<end>"}
OWN = "{% for m in messages %}<begin>{{ m['content'] }}<end>{% endfor %}<|im_start|>"
PROMPT = "<|im_start|>user\nOnce upon a <tool>time<|im_end|>\n<|im_start|>"
OFTEN = {START: 4.0, THINK: 4.0, TOOL: 4.0}
METHODS: Sequence[Mapping[str, Any]] = (
    {"method": "dynamic"},
    {"method": "dynamic", "search": "exact"},
    {"method": "dynamic", "plausibility": 0.1},
    {"method": "static", "alpha": {"tuned": 0.7, "lora": -0.2}},
    {"method": "blend"},
    {"method": "weighted", "weights": {"large": 0.5, "base": -0.3, "tuned": 0.8}},
    {"method": "weighted", "weights": {"base": 0.4, "tuned": 0.6}},
    {"method": "large"},
    {"method": "base"},
    {"method": "tuned"},
)


def names(method: Mapping[str, Any]) -> str:
    return " ".join(str(value) for value in method.values())


def write_family(folder: Path, **small: Any) -> Path:
    """Write a family whose small models differ from the usual ones by the arguments `small` of `tiny_model`."""
    folder.mkdir()
    tiny_model(folder / "large.gguf", seed=1, n_embd=64, control=CONTROL, pad_vocab=5)
    given = {"control": CONTROL, **small}
    tiny_model(folder / "base.gguf", seed=2, **given)
    tiny_model(folder / "tuned.gguf", seed=2, drift=0.5, **given)
    tiny_lora(folder / "lora.gguf", seed=3)
    (folder / "family.toml").write_text(
        'name = "tiny"\n[large]\npath = "large.gguf"\n[base]\npath = "base.gguf"\n'
        '[[experts]]\nname = "lora"\nlora = "lora.gguf"\n[[experts]]\nname = "tuned"\npath = "tuned.gguf"\n'
    )
    return folder


def opened(folder: Path) -> FusedLlama:
    return FusedLlama.from_family(folder, n_ctx=256, n_threads=1, n_parallel=3)


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FusedLlama]:
    """The family with equal tokens."""
    with opened(write_family(tmp_path_factory.mktemp("tokens") / "equal")) as llm:
        yield llm


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FusedLlama]:
    """The same family, but that the control tokens of its small models are renamed and moved."""
    folder = tmp_path_factory.mktemp("tokens") / "other"
    with opened(write_family(folder, order=ORDER, renamed=RENAMED, chat_template=OWN)) as llm:
        assert set(llm.files.tokens.maps) == {"base", "lora", "tuned"}
        yield llm


def fresh(llm: FusedLlama) -> FusedLlama:
    """The family with empty caches: what llama.cpp evaluates in other batches it rounds otherwise."""
    llm.driver.clear()
    llm.driver.decoder.ensemble.forget()
    return llm


def tokens(llm: FusedLlama, prompt: Any = PROMPT, **settings: Any) -> list[tuple[int, float]]:
    given = {"max_tokens": 24, "repeat_penalty": 1.2, "seed": 5, "logit_bias": OFTEN, **settings}
    return [(token.id, token.logprob) for token in fresh(llm).stream(prompt, **given)]


def flat(tree: Any) -> tuple[list[float], str]:
    """All numbers of a tree of JSON that have a fraction, and the text of all else."""
    numbers: list[float] = []
    text = json.dumps(json.loads(json.dumps(tree), parse_float=lambda number: numbers.append(float(number))))
    return numbers, text


def ids(found: Sequence[tuple[int, float]]) -> list[int]:
    return [token for token, _ in found]


class TestTheSameFamilyWithEqualTokens:
    """Token for token, whatever is asked."""

    @pytest.mark.parametrize("method", METHODS, ids=names)
    @pytest.mark.parametrize("draft", ["off", 4])
    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_streams(
        self, equal: FusedLlama, other: FusedLlama, method: Mapping[str, Any], draft: Any, temperature: float
    ) -> None:
        found, wanted = (tokens(llm, draft=draft, temperature=temperature, **method) for llm in (other, equal))
        assert ids(found) == ids(wanted)
        np.testing.assert_allclose([p for _, p in found], [p for _, p in wanted], atol=1e-4)

    def test_control_tokens_are_picked_at_all(self, equal: FusedLlama) -> None:
        picked = {token for seed in range(8) for token, _ in tokens(equal, seed=seed, temperature=1.0)}
        assert len(picked & set(OFTEN)) >= 2

    def test_batches(self, equal: FusedLlama, other: FusedLlama) -> None:
        requests = [
            {"id": f"{n}", "prompt": PROMPT * (1 + n % 2), "max_tokens": 12, "edge_dlf": dict(method)}
            for n, method in enumerate(METHODS)
        ]
        found, wanted = (
            [
                row["response"]["body"]["choices"][0]["text"]
                for row in fresh(llm).batch(requests, ordered=True, temperature=1.0, logit_bias=OFTEN, draft="off")
            ]
            for llm in (other, equal)
        )
        assert found == wanted

    @pytest.mark.parametrize("method", METHODS, ids=names)
    def test_scores(self, equal: FusedLlama, other: FusedLlama, method: Mapping[str, Any]) -> None:
        answer = [40, THINK, 41, TOOL, START, 42, END]
        (found,), (wanted,) = (
            [score for _, score in fresh(llm).score([(PROMPT, answer)], **method)] for llm in (other, equal)
        )
        np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-4)

    def test_traces(self, equal: FusedLlama, other: FusedLlama) -> None:
        given: dict[str, Any] = {"max_tokens": 8, "temperature": 0.0, "trace": True, "logit_bias": OFTEN}
        found, wanted = (fresh(llm).create_completion(PROMPT, **given)["edge_dlf"]["trace"] for llm in (other, equal))
        numbers, texts = flat(found["tokens"])
        assert texts == flat(wanted["tokens"])[1]
        np.testing.assert_allclose(numbers, flat(wanted["tokens"])[0], atol=1e-3)

    def test_tuned_weights(
        self, equal: FusedLlama, other: FusedLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        rows = [{"prompt": f"{n} <tool>", "answer": f"it is {n * n}"} for n in range(12)]
        found, wanted = (tune.tune(fresh(llm), rows, raw=True, n_threads=1) for llm in (other, equal))
        assert [outcome.name for outcome in found.outcomes] == [outcome.name for outcome in wanted.outcomes]
        for ours, theirs in zip(found.outcomes, wanted.outcomes, strict=True):
            np.testing.assert_allclose(ours.losses, theirs.losses, atol=1e-2)

    def test_a_chat_by_templates_of_their_own(self, equal: FusedLlama, other: FusedLlama) -> None:
        messages = [{"role": "user", "content": "A <|im_end|> B <end>"}]
        own = equal.tokenize("<|endoftext|>", special=True) + equal.tokenize("A <|im_end|> B <end>", special=False)
        own += equal.tokenize("<|im_end|><|im_start|>", special=True)
        prompt = other.apply_chat_template(messages)
        assert list(prompt) == list(equal.apply_chat_template(messages))
        assert prompt.own == dict.fromkeys(("base", "lora", "tuned"), own)
        for method in METHODS:
            assert ids(tokens(other, prompt, **method)) == ids(
                tokens(equal, list(prompt), prompts=dict.fromkeys(("base", "lora", "tuned"), own), **method)
            )

    def test_a_conversation_that_their_template_refuses(
        self, lacking: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        own = "{{ raise_exception('no') if messages[0].role == 'system' }}<end>"
        for name in ("base", "tuned"):
            tiny_model(tmp_path / f"{name}.gguf", seed=2, control=CONTROL, renamed=RENAMED, chat_template=own)
        (tmp_path / "large.gguf").symlink_to(lacking / "large.gguf")
        messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        with FusedLlama.from_family(spec(tmp_path), n_ctx=128, n_threads=1) as llm:
            assert llm.apply_chat_template(messages[1:]).own == {"base": [END], "tuned": [END]}
            assert [llm.apply_chat_template(messages).own for _ in range(2)] == [{}, {}]
            assert llm.create_chat_completion(messages, max_tokens=2)["choices"]
        said = [record.message for record in caplog.records if "by the large model's chat template" in record.message]
        assert [message.split()[0] for message in said] == ["base", "tuned"]

    def test_examples_keep_the_prompts_of_each_template(self, other: FusedLlama, tmp_path: Path) -> None:
        rows = [("row", {"prompt": f"{n} <tool>", "answer": f"it is {n}"}) for n in range(3)]
        found = examples.tokenized(other, rows, raw=False, system=None)
        losses = answer_rows.evaluate(other, found, 1, tmp_path)
        alone = [method.name for method in losses.methods].index("base alone")
        for n, (_, row) in enumerate(rows):
            prompt = other.apply_chat_template([{"role": "user", "content": row["prompt"]}])
            ((_, score),) = fresh(other).score([(prompt, found[n].answer)], method="base")
            mine = losses.losses[losses.starts[n] : losses.starts[n + 1], alone]
            np.testing.assert_allclose(mine, [-p for p in score.logprobs], atol=1e-2)
            asked = {"prompt": MemberPrompts(found[n].prompt, dict(found[n].own)), "max_tokens": 8}
            (answered,) = fresh(other).batch([asked], temperature=0.0, method="base", repeat_penalty=1.0)
            told = fresh(other).stream(prompt, max_tokens=8, temperature=0.0, method="base", repeat_penalty=1.0)
            assert answered["response"]["body"]["choices"][0]["text"] == "".join(token.text for token in told)


def small_ids() -> tuple[dict[int, int], dict[int, int]]:
    """What a small member of the family `lacking` reads for each id of the large model, and the column of its logit.

    By hand: <think> is unknown to it and read as a line break, <|im_end|> is its <end>, others stand elsewhere.
    """
    line_break = bpe_vocabulary()[0].index("Ċ")
    same = {token: token for token in range(BOS)}
    columns = {**same, BOS: TOOL - 1, START: BOS, END: START, TOOL: END}
    return {**columns, THINK: line_break}, columns


class Oracle:
    """Greedy decoding in float64, each member by itself, in its own ids."""

    def __init__(self, folder: Path) -> None:
        paths = {"large": "large", "base": "base", "tuned": "tuned"}
        self.members = {
            name: LlamaBackend(Model(folder / f"{file}.gguf"), name, n_ctx=128, n_threads=1)
            for name, file in paths.items()
        }
        self.reads, self.columns = small_ids()

    def row(self, name: str, text: Sequence[int]) -> Any:
        """Logits in the family's ids, −inf for what the member lacks."""
        member = self.members[name]
        member.trim(0, 0)
        member.decode([Run(0, text if name == "large" else [self.reads[token] for token in text], 1)])
        own = member.logits()[0].astype(np.float64)
        if name == "large":
            return own[: TOOL + 1]
        return np.array([own[self.columns[token]] if token in self.columns else -np.inf for token in range(TOOL + 1)])

    @staticmethod
    def alone(path: Path) -> Callable[[Sequence[int], int], list[int]]:
        """Greedy tokens of one model after a text, in its own ids, of those that the large model has too."""
        member = LlamaBackend(Model(path), "alone", n_ctx=128, n_threads=1)

        def decode(text: Sequence[int], n_tokens: int) -> list[int]:
            tokens = list(text)
            for _ in range(n_tokens):
                member.trim(0, 0)
                member.decode([Run(0, tokens, 1)])
                tokens.append(int(member.logits()[0][: TOOL + 1].argmax()))
            return tokens[len(text) :]

        return decode

    def fused(self, method: Mapping[str, Any], text: Sequence[int], alpha: float) -> Any:
        """Logits of the fusion. alpha: what was found at this token, which must be as good as any."""
        rows = {name: self.row(name, text) for name in self.members}
        large, base, tuned = rows.values()
        if method["method"] in rows:
            return rows[method["method"]]
        if method["method"] == "dynamic":
            (j,), *_ = naive.objectives(large, base, [tuned], [*naive.GRID, alpha])
            assert j[-1] <= 1.05 * j.min() + 1e-3
            fused = large + alpha * naive.log_ratio(base, tuned)[0]
            beta = method.get("plausibility")
            return naive.restricted(fused, [tuned], [alpha], beta) if beta else fused
        if method["method"] == "static":
            return large + method["alpha"]["tuned"] * naive.log_ratio(base, tuned)[0]
        weights = method.get("weights") or {"large": 0.5, "tuned": 0.5}
        return sum(weight * self.extended(rows, name, weights) for name, weight in weights.items())

    def extended(self, rows: Mapping[str, Any], name: str, weights: Mapping[str, float]) -> Any:
        """log p̃ of a member: P(v) for the v that it lacks, (1 − P(lacking)) p(v) for others."""
        lacks = ~np.isfinite(rows[name])
        with np.errstate(divide="ignore"):
            large, own = (np.log(naive.softmax(rows[each])) for each in ("large", name))
        if "large" not in weights or not lacks.any():
            return own
        return np.where(lacks, large, np.log1p(-np.exp(large[lacks]).sum()) + own)


@pytest.fixture(scope="module")
def lacking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family of one expert whose small models have no <think>, and stop one token earlier."""
    folder = tmp_path_factory.mktemp("tokens")
    order = {BOS: START, START: END, END: TOOL - 1, TOOL - 1: BOS}
    small: dict[str, Any] = {"control": CONTROL[1:], "order": order, "renamed": RENAMED}
    tiny_model(folder / "large.gguf", seed=1, n_embd=64, control=CONTROL)
    tiny_model(folder / "base.gguf", seed=2, **small)
    tiny_model(folder / "tuned.gguf", seed=2, drift=0.5, **small)
    return folder


def spec(folder: Path) -> FamilySpec:
    return FamilySpec.from_files(folder / "large.gguf", folder / "base.gguf", {"tuned": folder / "tuned.gguf"})


@pytest.mark.parametrize(
    "method", [*METHODS[:3], *METHODS[4:], {"method": "static", "alpha": {"tuned": 0.7}}], ids=names
)
def test_the_oracle(lacking: Path, method: Mapping[str, Any]) -> None:
    oracle, text = Oracle(lacking), [40, START, 41, THINK, 42]
    sampling = SamplingParams(temperature=0.0, repeat_penalty=1.0, logit_bias=OFTEN)
    with FusedLlama.from_family(spec(lacking), n_ctx=128, n_threads=1) as llm:
        for draft in ("off", 3):
            found = llm.stream(text, max_tokens=16, draft=draft, temperature=0.0, logit_bias=OFTEN, **method)
            picked = list(found)
            for n, token in enumerate(picked):
                fused = oracle.fused(method, [*text, *(each.id for each in picked[:n])], token.alpha)
                assert token.id == naive.select(fused, sampling, 0, 0)
                unrestricted = {name: value for name, value in method.items() if name != "plausibility"}
                fused = oracle.fused(unrestricted, [*text, *(each.id for each in picked[:n])], token.alpha)
                assert token.logprob == pytest.approx(naive.log_softmax(fused)[0][token.id], abs=0.05)
            assert len(picked) > 2


class TestMatching:
    """By the files' headers."""

    def test_by_text_by_role_and_not_at_all(self, lacking: Path) -> None:
        tokens = check_files(spec(lacking)).tokens
        assert tokens.n_vocab == TOOL + 1
        assert set(tokens.maps) == {"base", "tuned"}
        assert tokens.lacking["base"].tolist() == [THINK]
        reads, _ = small_ids()
        assert dict(enumerate(tokens.maps["base"].reads.tolist())) == reads
        match = tokens.matches[lacking / "base.gguf"]
        assert match.told() == (
            "base.gguf: control tokens matched with the large model's: by role '<end>' stands for '<|im_end|>', "
            "'<begin>' stands for '<|endoftext|>'; at other ids '<|im_start|>', '<tool>'; it lacks '<think>'"
        )
        assert match.warning() is None

    def test_tokens_of_the_small_model_alone(self, lacking: Path, tmp_path: Path) -> None:
        """They are read in prompts of their own, and never picked."""
        control = (*CONTROL, "<call>", "<cite>")
        for name in ("base", "tuned"):
            tiny_model(
                tmp_path / f"{name}.gguf", seed=2, control=control, chat_template="<cite>{{messages[0].content}}"
            )
        family = FamilySpec.from_files(
            lacking / "large.gguf", tmp_path / "base.gguf", {"tuned": tmp_path / "tuned.gguf"}
        )
        tokens = check_files(family).tokens
        assert tokens.n_vocab == TOOL + 1
        assert [list(match.extra) for match in tokens.matches.values()] == [[b"<call>", b"<cite>"]] * 2
        message = [{"role": "user", "content": "abcabcabc"}]
        raw = Oracle.alone(tmp_path / "tuned.gguf")
        with FusedLlama.from_family(family, n_ctx=128, n_threads=1) as llm:
            prompt = llm.apply_chat_template(message)
            assert prompt.own["tuned"] == [N + 3, *llm.tokenize("abcabcabc", special=False)]
            for draft in ("off", 4):
                settings: dict[str, Any] = {
                    "method": "tuned",
                    "temperature": 0.0,
                    "repeat_penalty": 1.0,
                    "max_tokens": 12,
                }
                found = [token.id for token in llm.stream(prompt, draft=draft, **settings)]
                assert found == raw(prompt.own["tuned"], len(found))
            penalised = llm.stream(prompt, **{**settings, "repeat_penalty": 1.5})
            assert all(token.id <= TOOL for token in penalised)

    def test_an_end_that_only_a_small_model_names(self, lacking: Path, tmp_path: Path) -> None:
        family = write_family(tmp_path / "f", order=ORDER, renamed=RENAMED)
        assert check_files(family).tokens.ends == {END}

    def test_what_is_lost_is_warned_of(self, lacking: Path, tmp_path: Path) -> None:
        bare = tiny_model(tmp_path / "bare.gguf", renamed={"<|im_start|>": "<a>", "<|endoftext|>": "<b>"})
        family = FamilySpec.from_files(lacking / "large.gguf", bare, {"tuned": bare})
        (match,) = check_files(family).tokens.matches.values()
        assert match.warning() == "bare.gguf lacks 3 of the large model's 5 control tokens"
        raw = bare.read_bytes()
        key = b"tokenizer.ggml.eos_token_id"
        assert raw.count(key) == 1
        bare.write_bytes(raw.replace(key, b"tokenizer.ggml.xos_token_id").replace(b"<|im_end|>", b"<|im_fin|>"))
        (match,) = check_files(family).tokens.matches.values()
        assert match.warning() == "bare.gguf has nothing for '<|im_end|>': it has no say in where an answer ends"

    @pytest.mark.parametrize("token", [100, 60])
    def test_an_ordinary_token_must_not_differ(self, lacking: Path, tmp_path: Path, token: int) -> None:
        """Neither by its text, nor where the other model has a control token."""
        other = {"tokens": {token: "different"}} if token == 100 else {"order": {token: START, START: token}}
        base = tiny_model(tmp_path / "base.gguf", control=CONTROL, **other)
        family = FamilySpec.from_files(lacking / "large.gguf", base, {"tuned": base})
        with pytest.raises(VocabMismatchError, match=rf"base\.gguf do not share one tokenizer: token {token} is"):
            check_files(family)

    def test_new_and_doctor_tell(self, lacking: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGE_DLF_MODELS", str(tmp_path))
        files = [f"--large={lacking}/large.gguf", f"--base={lacking}/base.gguf", f"--expert=tuned={lacking}/tuned.gguf"]
        result = CliRunner().invoke(main, ["new", "mine", *files])
        assert result.exit_code == 0, result.output
        assert "base.gguf: control tokens matched with the large model's: by role '<end>' stands for" in result.stderr
        assert "warning" not in result.stderr
        check = next(each for each in examine_family(lambda: (spec(lacking), {})) if each["name"] == "tokenizer")
        assert check["verdict"] == "ok"
        assert check["text"].startswith("308 tokens, base.gguf: control tokens matched")

    def test_a_family_with_equal_tokens_pays_nothing(self, equal: FusedLlama) -> None:
        assert equal.files.tokens.maps == {}
        assert equal._ensemble.maps == {}


def test_training_through_such_a_large_model_is_refused(lacking: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "answer": "b"}\n')
    command = [
        "train",
        lacking / "base.gguf",
        rows,
        "-o",
        tmp_path / "x.gguf",
        "--through",
        lacking / "large.gguf",
        "--raw",
    ]
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 2
    assert "cannot be trained through a model whose control tokens are others" in result.stderr
