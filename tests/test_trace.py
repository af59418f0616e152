"""Traces: what a step records, the file, its totals, and the page in headless Chromium."""

from __future__ import annotations

import json
import math
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from edge_dlf import FusedLlama, FusionParams, InvalidParameterError, SamplingParams
from edge_dlf.answers.trace_entry import answer_entry, token_entry
from edge_dlf.cli import main
from edge_dlf.evidence.trace import Entry, Totals, TraceFile, read_trace
from edge_dlf.evidence.trace_page import PAGE_TOKENS, write_page

from . import naive
from .test_decode import N_VOCAB, family, generate


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("EDGE_DLF_"):
            monkeypatch.delenv(name)


def run(*args: str | Path, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, list(map(str, args)), input=stdin)


def line(k: int = 0, alpha: float = 0.5, *, text: str | None = None, **changes: Any) -> dict[str, Any]:
    """A token's line of a trace of the experts a and b, of which a leads."""
    names = ("objective", "kl_forward", "kl_reverse", "target_forward", "target_reverse")
    top = [[1, "one", -0.5], [2, "<b>", -1.5]]
    shown = f" w{k}" if text is None else text
    return {
        "id": k,
        "text": shown,
        "name": shown,
        "logprob": -0.25,
        "alphas": {"a": alpha, "b": 0.0},
        "expert": "a" if alpha else None,
        "drafted": k % 3 == 0,
        "changed": k % 5 == 0,
        "search": dict.fromkeys(names, 0.125),
        "fused": top,
        "members": {name: {"id": 2, "name": "<b>", "top": top} for name in ("large", "base", "a", "b")},
        **changes,
    }


HEAD = answer_entry("a question", "fam", "dynamic", ("a", "b"), 2.0)


