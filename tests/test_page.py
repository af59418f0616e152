"""The chat in a real browser."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_dlf import FusedLlama
from edge_dlf.server import Rules

from .http_server import Served, serving
from .tiny import CHATML, tiny_model

PHONE, DESK = {"width": 390, "height": 844}, {"width": 1200, "height": 800}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Served]:
    rules = Rules({"max_tokens": 8, "seed": 1})
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=2) as llm, serving(llm, rules) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    page = browser.new_page(viewport=DESK)
    page.set_default_timeout(180_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(str(server.base_url))
    page.wait_for_selector("select")
    yield page
    shoot(page, "last")
    page.close()
    assert complaints == []


def shoot(page: Any, name: str) -> None:
    """Keep a picture where EDGE_DLF_PICTURES names a folder."""
    if folder := os.environ.get("EDGE_DLF_PICTURES"):
        page.screenshot(path=f"{folder}/{name}.png")


def answers(page: Any) -> list[str]:
    page.wait_for_selector("#send:text-is('Send')")
    return [node.text_content() for node in page.query_selector_all(".answer")]


def test_the_page_may_load_nothing_else() -> None:
    from edge_dlf.server.page import page

    content, headers = page()
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
    assert b"http" not in content.replace(b"https", b"http").replace(b"http-equiv", b"")
    assert b" style=" not in content
    assert b" onclick=" not in content


def test_a_message_is_answered_in_colours_of_alpha(page: Any, server: Served) -> None:
    page.fill("#text", "Hello")
    page.press("#text", "Enter")
    (answer,) = answers(page)
    body = {"messages": [{"role": "user", "content": "Hello"}], "edge_dlf": {"trace": True}}
    expected = server.post("/v1/chat/completions", json=body).json()
    assert answer == expected["choices"][0]["message"]["content"]
    alphas = [float(node.get_attribute("data-alpha")) for node in page.query_selector_all(".token[data-alpha]")]
    assert alphas == [token["alpha"] for token in expected["edge_dlf"]["trace"][0] if token["expert"]]
    strongest = page.locator(".token[data-alpha]").first
    assert "rgba" in strongest.evaluate("node => getComputedStyle(node).backgroundColor")
    shoot(page, "desk")
    page.press("#text", "Alt+a")
    assert strongest.evaluate("node => getComputedStyle(node).backgroundColor") == "rgba(0, 0, 0, 0)"
    assert "tokens" in page.text_content(".figures")


def test_the_method_is_switched_in_place_and_two_stand_side_by_side(page: Any, server: Served) -> None:
    page.fill("#text", "Who?")
    page.click("#send")
    answers(page)
    page.select_option("select", "tiny:large")
    (large,) = answers(page)
    body = {"model": "tiny:large", "messages": [{"role": "user", "content": "Who?"}]}
    assert large == server.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
    page.press("#text", "Alt+c")
    assert len(answers(page)) == 2
    left, right = (box.bounding_box() for box in page.query_selector_all("section"))
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]
    page.emulate_media(color_scheme="dark")
    shoot(page, "dark")
    page.set_viewport_size(PHONE)
    upper, lower = (box.bounding_box() for box in page.query_selector_all("section"))
    assert upper["y"] < lower["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    shoot(page, "phone")
    page.click("#compare")
    page.click("#fresh")
    assert answers(page) == []


def test_an_error_is_told_and_a_key_asked_for(browser: Any, tiny: Path) -> None:
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1) as llm, serving(llm, Rules(api_key="k")) as server:
        assert httpx.get(f"{server.base_url}").status_code == 200
        page = browser.new_page(viewport=DESK)
        page.set_default_timeout(180_000)
        page.goto(str(server.base_url))
        page.fill("#key", "k")
        page.press("#key", "Enter")
        page.wait_for_selector("select")
        page.fill("#text", "<b>long</b> " * 50)
        page.press("#text", "Enter")
        assert "more than the context of 64" in page.wait_for_selector(".wrong").text_content()
        assert page.query_selector("b") is None
        page.close()


def test_thinking_is_folded_once_the_answer_begins(browser: Any, tiny: Path, tmp_path: Path) -> None:
    thinks = tiny_model(tmp_path / "large.gguf", seed=1, n_embd=64, chat_template=f"{CHATML}<think>\n{{# </think> #}}")
    rules = Rules({"max_tokens": 40, "seed": 1, "think_budget": 5})
    families = FusedLlama(thinks, tiny / "base.gguf", {"lora": tiny / "lora.gguf"}, n_ctx=256, n_threads=1)
    with families as llm, serving(llm, rules) as server:
        page = browser.new_page(viewport=DESK)
        page.set_default_timeout(180_000)
        page.goto(str(server.base_url))
        page.fill("#text", "Hello")
        page.press("#text", "Enter")
        answers(page)
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        message = server.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        fold = page.locator(".answer details")
        assert fold.evaluate("node => node.open") is False
        assert fold.text_content() == "Thinking" + message["reasoning_content"]
        assert page.text_content(".answer") == "Thinking" + message["reasoning_content"] + message["content"]
        page.close()
