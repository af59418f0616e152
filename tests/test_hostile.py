"""Damaged GGUFs and llama.cpp itself: what `read_info` accepts must never kill or hang the process that loads it.

Every accepted file goes to a worker process (this module, run as a script), which loads it, tokenizes, decodes and
detokenizes. The worker may report an error; it may not die.
"""

from __future__ import annotations

import os
import random
import select
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest

from edge_dlf import EdgeDLFError, ModelFileError
from edge_dlf.engine.backend import Run
from edge_dlf.gguf.info import check_lora_fits, read_info
from edge_dlf.gguf.rules import TRIED

from .feed import feed
from .tiny import tiny_lora, tiny_model

ABSURD = (0, 1, 2, 3, 31, 255, 256, 512, 65535, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)
ABSURD_FLOATS = (0x7F800000, 0xFF800000, 0x7FC00000, 0xBF800000, 1)  # inf, -inf, NaN, -1, the smallest
FAMILIES = {
    "llama": {},
    "spm": {"tokenizer": "spm"},
    "qwen2": {"arch": "qwen2"},
    "qwen3": {"arch": "qwen3"},
    "gemma3": {"arch": "gemma3", "tokenizer": "spm"},
    "mamba": {"arch": "mamba"},
}


def work(path: Path, base: Path) -> str:
    """Load the model or LoRA in `path` and run it; what came of it."""
    from edge_dlf.llama import LlamaBackend, Model

    try:
        info = read_info(path)
        if info.is_adapter:
            check_lora_fits(info, read_info(base))
        model = Model(base if info.is_adapter else path, n_gpu_layers=0)
        try:
            tokens = model.tokenize(bytes(range(256)), special=True) + model.tokenize(b"<|im_end|>", special=True)
            for token in range(model.n_vocab):
                model.piece(token, special=True)
                model.is_eog(token)
            loras = [(path, 1.0)] if info.is_adapter else []
            for n_ubatch in (None, 64):
                backend = LlamaBackend(model, "base", n_ctx=256, n_ubatch=n_ubatch, n_threads=1, loras=loras)
                feed(backend, 0, (tokens or [0])[:4])
                backend.decode([Run(0, [0], 1)])
                backend.close()
        finally:
            model.close()
    except EdgeDLFError as error:
        return f"refused: {error}"
    return "runs"


class Worker:
    """A process that runs `work` on one path after another."""

    def __init__(self, base: Path) -> None:
        command = [sys.executable, "-m", __spec__.name, str(base)]  # type: ignore[name-defined]
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=Path(__file__).parents[1],
        )

    def run(self, path: Path) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(path, file=self._process.stdin, flush=True)
        ready, _, _ = select.select([self._process.stdout], [], [], 120)
        answer = self._process.stdout.readline().strip() if ready else "hangs"
        return answer or f"died: {self._process.wait()}"

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def worker(folder: Path) -> Iterator[Worker]:
    worker = Worker(tiny_model(folder / "base.gguf"))
    yield worker
    worker.close()


@pytest.fixture(scope="module", params=[*FAMILIES, "lora"])
def source(request: pytest.FixtureRequest, folder: Path) -> Path:
    path = folder / f"{request.param}.gguf"
    return tiny_lora(path) if request.param == "lora" else tiny_model(path, **FAMILIES[request.param])


def values_at(path: Path) -> list[tuple[int, bytes]]:
    """Where each scalar of the metadata, and each tensor's type, stands, and how it is packed."""
    reader = gguf.GGUFReader(path)
    packs = {gguf.GGUFValueType.UINT32: b"<I", gguf.GGUFValueType.INT32: b"<I", gguf.GGUFValueType.FLOAT32: b"<f"}
    fields = [field for name, field in reader.fields.items() if not name.startswith("GGUF.")]
    scalars = [
        (field.offset + 8 + len(field.name.encode()) + 4, packs[field.types[0]])
        for field in fields
        if field.types[0] in packs
    ]
    types = [(item.field.offset + sum(part.nbytes for part in item.field.parts[:4]), b"<I") for item in reader.tensors]
    return scalars + types


