"""Fuzz files that are read beside models: LoRA adapters over a loaded base, and compiled kernels on disk.

    python -m tests.fuzz_files lora --cases 20000 [--seed 0]  damaged and made-up adapters; what the checks accept is
                                                              loaded and run by llama.cpp in another process
    python -m tests.fuzz_files kernels --cases 100000         damaged files of one compiled kernel
    python -m tests.guided lora --minutes 60                  each of them guided by coverage

Prints how often each outcome came. Any other exception, and a process that dies, ends it with the bytes in crash.bin.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gguf
import numpy as np

from edge_dlf.errors import ModelFileError

from .fuzz_family import require_one_line
from .fuzz_headers import damaged
from .tiny import tiny_lora, tiny_model

Case = Callable[[bytes], str]
"""Try some bytes, and return a word for what came of them."""

TYPES = [None, None, None, *(gguf.GGMLQuantizationType[name] for name in ("F16", "Q8_0", "Q4_0", "Q5_1", "BF16"))]


def made_up_lora(path: Path, rng: random.Random) -> bytes:
    """An adapter over some tensors of the base, right or wrong in its names, shapes, types, keys and values."""
    parts = ("attn_q", "attn_k", "attn_output", "ffn_up", "ffn_down")
    names = ["token_embd", "output", *(f"blk.{layer}.{part}" for layer in (0, 1) for part in parts)]
    if rng.random() < 0.1:
        names = [*names, "output_norm", "rope_freqs", "blk.2.attn_q", "blk.0.attn_norm", "blk.0.ffn_gate_exps"]
    sizes = {"token_embd": (306, 32), "output": (32, 306), "attn_k": (32, 16), "ffn_up": (32, 64), "ffn_down": (64, 32)}
    writer = gguf.GGUFWriter(path, rng.choice(["llama"] * 30 + ["qwen2"]))
    writer.add_type(rng.choice(["adapter"] * 30 + ["model"]))
    writer.add_string("adapter.type", rng.choice(["lora"] * 30 + ["aLora"]))
    alpha = rng.choice([8.0, 8.0, 0.0, -1.0, 1e38, 5e-324, *[float("nan")] * (rng.random() < 0.1)])
    getattr(writer, rng.choice(["add_float32"] * 30 + ["add_float64"]))("adapter.lora.alpha", alpha)
    if rng.random() < 0.03:
        writer.add_array("adapter.alora.invocation_tokens", [1])
    for name in rng.sample(names, rng.randrange(1, 5)):
        n_in, n_out = sizes.get(name.rpartition(".")[2], (32, 32))
        n_in, rank = n_in if rng.random() < 0.95 else rng.randrange(1, 99), rng.choice([1, 4, 32, 32, 64])
        values = rng.choice([0.01, 0.01, 1e30, float("nan"), float("inf")])
        for half, shape in (("a", (n_in, rank) if name == "token_embd" else (rank, n_in)), ("b", (n_out, rank))):
            if rng.random() < 0.01:
                continue
            array, kind = np.full(shape, values, np.float32), rng.choice(TYPES)
            suffix = rng.choice([".weight"] * 50 + [".bias"])
            if kind is None or shape[-1] % 32:
                writer.add_tensor(f"{name}{suffix}.lora_{half}", array)
            else:
                with np.errstate(all="ignore"):
                    quantized = gguf.quantize(np.nan_to_num(array), kind)
                writer.add_tensor(f"{name}{suffix}.lora_{half}", quantized, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def lora_cases(folder: Path, stack: ExitStack) -> tuple[Case, list[bytes]]:
    from edge_dlf.gguf.info import check_lora_fits, read_info

    from .test_hostile import Worker

    bases = [tiny_model(folder / "base.gguf"), tiny_model(folder / "tied.gguf", tied=True)]
    workers, infos = [Worker(base) for base in bases], [read_info(base) for base in bases]
    for worker in workers:
        stack.callback(worker.close)
    path, rng = folder / "lora.gguf", random.Random(0)
    seeds = [tiny_lora(folder / "seed.gguf", rank=32).read_bytes()]
    seeds += [made_up_lora(folder / "made.gguf", rng) for _ in range(300)]

    def case(content: bytes) -> str:
        path.write_bytes(content)
        number = content[-1] % 2 if content else 0
        try:
            info = read_info(path)
            if not info.is_adapter:
                return "no adapter"
            check_lora_fits(info, infos[number])
        except ModelFileError as error:
            require_one_line(error)
            return "refused by its header"
        outcome = workers[number].run(path).partition(":")[0]
        assert outcome in ("runs", "refused"), outcome
        return f"accepted, then {outcome}"

    return case, seeds


def kernel_cases(folder: Path, _: ExitStack) -> tuple[Case, list[bytes]]:
    import numba

    from edge_dlf.fusion.kernels import memory
    from edge_dlf.fusion.kernels.cache import kept

    numba.config.CACHE_DIR = str(folder)
    values = np.arange(10)
    kept(numba.njit(memory.read.py_func))(values)
    originals = {file: file.read_bytes() for file in sorted(folder.rglob("*.nb?"))}
    assert len(originals) == 2

    def case(content: bytes) -> str:
        file, original = list(originals.items())[content[0] % 2 if content else 0]
        file.write_bytes(content[1:])
        kernel = kept(numba.njit(memory.read.py_func))
        found = kernel._cache.load_overload((numba.typeof(values),), kernel.targetctx)
        file.write_bytes(original)
        if found:  # numba's version, which stands before what has a checksum, may be written in other ways
            assert content[1:] == original or file.suffix == ".nbi"
            assert kernel(values) == 45
        return "found again" if found else "to be compiled"

    return case, [bytes([number]) + original for number, original in enumerate(originals.values())]


TARGETS = {"lora": lora_cases, "kernels": kernel_cases}


def fuzz(target: str, n_cases: int, seed: int, folder: Path) -> Counter[str]:
    """How often each outcome came."""
    (folder / target).mkdir()
    rng, outcomes = random.Random(seed), Counter[str]()
    with ExitStack() as stack:
        case, seeds = TARGETS[target](folder / target, stack)
        for number in range(n_cases):
            if target == "lora" and rng.random() < 0.3:
                content = made_up_lora(folder / "made.gguf", rng)
            else:
                content = seeds[number] if number < len(seeds) else damaged(rng, seeds)
            outcomes[_checked(case, content)] += 1
    return outcomes


@contextmanager
def cases(target: str, folder: Path, tally: Counter[str]) -> Iterator[tuple[Callable[[bytes], None], list[bytes]]]:
    """For `guided.py`."""
    with ExitStack() as stack:
        case, seeds = TARGETS[target](folder, stack)

        def once(content: bytes) -> None:
            tally[case(content)] += 1

        yield once, seeds


def _checked(case: Case, content: bytes) -> str:
    try:
        return case(content)
    except BaseException:
        Path("crash.bin").write_bytes(content)
        raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for outcome, n in fuzz(options.target, options.cases, options.seed, Path(folder)).most_common():
            print(f"{n:10,}  {outcome}")


if __name__ == "__main__":
    main()