def write_trace(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return path


class TestSteps:
    @pytest.mark.parametrize("n_draft", [0, 3])
    def test_a_trace_has_what_the_oracle_has(self, n_draft: int) -> None:
        fusion, sampling = FusionParams(), SamplingParams(temperature=0.9, seed=5, top_k=12, repeat_penalty=1.2)
        members = family()
        picks = generate(members, [1, 2], 12, fusion, sampling, traced=True, n_draft=n_draft)
        text = [1, 2]
        for pick in picks:
            rows = {name: member.row(text)[:N_VOCAB] for name, member in members.items()}
            t, alpha, objective = naive.search(rows["large"], rows["base"], [rows["e0"], rows["e1"]])
            trace = pick.trace
            assert trace is not None
            assert trace.choice is not None
            assert (trace.choice.expert, trace.choice.alpha) == (t, pytest.approx(alpha))
            assert trace.choice.objective == pytest.approx(objective, rel=1e-4, abs=1e-9)
            assert list(trace.alphas.values()) == list(pick.weights)
            fused = naive.fused_probs(rows["large"], rows["base"], [rows["e0"], rows["e1"]], pick.weights)
            assert [id for id, _ in trace.fused] == np.argsort(-fused, kind="stable")[:5].tolist()
            assert [lp for _, lp in trace.fused] == pytest.approx(np.log(np.sort(fused)[:-6:-1]), abs=1e-4)
            for name, row in rows.items():
                own = trace.members[name]
                assert own.token == naive.select(row.astype(np.float64), sampling, 5, len(text), text)
                assert [id for id, _ in own.top_logprobs] == np.argsort(-row, kind="stable")[:5].tolist()
            text.append(pick.token)
        assert any(pick.trace.members["large"].token != pick.token for pick in picks if pick.trace)

    def test_tracing_changes_no_pick(self) -> None:
        fusion, sampling = FusionParams(), SamplingParams(seed=3)
        plain = generate(family(), [4], 20, fusion, sampling, n_top=2)
        traced = generate(family(), [4], 20, fusion, sampling, n_top=2, traced=True)
        assert [(p.token, p.logprob, p.weights, p.top_logprobs) for p in plain] == [
            (p.token, p.logprob, p.weights, p.top_logprobs) for p in traced
        ]
        assert not any(pick.trace for pick in plain)

    @pytest.mark.parametrize(("method", "names"), [("static", ["large", "base", "e0", "e1"]), ("e1", ["e1"])])
    def test_other_methods_have_no_search(self, method: str, names: list[str]) -> None:
        picks = generate(family(), [4], 3, FusionParams(method=method), SamplingParams(seed=3), traced=True)
        for pick in picks:
            assert pick.trace
            assert pick.trace.choice is None
            assert list(pick.trace.members) == names

    @pytest.mark.parametrize(
        "weights",
        [{"large": 0.5, "base": -0.2, "e1": 0.7}, {"large": 0.6, "e0": -0.1}, {"e0": 0.4, "e1": 0.6}],
        ids=str,
    )
    def test_weighted_has_the_weights_of_experts(self, weights: dict[str, float]) -> None:
        fusion = FusionParams(method="weighted", weights=weights)
        for pick in generate(family(), [4], 3, fusion, SamplingParams(seed=3), traced=True, n_draft=2):
            assert pick.trace
            assert pick.trace.choice is None
            assert list(pick.trace.members) == list(weights)
            assert pick.trace.alphas == {name: weights[name] for name in weights if name in ("e0", "e1")}

    def test_a_member_of_its_own_nan_is_left_out(self) -> None:
        members = family()
        members["e1"].poison = (4, math.nan)
        fusion = FusionParams(method="static", alpha={"e0": 1.0})  # e1 has no weight, so that its row does not count
        (pick,) = generate(members, [4], 1, fusion, SamplingParams(seed=3), traced=True)
        assert pick.trace
        assert list(pick.trace.members) == ["large", "base", "e0"]


class TestApi:
    def test_tokens_and_results_carry_it(self, tiny_llm: FusedLlama) -> None:
        tokens = list(tiny_llm.stream("the", max_tokens=6, draft="off", trace=True))
        assert all(token.trace and set(token.trace.members) == {"large", "base", "lora", "tuned"} for token in tokens)
        result: Any = tiny_llm.create_completion("the", max_tokens=6, draft="off", trace=True)
        entries = [token_entry(token, lambda id: tiny_llm.detokenize([id])) for token in tokens]
        assert result["edge_dlf"]["trace"] == {"alpha_max": 2.0, "tokens": entries}
        for token, entry in zip(tokens, entries, strict=True):
            assert entry["changed"] == (token.trace is not None and token.trace.members["large"].token != token.id)
        plain: Any = tiny_llm.create_completion("the", max_tokens=6, draft="off")
        assert "trace" not in plain["edge_dlf"]
        assert plain["choices"] == result["choices"]

    def test_a_batch_carries_it(self, tiny_llm: FusedLlama) -> None:
        (row,) = tiny_llm.batch(["the"], max_tokens=4, trace=True)
        assert len(row["response"]["body"]["edge_dlf"]["trace"]["tokens"]) == 4


class TestCommands:
    def test_generate_chat_and_batch_add_to_one_file(self, tiny: Path, tmp_path: Path) -> None:
        trace, rows, out = tmp_path / "t.jsonl", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        common = ["-f", tiny, "--max-tokens", "5", "--trace", trace, "--threads", "1", "--ctx-size", "128"]
        assert run("generate", *common, "the\ncat").exit_code == 0
        assert run("generate", *common, "--json", "--method", "static", "the").exit_code == 0
        assert run("chat", *common, stdin="and\n").exit_code == 0
        rows.write_text('{"id": "r1", "prompt": "he"}\n{"id": "r2", "prompt": ""}\nnot json\n')
        run("batch", rows, "-o", out, *common, "--quiet", "--ordered")
        assert "trace" not in out.read_text()
        items = list(read_trace(trace))
        heads = [item for item in items if "format" in item]
        assert [head["answer"] for head in heads] == ["the cat", "the", "and", "r1", "r2"]
        assert [head["method"] for head in heads] == ["dynamic", "static", "dynamic", "dynamic", "dynamic"]
        assert [head["alpha_max"] for head in heads[:2]] == [2.0, 1.0]
        assert len(items) - len(heads) == 25

    @pytest.mark.parametrize(
        ("weights", "words"),
        [
            ("large=0.5,lora=0.25", "fusion changed the large model's choice of"),
            ("lora=0.75,tuned=0.25", "expert"),
            ("lora=1,large=-0.1", "at the bound 1 on 100.0% of steps"),
            ("large=1,base=0.5", " · 1 answer · weighted"),
        ],
    )
    def test_weighted_without_some_members(self, tiny: Path, tmp_path: Path, weights: str, words: str) -> None:
        trace = tmp_path / "t.jsonl"
        settings = ["--method", "weighted", "--weights", weights, "--max-tokens", "6", "--temperature", "0"]
        common = ["-f", tiny, "--trace", trace, "--threads", "1", "--ctx-size", "128"]
        assert run("generate", *common, *settings, "the").exit_code == 0
        found = run("trace", trace)
        assert found.exit_code == 0, found.stderr
        assert words in found.stdout
        assert ("fusion changed" in found.stdout) == ("large" in weights and "lora" in weights)
        (head, *steps) = read_trace(trace)
        given = dict(pair.split("=") for pair in weights.split(","))
        assert head["experts"] == [name for name in ("lora", "tuned") if name in given]
        for step in steps:
            assert step["alphas"] == {name: float(given[name]) for name in head["experts"]}
            assert step["expert"] == next(iter(head["experts"]), None)

    def test_a_resumed_batch_traces_only_what_it_answers(self, tiny: Path, tmp_path: Path) -> None:
        trace, rows, out = tmp_path / "t.jsonl", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
        args = [
            "batch",
            rows,
            "-o",
            out,
            "-f",
            tiny,
            "--max-tokens",
            "3",
            "--trace",
            trace,
            "--threads",
            "1",
            "--quiet",
        ]
        rows.write_text('{"id": "r1", "prompt": "he"}\n')
        assert run(*args).exit_code == 0
        rows.write_text('{"id": "r1", "prompt": "he"}\n{"id": "r2", "prompt": "at"}\n')
        assert run(*args).exit_code == 0
        assert [item["answer"] for item in read_trace(trace) if "format" in item] == ["r1", "r2"]

    def test_a_file_that_is_no_trace_is_left_alone(self, tiny: Path, tmp_path: Path) -> None:
        other = tmp_path / "notes.jsonl"
        other.write_text('{"prompt": "x"}\n')
        result = run("generate", "-f", tiny, "--trace", other, "the")
        assert result.exit_code == 2
        assert result.stderr == f"edge-dlf: {other}: line 1 is not of a trace that this version writes\n"
        assert other.read_text() == '{"prompt": "x"}\n'

    def test_a_folder_that_is_not_there(self, tiny: Path, tmp_path: Path) -> None:
        result = run("generate", "-f", tiny, "--trace", tmp_path / "no" / "t.jsonl", "the")
        assert (result.exit_code, result.stdout) == (2, "")
        assert "no such file or directory" in result.stderr

    def test_the_summary(self, tmp_path: Path) -> None:
        steps = [line(k, alpha) for k, alpha in enumerate([0.0, 0.5, 0.5, 2.0])]
        result = run("trace", write_trace(tmp_path / "t.jsonl", HEAD, *steps))
        assert result.exit_code == 0
        assert result.stdout.splitlines() == [
            "4 tokens · 1 answer · dynamic",
            "drafted 50.0% of tokens",
            "mean α 0.75 · at the bound 2 on 25.0% of steps · at 0 on 25.0%",
            "fusion changed the large model's choice of 1 token, 25.0%",
            "α from 0 |▄ █      ▄| to 2",
            "",
            "expert  steps led   share  mean α",
            "a               3   75.0%    0.75",
            "b               0    0.0%    0.00",
        ]
        assert result.stderr == f"page: {tmp_path / 't.html'}\n"
        assert (tmp_path / "t.html").exists()

    @pytest.mark.parametrize(
        ("content", "number"),
        [
            ("{}\n", 1),
            (json.dumps({**HEAD, "format": "edge-dlf trace 99"}) + "\n", 1),
            (json.dumps(HEAD) + "\nnonsense\n", 2),
            (json.dumps(HEAD) + "\n" + json.dumps({**line(), "fused": [[1, 2]]}) + "\n", 2),
            (json.dumps(HEAD) + "\n" + json.dumps({**line(), "expert": "nobody"}) + "\n", 2),
            (json.dumps(HEAD) + "\n" + json.dumps(line()).replace("-0.25", "1e999") + "\n", 2),
            (json.dumps(HEAD) + "\n" + json.dumps(line()).replace("-0.25", "9" * 400) + "\n", 2),
            (json.dumps(HEAD) + "\n" + json.dumps({**line(), "alphas": {"a": "x"}}) + "\n", 2),
            (json.dumps({**HEAD, "alpha_max": 10**400}) + "\n", 1),
            (json.dumps({**HEAD, "alpha_max": 1e308}) + "\n", 1),
            (json.dumps({**HEAD, "experts": ["a", 1]}) + "\n", 1),
            (json.dumps({**HEAD, "experts": [["a"]]}) + "\n", 1),
            (json.dumps(HEAD) + "\n" + json.dumps({**line(), "alphas": {"a": 1.7e308}}) + "\n", 2),
        ],
    )
    def test_a_wrong_line_is_named_and_no_page_is_left(self, tmp_path: Path, content: str, number: int) -> None:
        path = tmp_path / "t.jsonl"
        path.write_text(content)
        result = run("trace", path)
        assert result.exit_code == 2
        assert result.stderr == f"edge-dlf: {path}: line {number} is not of a trace that this version writes\n"
        assert not (tmp_path / "t.html").exists()

    def test_an_alpha_far_beyond_its_bound_is_in_the_last_part(self, tmp_path: Path) -> None:
        head, own = {**HEAD, "alpha_max": 1e-308}, {**line(), "alphas": {"a": 1e29}}
        result = run("trace", write_trace(tmp_path / "t.jsonl", head, own))
        assert (result.exit_code, result.stderr.count("\n")) == (0, 1)
        assert "α from 0 |         █|" in result.stdout

    def test_the_page_never_takes_the_trace_s_place(self, tmp_path: Path) -> None:
        path = write_trace(tmp_path / "t.html", HEAD, line())
        before = path.read_bytes()
        assert run("trace", path).exit_code == 2
        assert path.read_bytes() == before


class TestFile:
    def test_a_torn_line_is_cut_off_before_more_is_added(self, tmp_path: Path) -> None:
        path = write_trace(tmp_path / "t.jsonl", HEAD, line(0))
        whole = path.read_bytes()
        path.write_bytes(whole + b'{"id": 1, "te')
        assert len(list(read_trace(path))) == 2
        with TraceFile(path) as file:
            file.write(line(1), line(2))
        assert path.read_bytes().startswith(whole)
        assert [item["text"] for item in read_trace(path) if "text" in item] == [" w0", " w1", " w2"]

    def test_a_token_of_no_probability_comes_back(self, tmp_path: Path) -> None:
        with TraceFile(tmp_path / "t.jsonl") as file:
            file.write(HEAD, line(logprob=-math.inf))
        step = list(read_trace(tmp_path / "t.jsonl"))[1]
        assert step["logprob"] is None

    def test_totals(self) -> None:
        totals = Totals()
        with pytest.raises(InvalidParameterError):
            list(read_trace(Path("/nonexistent/t.jsonl")))
        totals.add(answer_entry("q", "f", "large", (), 0.0))
        totals.add(line(alphas={}, expert=None))
        assert (totals.n_tokens, totals.n_fused, totals.alpha_mean) == (1, 0, 0.0)


class Page:
    """A page of a trace in the browser, and what it complained about or asked of the network."""

    def __init__(self, browser: Any, path: Path, **settings: Any) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.tab = browser.new_page(**settings)
        self.tab.on("console", lambda message: self.complaints.append(message.text))
        self.tab.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.tab.on("request", lambda request: self.requests.append(request.url))
        self.tab.goto(path.as_uri())
        self.tab.wait_for_selector("#text .t")

    def texts(self) -> list[str]:
        return self.tab.eval_on_selector_all("#text .t", "tokens => tokens.map(token => token.textContent)")

    def close(self) -> None:
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("file:", "data:"))] == []
        self.tab.close()