def damaged(path: Path, n_flips: int, n_values: int) -> Iterator[tuple[str, bytes]]:
    """The file with a bit of its header flipped, or with one value replaced by an absurd one."""
    rng = random.Random(path.name)
    content = path.read_bytes()
    info = read_info(path)
    header_bytes = info.file_bytes - info.tensor_bytes
    for _ in range(n_flips):
        position, bit = rng.randrange(header_bytes), rng.randrange(8)
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        yield f"bit {bit} of byte {position}", bytes(flipped)
    places = values_at(path)
    for _ in range(n_values):
        position, pack = rng.choice(places)
        value = rng.choice(ABSURD_FLOATS if pack == b"<f" else (*ABSURD, rng.randrange(64)))
        replaced = bytearray(content)
        struct.pack_into("<I", replaced, position, value)
        yield f"{value} at byte {position}", bytes(replaced)


def survives(source: Path, worker: Worker, n_flips: int, n_values: int) -> dict[str, int]:
    outcomes = {"refused by its header": 0, "refused": 0, "runs": 0}
    path = source.with_name("damaged.gguf")
    for what, content in damaged(source, n_flips, n_values):
        path.write_bytes(content)
        try:
            read_info(path)
        except ModelFileError as error:
            assert "\n" not in str(error), what  # noqa: PT017
            outcomes["refused by its header"] += 1
            continue
        outcome = worker.run(path).partition(":")[0]
        assert outcome in outcomes, f"{source.stem} with {what}: {outcome}"
        outcomes[outcome] += 1
    return outcomes


def test_every_architecture_that_is_loaded_without_a_try_has_been_tried_here() -> None:
    assert {"llama", *(settings.get("arch", "llama") for settings in FAMILIES.values())} == TRIED


def test_no_damaged_header_kills_llama_cpp(source: Path, worker: Worker) -> None:
    assert worker.run(source) == "runs"
    outcomes = survives(source, worker, n_flips=300, n_values=200)
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.exhaustive
def test_none_of_thousands_of_damaged_headers_kills_llama_cpp(source: Path, worker: Worker) -> None:
    survives(source, worker, n_flips=10_000, n_values=5_000)


def test_every_truncation_is_refused(source: Path, folder: Path) -> None:
    rng = random.Random(source.name)
    content = source.read_bytes()
    path = folder / "truncated.gguf"
    for length in [*range(0, 64), *(rng.randrange(len(content)) for _ in range(100)), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelFileError):
            read_info(path)


def test_random_bytes_behind_a_good_magic_are_refused(folder: Path) -> None:
    rng = random.Random(7)
    path = folder / "random.gguf"
    for _ in range(300):
        counts = struct.pack("<IQQ", 3, rng.randrange(4), rng.randrange(4))
        path.write_bytes(b"GGUF" + counts + rng.randbytes(rng.randrange(200)))
        with pytest.raises(ModelFileError):
            read_info(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its peak memory from /proc")
@pytest.mark.parametrize("kind", ["tokens", "texts", "numbers", "keys", "name"])
def test_memory_stays_bounded(folder: Path, kind: str) -> None:
    path = folder / "big.gguf"
    array = b"\x09\0\0\0" + {"numbers": b"\x00\0\0\0"}.get(kind, b"\x08\0\0\0")
    body = {
        "tokens": lambda: b"".join(struct.pack("<Q", 48) + b"%048x" % number for number in range(500_000)),
        "texts": lambda: bytes(8 * 2_000_000),
        "numbers": lambda: bytes(1 << 30),
    }
    with path.open("wb") as file:
        if kind in body:
            count = {"tokens": 500_000, "texts": 2_000_000, "numbers": 1 << 30}[kind]
            name = b"tokenizer.ggml.tokens" if kind == "tokens" else b"x"
            file.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(name)) + name + array + struct.pack("<Q", count))
            file.write(body[kind]()) if kind != "numbers" else file.truncate(2 << 30)
        elif kind == "keys":
            file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 16))
            file.write(
                b"".join(struct.pack("<Q5sIQ1000s", 5, b"%05x" % n, 8, 1000, b"\xff" * 1000) for n in range(9999))
            )
        else:
            file.write(b"GGUF" + struct.pack("<IQQQ", 3, 1, 0, 1 << 30))
            file.truncate(2 << 30)
    check = (
        "import sys\nfrom edge_dlf import ModelFileError\nfrom edge_dlf.gguf.info import read_info\n"
        "try: read_info(sys.argv[1])\nexcept ModelFileError: pass\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run([sys.executable, "-c", check, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    assert int(done.stdout) < 200_000, f"{done.stdout} KiB"


if __name__ == "__main__":
    for line in sys.stdin:
        print(work(Path(line.rstrip("\n")), Path(sys.argv[1])), flush=True)
