"""Pictures of the documents, drawn anew from real runs on the family that ships and from the documents' tables:
python docs/pictures.py

Needs pip install '.[docs,test]' and Chromium. Writes into docs/pictures/. Texts are as the commands print them.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyte
from playwright.sync_api import Browser, Page, sync_playwright
from plots import draw_plots
from rich.console import Console
from rich.style import Style
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
PROGRAM = [sys.executable, "-m", "edge_dlf"]
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
COLUMNS, LINES = 92, 48
PATIENCE_S = 120.0
LEGS = "I see 6 lions and 2 cats. How many legs is that?"
_NAMES = {"brown": "yellow", "brightbrown": "bright_yellow"}


class Terminal(pyte.Screen):
    """A program in a terminal, and what the terminal shows."""

    def __init__(self, *arguments: str) -> None:
        super().__init__(COLUMNS, LINES)
        self._stream = pyte.ByteStream(self)
        self._fd, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        env = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor", "HOME": tempfile.mkdtemp()}
        self._process = subprocess.Popen(
            [*PROGRAM, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        typed = " ".join(f'"{word}"' if " " in word else word for word in arguments)
        self._stream.feed(f"$ edge-dlf {typed}\r\n".encode())

    def write_process_input(self, data: str) -> None:
        """Answer what the program asks of its terminal, such as where the cursor is."""
        os.write(self._fd, data.encode())

    def say(self, line: str) -> None:
        """Type a line, and wait for the next prompt."""
        n_prompts = self._n_prompts()
        self.send(line)
        self._read(lambda: self._n_prompts() > n_prompts)

    def send(self, line: str) -> None:
        os.write(self._fd, f"{line}\r".encode())

    def wait(self) -> None:
        """Wait for the first prompt."""
        self._read(lambda: self._n_prompts() > 0)

    def end(self) -> None:
        """Wait until the program has ended."""
        self._read(lambda: False)
        if self._process.wait():
            raise SystemExit(f"{self._process.args} ended with {self._process.returncode}:\n{self._shown()}")

    def _shown(self) -> str:
        return "\n".join(self.display)

    def _n_prompts(self) -> int:
        return sum(line.startswith(">") for line in self.display)

    def _read(self, is_enough: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not is_enough():
            ready, _, _ = select.select([self._fd], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise SystemExit(f"{self._process.args} stopped telling anything:\n{self._shown()}")
            try:
                content = os.read(self._fd, 65536)
            except OSError:  # the program has closed its side
                return
            if not content:
                return
            self._stream.feed(content)

    def write(self, name: str) -> None:
        """Write what is shown as SVG, without blank lines at the end."""
        lines = [self._line(y) for y in range(LINES)]
        while not lines[-1].plain.strip():
            lines.pop()
        console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: PTH123, SIM115
        console.print(Text("\n").join(lines), soft_wrap=True)
        svg = console.export_svg(title="edge-dlf", unique_id=name)
        svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # would be fetched from elsewhere
        PICTURES.joinpath(f"{name}.svg").write_text(svg, "utf-8")

    def _line(self, y: int) -> Text:
        line = Text()
        for x in range(COLUMNS):
            cell = self.buffer[y][x]
            line.append(cell.data, Style(color=_colour(cell.fg), bgcolor=_colour(cell.bg), bold=cell.bold))
        line.rstrip()
        return line


def _colour(name: str) -> str | None:
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return None if name == "default" else _NAMES.get(name, name.replace("bright", "bright_"))


def draw_terminal() -> None:
    """Draw a chat, and every method on one prompt."""
    chat = Terminal("chat", "demo", "--method", "dynamic")
    chat.wait()
    chat.say("/alpha on")
    for question in ("How much is 21 and 39 together?", LEGS, "Name the ones smaller than 29: 45, 24, 22"):
        chat.say(question)
    chat.write("chat")
    chat.send("/exit")
    chat.end()
    compare = Terminal("compare", "-f", "demo", LEGS)
    compare.end()
    compare.write("compare")


def draw_trace(browser: Browser, folder: Path) -> None:
    """Draw the page of a trace, with one token looked at."""
    trace, html = folder / "sum.jsonl", folder / "sum.html"
    asked = ["generate", "-f", "demo", "How much is 21 and 39 together?", "--method", "dynamic", "--trace", str(trace)]
    for arguments in (asked, ["trace", str(trace), "-o", str(html)]):
        subprocess.run([*PROGRAM, *arguments], check=True, stdout=subprocess.DEVNULL)
    page = browser.new_page(viewport={"width": 1100, "height": 560})
    page.goto(html.as_uri())
    page.keyboard.press("ArrowRight")
    page.screenshot(path=PICTURES / "trace.png")


@contextmanager
def served() -> Iterator[str]:
    """Address of a server of the family that ships."""
    command = [*PROGRAM, "serve", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr
        try:
            yield next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        finally:
            server.terminate()


def draw_page(browser: Browser) -> None:
    """Draw the chat page: as it begins, and in the dark with two methods."""
    with served() as url:
        page = browser.new_page(viewport={"width": 1100, "height": 640})
        page.goto(url)
        page.wait_for_selector(".examples button")
        page.screenshot(path=PICTURES / "page.png")
        page.emulate_media(color_scheme="dark")
        page.select_option("select.model", "demo:dynamic")
        page.click("#compare")
        for question in (LEGS, "What is the largest of 16, 29, 25?"):
            _ask(page, question)
        page.screenshot(path=PICTURES / "page-dark.png")


def _ask(page: Page, question: str) -> None:
    page.fill("#text", question)
    page.press("#text", "Enter")
    page.wait_for_selector("#send:text-is('Send')")


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    draw_plots()
    draw_terminal()
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        path = next(filter(None, map(shutil.which, CHROMIUM)), None)
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        draw_trace(browser, Path(folder))
        draw_page(browser)


if __name__ == "__main__":
    main()
