"""Commands that install llama-cpp-python anew, into the environment that this process runs in."""

from __future__ import annotations

import sys
from pathlib import Path

LLAMA_CPP = "0.3.36"
WHEELS = "https://abetlen.github.io/llama-cpp-python/whl/"
"""Where the authors of llama-cpp-python offer compiled wheels, in an index for each backend."""
_CUDA = (118, 121, 122, 123, 124, 125, 130, 132)
_MARKS = {
    "uv-receipt.toml": f"uv pip install --python {sys.executable}",
    "pipx_metadata.json": "pipx runpip edge-dlf install",
}
"""File in an environment that a tool made, and how that tool installs into it."""


def installer() -> str:
    """The command that installs packages here: a tool that uv or pipx has installed has no pip of its own."""
    return next((how for mark, how in _MARKS.items() if Path(sys.prefix, mark).is_file()), "pip install")


def compile_again(flags: str = "") -> str:
    """The command that compiles llama-cpp-python on this machine. flags: of cmake."""
    given = f'CMAKE_ARGS="{flags}" ' if flags else ""
    return (
        f"{given}{installer()} --force-reinstall --no-cache-dir --no-deps --no-binary llama-cpp-python "
        f"llama-cpp-python=={LLAMA_CPP}"
    )


def take_wheel(backend: str) -> str:
    """The command that takes a compiled wheel in place of what is installed, or says that there is none.

    backend: such as "cpu", "cu124", "metal", "vulkan" or "rocm72".
    """
    return (
        f"{installer()} --force-reinstall --no-deps --only-binary llama-cpp-python "
        f"--extra-index-url {WHEELS}{backend} llama-cpp-python=={LLAMA_CPP}"
    )


def cuda_wheel(major: int, minor: int) -> str | None:
    """The newest backend that a driver for this version of CUDA runs; None where it is too old for all."""
    known = [number for number in _CUDA if number <= 10 * major + minor]
    return f"cu{max(known)}" if known else None
