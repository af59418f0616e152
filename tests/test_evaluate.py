"""`edge-dlf eval`, and the harness's own numbers for a model against those of a plain loop over llama-cpp-python."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_dlf import FusedLlama
from edge_dlf.cli import main
from edge_dlf.cli.options import Options
from edge_dlf.evidence.stats import interval, paired
from edge_dlf.system.file_locks import locked

from . import naive


def test_intervals_small() -> None:
    assert interval([0.0] * 10) == pytest.approx((0.0, 0.0, 0.27753), abs=1e-5)
    assert interval([1.0] * 5 + [0.0] * 5) == pytest.approx((0.5, 0.23659, 0.76341), abs=1e-5)
    assert interval([0.25, 0.75]) == pytest.approx((0.5, 0.5 - 0.48999, 0.5 + 0.48999), abs=1e-5)
    assert paired([1.0, 0.0, 1.0], [1.0, 0.0, 1.0]) == (0.0, 0.0, 0.0)
    better = paired([1.0] * 9 + [0.0], [0.0] * 10)
    assert better.mean == 0.9
    assert better.excludes_zero
    assert not paired([1.0, 0.0], [0.0, 1.0]).excludes_zero


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager

    from edge_dlf.evidence import evaluate
    from edge_dlf.evidence.harness import HarnessModel

pytestmark = pytest.mark.filterwarnings("ignore")

QUESTIONS = [
    {"question": f"the {word} in the house", "choices": [" and", " of the", " the cat is", " in"], "answer": k % 4}
    for k, word in enumerate(["cat", "hen", "ant", "inn", "ending", "other", "hat"])
]
TEXTS = [{"text": "the cat and the hen in the inn " * 40}, {"text": "other"}]


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("EDGE_DLF_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)  # asks pip and others, for seconds


@pytest.fixture
def tasks(tmp_path: Path) -> Callable[[str], str]:
    """Writes a task and its data, and gives its path."""

    def write(kind: str) -> str:
        data = tmp_path / f"{kind}.jsonl"
        rows = TEXTS if kind == "rolling" else QUESTIONS
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        task: dict[str, Any] = {
            "task": f"tiny_{kind}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "num_fewshot": None,
            "metadata": {"version": 1},
        }
        if kind == "choice":
            task |= {
                "output_type": "multiple_choice",
                "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_choice": "choices",
                "doc_to_target": "answer",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        elif kind == "answer":
            task |= {
                "output_type": "generate_until",
                "doc_to_text": "Question: {{question}}\nAnswer:",
                "doc_to_target": " the",
                "generation_kwargs": {"until": ["\n", "he"], "max_gen_toks": 12, "do_sample": False},
                "metric_list": [{"metric": "exact_match"}],
            }
        else:
            task |= {
                "output_type": "loglikelihood_rolling",
                "doc_to_text": "",
                "doc_to_target": "{{text}}",
                "metric_list": [{"metric": "word_perplexity"}],
            }
        path = tmp_path / f"{kind}.yaml"
        path.write_text(json.dumps(task))  # JSON is YAML too
        return str(path)

    return write


class Reference(TemplateLM):  # type: ignore[misc]
    """A model in llama-cpp-python, one text after the other, in float32. n_vocab: tokens beyond it are padding."""

    def __init__(self, path: Path, n_vocab: int) -> None:
        import llama_cpp

        super().__init__()
        self.llama = llama_cpp.Llama(str(path), n_ctx=256, type_k=0, type_v=0, logits_all=True, verbose=False)
        self.n_vocab = n_vocab
        self.max_length = 256

    @property
    def eot_token_id(self) -> int:
        return int(self.llama.token_bos())

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self.llama.tokenize(string.encode(), add_bos=False, special=True))

    def rows(self, tokens: Sequence[int]) -> np.ndarray:
        self.llama.reset()
        self.llama.eval(tokens)
        return np.array(self.llama.scores[: len(tokens), : self.n_vocab], np.float64)

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            rows = self.rows([*context, *continuation][:-1])[-len(continuation) :]
            logprobs = [naive.log_softmax(row)[0][token] for row, token in zip(rows, continuation, strict=True)]
            found.append((float(sum(logprobs)), rows.argmax(1).tolist() == continuation))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        sums = []
        for request in requests:
            tokens = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(tokens, self.eot_token_id, 256, 1)
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            sums.append(sum(logprob for logprob, _ in parts))
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in requests:
            context, asked = request.args
            tokens, answer = self.tok_encode(context), list[int]()
            text = ""
            while len(answer) < asked["max_gen_toks"] and not any(stop in text for stop in asked["until"]):
                token = int(self.rows([*tokens, *answer])[-1].argmax())
                if token in (self.llama.token_eos(), self.llama.token_bos()):
                    break
                answer.append(token)
                text = self.llama.detokenize(answer).decode("utf-8", "replace")
            texts.append(min((text.split(stop)[0] for stop in asked["until"]), key=len))
        return texts


@pytest.fixture(scope="module")
def batched(tiny: Path) -> Iterator[FusedLlama]:
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=4, type_k="f32", type_v="f32") as llm:
        yield llm


def measure(lm: Any, task: str) -> Any:
    return lm_eval.simple_evaluate(
        model=lm, tasks=[task], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False)
    )


@pytest.mark.parametrize("kind", ["choice", "answer", "rolling"])
def test_the_large_alone_has_the_numbers_of_llama_cpp_python(
    kind: str, tasks: Callable[[str], str], tiny: Path, batched: FusedLlama
) -> None:
    path = tasks(kind)
    ours = measure(HarnessModel(lambda: batched, method="large"), path)
    theirs = measure(Reference(tiny / "large.gguf", batched.n_vocab), path)
    name = f"tiny_{kind}"
    # Batches round: 3e-4 nats a token here, which a perplexity raises to the power of the tokens of a word.
    numbers = {metric: value for metric, value in theirs["results"][name].items() if isinstance(value, float)}
    assert numbers
    for metric, value in numbers.items():
        assert ours["results"][name][metric] == pytest.approx(value, rel=5e-3), metric
    for mine, other in zip(ours["samples"][name], theirs["samples"][name], strict=True):
        for [one], [two] in zip(mine["resps"], other["resps"], strict=True):
            assert one == (two if kind == "answer" else pytest.approx(two, rel=1e-3))


def test_fused_scores_are_those_of_the_family(tasks: Callable[[str], str], batched: FusedLlama) -> None:
    found = measure(HarnessModel(lambda: batched, method="dynamic"), tasks("choice"))
    sample = found["samples"]["tiny_choice"][2]
    prompt = batched.tokenize("Question: the ant in the house\nAnswer:")
    for choice, [(logprob, _)] in zip(QUESTIONS[2]["choices"], sample["resps"], strict=True):
        whole = batched.tokenize(f"Question: the ant in the house\nAnswer: {choice}")
        ((_, score),) = batched.score([(prompt, whole[len(prompt) :])])
        assert logprob == pytest.approx(score.logprob, abs=1e-2)


def test_prompts_through_the_chat_template(batched: FusedLlama) -> None:
    lm = HarnessModel(lambda: batched)
    message = [{"role": "user", "content": "the cat"}]
    assert lm.tok_encode(lm.apply_chat_template(message)) == batched.apply_chat_template(message)
    begun = lm.apply_chat_template([*message, {"role": "assistant", "content": "It is"}], add_generation_prompt=False)
    assert begun == lm.apply_chat_template(message) + "It is"


class TestCommand:
    @pytest.fixture
    def run(self, tiny: Path, tmp_path: Path) -> Callable[..., Result]:
        def run(*args: str) -> Result:
            common = ["eval", str(tiny), "-o", str(tmp_path / "out"), "--threads", "1", "--ctx-size", "256"]
            return CliRunner().invoke(main, [*common, "--parallel", "4", *args])

        return run

    def test_a_table_of_methods_and_nothing_is_loaded_again(
        self, run: Callable[..., Result], tasks: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        args = ["--tasks", f"{tasks('choice')},{tasks('answer')}", "--methods", "large static:alpha=0.5 dynamic"]
        first = run(*args)
        assert first.exit_code == 0, first.stderr
        table = (tmp_path / "out" / "results.md").read_text()
        assert table in first.stdout
        assert "| method | acc (n = 7) | − large | − static:alpha=0.5 | − dynamic |" in table
        found = json.loads((tmp_path / "out" / "results.json").read_text())
        assert [(one["task"], one["metric"]) for one in found["tables"]] == [
            ("tiny_choice", "acc"),
            ("tiny_choice", "acc_norm"),
            ("tiny_answer", "exact_match"),
        ]
        assert len(found["tables"][0]["values"]["dynamic"]) == 7

        def load(_: Options) -> FusedLlama:
            raise AssertionError("loaded again")

        monkeypatch.setattr(Options, "load", load)
        (tmp_path / "out" / "results.md").unlink()
        assert run(*args).exit_code == 0
        assert (tmp_path / "out" / "results.md").read_text() == table
        assert json.loads((tmp_path / "out" / "results.json").read_text()) == found

    def test_weights_in_a_method(self, run: Callable[..., Result], tasks: Callable[[str], str], tmp_path: Path) -> None:
        same = "weighted:weights=large=1,base=-0.5,lora=0.5,plausibility=0"
        result = run("--tasks", tasks("choice"), "--methods", f"static:alpha=lora=0.5 {same}")
        assert result.exit_code == 0, result.stderr
        found = json.loads((tmp_path / "out" / "results.json").read_text())
        assert list(found["tables"][0]["values"]) == ["static:alpha=lora=0.5", same]
        assert found["tables"][0]["means"][same] == found["tables"][0]["means"]["static:alpha=lora=0.5"]

    def test_what_was_answered_before_it_was_stopped_is_kept(
        self, run: Callable[..., Result], tasks: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        score, n_scored = FusedLlama.score, []

        def stopped(self: FusedLlama, pairs: Any, **settings: Any) -> Iterator[Any]:
            pairs = list(pairs)
            n_scored.append(len(pairs))
            for n, item in enumerate(score(self, pairs, **settings)):
                if n == 5 and len(n_scored) == 1:
                    raise KeyboardInterrupt
                yield item

        monkeypatch.setattr(FusedLlama, "score", stopped)
        args = ["--tasks", tasks("choice"), "--methods", "dynamic"]
        assert run(*args).exit_code == 130
        assert run(*args).exit_code == 0
        assert n_scored == [28, 28 - 5]

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            (
                ["--tasks", "no_such_task"],
                "there is no task 'no_such_task'; `lm_eval ls tasks` lists those of the harness",
            ),
            (["--tasks", "no.yaml"], "no.yaml: no such file"),
            (
                ["--tasks", "paper_gsm8k", "--methods", "magic"],
                "method must be one of dynamic, static, blend, weighted, large, base, lora",
            ),
            (["--tasks", "paper_gsm8k", "--methods", "static:beta=1"], "expected METHOD:SETTING=VALUE, not"),
            (
                ["--tasks", "paper_gsm8k", "--methods", "static:plausibility=2"],
                "plausibility must be in [0, 1], not 2.0",
            ),
            (["--tasks", "paper_gsm8k", "--methods", "static:alpha=lora=1,b=2,search=grid"], "alpha names 'b'"),
            (
                ["--tasks", "paper_gsm8k", "--methods", "weighted:weights=large=1,b=-2,plausibility=0.1"],
                "weights names 'b'",
            ),
            (["--tasks", "paper_gsm8k", "--methods", "weighted"], "method weighted needs weights"),
            (["--tasks", "paper_gsm8k", "--data", "paper_mmlu=x"], "there is data for 'paper_mmlu'"),
            (["--tasks", "paper_gsm8k", "--data", "paper_gsm8k=no.jsonl"], "no.jsonl: no such file"),
        ],
    )
    def test_wrong_use_is_one_line(self, run: Callable[..., Result], args: list[str], message: str) -> None:
        result = run(*args)
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert message in result.stderr


class Scripted(TemplateLM):  # type: ignore[misc]
    """Answers the given texts in turn; finds the given choice likeliest."""

    def __init__(self, *texts: str) -> None:
        super().__init__()
        self.texts = texts
        self.prompts: list[str] = []

    eot_token_id = 0

    def tok_encode(self, string: str, **_: Any) -> list[int]:
        return list(string.encode())

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        self.prompts += [context for (context, _), _, _ in requests]
        return [(0.0 if continuation.strip() in self.texts else -1.0, False) for (_, continuation), _, _ in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise AssertionError

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        self.prompts += [request.args[0] for request in requests]
        return list(self.texts)


@pytest.mark.parametrize(
    ("task", "rows", "texts", "prompt", "values"),
    [
        (
            "paper_gsm8k",
            [{"question": "1 + 1?", "answer": "It is 2.\n#### 2"}, {"question": "x", "answer": "#### 1,072"}],
            [" It is 2 of 7.", " so\n#### 1072"],
            "Question: 1 + 1?\nAnswer:",
            {"exact_match, strict": [0, 1], "exact_match, flexible": [0, 1]},
        ),
        (
            "paper_truthfulqa",
            [{"question": "Why?", "mc1_targets": {"choices": ["true", "false"], "labels": [1, 0]}}],
            ["true"],
            "Question: Why?\nAnswer:",
            {"acc": [1]},
        ),
        (
            "paper_triviaqa",
            [
                {"question": "Who?", "answer": {"aliases": ["The Man", "Man"]}},
                {"question": "a", "answer": {"aliases": ["b"]}},
            ],
            [" the man.", "c"],
            "Question: Who?\nAnswer:",
            {"exact_match": [1, 0]},
        ),
        (
            "paper_cnn_dm",
            [{"article": "A b c.", "highlights": "the cat sat down"}],
            [" the cat sat"],
            "Article: A b c.\nSummary:",
            {"rouge2": [0.8]},
        ),
        (
            "paper_mmlu",
            [{"question": " 1? ", "choices": ["a", "b", "c", "d"], "answer": 2}],
            ["C"],
            "Question: 1?\nA. a\nB. b\nC. c\nD. d\nAnswer:",
            {"acc": [1]},
        ),
    ],
)
def test_the_paper_s_tasks(
    task: str, rows: list[Any], texts: list[str], prompt: str, values: dict[str, list[float]], tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manager = TaskManager(include_path=[str(evaluate.TASKS)], include_defaults=False)
    lm = Scripted(*texts)
    found = lm_eval.simple_evaluate(
        model=lm, tasks=[evaluate._spec(manager, task, [data])], bootstrap_iters=0, task_manager=manager
    )
    assert lm.prompts[0] == prompt
    columns = {metric: list(own.values()) for (_, metric), own in evaluate._values(found).items()}
    assert columns == {metric: pytest.approx(own) for metric, own in values.items()}


class TestFiles:
    """Tasks and data as people write, replace and misname them."""

    @pytest.fixture
    def run(self, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
        monkeypatch.chdir(tmp_path)

        def run(tasks: str, *args: str, output: str = "out", methods: str = "large") -> Result:
            common = ["eval", str(tiny), "--threads", "1", "--ctx-size", "256", "-o", output, "--methods", methods]
            return CliRunner().invoke(main, [*common, "--tasks", tasks, *args])

        return run

    def definition(self, name: str, **changed: Any) -> None:
        task: dict[str, Any] = {
            "task": "mine",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": "data.jsonl"}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{q}}",
            "doc_to_choice": "{{c}}",
            "doc_to_target": "{{l}}",
        }
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(json.dumps({**task, **changed}))

    def data(self, *rows: dict[str, Any]) -> None:
        Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def test_two_tasks_of_one_name(self, run: Callable[..., Result]) -> None:
        self.data({"q": "the", "c": [" cat", " hen"], "l": 0})
        self.definition("m.yaml")
        self.definition("sub/m.yaml", doc_to_text="a {{q}}")
        result = run("m.yaml,sub/m.yaml")
        assert (result.exit_code, result.stderr) == (
            2, "edge-dlf: m.yaml and sub/m.yaml are both named 'mine'; rename one of them\n"
        )  # fmt: skip
        self.definition("sub/m.yaml", task="paper_gsm8k")
        assert "are both named 'paper_gsm8k'" in run("paper_gsm8k,sub/m.yaml").stderr
        assert run("m.yaml,m.yaml").exit_code == 0

    def test_data_that_were_replaced_with_their_old_time(self, run: Callable[..., Result]) -> None:
        self.definition("m.yaml")
        means = []
        for right in (0, 1):
            self.data({"q": "the", "c": [" cat", " hen"], "l": right})
            os.utime("data.jsonl", (1e9, 1e9))
            assert run("m.yaml", output=f"out{right}").exit_code == 0
            table = json.loads(Path(f"out{right}/results.json").read_text())["tables"][0]
            means.append(table["means"]["large"]["mean"])
        assert sorted(means) == [0.0, 1.0]

    @pytest.mark.parametrize("place", [0, 1])
    @pytest.mark.parametrize("form", [[], ["--chat"]])
    def test_an_empty_choice_is_named(self, run: Callable[..., Result], place: int, form: list[str]) -> None:
        rows = [{"q": "the", "c": [" cat", " hen"], "l": 0}] * 2
        rows[place] = {"q": "a", "c": [" cat", ""], "l": 0}
        self.data(*rows)
        self.definition("m.yaml")
        result = run("m.yaml", *form)
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1].startswith("edge-dlf: ")
        assert f"example {place} of mine has an empty choice: {{'q': 'a'" in result.stderr

    def test_empty_data(self, run: Callable[..., Result]) -> None:
        self.definition("m.yaml")
        self.data()
        result = run("m.yaml")
        assert (result.exit_code, result.stderr) == (2, "edge-dlf: data.jsonl: is empty\n")
        assert run("paper_gsm8k", "--data", "paper_gsm8k=data.jsonl").stderr == "edge-dlf: data.jsonl: is empty\n"

    def test_a_file_in_place_of_the_folder(self, run: Callable[..., Result]) -> None:
        self.data({"q": "the", "c": [" cat", " hen"], "l": 0})
        self.definition("m.yaml")
        Path("file").write_text("mine")
        for output in ("file", "file/below"):
            result = run("m.yaml", output=output)
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert Path("file").read_text() == "mine"

    @pytest.mark.parametrize("name", ["results.json", "results.md"])
    def test_results_of_something_else_stay(self, run: Callable[..., Result], name: str) -> None:
        self.data({"q": "the", "c": [" cat", " hen"], "l": 0})
        self.definition("m.yaml")
        Path("out").mkdir()
        Path("out", name).write_text('{"mine": 1}')
        assert run("m.yaml").exit_code == 2
        assert Path("out", name).read_text() == '{"mine": 1}'

    def test_a_task_that_is_no_yaml(self, run: Callable[..., Result]) -> None:
        Path("m.yaml").write_text("task: [")
        result = run("m.yaml")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith("edge-dlf: m.yaml: is no task (")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("- a\n", "m.yaml: is no task (Expected YAML dict"),
            ("hello", "m.yaml: is no task (Expected YAML dict"),
            ("", "m.yaml: is no task (Expected YAML dict"),
            ("task: !!python/object/apply:os.system [true]", "m.yaml: is no task (could not determine a constructor"),
            ("process_docs: !function nosuch.f", "Cannot import module 'nosuch'"),
            ("dataset_kwargs: 3", "dataset_kwargs must be a mapping"),
            ("{dataset_path: json, dataset_kwargs: {data_files: 3}}", "data_files must name files, not 3"),
            ("{dataset_path: json, dataset_kwargs: {data_files: {test: [a, 1]}}}", "data_files must name files, not 1"),
        ],
    )
    @pytest.mark.parametrize("data", [[], ["--data", "m.yaml=data.jsonl"]])
    def test_a_definition_of_another_kind(
        self, run: Callable[..., Result], content: str, reason: str, data: list[str]
    ) -> None:
        self.data({"q": "the", "c": [" cat", " hen"], "l": 0})
        Path("m.yaml").write_text(content)
        result = run("m.yaml", *data)
        if not data or not content.startswith(("d", "{")):  # whose own data are not read where others are given
            assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
            assert reason in result.stderr
        assert result.exit_code
        assert result.stderr.splitlines()[-1].startswith("edge-dlf: ")

    @pytest.mark.parametrize(
        ("tasks", "methods", "said"), [("", "large", "names no task"), (",", "large", "names no task"),
        ("m.yaml", " ", "names no method"), ("m.yaml", "", "names no method")],
    )  # fmt: skip
    def test_nothing_to_measure(self, run: Callable[..., Result], tasks: str, methods: str, said: str) -> None:
        self.definition("m.yaml")
        result = run(tasks, methods=methods)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert said in result.stderr
        assert not Path("out").exists()

    def test_two_runs_of_one_folder(self, run: Callable[..., Result]) -> None:
        self.data({"q": "the", "c": [" cat", " hen"], "l": 0})
        self.definition("m.yaml")
        Path("out").mkdir()
        with locked([Path("out/results.json")]):
            result = run("m.yaml")
        assert result.exit_code == 1
        assert result.stderr == "edge-dlf: out/results.json: another run is writing to it\n"

    def test_results_of_one_example_are_json(self, run: Callable[..., Result]) -> None:
        self.data({"q": "the", "c": [" cat", " hen"], "l": 0})
        self.definition("m.yaml")
        assert run("m.yaml", methods="large base").exit_code == 0
        text = Path("out/results.json").read_text()
        assert not {"NaN", "Infinity"}.intersection(re.findall(r"\w+", text))
        (difference,) = json.loads(text)["tables"][0]["differences"]["large"].values()
        assert difference["low"] is None

    @pytest.mark.parametrize(("kind", "code"), [("garbage", 2), ("folder", 2), ("damaged", 1)])
    def test_answers_that_cannot_be_kept(
        self, run: Callable[..., Result], kind: str, code: int, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.data({"q": "the", "c": [" cat", " hen"], "l": 0})
        self.definition("m.yaml")
        assert run("m.yaml").exit_code == 0
        (answers,) = Path("out").glob("*.db")
        content = answers.read_bytes()
        answers.unlink()
        if kind == "folder":
            answers.mkdir()
        else:
            answers.write_bytes((content[:100] if kind == "damaged" else b"") + b"garbage" * (len(content) // 7))
        result = run("m.yaml")
        assert result.exit_code == code
        assert result.stderr.splitlines()[-1].startswith(f"edge-dlf: {answers}: ")
        assert "Traceback" not in result.stderr + capfd.readouterr().err
