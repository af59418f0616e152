"""Families for the tests: tiny ones made here, and the real one that EDGE_DLF_TEST_FAMILY names."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from edge_dlf import FusedLlama

from .hub_server import HubServer, hub_server
from .tiny import tiny_family, tiny_lora

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="session", autouse=True)
def interrupts() -> None:
    """Let Ctrl-C reach the commands that tests start: a shell starts what runs in its background without it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny family: large.gguf (a longer, padded vocabulary), base.gguf, tuned.gguf and lora.gguf."""
    return tiny_family(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_llm(tiny: Path) -> Iterator[FusedLlama]:
    """The tiny family in memory; greedy by its defaults, a context of 256."""
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1) as llm:
        yield llm


@pytest.fixture(scope="session")
def corrected(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a family of the tiny large model and a corrector, whose LoRA is over the tiny base."""
    folder = tmp_path_factory.mktemp("corrected")
    tiny_lora(folder / "fix.gguf", seed=4, trained=("corrector", tiny / "large.gguf"))
    (folder / "family.toml").write_text(
        f'name = "corrected"\n[large]\npath = "{tiny}/large.gguf"\n[base]\npath = "{tiny}/base.gguf"\n'
        '[[experts]]\nname = "fix"\nlora = "fix.gguf"\n[defaults]\ntemperature = 0.0\n'
    )
    return folder


@pytest.fixture(scope="session")
def real_family() -> str:
    """The family that EDGE_DLF_TEST_FAMILY names; tests that need it are skipped where it is not set."""
    family = os.environ.get("EDGE_DLF_TEST_FAMILY")
    if not family:
        pytest.skip("EDGE_DLF_TEST_FAMILY names no family")
    return family


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, for one module: while Playwright is open, its thread can run no other event loop. Tests that
    need it are skipped where there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if path is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield chromium
        chromium.close()


@pytest.fixture
def hub_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A hub without repositories, an empty cache and models folder, no token, and no waits between retries."""
    with hub_server() as server:
        # huggingface-hub read its environment when it was imported.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        at_server = server.url + template[template.index("/{repo_id}") :]
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": at_server,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_HUB_OFFLINE": False,
            "DOWNLOAD_CHUNK_SIZE": 10_000,  # what has come is written in steps of this
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("time.sleep", lambda _: None)
        monkeypatch.setenv("EDGE_DLF_MODELS", str(tmp_path / "models"))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server
        close_session()
