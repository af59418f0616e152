"""`edge-dlf doctor`: a verdict and a next step for everything that may be wrong, and exit code 0 only if nothing is."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edge_dlf import llama
from edge_dlf.cli import main
from edge_dlf.evidence import doctor
from edge_dlf.families import guard
from edge_dlf.families.guard import Trial
from edge_dlf.system import install
from edge_dlf.system.machine import GPU, Machine

from .tiny import tiny_model


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_DLF_MODELS", str(tmp_path / "models"))
    monkeypatch.delenv("EDGE_DLF_FAMILY", raising=False)
    monkeypatch.setattr("platformdirs.user_cache_dir", lambda *_, **__: str(tmp_path / "cache"))
    monkeypatch.setattr(guard, "try_model", lambda *_, **__: Trial(True, tps=12.0))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))


def examine(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["doctor", *map(str, arguments)])


def checks(*arguments: object) -> dict[str, dict[str, Any]]:
    result = examine(*arguments, "--json")
    found = json.loads(result.stdout)
    assert found["ok"] == (result.exit_code == 0)
    assert result.exit_code in (0, 1)
    for check in found["checks"]:
        assert check["verdict"] in ("ok", "note", "problem")
        assert (check["next_step"] is None) == (check["verdict"] == "ok"), check
    return {check["name"]: check for check in found["checks"]}


def test_a_machine() -> None:
    found = checks()
    assert list(found) == [
        *("Python", "llama.cpp", "CPU", "AMX", "GPU", "memory", "threads", "kernels", "families"),
    ]
    assert found["llama.cpp"]["facts"]["version"] == install.LLAMA_CPP
    assert "CPU" in found["llama.cpp"]["facts"]["backends"]
    assert f"{install.LLAMA_CPP}, built with " in found["llama.cpp"]["text"]
    assert found["memory"]["facts"]["free_bytes"] > 0
    assert found["threads"]["facts"]["n_threads"] == llama.default_n_threads()


def test_whether_drafting_pays(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "drafting" not in checks(tiny)  # no times
    monkeypatch.setattr(guard, "try_model", lambda *_, **__: Trial(True, tps=12.0, batch_s=[0.1, 0.1, 0.1]))
    text = checks(tiny)["drafting"]["text"]
    assert text.startswith("pays here")
    assert "a plain step takes 4.00 times one of the large model alone" in text


def test_the_version_is_the_one_that_is_installed_with_it() -> None:
    pyproject = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert f'"llama-cpp-python=={install.LLAMA_CPP}"' in pyproject


def test_a_family_in_lines(tiny: Path) -> None:
    result = examine(tiny)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[-1] == "all is well"
    assert "ok       tokenizer: 306 tokens, the same in every model" in lines
    assert "ok       chat template: renders a message" in lines
    for member in ("large", "base", "lora", "tuned"):
        assert f"ok       decode {member}: 12.0 tokens/s alone" in lines


def test_a_family_in_numbers(tiny: Path) -> None:
    fits = checks(tiny, "--ctx-size", 256)["fits"]
    assert fits["facts"]["largest_n_ctx"] == fits["facts"]["n_ctx"] * 2 == 512
    assert [member["name"] for member in fits["facts"]["members"]] == ["large", "base", "lora", "tuned"]


def test_every_member_is_tried_with_its_own_adapter(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def try_model(shards: Sequence[Path], loras: Sequence[tuple[Path, float]], **_: object) -> Trial:
        tried.append((shards[0].name, [path.name for path, _ in loras]))
        return Trial(not loras, "llama.cpp crashed (SIGSEGV)" if loras else "")

    monkeypatch.setattr(guard, "try_model", try_model)
    found = checks(tiny)
    assert tried == [("large.gguf", []), ("base.gguf", []), ("base.gguf", ["lora.gguf"]), ("tuned.gguf", [])]
    assert found["decode lora"]["verdict"] == "problem"
    assert found["decode lora"]["text"] == "llama.cpp crashed (SIGSEGV)"
    assert examine(tiny).stdout.splitlines()[-1] == "1 problem"


def test_a_family_that_does_not_exist() -> None:
    found = checks("/no/such/family")
    assert found["files"]["verdict"] == "problem"
    assert "no such family" in found["files"]["text"]
    assert "fits" not in found


def test_a_file_that_is_missing(tiny: Path) -> None:
    base, lora = tiny / "base.gguf", tiny / "lora.gguf"
    found = checks("--large", "no.gguf", "--base", base, "--expert", f"lora={lora}")
    assert found["files"]["text"] == "no.gguf: no such file or directory"


def test_tokenizers_that_differ(tiny: Path, tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other.gguf", tokens={7: "other"})
    found = checks("--large", tiny / "large.gguf", "--base", other, "--expert", f"e={other}")
    assert found["tokenizer"]["verdict"] == "problem"
    assert "token 7 is" in found["tokenizer"]["text"]


def test_a_context_that_does_not_fit(tiny: Path) -> None:
    found = checks(tiny, "--ctx-size", 2 * 10**9)
    assert found["fits"]["verdict"] == "problem"
    assert found["fits"]["next_step"] == "--ctx-size 512"
    assert found["decode large"]["verdict"] == "ok"


def test_too_little_memory_for_any_context(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "this_machine", lambda _gpus: Machine(1000, "a limit of its control group"))
    found = checks(tiny)
    assert found["memory"]["text"].endswith("are free, by a limit of its control group")
    assert found["fits"]["next_step"] == "close other programs, or choose a smaller family"
    assert "decode large" not in found


def test_a_template_that_explodes(tiny: Path, tmp_path: Path) -> None:
    large = tiny_model(tmp_path / "large.gguf", chat_template="{{ 'x' * 10**10 }}")
    found = checks("--large", large, "--base", tiny / "base.gguf", "--expert", f"e={tiny / 'lora.gguf'}")
    assert "MiB of memory" in found["chat template"]["text"]


def test_no_template(tiny: Path, tmp_path: Path) -> None:
    large = tiny_model(tmp_path / "large.gguf", chat_template=None)
    found = checks("--large", large, "--base", tiny / "base.gguf", "--expert", f"e={tiny / 'lora.gguf'}")
    assert found["chat template"]["verdict"] == "note"


def test_a_build_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    monkeypatch.setitem(sys.modules, "edge_dlf.llama", None)
    monkeypatch.delattr("edge_dlf.llama")
    found = checks(tiny)
    assert found["llama.cpp"]["verdict"] == "problem"
    assert found["llama.cpp"]["next_step"].endswith(f"llama-cpp-python=={install.LLAMA_CPP}")
    assert found["tokenizer"]["verdict"] == "ok"


def test_amx_and_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "amx_crashes", lambda: True)
    monkeypatch.setattr(llama, "system_info", lambda: "0.0.1 CPU : SSE3 = 1")
    monkeypatch.setattr(doctor, "_cpu_lines", lambda *_: ["avx2 avx512f"])
    found = checks()
    assert [found[name]["verdict"] for name in ("AMX", "llama.cpp", "CPU")] == ["note"] * 3
    assert "-fno-tree-dse" in found["AMX"]["next_step"]
    assert "does not use avx2, avx512f" in found["CPU"]["text"]
    assert 'CMAKE_ARGS="-DGGML_NATIVE=ON" pip install' in found["CPU"]["next_step"]


def test_gpus_that_are_used_and_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "gpus", lambda: [GPU("CUDA0", "NVIDIA H200", 10**11, 15 * 10**10)])
    assert checks()["GPU"]["text"] == "NVIDIA H200, 100.0 GB of 150.0 GB free"
    monkeypatch.setattr(llama, "gpus", lambda: [])
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: tool if tool == "rocm-smi" else None)
    assert f"--extra-index-url {install.WHEELS}rocm72 llama" in checks()["GPU"]["next_step"]
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert f"--extra-index-url {install.WHEELS}metal llama" in checks()["GPU"]["next_step"]


@pytest.mark.parametrize(
    ("said", "wheel"),
    [("CUDA Version: 12.9 ", "cu125"), ("CUDA Version: 13.2", "cu132"), ("CUDA Version: 11.0", None), ("busy", None)],
)
def test_the_wheel_for_the_driver(
    said: str, wheel: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '| NVIDIA-SMI 550 {said}|'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(llama, "gpus", lambda: [])
    step = checks()["GPU"]["next_step"]
    assert "-DGGML_CUDA=on" in step
    assert (f"--extra-index-url {install.WHEELS}{wheel} llama" in step) == bool(wheel)


@pytest.mark.parametrize(
    ("mark", "command"),
    [
        ("uv-receipt.toml", f"uv pip install --python {sys.executable} "),
        ("pipx_metadata.json", "pipx runpip edge-dlf install "),
        ("other", "pip install "),
    ],
)
def test_commands_install_into_this_environment(
    mark: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / mark).touch()
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    assert install.compile_again().startswith(command)
    assert install.take_wheel("cpu").startswith(command)


def test_layers_of_a_family_on_several_gpus(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = tuple(GPU(f"CUDA{n}", "a GPU", 10**10, 10**10) for n in range(2))
    monkeypatch.setattr(doctor, "this_machine", lambda _: Machine(10**10, gpus=gpus))
    found = checks(tiny, "--main-gpu", "base=1", "--tensor-split", "1,1", "--gpu-layers", "tuned=0")
    for words in ("buffers (3/3 layers on CUDA0 and CUDA1)", "(3/3 layers on CUDA1)", "(0/3 layers on the GPU)"):
        assert words in found["fits"]["text"]
    assert found["decode base"]["verdict"] == "ok"
    assert examine(tiny, "--main-gpu", 2).exit_code == 2


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "default_n_threads", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert checks()["threads"]["next_step"] == "unset OMP_NUM_THREADS"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.getloadavg", lambda: (999.0, 0.0, 0.0))
    assert checks()["threads"]["verdict"] == "note"


def test_families_that_are_here(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "family.toml").touch()
    assert checks()["families"]["facts"]["families"] == ["a", "b"]


def test_wrong_usage_is_no_verdict(tiny: Path) -> None:
    assert examine(tiny, "--family", tiny).exit_code == 2
    assert examine(tiny, "--cache-type-k", "q9_9").exit_code == 2
