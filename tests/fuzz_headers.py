"""Fuzz the check of GGUF headers: whatever a file holds, it is accepted or refused with one line, in bounded memory.

    python tests/fuzz_headers.py --cases 100000 [--seed 0]  random damage to small models, adapters and shards
    python -m tests.guided headers --minutes 60             guided by coverage

Prints how many files were refused and accepted, the slowest, and the most memory it ever had. Any other exception ends
it with the file's bytes in crash.gguf.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []
INTERESTING = (0, 1, 2, 4, 7, 8, 9, 12, 31, 255, 1 << 15, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
WIDE = (0, 1, 63, 64, 1 << 16, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


@dataclass
class Report:
    """What came of all cases."""

    n_refused: int = 0
    n_accepted: int = 0
    slowest_s: float = 0.0
    reasons: set[str] = field(default_factory=set)

    @property
    def peak_bytes(self) -> int:
        status = Path("/proc/self/status")
        if status.exists():  # what getrusage says counts the process that started this one too
            return 1024 * next(int(line.split()[1]) for line in status.open() if line.startswith("VmHWM"))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def __str__(self) -> str:
        return (
            f"{self.n_refused + self.n_accepted:,} files: {self.n_refused:,} refused for {len(self.reasons)} kinds of "
            f"reasons, {self.n_accepted:,} accepted; slowest {self.slowest_s * 1e3:.0f} ms, "
            f"peak memory {self.peak_bytes / 1e6:.0f} MB"
        )


class Checker:
    """Writes each case to one file and checks it."""

    def __init__(self, folder: Path) -> None:
        from edge_dlf.errors import ModelFileError
        from edge_dlf.gguf.info import check_lora_fits, read_info

        self._error, self._read, self._check_fits = ModelFileError, read_info, check_lora_fits
        self._path = folder / "case.gguf"
        self._base = self._read(folder / "seed-model.gguf")
        self.report = Report()

    def check(self, content: bytes) -> str:
        """Returns how it ended: "accepted" or "refused"."""
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.write(descriptor, content)
        os.close(descriptor)
        started = time.perf_counter()
        try:
            info = self._read(self._path, self._base)
            if info.is_adapter:
                self._check_fits(info, self._base)
            self.report.n_accepted += 1
            return "accepted"
        except self._error as error:
            if "\n" in str(error):
                raise AssertionError(f"a reason in two lines: {error}") from error
            self.report.n_refused += 1
            if len(self.report.reasons) < 1000:
                self.report.reasons.add(" ".join(word for word in error.reason.split()[:4] if word.isalpha()))
            return "refused"
        except BaseException:
            Path("crash.gguf").write_bytes(content)
            raise
        finally:
            self.report.slowest_s = max(self.report.slowest_s, time.perf_counter() - started)


def seeds(folder: Path) -> list[bytes]:
    """Small files of every kind that there is, written to `folder` as seed-*.gguf."""
    import gguf

    from tests.tiny import tiny_lora, tiny_model

    size = {"n_embd": 16, "n_layer": 1}
    tiny_model(folder / "seed-model.gguf", **size)
    tiny_model(folder / "seed-qwen2.gguf", arch="qwen2", pad_vocab=2, chat_template=None, **size)
    tiny_model(folder / "seed-spm.gguf", tokenizer="spm", **size)
    tiny_model(folder / "seed-mamba.gguf", arch="mamba", chat_template=None, **size)
    tiny_lora(folder / "seed-lora.gguf", rank=2, **size)
    writer = gguf.GGUFWriter(folder / "seed-kinds.gguf", "llama")
    for kind, value in (("uint8", 1), ("int8", -1), ("uint16", 2), ("int16", -2), ("uint64", 3), ("float64", 0.5)):
        getattr(writer, f"add_{kind}")(f"a.{kind}", value)
    writer.add_array("a.numbers", list(range(600)))
    writer.add_array("a.texts", ["", "a", "b" * 300, "é"])
    writer.add_custom_alignment(64)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()
    return [path.read_bytes() for path in sorted(folder.glob("seed-*.gguf"))]


def damaged(rng: random.Random, originals: list[bytes]) -> bytes:
    """One of `originals` after a few random changes, most of them near its beginning."""
    content = bytearray(rng.choice(originals))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        reach = max(1, min(len(content), int(2 ** rng.uniform(2, 15))))
        at = rng.randrange(reach)
        kind = rng.randrange(8)
        if kind == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            content[at] = rng.randrange(256)
        elif kind == 2:
            content[at : at + 4] = struct.pack("<I", rng.choice(INTERESTING))
        elif kind == 3:
            content[at : at + 8] = struct.pack("<Q", rng.choice(WIDE))
        elif kind == 4:
            del content[at : at + rng.randrange(1, 40)]
        elif kind == 5:
            content[at:at] = rng.randbytes(rng.randrange(1, 40))
        elif kind == 6:
            other = rng.choice(originals)
            start = rng.randrange(min(len(other), reach))
            content[at : at + 64] = other[start : start + 64]
        else:
            del content[rng.randrange(len(content) // 2, len(content)) :]
        if not content:
            content = bytearray(b"G")
    return bytes(content)


def fuzz(n_cases: int, seed: int, folder: Path) -> Report:
    """Check `n_cases` damaged files."""
    originals = seeds(folder)
    checker, rng = Checker(folder), random.Random(seed)
    for original in originals[:4]:
        checker.check(original)
    for _ in range(n_cases - len(originals[:4])):
        checker.check(damaged(rng, originals))
    return checker.report


@contextmanager
def cases(_: str, folder: Path, tally: Counter[str]) -> Iterator[tuple[Callable[[bytes], None], list[bytes]]]:
    """For `guided.py`."""
    originals = seeds(folder)
    checker = Checker(folder)

    def once(content: bytes) -> None:
        tally[checker.check(content)] += 1

    yield once, originals


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    in_memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=in_memory if in_memory.is_dir() else None) as folder:
        print(fuzz(options.cases, options.seed, Path(folder)))


if __name__ == "__main__":
    main()
