"""Texts on which llama.cpp's own tokenizers crash or take for ever: they are tokenized, or refused with one line."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edge_dlf import ContextOverflowError, FusedLlama, InvalidParameterError, OutOfMemoryError
from edge_dlf.llama import Model

from .tiny import tiny_lora, tiny_model

RECURSIVE = (
    "afmoe", "bailingmoe", "bloom", "deepseek-coder", "deepseek-llm", "deepseek-v3", "default", "exaone-moe", "falcon",
    "gpt-4o", "granite-embed-multi-97m", "jais-2", "minicpm5", "seed-coder", "spark2_5", "superbpe", "tekken",
    "tiny_aya", "ufakzeka", "viking", "youtu",
)  # fmt: skip
"""One pre-tokenizer for each of llama.cpp's regular expressions that overflow an ordinary stack."""
OTHERS = ("chameleon", "gemma4", "gpt-2", "kimi-k2", "laguna", "llama-bpe", "qwen2", "qwen35")
RUNS = (
    "-",
    "a",
    "A",
    "aÉ",
    " ",
    "\n",
    "\r\n",
    "\t",
    "1",
    "½",
    "中",
    "한",
    "あ",
    "😀",
    "a\u0301",
    "\u0301",
    "a b ",
    "/\n",
)
TOKENIZE = f"""
import sys
from pathlib import Path
from edge_dlf import InvalidParameterError
from edge_dlf.llama import Model
for file in sys.argv[1:]:
    model = Model(Path(file), vocab_only=True)
    for run in {RUNS!r}:
        print(file, ascii(run), flush=True)
        try:
            model.tokenize((run * 40_000)[:40_000].encode(), special=False)
        except InvalidParameterError:
            assert Path(file).stem in ("superbpe", "deepseek-llm")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vocabularies")
    for pre in (*RECURSIVE, *OTHERS):
        tiny_model(folder / f"{pre}.gguf", pre=pre, n_embd=16, n_layer=1)
    tiny_model(folder / "spm.gguf", tokenizer="spm", n_embd=16, n_layer=1)
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FusedLlama]:
    """A family with the pre-tokenizer of gpt-oss and Llama 4."""
    folder = tmp_path_factory.mktemp("family")
    large = tiny_model(folder / "large.gguf", pre="gpt-4o", seed=1, n_ctx=64)
    base = tiny_model(folder / "base.gguf", pre="gpt-4o", seed=2, n_ctx=64)
    with FusedLlama(large, base, {"lora": tiny_lora(folder / "lora.gguf")}, n_ctx=64, n_parallel=2) as llm:
        yield llm


def test_long_runs_crash_no_pre_tokenizer(folder: Path) -> None:
    files = [str(folder / f"{pre}.gguf") for pre in (*RECURSIVE, *OTHERS)] + [str(folder / "spm.gguf")]
    done = subprocess.run([sys.executable, "-c", TOKENIZE, *files], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1]}: {done.stderr[-500:]}"


@pytest.mark.parametrize("pre", [*RECURSIVE, *OTHERS, "spm"])
def test_long_texts_have_llama_cpps_own_tokens(folder: Path, pre: str) -> None:
    model, rng = Model(folder / f"{pre}.gguf", vocab_only=True), random.Random(pre)
    for _ in range(20):
        text = "".join(rng.choice(RUNS) * rng.randrange(1, 200) for _ in range(40)) + rng.choice(RUNS)
        for special in (False, True):
            own = model._tokens(text.encode(), special)
            assert model.tokenize(text.encode(), special=special) == own
    model.close()


@pytest.mark.parametrize("spaces", [True, False])
def test_sentencepiece_texts_are_cut_where_no_token_reaches_over(folder: Path, spaces: bool) -> None:
    model, rng = Model(folder / "spm.gguf", vocab_only=True), random.Random(0)
    text = "".join(rng.choice(("the ", "😀", "é", "x", "<s>", "\n")) for _ in range(20_000))
    text = text if spaces else text.replace(" ", "")
    assert len(model._piece.findall(text)) > 5
    assert model.tokenize(text.encode(), special=True) == model._tokens(text.encode(), True)
    model.close()


def test_bytes_that_are_no_text_are_tokenized_whole(folder: Path) -> None:
    model = Model(folder / "spm.gguf", vocab_only=True)
    text = b"\xff" + "😀".encode() * 3000
    assert model.tokenize(text, special=False) == model._tokens(text, False)
    model.close()


@pytest.mark.parametrize(
    ("pre", "text"),
    [
        ("gpt-4o", "-" * (2**20 + 1)),
        ("tekken", "\n " * 2**20),
        ("gpt-4o", "x" + "/\n" * 2**20),
        ("superbpe", "1" * 5000),
        ("deepseek-llm", " " * 5000 + "1"),
    ],
)
def test_what_cannot_be_split_is_refused_at_once(folder: Path, pre: str, text: str) -> None:
    model = Model(folder / f"{pre}.gguf", vocab_only=True)
    with pytest.raises(InvalidParameterError, match="this model's tokenizer"):
        model.tokenize(text.encode(), special=False)
    model.close()


def test_a_long_text_of_short_lines_is_no_problem(folder: Path) -> None:
    model = Model(folder / "gpt-4o.gguf", vocab_only=True)
    assert len(model.tokenize(b"ab c\n" * 300_000, special=False)) == 1_200_000
    model.close()


def test_no_room_for_a_stack_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", full)
    model = Model(folder / "gpt-4o.gguf", vocab_only=True)
    with pytest.raises(OutOfMemoryError, match="a line of 40,000 characters"):
        model.tokenize(b"-" * 40_000, special=False)
    model.close()
    assert threading.stack_size() == 0


class TestAFamily:
    """Every way that a text reaches the tokenizer."""

    RUN = "-" * 40_000

    def test_a_row_of_a_batch_is_its_own_error(self, llm: FusedLlama) -> None:
        rows = ["hello", self.RUN, "again", {"messages": [{"role": "user", "content": self.RUN}]}]
        results = list(llm.batch(rows, max_tokens=3, ordered=True))
        assert [result["error"] and result["error"]["code"] for result in results] == [
            None, "context_length_exceeded", None, "context_length_exceeded",
        ]  # fmt: skip

    def test_prompts_messages_answers_and_scores(self, llm: FusedLlama) -> None:
        assert len(llm.tokenize(self.RUN)) == 40_000
        with pytest.raises(ContextOverflowError, match="more than the context"):
            llm.apply_chat_template([{"role": "user", "content": self.RUN}])
        assert len(llm.tokenize_answer(self.RUN, is_chat=True)) == 40_001
        with pytest.raises(Exception, match="context"):
            list(llm.score([("hello", llm.tokenize_answer(self.RUN))]))
        with pytest.raises(Exception, match="context"):
            llm.create_completion(self.RUN)

    def test_stop_strings_and_schemas(self, llm: FusedLlama) -> None:
        assert llm.create_completion("hello", max_tokens=2, stop=self.RUN[:4096])["choices"]
        schema = {"enum": [self.RUN]}
        assert llm.create_completion("hello", max_tokens=2, json_schema=schema)["choices"]
