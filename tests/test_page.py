"""The chat in a real browser."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from edge_dlf import FusedLlama
from edge_dlf.families.spec import FamilySpec
from edge_dlf.server import Rules
from edge_dlf.system.page import COLOURS

from .http_server import Served, serving
from .tiny import CHATML, tiny_model

CHAT = "/v1/chat/completions"
PHONE, DESK = {"width": 390, "height": 844}, {"width": 1200, "height": 800}
EXAMPLES = ("Who?", "Where?", "When?", "Why?", "How?")


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Served]:
    family, rules = dataclasses.replace(FamilySpec.load(tiny), examples=EXAMPLES), Rules({"max_tokens": 8, "seed": 1})
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1, n_parallel=2) as llm, serving(llm, rules) as server:
        yield server


@pytest.fixture
def page(browser: Any, server: Served) -> Iterator[Any]:
    """The page of a browser that was never here before. `page.bodies` are the requests for answers."""
    context = browser.new_context(viewport=DESK)
    page = context.new_page()
    page.set_default_timeout(60_000)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.bodies = []
    page.on("request", lambda request: page.bodies.append(request.post_data_json) if CHAT in request.url else None)
    page.goto(str(server.base_url))
    page.wait_for_selector("select.model")
    yield page
    shoot(page, "last")
    context.close()
    assert complaints == []


def shoot(page: Any, name: str) -> None:
    """Keep a picture where EDGE_DLF_PICTURES names a folder."""
    if folder := os.environ.get("EDGE_DLF_PICTURES"):
        page.screenshot(path=f"{folder}/{name}.png")


def answers(page: Any) -> list[str]:
    page.wait_for_selector("#send:text-is('Send')")
    return [node.text_content() for node in page.query_selector_all(".answer .text")]


def ask(page: Any, text: str) -> list[str]:
    page.fill("#text", text)
    page.press("#text", "Enter")
    return answers(page)


def expected(server: Served, *messages: str, **fields: Any) -> str:
    """The server's answer to messages of the user and the assistant in turn."""
    turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(messages)]
    answer = server.post(CHAT, json={"messages": turns, **fields}).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"])


def fits(page: Any) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


def test_the_page_may_load_nothing_else() -> None:
    from edge_dlf.server.page import page

    content, headers = page()
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "script-src 'sha256-" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert b"http" not in content
    assert b" style=" not in content
    assert b" onclick=" not in content
    assert b"{{" not in content
    assert b"innerHTML" not in content


def test_an_empty_page_says_what_it_is_and_what_to_try(page: Any, server: Served) -> None:
    assert page.text_content(".names") == "lora, tuned"
    assert [node.text_content() for node in page.query_selector_all(".examples button")] == list(EXAMPLES[:4])
    shoot(page, "empty")
    page.click(".examples button >> nth=1")
    assert answers(page) == [expected(server, "Where?")]
    assert page.query_selector(".welcome") is None


def test_a_message_is_answered_in_the_colours_of_the_experts(page: Any, server: Served) -> None:
    (answer,) = ask(page, "Hello")
    body = {"messages": [{"role": "user", "content": "Hello"}], "edge_dlf": {"trace": True}}
    whole = server.post(CHAT, json=body).json()
    assert answer == whole["choices"][0]["message"]["content"]
    (tokens,) = whole["edge_dlf"]["trace"]
    shown, pieces = [], iter(page.query_selector_all(".answer .token"))  # markup cuts a token into pieces
    for text in page.evaluate("talk.turns[0].answers[0][0].tokens.map(({text}) => text)"):
        shown.append(next(pieces))
        done = shown[-1].text_content()
        while done != text:
            done += next(pieces).text_content()
    assert [node.get_attribute("data-alpha") is not None for node in shown] == [bool(t["expert"]) for t in tokens]
    assert [
        "changed" in node.get_attribute("class") for node, token in zip(shown, tokens, strict=True) if token["expert"]
    ] == [token["changed"] for token in tokens if token["expert"]]
    page.select_option("#colour", "alpha")
    colours = [node.evaluate("node => getComputedStyle(node).backgroundColor") for node in shown]
    for token, colour in zip(tokens, colours, strict=True):
        if token["alpha"]:
            hue = COLOURS[("lora", "tuned").index(token["expert"])]
            assert colour.startswith(f"rgba({', '.join(map(str, hue))}, 0.")
    assert any(token["alpha"] for token in tokens)
    legend = page.locator("#experts i").first.evaluate("node => getComputedStyle(node).backgroundImage")
    assert f"rgba({', '.join(map(str, COLOURS[0]))}" in legend
    shoot(page, "desk")
    page.press("#text", "Alt+a")
    assert page.input_value("#colour") == "none"
    assert shown[0].evaluate("node => getComputedStyle(node).backgroundColor") == "rgba(0, 0, 0, 0)"
    page.reload()
    page.wait_for_selector(".answer .tools button")
    assert page.input_value("#colour") == "none"


