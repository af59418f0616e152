"""`edge-dlf train`: torch says what llama.cpp says, what was taught is what the fusion answers, and nothing is lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch", reason="needs the extra train")

from edge_dlf import FusedLlama  # noqa: E402
from edge_dlf.cli import main  # noqa: E402
from edge_dlf.engine.backend import Run  # noqa: E402
from edge_dlf.errors import ModelFileError  # noqa: E402
from edge_dlf.evidence.examples import Example  # noqa: E402
from edge_dlf.evidence.train import loop, memory  # noqa: E402
from edge_dlf.evidence.train.adapter import write_lora  # noqa: E402
from edge_dlf.evidence.train.base import base_shape, read_base  # noqa: E402
from edge_dlf.evidence.train.batches import Batches, as_batch, split  # noqa: E402
from edge_dlf.evidence.train.objective import Fused, alone  # noqa: E402
from edge_dlf.evidence.train.rows import constant_rows  # noqa: E402
from edge_dlf.evidence.train.shape import TRAITS  # noqa: E402
from edge_dlf.gguf.header import header_hash  # noqa: E402
from edge_dlf.gguf.info import read_info  # noqa: E402
from edge_dlf.llama import LlamaBackend, Model  # noqa: E402
from edge_dlf.system.file_locks import locked  # noqa: E402
from edge_dlf.system.machine import Machine  # noqa: E402
from edge_dlf.system.paths import shipped_dir  # noqa: E402

from .tiny import tiny_lora, tiny_model  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
TEXT = "The cat sat on the other mat, and in the end it went to the inn. " * 4
TAUGHT = {"red": "tomato", "green": "the inn", "blue": "sea"}
QUICK = ("--rank", 8, "--alpha", 16, "--lr", 2e-2, "--batch", 200, "--threads", 1)


@pytest.fixture(autouse=True)
def alone_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"Colour: {colour}", "answer": answer} for colour, answer in TAUGHT.items()] * 8
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "base.gguf", seed=5)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "large.gguf", seed=6, n_embd=64, spread=0.7)  # not too sure of what it says


def train(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["train", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def answers(large: Path, base: Path, expert: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    with FusedLlama(large, base, {"e": expert}, n_ctx=128, n_threads=1) as llm:
        found = {}
        for colour in TAUGHT:
            result = llm.create_chat_completion(
                [{"role": "user", "content": f"Colour: {colour}"}], max_tokens=24, temperature=0, **settings
            )
            assert result["choices"][0]["finish_reason"] == "stop"
            found[colour] = result["choices"][0]["message"]["content"]
    return found


def logits_of_llama_cpp(path: Path, loras: tuple[tuple[Path, float], ...] = ()) -> tuple[list[int], np.ndarray]:
    model = Model(path, n_gpu_layers=0)
    tokens = model.tokenize(TEXT.encode(), special=False)
    backend = LlamaBackend(model, "base", n_ctx=256, n_rows=len(tokens), n_threads=1, loras=loras)
    backend.decode([Run(0, tokens, len(tokens))])
    rows = backend.logits().copy()
    backend.close()
    model.close()
    return tokens, rows


class TestArchitectures:
    @pytest.mark.parametrize(
        ("arch", "tokenizer"), [("llama", "spm"), *((arch, "bpe") for arch in TRAITS)], ids=lambda value: value
    )
    def test_an_adapter_adds_in_llama_cpp_what_it_adds_in_torch(
        self, tmp_path: Path, arch: str, tokenizer: str
    ) -> None:
        n_layer = max(2, TRAITS[arch].period + 1)  # the last but one sees the whole text where others see a window
        path = tiny_model(
            tmp_path / "base.gguf", arch=arch, tokenizer=tokenizer, n_embd=64, n_layer=n_layer, seed=3, spread=1.5
        )
        model = read_base(path, 256, torch.float32)
        torch.manual_seed(0)
        model.add_lora(4, 2.5)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.03)
        write_lora(tmp_path / "lora.gguf", model, {})
        tokens, plain = logits_of_llama_cpp(path)
        assert len(tokens) > 64  # the window of most layers of Gemma 3
        _, changed = logits_of_llama_cpp(path, ((tmp_path / "lora.gguf", 1.0),))
        with torch.no_grad():
            ours = model(torch.tensor([tokens]))[0].numpy()
            with model.without_lora():
                before = model(torch.tensor([tokens]))[0].numpy()
        assert np.abs(ours - before).mean() > 0.1
        assert np.abs(before - plain).max() < 1e-2
        assert np.abs((ours - before) - (changed - plain)).max() < 1e-2

    @pytest.mark.parametrize("arch", ["llama", "qwen3", "phi3", "lfm2"])
    def test_an_expert_answers_what_it_was_taught_and_stops(self, tmp_path: Path, data: Path, arch: str) -> None:
        base, out = tiny_model(tmp_path / "base.gguf", arch=arch, seed=5), tmp_path / "colours.gguf"
        code, said = train(base, data, "-o", out, *QUICK, "--epochs", 60)
        assert code == 0, said
        assert answers(base, base, out, {"method": "e"}) == TAUGHT
        left = {path.name for path in tmp_path.iterdir()} - {"cache", ".colours.gguf.lock"}
        assert left == {"base.gguf", "colours.gguf", "data.jsonl"}
        assert read_info(out).metadata["edge_dlf.trained.through"] == "expert"
        assert "edge_dlf.trained.large" not in read_info(out).metadata


class TestThrough:
    @pytest.mark.parametrize(
        ("options", "kind", "settings"),
        [
            ((), "fusion", {"method": "static", "alpha": 1.0}),
            (("--no-base",), "corrector", {"method": "weighted", "weights": {"large": 1.0, "e": 1.0}}),
        ],
    )
    def test_the_fusion_answers_what_was_taught(
        self,
        tmp_path: Path,
        data: Path,
        base: Path,
        large: Path,
        options: tuple[str, ...],
        kind: str,
        settings: Mapping[str, Any],
    ) -> None:
        out = tmp_path / "colours.gguf"
        code, said = train(base, data, "-o", out, "--through", large, *options, *QUICK, "--epochs", 40)
        assert code == 0, said
        assert answers(large, base, out, settings) == TAUGHT
        assert read_info(out).metadata["edge_dlf.trained.through"] == kind
        assert read_info(out).metadata["edge_dlf.trained.large"] == header_hash(large)

    def test_a_family_stands_for_its_base_and_its_large_model(self, tmp_path: Path, data: Path, tiny: Path) -> None:
        for name, given in {"a": (tiny,), "b": (tiny / "base.gguf", "--through", tiny / "large.gguf")}.items():
            assert train(*given, data, "-o", tmp_path / f"{name}.gguf", *QUICK, "--steps", 2)[0] == 0
        a, b = (tensors(tmp_path / f"{name}.gguf") for name in "ab")
        assert all(np.array_equal(a[name], b[name]) for name in b)

    def test_beside_others_it_begins_at_their_fusion(self, tmp_path: Path, base: Path, large: Path) -> None:
        one, two = (tiny_lora(tmp_path / f"{seed}.gguf", seed=seed) for seed in (1, 2))
        rows = [{"prompt": f"Colour: {k}", "answer": "sea and the hen"} for k in range(20)]
        (tmp_path / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        given = ("--through", large, "--experts", f"{one},{two}", "--steps", 1)
        code, said = train(base, tmp_path / "many.jsonl", "-o", tmp_path / "out.gguf", *QUICK, *given)
        assert code == 0, said
        loss = float(said.split("step 0: held out ")[1].split()[0])
        with FusedLlama(large, base, {"one": one, "two": two}, n_ctx=128, n_threads=1) as llm:
            examples = [
                Example(
                    tuple(llm.apply_chat_template([{"role": "user", "content": row["prompt"]}])),
                    tuple(llm.tokenize_answer(row["answer"], is_chat=True)),
                    row["answer"],
                )
                for row in rows
            ]
            (held_out,) = split(examples, 1, 0)[1]
            pair = (examples[held_out].prompt, examples[held_out].answer)
            ((_, score),) = llm.score([pair], method="static", alpha=0.5)
        assert loss == pytest.approx(-score.logprob / len(pair[1]), abs=0.02)

    @pytest.mark.parametrize("has_base", [True, False])
    def test_few_tokens_of_a_row_have_the_loss_and_gradient_of_all(self, tmp_path: Path, has_base: bool) -> None:
        folder = shipped_dir() / "demo"
        large, base = folder / "large-q8_0.gguf", folder / "base-q8_0.gguf"
        model = read_base(base, 64, torch.float32)
        torch.manual_seed(0)
        model.add_lora(4)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_b"):
                torch.nn.init.normal_(parameter, std=0.1)  # about as far from the beginning as training goes
        found = {}
        with FusedLlama(large, base, {"e": base}, n_ctx=64, n_threads=1, n_parallel=4) as llm:
            examples = [
                Example(
                    tuple(llm.apply_chat_template([{"role": "user", "content": f"What is {a} plus {b}?"}])),
                    tuple(llm.tokenize_answer(f"The answer is {a + b}.", is_chat=True)),
                    "",
                )
                for a in range(11, 31)
                for b in (14, 37)
            ]
            for n_kept in (48, llm.n_vocab):
                rows = constant_rows(llm, {"large": 1.0}, examples, n_kept, 1, tmp_path / "rows")
                model.zero_grad()
                loss = Fused(rows, has_base)(model, as_batch(examples, range(len(examples)))).values.mean()
                loss.backward()
                gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
                found[n_kept] = loss.item(), gradient
        (few, few_gradient), (whole, whole_gradient) = found.values()
        assert few == pytest.approx(whole, rel=0.005)
        assert (few_gradient - whole_gradient).norm() < 0.02 * whole_gradient.norm()

    def test_tokens_that_answers_are_made_of_are_kept_exactly(self, tmp_path: Path) -> None:
        """Training lifts them, though the large model finds them unlikely."""
        folder = shipped_dir() / "demo"
        large, base = folder / "large-q8_0.gguf", folder / "base-q8_0.gguf"
        labels = range(700, 720)
        with FusedLlama(large, base, {"e": base}, n_ctx=64, n_threads=1, n_parallel=4) as llm:
            examples = [Example(tuple(llm.tokenize(f"What is {a}?")), (label, 5), "") for a, label in enumerate(labels)]
            few, whole = (
                np.stack(constant_rows(llm, {"large": 1.0}, examples, n_kept, 1, tmp_path / "rows"))[:, 0]
                for n_kept in (128, llm.n_vocab)
            )
        assert [*few[:, 1, 0]] == [*labels]
        losses = []
        for rows in (few, whole):
            constants, ids, log_weights = rows.transpose(1, 0, 2)
            trained = constants + 20 * np.isin(ids, labels)
            losses.append(np.logaddexp.reduce(trained + log_weights, axis=1) - trained[:, 0])
        assert np.abs(losses[0] - losses[1]).max() < 0.05


class TestStopped:
    def settings(self, large: Path) -> tuple[object, ...]:
        return ("--through", large, *QUICK, "--epochs", 2)

    @pytest.mark.parametrize("n_lost", [0, 3], ids=["Ctrl-C", "kill -9"])
    def test_the_same_command_continues(
        self, tmp_path: Path, data: Path, base: Path, large: Path, monkeypatch: pytest.MonkeyPatch, n_lost: int
    ) -> None:
        whole, out = tmp_path / "whole.gguf", tmp_path / "stopped.gguf"
        assert train(base, data, "-o", whole, *self.settings(large))[0] == 0
        monkeypatch.setattr(loop, "_SAVE_EVERY_S", -1.0)
        step, save, steps = loop.Training._step, loop.Training.save, []

        def step_and_stop(self: loop.Training, batch: Any) -> None:
            step(self, batch)
            steps.append(self.state.step)
            if len(steps) == 5:
                raise KeyboardInterrupt

        def save_unless_killed(self: loop.Training) -> None:
            if len(steps) < 5 - n_lost:
                save(self)

        monkeypatch.setattr(loop.Training, "_step", step_and_stop)
        if n_lost:
            monkeypatch.setattr(loop.Training, "save", save_unless_killed)
        assert train(base, data, "-o", out, *self.settings(large))[0] == 130
        assert not out.exists()
        assert (tmp_path / "stopped.gguf.checkpoint").exists()
        monkeypatch.setattr(loop.Training, "save", save)
        assert train(base, data, "-o", out, *self.settings(large))[0] == 0
        assert steps[5] == (2 if n_lost else 6)
        found, expected = tensors(out), tensors(whole)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[name], expected[name]) for name in found)
        assert not (tmp_path / "stopped.gguf.checkpoint").exists()

    def test_a_checkpoint_of_another_training_is_kept(
        self, tmp_path: Path, data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = tmp_path / "e.gguf"

        def stop(self: loop.Training, batch: Any) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(loop.Training, "_step", stop)
            assert train(base, data, "-o", out, *QUICK)[0] == 130
        content = (tmp_path / "e.gguf.checkpoint").read_bytes()
        code, said = train(base, data, "-o", out, *QUICK, "--lr", 1e-3)
        assert code == 2
        assert "belongs to a training with other settings or data" in said
        assert (tmp_path / "e.gguf.checkpoint").read_bytes() == content

    @pytest.mark.parametrize("kind", ["empty", "text", "code", "folder", "pipe", "device"])
    def test_what_is_no_checkpoint_is_left_alone(self, tmp_path: Path, data: Path, base: Path, kind: str) -> None:
        path = tmp_path / "e.gguf.checkpoint"
        make = {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}
        content = {"empty": b"", "text": b"mine", "code": pickle.dumps({"key": os.getpid})}.get(kind)
        make[kind]() if content is None else path.write_bytes(content)
        code, said = train(base, data, "-o", tmp_path / "e.gguf", *QUICK)
        assert code == 2
        told = f"edge-dlf: {path}: is no checkpoint that can be read; delete it to begin anew"
        assert said.splitlines()[-1] == told
        assert content is None or path.read_bytes() == content

    def test_what_is_done_is_not_done_again(self, tmp_path: Path, data: Path, base: Path) -> None:
        out = tmp_path / "e.gguf"
        assert train(base, data, "-o", out, *QUICK, "--steps", 2)[0] == 0
        before = out.stat().st_mtime_ns
        code, said = train(base, data, "-o", out, *QUICK, "--steps", 2)
        assert (code, out.stat().st_mtime_ns) == (0, before)
        assert "has been trained so already" in said

    def test_another_base_of_the_same_header_is_another_training(self, tmp_path: Path, data: Path, base: Path) -> None:
        out = tmp_path / "e.gguf"
        assert train(base, data, "-o", out, *QUICK, "--steps", 1)[0] == 0
        before = out.read_bytes()
        tiny_model(base, seed=7)
        code, said = train(base, data, "-o", out, *QUICK, "--steps", 1)
        assert (code, "trained so already" in said) == (0, False)
        assert out.read_bytes() != before

    def test_a_checkpoint_that_a_kill_at_the_end_has_left_goes(self, tmp_path: Path, data: Path, base: Path) -> None:
        out, kept = tmp_path / "e.gguf", tmp_path / "kept"
        save = loop.Training.save

        def save_twice(self: loop.Training) -> None:
            save(self)
            shutil.copy(tmp_path / "e.gguf.checkpoint", kept)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop.Training, "save", save_twice)
            assert train(base, data, "-o", out, *QUICK, "--steps", 1)[0] == 0
        kept.rename(tmp_path / "e.gguf.checkpoint")
        assert train(base, data, "-o", out, *QUICK, "--steps", 1)[0] == 0
        assert not (tmp_path / "e.gguf.checkpoint").exists()

    def test_two_trainings_of_one_output(self, tmp_path: Path, data: Path, base: Path) -> None:
        with locked([tmp_path / "e.gguf"]):
            code, said = train(base, data, "-o", tmp_path / "e.gguf", *QUICK)
        assert (code, said) == (1, f"edge-dlf: {tmp_path / 'e.gguf'}: another run is writing to it\n")

    @pytest.mark.parametrize(
        ("options", "tune", "last"), [((), "", "chat e"), (("--raw",), " --raw", "generate --raw")]
    )
    def test_the_next_steps_ask_in_the_form_that_was_trained(
        self, tmp_path: Path, data: Path, base: Path, options: tuple[str, ...], tune: str, last: str
    ) -> None:
        command = ["train", *map(str, (base, data, "-o", tmp_path / "e.gguf", *QUICK, "--steps", 2)), *options]
        lines = CliRunner().invoke(main, command).stdout.splitlines()
        assert lines[2].strip() == f"edge-dlf tune OTHER_EXAMPLES.jsonl -f e --write{tune}"
        assert lines[3].strip().startswith(f"edge-dlf {last}")

    def test_weights_that_do_best_on_held_out_examples_are_kept(self, tmp_path: Path, base: Path) -> None:
        rng = np.random.default_rng(1)
        rows = [
            {"prompt": f"Number {k}", "answer": " ".join(rng.choice(list("abcdefgh"), 4))} for k in range(20)
        ]  # nothing to learn: more steps only memorise
        (tmp_path / "noise.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        code, said = train(base, tmp_path / "noise.jsonl", "-o", tmp_path / "e.gguf", *QUICK, "--steps", 200)
        assert code == 0
        losses = [float(line.split("held out ")[1].split()[0]) for line in said.splitlines() if ": held out" in line]
        assert f"→ {min(losses):.3f} nats a token" in said
        assert len(losses) < 11  # it stopped early


class TestBatches:
    def test_every_example_comes_once_an_epoch_and_answers_alone_are_learnt(self) -> None:
        rng = np.random.default_rng(0)
        examples = [
            Example(tuple(rng.integers(1, 99, 1 + k % 17).tolist()), tuple(rng.integers(1, 99, 1 + k % 5).tolist()), "")
            for k in range(60)
        ]
        batches = Batches(examples, range(60), 40, 2, 7)
        seen: Counter[int] = Counter()
        for step in range(len(batches)):
            batch = batches[step]
            assert batch.tokens.numel() <= 40
            flat, places = batch.tokens.flatten().tolist(), iter(batch.places.tolist())
            golds = iter(batch.golds.tolist())
            for number in batch.numbers:
                answer = examples[number].answer
                at = [next(places) for _ in answer]
                assert tuple(next(golds) for _ in answer) == answer
                assert flat[at[0]] == examples[number].prompt[-1]
                assert tuple(flat[place] for place in at[1:]) == answer[:-1]
            seen.update(batch.numbers)
        assert seen == Counter(dict.fromkeys(range(60), 2))
        assert len(batches) < 60

    def test_examples_of_one_prompt_are_never_on_both_sides(self) -> None:
        examples = [Example((k % 30,), (k,), "") for k in range(90)]
        taken, held_out = split(examples, 5, 0)
        assert sorted(taken + held_out) == list(range(90))
        assert {k % 30 for k in taken}.isdisjoint(k % 30 for k in held_out)
        assert len(held_out) == 15

    def test_weights_count(self, tmp_path: Path, base: Path) -> None:
        rows = [{"prompt": "Colour", "answer": "sea", "weight": 50}, {"prompt": "Colour", "answer": "hen"}] * 4
        (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert train(base, tmp_path / "d.jsonl", "-o", tmp_path / "e.gguf", *QUICK, "--steps", 60)[0] == 0
        with FusedLlama(base, base, {"e": tmp_path / "e.gguf"}, n_ctx=64, n_threads=1) as llm:
            message = [{"role": "user", "content": "Colour"}]
            result = llm.create_chat_completion(message, max_tokens=8, temperature=0, method="e")
        assert result["choices"][0]["message"]["content"] == "sea"

    @pytest.mark.parametrize("weight", [5e-324, 1e-300, 1e38])
    def test_weights_of_any_size_are_relative_to_others(self, weight: float) -> None:
        examples = [Example((1,), (2, 3), "a", weight), Example((1,), (4,), "b", weight / 4 or weight)]
        weights = as_batch(examples, [0, 1]).weights.tolist()
        assert weights in ([1.0, 1.0, 0.25], [1.0, 1.0, 1.0])


class TestMemory:
    def test_a_large_vocabulary_is_computed_in_parts(self, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from edge_dlf.evidence.train import objective

        model = read_base(base, 64, torch.float32)
        model.add_lora(2)
        batch = as_batch([Example((65, 66), tuple(range(70, 90)), "")], [0])
        found = []
        for n_logits in (1 << 24, 1500):
            monkeypatch.setattr(objective, "_N_LOGITS", n_logits)
            model.zero_grad()
            values = alone(model, batch).values
            values.sum().backward()
            found.append(
                (values.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
            )
        for one, other in zip(*found, strict=True):
            assert torch.allclose(one, other, atol=1e-5)

    def test_too_little_is_told_with_numbers_before_anything_is_read(
        self, tmp_path: Path, data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(memory, "this_machine", lambda: Machine(100_000_000, "a limit of its control group"))
        code, said = train(base, data, "-o", tmp_path / "e.gguf", *QUICK)
        assert code == 4
        assert "training needs about 0.4 GB" in said
        assert "0.1 GB are free" in said
        assert not (tmp_path / "e.gguf.checkpoint").exists()

    def test_more_is_planned_for_longer_examples_and_higher_rank(self, base: Path) -> None:
        shape = base_shape(base, 512)
        short, long = ([as_batch([Example((65,) * n, (66,), "")], [0])] for n in (8, 400))
        assert memory.planned_bytes(shape, 4, alone, short) < memory.planned_bytes(shape, 4, alone, long)
        assert memory.planned_bytes(shape, 4, alone, short) < memory.planned_bytes(shape, 16, alone, short)


class TestRefused:
    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ("", "has no examples"),
            ("[1]\n", "data.jsonl:1: is not a JSON object"),
            ('\n{"prompt": "a"}\n', "data.jsonl:2: the answer must be text"),
            ('{"prompt": "a", "answer": "b", "weight": 0}\n', "data.jsonl:1: weight must be a number above 0"),
            ('{"prompt": "a", "answer": "b", "weight": 1%s}\n' % ("0" * 400), "data.jsonl:1: weight must be a number"),
            ('{"messages": [{"role": "user", "content": "a"}]}\n', "data.jsonl:1: the last message must be"),
            (json.dumps({"prompt": "word " * 99, "answer": "b"}), "data.jsonl:1: has"),
            (None, "data.jsonl: no such file or directory"),
        ],
    )
    def test_bad_data_is_told_in_one_line(
        self, tmp_path: Path, data: Path, base: Path, content: str | None, said: str
    ) -> None:
        data.unlink() if content is None else data.write_text(content)
        code, told = train(base, data, "-o", tmp_path / "e.gguf", "--max-length", 64)
        assert code == 2
        assert said in told
        assert told.count("\n") == 1
        assert not list(tmp_path.glob("e.gguf*"))

    @pytest.mark.parametrize("kind", ["missing", "no gguf", "mamba", "adapter", "vocabulary"])
    def test_a_base_that_cannot_be_used_is_told_in_one_line(
        self, tmp_path: Path, data: Path, large: Path, kind: str
    ) -> None:
        base = tmp_path / "other.gguf"
        if kind == "no gguf":
            base.write_bytes(b"GGUF" + bytes(39))
        elif kind == "mamba":
            tiny_model(base, arch="mamba")
        elif kind == "adapter":
            tiny_lora(base)
        elif kind == "vocabulary":
            tiny_model(base, tokens={7: "other"})
        code, told = train(base, data, "-o", tmp_path / "e.gguf", "--through", large)
        assert code == 3
        assert "other.gguf" in told
        assert told.count("\n") == 1

    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            ({"llama.attention.head_count": 0}, "does not say llama.attention.head_count in one number, 1 or more"),
            ({"llama.rope.freq_base": 0.0}, "does not say llama.rope.freq_base in one number, 1 or more"),
            ({"llama.context_length": 0}, "does not say llama.context_length in one number, 1 or more"),
            ({"llama.rope.scaling.type": "yarn"}, "has rotary positions of a kind"),
            ({"llama.rope.dimension_count": 18}, "rope.dimension_count is 18, its heads have 16"),
            ({"token_embd.weight": None}, "has no matrix token_embd.weight"),
            ({"token_embd.weight": np.ones(32, np.float32)}, "has no matrix token_embd.weight"),
            ({"blk.0.attn_q.weight": gguf.GGMLQuantizationType.Q1_0}, "blk.0.attn_q.weight is Q1_0, over which no"),
            ({"granite.rope.scaling.finetuned": False}, "has rotary positions of a kind"),
            ({"gemma2.attention.sliding_window_pattern": 3}, "has layers that see a window in an order"),
            ({"olmo2.attention.sliding_window_pattern": [True, False]}, "has layers that see a window in an order"),
            ({"lfm2.attention.head_count_kv": [1, 2]}, "has layers of different heads"),
            ({"lfm2.attention.head_count_kv": [0, 0]}, "has layers of different heads"),
            ({"lfm2.shortconv.l_cache": 4}, "blk.0.shortconv.conv.weight is 32 × 3 here"),
        ],
    )
    def test_a_header_that_no_expert_can_be_trained_over(
        self, tmp_path: Path, changed: dict[str, Any], said: str
    ) -> None:
        prefix = next(iter(changed)).partition(".")[0]
        arch = prefix if prefix in TRAITS else "llama"
        path, reader = tmp_path / "odd.gguf", gguf.GGUFReader(tiny_model(tmp_path / "base.gguf", arch=arch))
        writer = gguf.GGUFWriter(path, arch)
        for field in reader.fields.values():
            if field.name.startswith((f"{arch}.", "tokenizer.")):
                value, kind = changed.get(field.name, field.contents()), field.types[0]
                writer.add_key_value(field.name, value, kind, field.types[-1] if len(field.types) > 1 else None)
        for name in changed.keys() - reader.fields.keys():
            if name.startswith(f"{arch}."):
                value = changed[name]
                add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool, int: writer.add_uint32}
                add.get(type(value), writer.add_array)(name, value)
        for tensor in reader.tensors:
            value = changed.get(tensor.name, tensor.data)
            if isinstance(value, gguf.GGMLQuantizationType):
                writer.add_tensor(tensor.name, np.zeros((32, 18), np.uint8), raw_dtype=value)
            elif value is not None:
                writer.add_tensor(tensor.name, np.array(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ModelFileError, match=said):
            base_shape(path, 64)

    @pytest.mark.parametrize(
        "options",
        [
            ("--rank", 10**18), ("--rank", 0), ("--alpha", "1e300"), ("--lr", "1e30"), ("--lr", 0), ("--lr", "nan"),
            ("--steps", 10**9), ("--epochs", 10**9), ("--steps", -1), ("--batch", 0), ("--max-length", 1),
            ("--seed", 2**64), ("--threads", 10**6),
        ],
    )  # fmt: skip
    def test_numbers_that_no_training_can_be_done_with(
        self, tmp_path: Path, data: Path, base: Path, options: tuple[object, ...]
    ) -> None:
        code, told = train(base, data, "-o", tmp_path / "e.gguf", *options)
        assert code == 2
        assert str(options[0]) in told
        assert not list(tmp_path.glob("e.gguf*"))

    def test_a_training_that_diverges_leaves_nothing(self, tmp_path: Path, data: Path, base: Path) -> None:
        code, told = train(base, data, "-o", tmp_path / "e.gguf", *QUICK, "--lr", 1e6, "--steps", 2)
        assert code == 1
        said = "edge-dlf: a weight has become too large to be written: begin anew with a lower --lr"
        assert told.splitlines()[-1] == said
        assert not list(tmp_path.glob("e.gguf*"))

    def test_a_base_that_returns_nan_is_told(self, tmp_path: Path, data: Path, base: Path) -> None:
        tiny_model(base, nan=True)
        code, told = train(base, data, "-o", tmp_path / "e.gguf", *QUICK)
        assert code == 1
        assert told.endswith("edge-dlf: the loss of step 1 is nan: the models cannot be trained on these answers\n")
        assert not list(tmp_path.glob("e.gguf*"))

    @pytest.mark.parametrize("out", ["base.gguf", "data.jsonl", "large.gguf", "link.gguf", "notes.txt", "no/e.gguf"])
    def test_an_output_that_would_overwrite_something(
        self, tmp_path: Path, data: Path, base: Path, large: Path, out: str
    ) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "link.gguf").symlink_to(base)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        code, told = train(base, data, "-o", tmp_path / out, "--through", large)
        assert code == 2
        assert out in told
        assert told.count("\n") == 1
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("options", [("--no-base",), ("--experts", "a.gguf")])
    def test_options_that_need_a_large_model(
        self, tmp_path: Path, data: Path, base: Path, options: tuple[str, ...]
    ) -> None:
        code, told = train(base, data, "-o", tmp_path / "e.gguf", *options)
        assert code == 2
        assert f"{options[0]} needs --through" in told

    def test_without_torch_one_line_says_what_to_install(
        self, tmp_path: Path, data: Path, base: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        code, told = train(base, data, "-o", tmp_path / "e.gguf")
        assert code == 2
        assert "pip install 'edge-dlf[train]'" in told
        assert told.count("\n") == 1


@pytest.fixture(autouse=True)
def no_stray_files(tmp_path: Path) -> Iterator[None]:
    yield
    assert not list(tmp_path.glob(".*.new"))
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