class TestPage:
    def test_it_shows_every_token_as_text(self, browser: Any, tmp_path: Path) -> None:
        texts = ["</script><script>alert(1)</script>", "line\nbreak", "", "<b>", "é", "\u2028", "{{meta}}", "\ud800"]
        entries = [line(k, 0.1 * k, text=text) for k, text in enumerate(texts)]
        head = {**HEAD, "answer": "<img src=x onerror=alert(1)>"}
        path = write_trace(tmp_path / "<i>&t.jsonl", head, *entries)
        assert run("trace", path, "-o", tmp_path / "t.html").exit_code == 0
        page = Page(browser, tmp_path / "t.html")
        assert page.texts() == [text.replace("\n", "↵\n") or "◌" for text in texts]
        assert page.tab.inner_text("#text h2") == "<img src=x onerror=alert(1)> · dynamic"
        assert page.tab.title() == "<i>&t.jsonl · edge-dlf trace"
        assert page.tab.locator("#text .t.changed").count() == 2
        assert page.tab.locator("#curve path").count() == 2
        page.close()

    def test_keys_move_and_the_candidates_stand_side_by_side(self, browser: Any, tmp_path: Path) -> None:
        path = write_trace(tmp_path / "t.jsonl", HEAD, *(line(k, 0.25 * k) for k in range(8)))
        run("trace", path)
        page = Page(browser, tmp_path / "t.html")
        page.tab.keyboard.press("ArrowRight")
        page.tab.keyboard.press("ArrowRight")
        assert page.tab.evaluate("document.activeElement.textContent") == " w1"
        heads = page.tab.locator("#detail th").all_inner_texts()
        assert heads == ["fused", "large", "base", "a", "b"]
        assert "α a 0.25" in page.tab.inner_text("#detail")
        page.tab.keyboard.press("n")
        assert page.tab.evaluate("document.activeElement.textContent") == " w5"
        assert "The large model alone" in page.tab.inner_text("#detail")
        page.tab.keyboard.press("Home")
        assert page.tab.evaluate("document.activeElement.textContent") == " w0"
        page.tab.hover("#text .t >> nth=7")
        assert "α a 1.75" in page.tab.inner_text("#detail")
        page.close()

    def test_colours_by_alpha_and_by_expert(self, browser: Any, tmp_path: Path) -> None:
        by_b = line(2, 0.0, expert="b", alphas={"a": 0.0, "b": 2.0})
        path = write_trace(tmp_path / "t.jsonl", HEAD, line(0, 0.0), line(1, 0.5), by_b)
        run("trace", path)
        for scheme in ("light", "dark"):
            page = Page(browser, tmp_path / "t.html", color_scheme=scheme)
            colours = "tokens => tokens.map(token => getComputedStyle(token).backgroundColor)"
            by_alpha = page.tab.eval_on_selector_all("#text .t", colours)
            page.tab.check("input[value=expert]")
            by_expert = page.tab.eval_on_selector_all("#text .t", colours)
            assert by_alpha[0] == by_expert[0] == "rgba(0, 0, 0, 0)"
            assert by_alpha[1] != by_expert[1]  # weak by α, full by expert
            assert by_alpha[2] == by_expert[2] != by_expert[1]
            page.close()

    def test_a_phone_scrolls_only_downwards(self, browser: Any, tmp_path: Path) -> None:
        path = write_trace(tmp_path / "t.jsonl", HEAD, *(line(k, 1.0, text=" longest" * 9) for k in range(30)))
        run("trace", path)
        page = Page(browser, tmp_path / "t.html", viewport={"width": 360, "height": 640})
        page.tab.keyboard.press("ArrowRight")
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= 360
        page.close()

    def test_pages_are_unpacked_when_they_are_shown(self, browser: Any, tmp_path: Path) -> None:
        expect = pytest.importorskip("playwright.sync_api").expect
        entries = [line(k, (k % 21) / 10) for k in range(2 * PAGE_TOKENS + 5)]
        run("trace", write_trace(tmp_path / "t.jsonl", HEAD, *entries))
        page = Page(browser, tmp_path / "t.html")
        assert page.texts() == [entry["text"] for entry in entries[:PAGE_TOKENS]]
        page.tab.keyboard.press("]")
        expect(page.tab.locator("#text .t").first).to_have_text(f"w{PAGE_TOKENS}")
        page.tab.select_option("#page", "2")
        expect(page.tab.locator("#text .t")).to_have_count(5)
        assert page.texts() == [entry["text"] for entry in entries[-5:]]
        assert page.tab.inner_text("#text h2").endswith("goes on")
        page.tab.focus("#text .t")
        page.tab.keyboard.press("Home")
        page.tab.keyboard.press("ArrowLeft")
        expect(page.tab.locator("#text .t:focus")).to_have_text(f"w{2 * PAGE_TOKENS - 1}")
        page.close()

    def test_memory_does_not_grow_with_the_trace(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("edge_dlf.evidence.trace_page.PAGE_TOKENS", 100)

        def items(n: int) -> Iterator[Entry]:
            yield HEAD
            for k in range(n):
                yield line(k % 50)

        def peak(n: int) -> int:
            with (tmp_path / "page").open("wb") as file:
                tracemalloc.start()
                write_page(items(n), "t", file)
                _, most = tracemalloc.get_traced_memory()
                tracemalloc.stop()
            return most

        peak(200)
        assert peak(4000) < 1.5 * peak(400)
