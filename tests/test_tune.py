"""`edge-dlf tune`: the pass over given answers, the comparison and its recommendation, what is written, bad input."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_dlf import FusedLlama, InvalidParameterError
from edge_dlf.answers.requests import parse_body
from edge_dlf.cli import main
from edge_dlf.engine.backend import Run
from edge_dlf.evidence import tune as tuning
from edge_dlf.evidence.answer_rows import AnswerLosses, evaluate
from edge_dlf.evidence.examples import Example, read_rows, tokenized
from edge_dlf.evidence.held_out import Outcome
from edge_dlf.families.defaults import with_settings, write_settings
from edge_dlf.families.spec import FamilySpec, tomllib
from edge_dlf.system.file_locks import locked
from edge_dlf.system.paths import shipped_dir

from .tiny import tiny_model

N_ANSWER = 12


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("EDGE_DLF_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawn(llm: FusedLlama, weights: Mapping[str, float], n: int) -> list[Example]:
    """Examples whose answers are drawn from the weighted fusion, which therefore has the lowest loss of all methods."""
    ensemble, rng = llm.driver.decoder.ensemble, np.random.default_rng(0)
    examples = []
    for k in range(n):
        prompt = llm.tokenize(f"prompt {k}: ")
        answer: list[int] = []
        while len(answer) < N_ANSWER:
            ensemble.forget()
            rows = ensemble.decode({name: [Run(0, [*prompt, *answer], 1)] for name in weights})
            fused = sum(weight * rows[name][0, : llm.n_vocab] for name, weight in weights.items())
            answer.append(int((fused + rng.gumbel(size=llm.n_vocab)).argmax()))
        examples.append(Example(tuple(prompt), tuple(answer), llm.detokenize(answer)))
    ensemble.forget()
    return examples


def tuned(llm: FusedLlama, examples: list[Example], folder: Path) -> tuning.TuneResult:
    return tuning.tune_tasks(llm, {"": examples}, n_threads=1, folder=folder)[""]


def test_an_expert_that_gave_the_answers_is_recommended_alone(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    result = tuned(tiny_llm, drawn(tiny_llm, {"tuned": 1.0}, 60), tmp_path)
    assert result.recommended.name == "tuned alone"
    assert result.settings == {"method": "tuned", "weights": None}
    assert result.verdict.startswith("The expert tuned alone is as good as any fusion here and ")


def test_a_mixture_is_recommended_where_both_halves_gave_the_answers(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    result = tuned(tiny_llm, drawn(tiny_llm, {"large": 0.6, "tuned": 0.7}, 100), tmp_path)
    weights = result.settings["weights"]
    assert result.settings["method"] == "weighted"
    assert set(weights) == {"large", "tuned"}
    assert weights["large"] == pytest.approx(0.6, abs=0.1)
    assert weights["tuned"] == pytest.approx(0.7, abs=0.1)
    assert result.verdict.startswith("Fusion helps: weighted has ")


@pytest.mark.parametrize(
    ("weights", "n"), [({"tuned": 1.0}, 30), ({"large": 0.1, "tuned": 0.9}, 30), ({"large": 0.6, "tuned": 0.7}, 8)]
)
def test_the_cheapest_that_cannot_be_told_from_the_best_is_recommended(
    tiny_llm: FusedLlama, tmp_path: Path, weights: dict[str, float], n: int
) -> None:
    result = tuned(tiny_llm, drawn(tiny_llm, weights, n), tmp_path)

    def is_as_good(outcome: Outcome) -> bool:
        behind = outcome.above(result.best)
        one_standard_error = (result.best.loss.high - result.best.loss.mean) / 1.96
        return behind.mean <= 1e-3 or (behind.low <= 0 and behind.mean <= one_standard_error)

    assert is_as_good(result.recommended)
    cheaper = [outcome for outcome in result.outcomes if outcome.n_bytes < result.recommended.n_bytes]
    assert not any(map(is_as_good, cheaper))


def test_few_examples_tell_nothing(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    for weights in ({"tuned": 1.0}, {"large": 0.6, "tuned": 0.7}):
        assert tuned(tiny_llm, drawn(tiny_llm, weights, 4), tmp_path).verdict.startswith("Too few examples to tell: ")


def test_a_task_that_no_member_knows_is_named(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    examples = [Example((65, 66 + k), tuple(rng.integers(0, 250, 6).tolist()), "") for k in range(12)]
    result = tuned(tiny_llm, examples, tmp_path)
    assert result.verdict.startswith("No member knows this task: ")
    assert not result.is_known


def test_every_method_has_the_loss_of_its_scores(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    examples = drawn(tiny_llm, {"tuned": 1.0}, 4)
    found = evaluate(tiny_llm, examples, 1, tmp_path)
    pairs = [(example.prompt, example.answer) for example in examples]
    for c, (_, settings, _) in enumerate(found.methods):
        for k, score in tiny_llm.score(pairs, **settings):
            rows = slice(found.starts[k], found.starts[k + 1])
            assert found.losses[rows, c] == pytest.approx([-logprob for logprob in score.logprobs], abs=2e-3)
            if "plausibility" not in settings:
                assert found.right[rows, c].all() == score.is_greedy


def test_blend_has_the_loss_of_its_scores(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    examples = drawn(tiny_llm, {"large": 0.6, "tuned": 0.7}, 20)
    (blend,) = [outcome for outcome in tuned(tiny_llm, examples, tmp_path).outcomes if outcome.name == "blend"]
    assert blend.members == ("large", "lora", "tuned")
    scores = dict(tiny_llm.score([(each.prompt, each.answer) for each in examples], **blend.settings))
    for k, example in enumerate(examples):
        assert blend.losses[k] == pytest.approx(-scores[k].logprob, rel=0.02, abs=0.1)
        assert (blend.n_right[k] == len(example.answer)) == scores[k].is_greedy


def test_tokens_right_of_a_weighted_fusion_are_those_of_the_engine(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    examples = drawn(tiny_llm, {"large": 0.6, "tuned": 0.7}, 20)
    result = tuned(tiny_llm, examples, tmp_path)
    (outcome,) = [each for each in result.outcomes if each.prior and each.members == ("large", "tuned")]
    for k, example in enumerate(examples):
        pair = [(example.prompt, example.answer)]
        settings = {"method": "weighted", "weights": outcome.fold_weights[result.folds[k]]}
        ((_, score),) = tiny_llm.score(pair, **settings)
        assert outcome.losses[k] == pytest.approx(-score.logprob, rel=0.02, abs=0.1)
        assert (outcome.n_right[k] == len(example.answer)) == score.is_greedy


def test_a_pass_that_was_stopped_continues(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    examples = drawn(tiny_llm, {"tuned": 1.0}, 12)
    whole = evaluate(tiny_llm, examples, 1, tmp_path / "whole")

    def stop(n_done: int) -> None:
        if n_done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny_llm, examples, 1, tmp_path / "parts", stop)
    (file,) = (tmp_path / "parts").glob("*.rows")
    for n_cut in (0, 7):  # as left by a process that was killed while it wrote
        content = file.read_bytes()
        file.write_bytes(content[: len(content) - n_cut])
        seen: list[int] = []
        parts = evaluate(tiny_llm, examples, 1, tmp_path / "parts", seen.append)
        assert seen[0] == (11 if n_cut else 5)
        assert parts.losses == pytest.approx(whole.losses, abs=2e-3)
    evaluate(tiny_llm, examples, 1, tmp_path / "parts", seen.append)
    assert seen[-1] == 12


def test_a_pass_waits_for_another_one_over_the_same_examples(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    examples = drawn(tiny_llm, {"tuned": 1.0}, 6)
    whole = evaluate(tiny_llm, examples, 1, tmp_path)
    (file,) = tmp_path.glob("*.rows")
    content, other, seen = file.read_bytes(), ExitStack(), list[int]()
    file.write_bytes(content[:-7])
    other.enter_context(locked([file]))

    def finish(n_done: int) -> None:
        if not seen:
            file.write_bytes(content)
            other.close()
        seen.append(n_done)

    assert evaluate(tiny_llm, examples, 1, tmp_path, finish).losses == pytest.approx(whole.losses)
    assert seen[:2] == [0, 6]


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_stands_in_a_pass_s_place_is_left_alone(tiny_llm: FusedLlama, tmp_path: Path, kind: str) -> None:
    examples = drawn(tiny_llm, {"tuned": 1.0}, 2)
    whole = evaluate(tiny_llm, examples, 1, tmp_path)
    (file,) = tmp_path.glob("*.rows")
    file.unlink()
    make = {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero")}
    make[kind]()
    assert evaluate(tiny_llm, examples, 1, tmp_path).losses == pytest.approx(whole.losses)
    assert not file.is_file()


def test_what_prompts_share_is_read_once(tiny: Path, tmp_path: Path) -> None:
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=4) as llm:
        shared = llm.tokenize("the cat and the hen in the inn " * 8)
        examples = [Example((*shared, 65 + k, 66), (67, 68 + k), "") for k in range(8)]
        ensemble = llm.driver.decoder.ensemble
        n_read: list[int] = []
        decode = ensemble.decode

        def counting(runs: Mapping[str, Any], *arguments: Any) -> Any:
            n_read.extend(len(run.tokens) for run in runs.get("large", ()))
            return decode(runs, *arguments)

        ensemble.decode = counting  # type: ignore[method-assign]
        evaluate(llm, examples, 1, tmp_path)
    assert sum(n_read) == len(shared) + 8 * 3


def test_an_expert_that_seems_to_know_the_examples_is_named(
    tiny_llm: FusedLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def knowing(*arguments: Any) -> AnswerLosses:
        found = evaluate(*arguments)
        losses = found.losses.copy()
        losses[:, 3] = 0.001
        return replace(found, losses=losses)

    monkeypatch.setattr(tuning, "evaluate", knowing)
    result = tuned(tiny_llm, drawn(tiny_llm, {"tuned": 1.0}, 12), tmp_path)
    assert any(note.startswith("tuned has 0.001 nats a token, suspiciously few") for note in result.notes)


def test_an_answer_that_no_member_can_give_is_refused(
    tiny_llm: FusedLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impossible(*arguments: Any) -> AnswerLosses:
        found = evaluate(*arguments)
        return replace(found, losses=np.full_like(found.losses, np.inf))

    monkeypatch.setattr(tuning, "evaluate", impossible)
    with pytest.raises(InvalidParameterError, match="no member gives every token"):
        tuned(tiny_llm, drawn(tiny_llm, {"tuned": 1.0}, 4), tmp_path)


def test_a_member_that_cannot_give_an_answer_is_left_out(
    tiny_llm: FusedLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def excluding(*arguments: Any) -> AnswerLosses:
        found = evaluate(*arguments)
        losses = found.losses.copy()
        losses[3, [0, *range(4, 8)]] = np.inf
        return replace(found, losses=losses)

    monkeypatch.setattr(tuning, "evaluate", excluding)
    result = tuned(tiny_llm, drawn(tiny_llm, {"tuned": 1.0}, 12), tmp_path)
    assert not any("large" in outcome.members for outcome in result.outcomes if outcome.prior)
    assert math.isfinite(result.recommended.loss.mean)
    assert json.loads(json.dumps(result.as_json(), allow_nan=False))["methods"][0]["loss"]["mean"] is None


SUMS = [(35, 40), (21, 39), (12, 13), (50, 20), (41, 17), (33, 22), (60, 11), (18, 44), (25, 25), (71, 12), (19, 54)]


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """A copy of the family that ships, with one expert."""
    folder = tmp_path / "demo"
    folder.mkdir()
    for name in ("large-q8_0", "base-q8_0", "sums-lora-f16"):
        shutil.copy(shipped_dir() / "demo" / f"{name}.gguf", folder)
    (folder / "family.toml").write_text(
        'name = "mine"\n[large]\npath = "large-q8_0.gguf"\n[base]\npath = "base-q8_0.gguf"\n[[experts]]\n'
        'name = "sums"\npath = "sums-lora-f16.gguf"\n[defaults]  # of mine\ntemperature = 0.0\n'
        'method = "static"  # for now\n'
    )
    return folder


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    path = tmp_path / "sums.jsonl"
    rows = [{"prompt": f"What is {a} plus {b}?", "answer": f"The answer is {a + b}."} for a, b in SUMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["tune", *map(str, arguments), "--threads", "1"])


def test_the_command_prints_a_table_and_writes_the_recommendation(demo: Path, sums: Path) -> None:
    result = run(sums, "-f", demo, "--write", "--check", "3")
    assert result.exit_code == 0, result.output
    assert "answers right" in result.stdout
    assert "Fusion helps: weighted has" in result.stdout
    assert f"To use it: edge-dlf chat -f {demo} --method weighted --weights large=" in result.stdout
    assert "Of 3 held-out answers, generated, are exact: weighted large + sums 3" in result.stdout
    text = (demo / "family.toml").read_text()
    assert '[defaults]  # of mine\ntemperature = 0.0\nmethod = "weighted"  # for now\nweights = {large = ' in text
    defaults = FamilySpec.load(demo).defaults
    assert defaults["method"] == "weighted"
    assert set(defaults["weights"]) == {"large", "sums"}
    assert "To use it: edge-dlf generate --raw -f " in run(sums, "-f", demo, "--raw").stdout
    again = run(sums, "-f", demo)
    assert again.stdout.splitlines()[3:-1] == result.stdout.splitlines()[3:-2]  # all members are compared anew


def test_what_is_written_may_be_a_profile(demo: Path, sums: Path) -> None:
    before = (demo / "family.toml").read_text()
    result = run(sums, "-f", demo, "--write", "--profile", "adding")
    assert result.exit_code == 0, result.output
    assert f"To use it: edge-dlf chat -f {demo} --profile adding" in result.stdout
    text = (demo / "family.toml").read_text()
    assert text.startswith(before + '\n[profiles.adding]\nmethod = "weighted"\nweights = {large = ')
    spec = FamilySpec.load(demo)
    assert set(spec.profiles["adding"]["weights"]) == {"large", "sums"}
    assert spec.defaults == {"temperature": 0.0, "method": "static"}
    for names, message in (
        (("--profile", "adding"), "--profile names what --write writes"),
        (("--write", "--profile", "dynamic"), "a profile cannot be named 'dynamic'"),
        (("--write", "--profile", "a b"), "a profile's name must have letters"),
    ):
        refused = run(sums, "-f", demo, *names)
        assert (refused.exit_code, refused.stdout) == (2, "")
        assert message in refused.stderr
    assert (demo / "family.toml").read_text() == text


def test_several_tasks_are_compared_in_one_pass(tiny_llm: FusedLlama, tmp_path: Path) -> None:
    one = drawn(tiny_llm, {"tuned": 1.0}, 24)
    two = drawn(tiny_llm, {"large": 0.6, "tuned": 0.7}, 20)
    seen: list[int] = []
    both = tuning.tune_tasks(
        tiny_llm, {"a": one, "b": [*two, *one[:2]]}, n_threads=1, folder=tmp_path / "both", tell=seen.append
    )
    assert seen[0] == 0
    assert max(seen) == 44  # examples that tasks share are read once
    assert len(list((tmp_path / "both").glob("*.rows"))) == 1
    for task, examples in {"a": one, "b": [*two, *one[:2]]}.items():
        alone = tuned(tiny_llm, examples, tmp_path / task)
        assert both[task].verdict == alone.verdict
        assert both[task].settings["method"] == alone.settings["method"]
        for outcome, other in zip(both[task].outcomes, alone.outcomes, strict=True):
            assert outcome.losses == pytest.approx(other.losses, rel=3e-2)  # rows are sampled by number
    with pytest.raises(InvalidParameterError, match="task 'b': there is only one example"):
        tuning.tune_tasks(tiny_llm, {"a": one, "b": two[:1]})


def test_each_task_of_a_file_gets_a_table_and_a_profile(demo: Path, sums: Path, tmp_path: Path) -> None:
    path, both = tmp_path / "two.jsonl", []
    for row in map(json.loads, sums.read_text().splitlines()):
        both += [{**row, "task": "adding"}, {**row, "answer": row["answer"].removesuffix("."), "task": "bare"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in both))
    result = run(path, "-f", demo, "--task-field", "task", "--write", "--check", "2")
    assert result.exit_code == 0, result.output
    for task in ("adding", "bare"):
        assert f"== {task}\nmine, {len(SUMS)} examples" in result.stdout
        assert f"To use it: edge-dlf chat -f {demo} --profile {task}" in result.stdout
    spec = FamilySpec.load(demo)
    assert list(spec.profiles) == ["adding", "bare"]
    assert spec.defaults["method"] == "static"
    found = json.loads(run(path, "-f", demo, "--task-field", "task", "--json").stdout)["tasks"]
    assert {task: own["recommended"]["method"] for task, own in found.items()} == {
        task: own["method"] for task, own in spec.profiles.items()
    }


def test_nothing_is_written_for_a_task_that_no_member_knows(demo: Path, sums: Path, tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "two.jsonl"
    rows = [{**json.loads(row), "task": "adding"} for row in sums.read_text().splitlines()]
    for row in rows[:12]:
        rows.append({**row, "answer": "".join(map(chr, rng.integers(0x3041, 0x3096, 6))), "task": "noise"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(path, "-f", demo, "--task-field", "task", "--write")
    assert result.exit_code == 1
    assert "No member knows this task" in result.stdout
    assert result.stderr.splitlines()[-1].endswith("no member knows these tasks: noise")
    assert list(FamilySpec.load(demo).profiles) == ["adding"]
    before = (demo / "family.toml").read_text()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows if row["task"] == "noise"))
    result = run(path, "-f", demo, "--write")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].endswith("no member knows this task")
    assert (demo / "family.toml").read_text() == before


@pytest.mark.parametrize(
    ("tasks", "flags", "message"),
    [
        (["a", None], (), "examples.jsonl:2: the field 'task' must name the task, in text"),
        (["a", 3], (), "examples.jsonl:2: the field 'task' must name the task"),
        (["a", "a", "b"], (), "task 'b': there is only one example"),
        (["a", "a", "b c", "b c"], ("--write",), "a profile's name must have letters"),
        (["a", "a"], ("--write", "--profile", "b"), "--task-field gives each task's profile its name"),
        ([], (), "there are no examples"),
    ],
)
def test_bad_tasks_get_one_line_and_change_nothing(
    demo: Path, tmp_path: Path, tasks: list[Any], flags: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "examples.jsonl"
    rows = [{"prompt": f"{n}", "answer": "b", "task": task} for n, task in enumerate(tasks)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = (demo / "family.toml").read_text()
    result = run(path, "-f", demo, "--task-field", "task", *flags)
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]
    assert (demo / "family.toml").read_text() == before


def test_json_holds_what_a_request_takes(demo: Path, sums: Path) -> None:
    result = run(sums, "-f", demo, "--json")
    found = json.loads(result.stdout)
    assert found["n_examples"] == len(SUMS)
    settings = parse_body({"prompt": "What is 2 plus 3?", "edge_dlf": found["recommended"]}).settings
    assert settings["method"] == "weighted"
    with FusedLlama.from_family(demo, n_ctx=128, n_threads=1) as llm:
        answer = llm.create_chat_completion([{"role": "user", "content": "What is 12 plus 13?"}], **settings)
    assert answer["choices"][0]["message"]["content"].strip() == "The answer is 25."  # type: ignore[index]


def test_the_same_from_python(demo: Path, sums: Path) -> None:
    rows = [json.loads(line) for line in sums.read_text().splitlines()]
    chats = [
        {"messages": [{"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    with FusedLlama.from_family(demo, n_ctx=128, n_threads=1) as llm:
        results = [tuning.tune(llm, given, n_threads=1) for given in (rows, chats)]
    assert results[0].settings == results[1].settings
    assert results[0].settings["method"] == "weighted"


def chat(**answer: Any) -> str:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **answer}]
    return json.dumps({"messages": messages}) + "\n"


def rows(*pairs: tuple[str, str]) -> str:
    return "".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "there are no examples"),
        (rows(("a", "b")), "there is only one example"),
        (rows(("a", "b"), ("a", "b")), "all examples are the same"),
        (rows(("a", "b"), ("a", "  ")), "examples.jsonl:2: the answer is empty"),
        (rows(("a", "b"), ("a" * 5000, "b")), "examples.jsonl:2: has 50"),
        ("nothing\n", "examples.jsonl:1: is not JSON"),
        ('{"prompt": "a"}\n', "examples.jsonl:1: the answer must be text"),
        ('{"answer": "a"}\n', "examples.jsonl:1: needs either a prompt or messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}\n', "examples.jsonl:1: the last message must be"),
        (
            '{"messages": [{"role": "user"}], "answer": "a"}\n',
            "examples.jsonl:1: the content of a message must be text",
        ),
        ('{"messages": 3}\n', "examples.jsonl:1: messages must be a list"),
        (chat(tool_calls=[{"id": "1"}]), "examples.jsonl:1: of the last message, 'tool_calls' cannot be learnt from"),
        (chat(reasoning_content="hm"), "examples.jsonl:1: of the last message, 'reasoning_content' cannot be learnt"),
        (chat(weight=0.5), "examples.jsonl:1: of the last message, 'weight' cannot be learnt from"),
        (chat()[:-2] + ', "tools": [{}]}', "examples.jsonl:1: of a row, 'tools' cannot be learnt from"),
    ],
)
def test_bad_examples_get_one_line_and_change_nothing(demo: Path, tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(content)
    before = (demo / "family.toml").read_text()
    result = run(path, "-f", demo, "--write")
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]
    assert (demo / "family.toml").read_text() == before


def test_a_member_that_returns_nan_is_named(tiny: Path, tmp_path: Path, sums: Path) -> None:
    tiny_model(tmp_path / "nan.gguf", seed=2, nan=True)
    family = ("--large", tiny / "large.gguf", "--base", tiny / "base.gguf", "--expert", f"odd={tmp_path / 'nan.gguf'}")
    result = run(sums, *family)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "edge-dlf: odd returned NaN in its logits"


def test_a_family_that_is_not_the_users_is_not_written_to(tiny: Path, sums: Path) -> None:
    files = ("--large", tiny / "large.gguf", "--base", tiny / "base.gguf", "--expert", f"lora={tiny / 'lora.gguf'}")
    for family, message in ((files, "made of files"), (("-f", "demo"), "ships with edge-dlf")):
        result = run(sums, *family, "--write")
        assert result.exit_code == 2
        assert message in result.stderr


WEIGHTS = {"large": 0.5, "odd.name": -0.25}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a = 1\n", 'a = 1\n\n[defaults]\nmethod = "weighted"\nweights = {large = 0.5, "odd.name" = -0.25}\n'),
        (
            '[defaults] # x\nweights = { large = 1.0 } # "#"\ntop_k = 1\n\n# end\n[b]\n',
            '[defaults] # x\nweights = {large = 0.5, "odd.name" = -0.25} # "#"\ntop_k = 1\n\n# end\n'
            'method = "weighted"\n[b]\n',
        ),
        (
            "[defaults]\r\nmethod = 'static'\r\n",
            '[defaults]\r\nmethod = "weighted"\r\nweights = {large = 0.5, "odd.name" = -0.25}\r\n',
        ),
        (
            "defaults = { top_k = 1 }\n",
            'defaults = { top_k = 1, method = "weighted",weights = {large = 0.5, "odd.name" = -0.25}}\n',
        ),
        (
            '[defaults]\nmethod = """static\n"""\n',
            '[defaults]\nmethod = "weighted"\nweights = {large = 0.5, "odd.name" = -0.25}\n',
        ),
        (
            "[defaults]\n[defaults.weights]\nlarge = 1.0\n[b]\n",
            '[defaults]\nmethod = "weighted"\nweights = {large = 0.5, "odd.name" = -0.25}\n[b]\n',
        ),
    ],
)
def test_the_rest_of_a_file_stays_as_it_is(before: str, after: str) -> None:
    assert with_settings(before, {"method": "weighted", "weights": WEIGHTS}) == after
    assert tomllib.loads(after)["defaults"] == tomllib.loads(before).get("defaults", {}) | {
        "method": "weighted",
        "weights": WEIGHTS,
    }


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("a = 1\n[b]\n", 'a = 1\n[b]\n\n[profiles."odd.name"]\ntop_k = 2\n'),
        (
            "[profiles.a]\ntop_k = 1\n[profiles . 'odd.name'] # x\ntop_k = 1\n[defaults]\ntop_k = 1\n",
            "[profiles.a]\ntop_k = 1\n[profiles . 'odd.name'] # x\ntop_k = 2\n[defaults]\ntop_k = 1\n",
        ),
        ('profiles = { "odd.name" = { top_k = 1 } }\n', 'profiles = { "odd.name" = { top_k = 2 } }\n'),
        ("profiles = { a = { top_k = 1 } }\n", 'profiles = { a = { top_k = 1 }, "odd.name" = {top_k = 2}}\n'),
        ("profiles.a.top_k = 1\nb = 1\n", 'profiles.a.top_k = 1\nprofiles."odd.name" = {top_k = 2}\nb = 1\n'),
    ],
)
def test_a_profile_is_written_by_its_name(before: str, after: str) -> None:
    assert with_settings(before, {"top_k": 2}, "odd.name") == after


def test_a_setting_is_taken_out() -> None:
    text = '[defaults]\nmethod = "weighted"\nweights = { large = 1.0 }\n'
    assert with_settings(text, {"method": "sums", "weights": None}) == '[defaults]\nmethod = "sums"\n'


def test_a_byte_order_mark_stays_where_settings_are_written(tiny: Path, tmp_path: Path) -> None:
    path, text = tmp_path / "family.toml", (tiny / "family.toml").read_text()
    path.write_text(f"\ufeff{text}", "utf-8")
    write_settings(path, {"short": {"top_k": 2}})
    assert path.read_text("utf-8") == f"\ufeff{text}\n[profiles.short]\ntop_k = 2\n"


@pytest.mark.parametrize("content", ["garbage = [", "a = 1\ra = 2", "a = 1\na = 2\n", ""])
def test_a_file_that_was_damaged_meanwhile_is_not_changed(tmp_path: Path, content: str) -> None:
    path = tmp_path / "family.toml"
    path.write_bytes(content.encode())
    with pytest.raises(InvalidParameterError, match="is not changed, for then"):
        write_settings(path, {None: {"top_k": 2}})
    assert path.read_bytes() == content.encode()


def test_a_system_prompt_is_a_message_or_refused(tiny_llm: FusedLlama) -> None:
    given = [("here", {"prompt": "a", "answer": "b"})]
    plain = tokenized(tiny_llm, given, raw=False, system=None)
    assert tokenized(tiny_llm, given, raw=False, system="") == plain
    assert tokenized(tiny_llm, given, raw=False, system="x") != plain
    with pytest.raises(InvalidParameterError, match="a system prompt needs the chat template"):
        tokenized(tiny_llm, given, raw=True, system="x")


def test_what_says_nothing_beside_an_answer_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_text(chat(name="x", weight=1, refusal=None, tool_calls=[], reasoning_content=""))
    assert len(list(read_rows(path))) == 1


def test_a_row_of_more_than_64_mib_is_told_as_such(tmp_path: Path) -> None:
    path = tmp_path / "examples.jsonl"
    path.write_bytes(rows(("a", "b")).encode() + b"x" * (65 << 20) + b"\n")
    with pytest.raises(InvalidParameterError, match="examples.jsonl:2: has more than 64 MiB"):
        list(read_rows(path))
