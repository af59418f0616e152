"""A try in a process of its own: whatever happens there, a verdict comes back, and is remembered where it is final."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from edge_dlf import FusedLlama, ModelFileError
from edge_dlf.families import guard
from edge_dlf.families.guard import Verdict, attempt, require_harmless, verdict
from edge_dlf.gguf.info import read_info
from edge_dlf.system import remembered

from .tiny import tiny_lora, tiny_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(remembered.platformdirs, "user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    return tmp_path / "cache" / "verdicts.json"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_model(tmp_path / "model.gguf")


def test_a_model_and_its_adapter_run(model: Path, tmp_path: Path, cache: Path) -> None:
    found = attempt([model], [(tiny_lora(tmp_path / "lora.gguf"), 0.5)])
    assert found.ok, found.reason
    assert found.tps > 0
    assert list(json.loads(cache.read_bytes())) == [f"{model}\n{tmp_path / 'lora.gguf'}"]


def test_what_llama_cpp_refuses_is_the_reason(tmp_path: Path) -> None:
    found = attempt([tiny_model(tmp_path / "nan.gguf", nan=True)])
    assert found == Verdict(False, "its logits are not numbers")
    unknown = tiny_model(tmp_path / "unknown.gguf", arch="nonesuch")
    assert "unknown.gguf: llama.cpp cannot load it" in attempt([unknown]).reason


@pytest.mark.parametrize(
    ("code", "reason", "is_final"),
    [
        ("import os; os.kill(os.getpid(), 11)", r"llama.cpp crashed (SIGSEGV)", True),
        (
            "import os, sys; print('GGML_ASSERT(n > 0) failed', file=sys.stderr, flush=True); os.abort()",
            "llama.cpp gave up (SIGABRT: GGML_ASSERT(n > 0) failed)",
            True,
        ),
        ("import os; os.kill(os.getpid(), 9)", "its process was killed, as the system does where memory ru", False),
        ("import os; os._exit(7)", "its process ended with code 7", False),
        ("print('no verdict')", "its process ended with code 0", False),
        ("import threading; threading.Event().wait()", "did not answer within 1 s", False),
    ],
)
def test_a_process_that_dies_or_hangs(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str, is_final: bool
) -> None:
    monkeypatch.setattr(guard, "_TRY", code)
    found = attempt([model], patience_s=None if "wait" not in code else 1.0)
    assert not found.ok
    assert found.reason.startswith(reason)
    assert found.is_final == is_final == cache.exists()


def test_a_verdict_holds_for_the_file_and_the_build(model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def run(*_: object) -> Verdict:
        tries.append(1)
        return Verdict(True, tps=float(len(tries)))

    monkeypatch.setattr(guard, "_run", run)
    assert [verdict([model]).tps for _ in range(3)] == [1, 1, 1]
    os.utime(model, ns=(1, 1))
    assert [verdict([model]).tps for _ in range(2)] == [2, 2]
    monkeypatch.setattr(guard, "system_info", lambda: "another build")
    assert [verdict([model]).tps for _ in range(2)] == [3, 3]
    assert attempt([model]).tps == 4
    shard = model.with_name("shard")
    shard.touch()
    assert [verdict([model, shard]).tps for _ in range(2)] == [5, 5]
    shard.write_bytes(b"x")
    assert verdict([model, shard]).tps == 6
    for damage in (b"{", b"[1]", b'{"%s": 7}' % os.fsencode(model), b"\xff"):
        cache.write_bytes(damage)
        assert verdict([model]).ok
    cache.unlink()
    cache.mkdir()
    assert verdict([model]).ok


def test_a_verdict_beside_a_gpu_says_nothing_of_plain_attention(
    model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "_run", lambda *_: Verdict(True, tps=1.0))
    monkeypatch.setattr(guard, "gpus", lambda: ("gpu",))
    assert verdict([model]).tps == 1
    monkeypatch.setattr(guard, "_run", lambda *_: Verdict(True, tps=2.0))
    assert verdict([model]).tps == 1
    monkeypatch.setattr(guard, "gpus", lambda: ())
    assert verdict([model]).tps == 2


def test_only_an_architecture_without_rules_is_tried(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_run", lambda *_: Verdict(False, "llama.cpp crashed (SIGSEGV)"))
    info = read_info(model)
    require_harmless(info, -1)
    monkeypatch.setattr(guard, "TRIED", frozenset({"qwen2"}))
    with pytest.raises(ModelFileError, match=r"as a try in another process showed: llama.cpp crashed \(SIGSEGV\)"):
        require_harmless(info, -1)


def test_a_family_is_not_loaded_before_the_try(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_run", lambda *_: Verdict(False, "llama.cpp crashed (SIGSEGV)"))
    monkeypatch.setattr(guard, "TRIED", frozenset())
    with pytest.raises(ModelFileError, match=r"large\.gguf: cannot be used"):
        FusedLlama.from_family(tiny, n_ctx=256)