def test_another_method_gives_another_version_and_two_stand_side_by_side(page: Any, server: Served) -> None:
    (own,) = ask(page, "Who?")
    page.select_option("select.model", "tiny:large")
    (large,) = answers(page)
    assert large == expected(server, "Who?", model="tiny:large")
    assert "2 of 2" in page.text_content(".answer .tools")
    page.click(".answer button:text-is('‹')")
    assert answers(page) == [own]
    page.select_option("select.model", "tiny")
    answers(page)
    page.press("#text", "Alt+c")
    assert answers(page) == [own, large]
    assert [box.input_value() for box in page.query_selector_all("select.model")] == ["tiny", "tiny:large"]
    left, right = (box.bounding_box() for box in page.query_selector_all("section"))
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]
    page.emulate_media(color_scheme="dark")
    shoot(page, "dark")
    again = ask(page, "Why?")
    assert again[1::2] == [
        expected(server, "Who?", own, "Why?"),
        expected(server, "Who?", large, "Why?", model="tiny:large"),
    ]
    page.set_viewport_size(PHONE)
    upper, lower = (box.bounding_box() for box in page.query_selector_all("section"))
    assert upper["y"] < lower["y"]
    assert fits(page)
    shoot(page, "phone")
    page.click("#compare")
    assert answers(page) == again[:2]
    assert "1 of 2" in page.text_content(".answer .tools >> nth=1")  # the other side's answer stays
    page.click("#new")
    assert answers(page) == []
    assert fits(page)


def test_weights_are_moved_and_reset(page: Any, server: Served) -> None:
    page.select_option("select.model", "tiny:static")
    ask(page, "Who?")
    page.click(".weights summary")
    page.locator(".weights input").first.fill("0.25")
    (answer,) = answers(page)
    assert page.bodies[-1]["edge_dlf"] == {"trace": True, "alpha": {"lora": 0.25, "tuned": 1}}
    assert answer == expected(server, "Who?", edge_dlf={"method": "static", "alpha": {"lora": 0.25, "tuned": 1}})
    page.click(".weights button")
    answers(page)
    assert page.bodies[-1]["edge_dlf"] == {"trace": True}
    page.select_option("select.model", "tiny:blend")
    answers(page)
    page.locator(".weights input").nth(2).fill("-0.5")
    answers(page)
    weights = {"large": 0.5, "base": 0, "lora": -0.5, "tuned": 0.25}
    assert page.bodies[-1]["edge_dlf"] == {"trace": True, "method": "weighted", "weights": weights}
    shoot(page, "weights")


