"""A trial in a process of its own: whatever happens there, a result comes back, and is remembered if it is final."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from edge_dlf import FusedLlama, ModelFileError
from edge_dlf.families import guard
from edge_dlf.families.guard import RUNS, Trial, require_adapters_run, require_runs, try_model
from edge_dlf.gguf.info import read_info

from .tiny import tiny_lora, tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    return tmp_path / "cache" / "trials.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model.gguf")


class FakePython:
    """Runs in place of Python: a shell script. n_runs: how often it ran."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._log = folder / "python", folder / "runs"
        monkeypatch.setattr(sys, "executable", str(self._path))

    def does(self, script: str) -> None:
        self._path.write_text(f"#!/bin/sh\necho >> {self._log}\n{script}\n")
        self._path.chmod(0o755)

    def finds(self, trial: str) -> None:
        self.does(f"echo '{trial}'")

    @property
    def n_runs(self) -> int:
        return len(self._log.read_bytes()) if self._log.exists() else 0


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePython:
    return FakePython(tmp_path, monkeypatch)


def test_a_model_and_its_adapter_run(model: Path, tmp_path: Path, cache: Path) -> None:
    found = try_model([model], [(tiny_lora(tmp_path / "lora.gguf"), 0.5)])
    assert found.ok, found.reason
    assert found.tps > 0
    (key,) = json.loads(cache.read_bytes())
    assert [str(model), str(tmp_path / "lora.gguf")] in json.loads(key)


def test_batches_that_are_asked_for_are_timed(model: Path, cache: Path) -> None:
    assert try_model([model]).batch_s == []
    found = try_model([model], batches=(1, 2, 4))
    assert len(found.batch_s) == 3
    assert min(found.batch_s) > 0


def test_the_architectures_that_are_known_to_run_are_those_of_the_table() -> None:
    page = Path(__file__).parents[1] / "docs" / "models.md"
    (row,) = [line for line in page.read_text("utf-8").splitlines() if line.endswith("| yes | yes | yes | yes |")]
    assert {*re.findall("`([^`]+)`", row)} == RUNS
    assert f"{len(RUNS)} architectures do all" in page.read_text("utf-8")


def test_what_llama_cpp_refuses_is_the_reason(tmp_path: Path) -> None:
    found = try_model([tiny_model(tmp_path / "nan.gguf", nan=True)])
    assert found == Trial(False, "its logits are not numbers")
    unknown = tiny_model(tmp_path / "unknown.gguf", arch="nonesuch")
    assert "unknown.gguf: llama.cpp cannot load it" in try_model([unknown]).reason


@pytest.mark.parametrize(
    ("script", "reason", "is_final"),
    [
        ("kill -SEGV $$", "llama.cpp crashed (SIGSEGV)", True),
        (
            "echo 'GGML_ASSERT(n > 0) failed' >&2; kill -ABRT $$",
            "llama.cpp crashed (SIGABRT: GGML_ASSERT(n > 0) failed)",
            True,
        ),
        ("kill -KILL $$", "its process was killed, as the system does where memory runs out", False),
        ("exit 7", "its process ended with code 7", False),
        ("echo no result", "its process ended with code 0", False),
        ("exec sleep 60", "did not answer within 1 s", False),
    ],
)
def test_a_process_that_dies_or_hangs(
    model: Path, cache: Path, python: FakePython, script: str, reason: str, is_final: bool
) -> None:
    python.does(script)
    found = try_model([model], patience_s=1.0 if "sleep" in script else None)
    assert found == Trial(False, reason, is_final=is_final)
    assert is_final == cache.exists()


class TestRemembering:
    @pytest.fixture
    def untried(self, tmp_path: Path) -> Path:
        """A model of an architecture that is not known to run."""
        return tiny_model(tmp_path / "untried.gguf", arch="nonesuch")

    @staticmethod
    def check(model: Path, times: int = 2) -> None:
        for _ in range(times):
            require_runs(read_info(model), -1)

    def test_one_trial_for_a_file_and_a_build(
        self, untried: Path, python: FakePython, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        python.finds('{"ok": true, "tps": 1}')
        self.check(untried, 3)
        assert python.n_runs == 1
        os.utime(untried, ns=(1, 1))
        self.check(untried)
        assert python.n_runs == 2
        monkeypatch.setattr(guard, "system_info", lambda: "another build")
        self.check(untried)
        assert python.n_runs == 3
        assert try_model([untried]).ok
        assert python.n_runs == 4

    def test_every_shard_counts(self, untried: Path, python: FakePython, cache: Path) -> None:
        python.finds('{"ok": true}')
        shard = untried.with_name("shard")
        shard.touch()
        try_model([untried, shard])
        shard.write_bytes(b"x")
        try_model([untried, shard])
        assert len(json.loads(cache.read_bytes())) == 2

    def test_a_damaged_memory_is_forgotten(self, untried: Path, python: FakePython, cache: Path) -> None:
        python.finds('{"ok": true}')
        self.check(untried)
        seven = json.dumps(dict.fromkeys(json.loads(cache.read_bytes()), 7)).encode()
        for damage in (b"{", b"[1]", seven, b"\xff"):
            cache.write_bytes(damage)
            self.check(untried)
        cache.unlink()
        cache.mkdir()
        self.check(untried)
        assert python.n_runs == 1 + 4 + 2

    def test_a_trial_beside_a_gpu_says_nothing_of_plain_attention(
        self, untried: Path, python: FakePython, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        python.finds('{"ok": true}')
        monkeypatch.setattr(guard, "gpus", lambda: ("gpu",))
        self.check(untried)
        assert python.n_runs == 1
        monkeypatch.setattr(guard, "gpus", lambda: ())
        self.check(untried)
        assert python.n_runs == 2

    @pytest.mark.parametrize("arch", ["llama", "lfm2", "granitehybrid", "qwen35"])
    def test_an_architecture_that_is_known_to_run_starts_no_process(
        self, arch: str, untried: Path, tmp_path: Path, python: FakePython
    ) -> None:
        python.does("kill -SEGV $$")
        known = tiny_model(tmp_path / "known.gguf", arch=arch)
        self.check(known)
        assert python.n_runs == 0
        with pytest.raises(ModelFileError, match=r"as a try in another process showed: llama.cpp crashed \(SIGSEGV\)"):
            require_adapters_run(read_info(known), {"expert": [(tiny_lora(tmp_path / "lora.gguf"), 1.0)]}, -1)
        assert python.n_runs == 1
        with pytest.raises(ModelFileError, match=r"as a try in another process showed: llama.cpp crashed \(SIGSEGV\)"):
            self.check(untried)

    def test_a_hybrid_family_is_loaded_without_a_process(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        started: list[object] = []
        monkeypatch.setattr(guard, "_run", lambda *question: started.append(question) or Trial(False))
        files = [tiny_model(tmp_path / f"{n}.gguf", arch="lfm2", seed=n) for n in range(3)]
        with FusedLlama(files[0], files[1], {"tuned": files[2]}, n_ctx=256, n_threads=1) as llm:
            assert next(llm.stream("Hi")).id >= 0
        assert not started

    def test_a_family_is_not_loaded_before_the_trial(self, untried: Path, tiny: Path, python: FakePython) -> None:
        python.does("kill -SEGV $$")
        with pytest.raises(ModelFileError, match=r"untried\.gguf: cannot be used, as a try"):
            FusedLlama(untried, tiny / "base.gguf", {"lora": tiny / "lora.gguf"}, n_ctx=256)
