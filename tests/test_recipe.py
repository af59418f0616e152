"""The recipe of the demo family: its problems, its documents, and GGUF files that say what torch says."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra recipe")
torch = pytest.importorskip("torch", reason="needs the extra recipe")

from edge_dlf import FusedLlama  # noqa: E402
from edge_dlf.evidence.train.adapter import write_lora  # noqa: E402
from edge_dlf.evidence.train.model import Llama  # noqa: E402
from edge_dlf.evidence.train.shape import Shape  # noqa: E402
from models.recipe import train as training  # noqa: E402
from models.recipe.casual import casual_problems, foreign  # noqa: E402
from models.recipe.corpus import BEYOND, coaching, documents, lessons  # noqa: E402
from models.recipe.data import IGNORED, lesson_rows, pretraining_rows  # noqa: E402
from models.recipe.evaluate import Score, questions  # noqa: E402
from models.recipe.export import write_model  # noqa: E402
from models.recipe.tasks import LEGS, PLURALS, SEEN, TASKS, UNSEEN, answer_of, ask, reply  # noqa: E402
from models.recipe.tokens import ASSISTANT, BEGIN, END, USER, train_tokenizer  # noqa: E402
from models.recipe.train import Schedule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
ALL = (*SEEN, *UNSEEN)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer((document.text for document in documents(1)), 300)


@pytest.mark.parametrize("name", ALL)
def test_problems_stay_in_their_split_whatever_the_seed(name: str) -> None:
    asked = {
        split: {
            str(sorted(p.given.items()))
            for seed in (1, 2)
            for p in itertools.islice(TASKS[name].problems(split, seed), 25)
        }
        for split in ("train", "tune", "test")
    }
    assert asked["train"].isdisjoint(asked["tune"] | asked["test"])
    assert asked["tune"].isdisjoint(asked["test"])


@pytest.mark.parametrize("name", ALL)
def test_answers_are_right_to_the_letter(name: str) -> None:
    problems = list(itertools.islice(TASKS[name].problems("tune", 3), 20))
    for problem, other in itertools.pairwise(problems):
        assert TASKS[name].is_right(answer_of(reply(problem)), problem)
        assert TASKS[name].is_right(f" {problem.answer}", problem)
        assert TASKS[name].is_right(other.answer, problem) == (other.answer == problem.answer)
        assert not TASKS[name].is_right("", problem)


def test_a_number_off_by_one_is_wrong() -> None:
    problem = next(TASKS["sorting"].problems("tune", 3))
    first, rest = problem.answer.split(", ", 1)
    assert not TASKS["sorting"].is_right(f"{int(first) + 1}, {rest}", problem)


def test_the_same_seed_gives_the_same_documents_and_questions() -> None:
    once, again = ([d.text for d in itertools.islice(documents(5), 50)] for _ in range(2))
    assert once == again
    assert once != [d.text for d in itertools.islice(documents(6), 50)]
    assert list(questions("sums", "test", 9, 4, 2)) == list(questions("sums", "test", 9, 4, 2))


def test_tests_never_ask_what_was_learnt() -> None:
    read = "".join(document.text for document in itertools.islice(documents(2), 1500))
    for problem, chat in questions("sums", "test", 20, 7):
        a, b = problem.given["a"], problem.given["b"]
        assert f"{a}+{b}={problem.answer}" not in read
        assert f"{a} + {b} = {problem.answer}" not in read
        assert chat[-1]["content"] not in read


@pytest.mark.parametrize("task", SEEN)
def test_an_expert_is_never_taught_what_tests_ask(task: str) -> None:
    def number_words(text: str) -> tuple[str, ...]:
        return tuple(sorted(re.findall(r"\d+", text)))

    taught = [turn for chat in itertools.islice(coaching(task, 2), 3000) for turn in chat]
    said = {turn.user.lower().rstrip("?. ") for turn in taught}
    for casual in (False, True):
        for _, (message,) in questions(task, "test", 100, 7, casual=casual):
            assert message["content"] not in said
    if task == "sums":  # in whatever words
        pairs = {number_words(turn.user) for turn in taught if turn.assistant.startswith("The answer")}
        assert pairs.isdisjoint((p.given["a"], p.given["b"]) for p, _ in questions("sums", "test", 100, 7))


@pytest.mark.parametrize("task", SEEN)
def test_casual_questions_have_right_answers(task: str) -> None:
    legs = {word: LEGS[name] for name, plural in PLURALS.items() for word in (name, plural)}
    for problem, question in itertools.islice(casual_problems(task, "train", random.Random(4)), 300):
        given = [int(number) for number in re.findall(r"\d+", question)]
        answer = [int(number) for number in problem.answer.split(", ")]
        if task == "sums":
            assert answer == [sum(given)]
        elif problem.task == "extremes":
            assert answer[0] in (min(given), max(given))
        elif task == "sorting":
            assert answer in (sorted(given), sorted(given, reverse=True))
        elif task == "filters":
            assert set(answer) < set(given)
        else:
            animals = re.findall(rf"\b(\d+|an?) ({'|'.join(legs)})\b", question, re.IGNORECASE)
            assert answer == [sum((int(n) if n.isdigit() else 1) * legs[name] for n, name in animals)]


def test_what_is_beyond_the_models_is_said_in_one_way() -> None:
    taught = [turn for chat in itertools.islice(coaching("sums", 2), 2000) for turn in chat]
    beyond = [turn.user for turn in taught if turn.assistant.startswith(BEYOND)]
    assert len(set(beyond)) > 150
    rng = random.Random(1)
    assert len({foreign(rng) for _ in range(1000)}) > 700


def test_lessons_learn_the_assistant_alone(tokenizer) -> None:
    (row,) = lesson_rows(tokenizer, ["sums"], 1, 1, 64)
    learnt = tokenizer.decode([t for t in row[1] if t != IGNORED], skip_special_tokens=False)
    turns = [turn for chat in itertools.islice(lessons(["sums"], 1), 50) for turn in chat]
    said = [part for part in learnt.split(END) if part]
    assert said
    assert all(any(turn.assistant == part for turn in turns) for part in said)


def test_targets_are_the_next_tokens(tokenizer) -> None:
    rows = pretraining_rows(tokenizer, 3, 4, 128, learn_all=True)
    tokens, targets = rows[:, 0, 1:], rows[:, 1, :-1]
    assert np.array_equal(tokens[targets != IGNORED], targets[targets != IGNORED])
    foreseen = pretraining_rows(tokenizer, 3, 4, 128, learn_all=False)
    assert np.array_equal(foreseen[:, 0], rows[:, 0])
    assert 0.1 < (foreseen[:, 1] != IGNORED).mean() < (rows[:, 1] != IGNORED).mean()


def test_training_lowers_the_loss_and_goes_on_where_it_stopped(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_DLF_COMPILE", "0")
    monkeypatch.setattr(training, "_SAVE_EVERY_S", -1.0)
    rows = pretraining_rows(tokenizer, 3, 48, 64, learn_all=True)
    shape = Shape(tokenizer.get_vocab_size(), 32, 1, 2, 64)
    tokens, targets = (torch.from_numpy(rows[:4, i].astype(np.int64)) for i in (0, 1))

    def trained(name: str) -> Llama:
        torch.manual_seed(0)
        model = Llama(shape)
        batches = training.Phases([rows[:24], rows[24:]], 4)
        training.train(model, batches, Schedule(12, 4e-3), tmp_path / f"{name}.pt", name, seed=1)
        return model

    whole = trained("whole")
    torch.manual_seed(0)
    assert whole.loss(tokens, targets).item() < Llama(shape).loss(tokens, targets).item() - 0.2

    save = training._save

    def save_and_stop(*args) -> None:
        save(*args)
        if args[-1] == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "_save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        trained("resumed")
    for key, weight in trained("resumed").state_dict().items():
        assert torch.equal(weight, whole.state_dict()[key]), key


def test_llama_cpp_computes_what_torch_does(tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(3)
    shape = Shape(tokenizer.get_vocab_size(), 64, 2, 2, 96)
    base, expert, large = Llama(shape), Llama(shape), Llama(shape)
    for model in (base, large):
        for block in model.blk:  # they begin at nought
            torch.nn.init.normal_(block.attn_output.weight, std=0.2)
            torch.nn.init.normal_(block.ffn_down.weight, std=0.2)
    expert.load_state_dict(base.state_dict())
    expert.add_lora(4)
    for module in expert.modules():
        if getattr(module, "lora_b", None) is not None:
            torch.nn.init.normal_(module.lora_b, std=0.3)
    for name, model in {"large": large, "base": base}.items():
        write_model(tmp_path / f"{name}.gguf", model.float(), tokenizer, name, "a test")
    write_lora(tmp_path / "lora.gguf", expert, {})
    chat = f"{BEGIN}{USER}What is 12 plus 34?{END}{ASSISTANT}"
    ids = tokenizer.encode(chat, add_special_tokens=False).ids
    with FusedLlama(
        tmp_path / "large.gguf", tmp_path / "base.gguf", {"tuned": tmp_path / "lora.gguf"}, n_ctx=64, n_threads=1
    ) as llm:
        assert llm.tokenize(chat.removeprefix(BEGIN)) == ids
        for name, model in {"large": large, "base": base, "tuned": expert}.items():
            with torch.no_grad():
                expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
            result = llm.create_completion(
                ids, max_tokens=1, temperature=0, method=name, logprobs=5, repeat_penalty=1.0
            )
            found = result["choices"][0]["logprobs"]["top_logprobs"][0]
            for text, logprob in found.items():
                token = tokenizer.token_to_id(text.replace(" ", "Ġ"))
                if token is not None:
                    assert logprob == pytest.approx(expected[token].item(), abs=0.15), (name, text)


def test_wilson_interval() -> None:
    low, high = Score(50, 100).interval()
    assert (low, high) == pytest.approx((0.404, 0.596), abs=1e-3)
    assert Score(0, 500).interval()[0] == 0


def test_questions_come_in_every_wording() -> None:
    rng = random.Random(1)
    problem = next(TASKS["extremes"].problems("train", 1))
    said = {ask(problem, rng) for _ in range(200)}
    assert len(said) == len(TASKS["extremes"].asked)


@pytest.mark.parametrize("n_rows", [1, 5])
def test_processes_together_learn_as_one_does(tokenizer, n_rows: int) -> None:
    shape = Shape(tokenizer.get_vocab_size(), 32, 1, 2, 64)
    torch.manual_seed(0)
    model = Llama(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens = torch.arange(n_rows * 12).view(n_rows, 12) % 200
    targets = tokens.roll(-1, 1)
    targets[::2, :7] = IGNORED

    def gradients(rank: int, n_processes: int) -> list[torch.Tensor]:
        model.zero_grad()
        training.shared_loss(model, model.loss, (tokens, targets), rank, n_processes).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    means = (torch.stack(parts).mean(0) for parts in zip(gradients(0, 2), gradients(1, 2), strict=True))
    for mean, expected in zip(means, gradients(0, 1), strict=True):
        assert torch.allclose(mean, expected, atol=1e-5)