def test_conversations_are_kept_in_the_browser(page: Any) -> None:
    page.press("#text", "Alt+s")
    page.keyboard.type("Be brief.")
    first = ask(page, "Who?")
    assert page.bodies[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.press("#text", "Alt+n")
    page.fill("#system textarea", "")
    second = ask(page, "Why?")
    assert [message["role"] for message in page.bodies[-1]["messages"]] == ["user"]
    page.reload()
    page.wait_for_selector(".answer .tools button")
    assert answers(page) == second
    titles = page.locator("#talks li button:first-child")
    assert titles.all_text_contents() == ["Why?", "Who?"]
    shoot(page, "list")
    titles.nth(1).click()
    assert answers(page) == first
    assert page.input_value("#system textarea") == "Be brief."
    page.on("dialog", lambda dialog: dialog.accept())
    page.click("#talks li.here button:last-child")
    assert titles.all_text_contents() == ["Why?"]
    assert answers(page) == []


def test_a_full_browser_lets_the_oldest_conversation_go(page: Any) -> None:
    ask(page, "Who?")
    page.evaluate("""() => {
      const [name] = Object.keys(localStorage).filter((name) => name.startsWith(PREFIX));
      for (let n = 0; ; n++) {
        const old = {...JSON.parse(localStorage[name]), id: `old${n}`, at: n, system: "x".repeat(500_000)};
        try { localStorage[PREFIX + old.id] = JSON.stringify(old); } catch { break; }
      }
      for (let size = 100_000; size >= 1; size /= 10)
        for (;;) try { localStorage["fill"] = (localStorage["fill"] ?? "") + "x".repeat(size); } catch { break; }
    }""")
    page.press("#text", "Alt+n")
    ask(page, "Why?")
    ids = page.evaluate("kept().map(({id}) => id)")
    assert page.locator("#talks li button:first-child").first.text_content() == "Why?"
    assert "old0" not in ids
    assert "old1" in ids
    page.reload()
    page.wait_for_selector(".answer .tools button")


def test_a_message_is_edited_an_answer_copied_and_given_again(page: Any, server: Served) -> None:
    ask(page, "Who?")
    first, _ = ask(page, "Why?")
    page.press("#text", "ArrowUp")
    assert page.input_value(".user textarea") == "Why?"
    page.keyboard.press("Escape")
    assert page.query_selector(".user textarea") is None
    page.press("#text", "ArrowUp")
    page.fill(".user textarea", "How?")
    page.keyboard.press("Enter")
    assert answers(page) == [first, expected(server, "Who?", first, "How?")]
    page.press("#text", "Alt+r")
    assert len(answers(page)) == 2
    assert "2 of 2" in page.text_content(".answer >> nth=1")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click(".answer >> nth=0 >> button:text-is('Copy')")
    page.wait_for_selector("button:text-is('Copied')")
    assert page.evaluate("navigator.clipboard.readText()") == first
    page.hover(".user >> nth=0")
    page.click(".user >> nth=0 >> button:text-is('Edit')")
    page.fill(".user textarea", "When?")
    page.click(".user button:text-is('Send')")
    assert answers(page) == [expected(server, "When?")]


def test_an_answer_is_stopped_and_what_came_is_kept(page: Any) -> None:
    ask(page, "Who?")
    page.route(f"**{CHAT}", lambda route: None)  # answers no more
    page.fill("#text", "Why?")
    page.press("#text", "Enter")
    page.wait_for_selector("#send:text-is('Stop')")
    page.press("#text", "Escape")
    assert answers(page)[1] == ""
    assert "stopped" in page.text_content(".answer >> nth=1")
    page.reload()
    page.wait_for_selector(".answer .tools button")
    assert page.locator(".user .text").all_text_contents() == ["Who?", "Why?"]
    page.unroute_all()
    page.press("#text", "Alt+r")
    assert answers(page)[1] != ""


def let_a_model_say(page: Any, *tokens: str) -> None:
    """Answer what the page asks from now on with these tokens, each of them changed by an expert."""
    how = {"alpha": 1.0, "expert": "lora", "logprob": -0.1, "changed": True}
    how["large"] = {"choice": "<i>", "logprob": None}
    chunks = [{"choices": [{"delta": {"content": text}, "finish_reason": None}], "edge_dlf": how} for text in tokens]
    end = {"choices": [{"delta": {}, "finish_reason": "stop"}], "edge_dlf": {"generation_tps": 1.0}}
    events = "".join(f"data: {json.dumps(each)}\n\n" for each in (*chunks, end)) + "data: [DONE]\n\n"
    page.route(f"**{CHAT}", lambda route: route.fulfill(content_type="text/event-stream", body=events))


def test_what_a_model_says_is_text_and_never_html(page: Any) -> None:
    said = "<img src=x onerror=alert(1)><b>bold</b> {{colours}}"
    let_a_model_say(page, said)
    assert ask(page, "<b>Who?</b>") == [said]
    assert page.locator(".log b, .log img, .log i").count() == 0
    assert 'which would have said "<i>"' in page.get_attribute(".answer .token", "title")
    assert page.text_content("#talks li") == "<b>Who?</b>×"


MARKDOWN = """
# A title
Some **strong** and *slanted* words, `a | b`, ~~none~~, \\*a star\\*, 2**3 = 8, a*b*c, snake_case_name.

3. third:
   ```python
   for n in numbers:
       print(n)
   ```
4. fourth
   - within
     - deeper

   still the fourth
- another list

| name | what **it** is |
|---|:--:|
| `x` | |
| y \\| z | *second* |

> said

---
<b>none</b> **open
```
**code**
"""
DRAWN = {
    "h3": ["A title"],
    "strong": ["strong", "it"],
    "em": ["slanted", "second"],
    ".text > p": [
        "Some strong and slanted words, a | b, none, *a star*, 2**3 = 8, a*b*c, snake_case_name.",
        "<b>none</b> **open",
    ],
    "ol > li > pre code": ["for n in numbers:\n    print(n)"],
    "ol > li > ul > li > ul": ["deeper"],
    "ol > li > p": ["still the fourth"],
    ".text > ul": ["another list"],
    "th": ["name", "what it is"],
    "td": ["x", "", "y | z", "second"],
    "blockquote": ["said"],
    ".text > pre": ["**code**"],
}


def test_markdown_is_drawn(page: Any) -> None:
    let_a_model_say(page, *(MARKDOWN[n : n + 3] for n in range(0, len(MARKDOWN), 3)))
    assert ask(page, "Show me") == [MARKDOWN]
    for selector, texts in DRAWN.items():
        assert page.locator(f".answer {selector}").all_inner_texts() == texts, selector
    assert page.evaluate("[...document.querySelectorAll('ol > li')].map(({value}) => value)") == [3, 4]
    assert page.locator(".answer .rule").count() == 1
    assert page.locator(".answer code .token[data-alpha]").count() > 0
    shoot(page, "markdown")
    page.set_viewport_size(PHONE)
    assert fits(page)


def test_no_character_of_markdown_is_lost_whatever_it_is_and_however_it_comes(page: Any) -> None:
    """Drawn token by token, each of up to four pieces of markup."""
    wrong = page.evaluate(
        """(sample) => {
          const pieces = ["*", "**", "_", "`", "```", "~~", "\\n", "\\n\\n", "- ", "1. ", "  ", "# ", "> ", "|", "---",
            "|-|-|", "\\\\", "a", "b c", ""];
          let seed = 1;
          const random = (n) => (seed = seed * 48271 % 2147483647) % n;
          const soups = Array.from({length: 300}, () => Array.from({length: 30}, () =>
            Array.from({length: random(4)}, () => pieces[random(pieces.length)]).join("")));
          for (const texts of [...soups, sample]) {
            const given = {tokens: []}, box = document.createElement("div"), write = markdownOf(given, box);
            for (const text of texts) {
              given.tokens.push({text});
              write();
              if (box.textContent !== textOf(given)) return [textOf(given), box.textContent];
            }
            const again = document.createElement("div");
            markdownOf(given, again)();
            if (texts === sample && again.innerHTML !== box.innerHTML) return [again.innerHTML, box.innerHTML];
          }
        }""",
        [*MARKDOWN],
    )
    assert wrong is None


def test_on_a_phone_the_conversations_cover_the_page_until_it_is_touched(page: Any) -> None:
    ask(page, "Who?")
    page.set_viewport_size(PHONE)
    page.reload()
    page.wait_for_selector(".answer .tools button")
    assert not page.is_visible("#talks")
    page.click("#list")
    assert page.is_visible("#talks")
    shoot(page, "phone-list")
    page.mouse.click(PHONE["width"] - 5, 400)
    assert not page.is_visible("#talks")
    assert fits(page)


def test_an_error_is_told_and_a_key_asked_for(browser: Any, tiny: Path) -> None:
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1) as llm, serving(llm, Rules(api_key="k")) as server:
        assert httpx.get(f"{server.base_url}").status_code == 200
        page = browser.new_page(viewport=DESK)
        page.set_default_timeout(60_000)
        page.goto(str(server.base_url))
        page.fill("#key", "k")
        page.press("#key", "Enter")
        page.wait_for_selector("select.model")
        page.fill("#text", "<b>long</b> " * 50)
        page.press("#text", "Enter")
        assert "more than the context of 64" in page.wait_for_selector(".wrong").text_content()
        assert page.query_selector(".log b") is None
        page.close()


def test_thinking_is_folded_once_the_answer_begins(browser: Any, tiny: Path, tmp_path: Path) -> None:
    thinks = tiny_model(tmp_path / "large.gguf", seed=1, n_embd=64, chat_template=f"{CHATML}<think>\n{{# </think> #}}")
    rules = Rules({"max_tokens": 40, "seed": 1, "think_budget": 5})
    families = FusedLlama(thinks, tiny / "base.gguf", {"lora": tiny / "lora.gguf"}, n_ctx=256, n_threads=1)
    with families as llm, serving(llm, rules) as server:
        page = browser.new_page(viewport=DESK)
        page.set_default_timeout(60_000)
        page.goto(str(server.base_url))
        assert "family.toml" in page.wait_for_selector(".examples p").text_content()
        page.fill("#text", "Hello")
        page.press("#text", "Enter")
        answers(page)
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        message = server.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        fold = page.locator(".answer details")
        assert fold.evaluate("node => node.open") is False
        assert fold.text_content() == "Thinking" + message["reasoning_content"]
        assert answers(page) == [message["content"]]
        page.close()
