"""How soon a long trace opens in a browser: the page that `edge-dlf trace` makes of it, in headless Chromium.

    python benchmarks/trace_page.py --family FAMILY --questions FILE [--tokens 1000000] [--rounds 3]

The questions of FILE, one a line, are answered with `edge-dlf batch --trace`; these answers are repeated to the wanted
number of tokens. Needs playwright, and Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from playwright.sync_api import Browser, sync_playwright

from edge_dlf.evidence.trace_page import PAGE_TOKENS

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")


def run(*arguments: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "edge_dlf", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def repeated(lines: list[bytes], n_tokens: int) -> Iterator[bytes]:
    """The answers in `lines`, over and over, up to `n_tokens` tokens."""
    for line in itertools.cycle(lines):
        if not n_tokens:
            return
        n_tokens -= not line.startswith(b'{"format"')
        yield line


def opened(browser: Browser, page: Path) -> tuple[float, float, float]:
    """Seconds from the start to the first tokens, to the end of the file, and from then to tokens of the last page."""
    tab = browser.new_page()
    started = time.perf_counter()
    tab.goto(page.as_uri(), wait_until="commit")
    tab.wait_for_selector("#text .t")
    first = time.perf_counter() - started
    tab.wait_for_load_state("load")
    whole = time.perf_counter() - started
    last = tab.locator("#page option").last.get_attribute("value")
    tab.evaluate("document.querySelector('#text .t').dataset.isOld = true")
    started = time.perf_counter()
    tab.select_option("#page", last)
    tab.wait_for_selector("#text .t[data-is-old]", state="detached")
    turned = time.perf_counter() - started
    tab.close()
    return first, whole, turned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.tokens <= PAGE_TOKENS:
        parser.error(f"a trace of {options.tokens} tokens has but one page")
    chromium = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if chromium is None:
        parser.error("there is no Chromium on the PATH")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        rows, answers, short, trace, page = (
            Path(folder, name) for name in ("rows", "answers", "short", "trace", "page.html")
        )
        questions = options.questions.read_text("utf-8").splitlines()
        rows.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions), "utf-8")
        run("batch", rows, "-o", answers, "-f", options.family, "--trace", short, "--quiet", "--ctx-size", "512")
        with trace.open("wb") as file:
            file.writelines(repeated(short.read_bytes().splitlines(keepends=True), options.tokens))
        started = time.perf_counter()
        run("trace", trace, "-o", page)
        made = time.perf_counter() - started
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        times = [opened(browser, page) for _ in range(options.rounds)]
        browser.close()
        first, whole, turned = (median(column) for column in zip(*times, strict=True))
        print("| tokens | trace, MB | page, MB | made in, s | first tokens, s | whole file, s | last page, s |")
        print("|---" * 7 + "|")
        sizes = (f"{path.stat().st_size / 1e6:.0f}" for path in (trace, page))
        print(f"| {options.tokens:,} | {' | '.join(sizes)} | {made:.0f} | {first:.2f} | {whole:.2f} | {turned:.2f} |")


if __name__ == "__main__":
    main()
