"""Dynamic Logits Fusion for GGUF models: a large local model answers with the skill of small fine-tuned experts.

Names are imported when they are first used, so that `import edge_dlf` loads neither NumPy, numba nor llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import (
    CapacityError,
    ContextOverflowError,
    DecodeError,
    DownloadError,
    EdgeDLFError,
    FamilyError,
    InvalidParameterError,
    LoadError,
    ModelFileError,
    NonFiniteLogitsError,
    OutOfMemoryError,
    RequestInterruptedError,
    VocabMismatchError,
)
from .params import FusionParams, SamplingParams

if TYPE_CHECKING:
    from .answers.token import Token
    from .api import FusedLlama
    from .evidence.tune import tune
    from .fusion.arrays import fuse_logits, search_alpha

__version__ = "0.2.0"
__path__.append(f"{__path__[0]}/evidence/commands")  # for `python -m edge_dlf.harness`, a published name

__all__ = [
    "CapacityError",
    "ContextOverflowError",
    "DecodeError",
    "DownloadError",
    "EdgeDLFError",
    "FamilyError",
    "FusedLlama",
    "FusionParams",
    "InvalidParameterError",
    "LoadError",
    "ModelFileError",
    "NonFiniteLogitsError",
    "OutOfMemoryError",
    "RequestInterruptedError",
    "SamplingParams",
    "Token",
    "VocabMismatchError",
    "fuse_logits",
    "search_alpha",
    "tune",
]

_LAZY = {
    "FusedLlama": ".api",
    "Token": ".answers.token",
    "fuse_logits": ".fusion.arrays",
    "search_alpha": ".fusion.arrays",
    "tune": ".evidence.tune",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
