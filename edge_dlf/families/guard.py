"""A model is loaded and run in a process that may crash, before it is trusted in this one.

llama.cpp ends its process on some files that no rule here foresees. What came of a try is remembered by the file's
path, size and time and by the build of llama.cpp, so that each file is tried once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.backend import PLAIN_TOKENS, Run
from ..errors import EdgeDLFError, ModelFileError
from ..gguf.info import GGUFInfo, read_info
from ..gguf.rules import TRIED
from ..llama import gpus, system_info
from ..system.child import python_command
from ..system.remembered import recall, remember, states

Adapters = Sequence[tuple[Path, float]]

_COLLECTION = "verdicts"
_PATIENCE_S = 120.0
_SLOWEST_DISK = 20e6  # bytes a second
_N_TOKENS = 8
_TRY = f"import sys; from {__name__} import main; main(sys.argv[1])"
_CRASHES = {signal.SIGSEGV: "crashed", signal.SIGABRT: "gave up", signal.SIGBUS: "crashed", signal.SIGILL: "crashed",
            signal.SIGFPE: "crashed"}  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What came of a try. tps: tokens a second that it decoded. is_final: whether another try would end the same."""

    ok: bool
    reason: str = ""
    tps: float = 0.0
    is_final: bool = True


def require_harmless(info: GGUFInfo, n_gpu_layers: int, split: Sequence[float] = ()) -> None:
    """Try a model of an architecture that the rules of `gguf_rules` were not tried on, its layers where `Model` is told
    to have them.

    Raises ModelFileError where it does not run.
    """
    if info.architecture in TRIED:
        return
    found = verdict(info.shards, n_gpu_layers=n_gpu_layers, split=split)
    if not found.ok:
        raise ModelFileError(info.path, f"cannot be used, as a try in another process showed: {found.reason}")


def verdict(
    shards: Sequence[Path], loras: Adapters = (), *, n_gpu_layers: int = -1, split: Sequence[float] = ()
) -> Verdict:
    """The remembered verdict on the model in `shards` with `loras` over it; where there is none, a try's."""
    known = recall(_COLLECTION, _key(shards, loras))
    if isinstance(known, dict) and known.get("state") == _state(shards, loras):
        with suppress(KeyError, TypeError):
            return Verdict(**known["verdict"])
    return attempt(shards, loras, n_gpu_layers=n_gpu_layers, split=split)


def attempt(
    shards: Sequence[Path],
    loras: Adapters = (),
    *,
    n_gpu_layers: int = -1,
    split: Sequence[float] = (),
    patience_s: float | None = None,
) -> Verdict:
    """Load the model in `shards`, `loras` over it, in another process, decode a few tokens, and remember the end."""
    state = _state(shards, loras)
    patience_s = patience_s or _PATIENCE_S + sum(path.stat().st_size for path in shards) / _SLOWEST_DISK
    placed = {"n_gpu_layers": n_gpu_layers, "split": list(split)}
    found = _run(shards[0], loras, placed, patience_s)
    if found.is_final:
        remember(_COLLECTION, _key(shards, loras), {"state": state, "verdict": asdict(found)})
    return found


def _run(model: Path, loras: Adapters, placed: Mapping[str, Any], patience_s: float) -> Verdict:
    question = {"model": str(model), "loras": [(str(path), scale) for path, scale in loras], "placed": placed}
    # Its own session: Ctrl-C in the terminal is for this process, which then ends it.
    process = subprocess.Popen(
        python_command(_TRY, json.dumps(question)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
    )
    try:
        output, complaints = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        return Verdict(False, f"did not answer within {patience_s:.0f} s", is_final=False)
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()
    with suppress(ValueError, TypeError, IndexError):
        return Verdict(**json.loads(output.splitlines()[-1]))
    code = process.returncode
    if -code in _CRASHES:
        name = signal.Signals(-code).name
        last = complaints.decode("utf-8", "replace").strip().splitlines()[-1:]
        return Verdict(False, f"llama.cpp {_CRASHES[signal.Signals(-code)]} ({': '.join([name, *last])})")
    if code == -signal.SIGKILL:
        return Verdict(False, "its process was killed, as the system does where memory runs out", is_final=False)
    return Verdict(False, f"its process ended with code {code}", is_final=False)


def main(question: str) -> None:
    """The other process: print a verdict as one line of JSON."""
    asked = json.loads(question)
    try:
        found = _decode(Path(asked["model"]), [(Path(p), scale) for p, scale in asked["loras"]], asked["placed"])
    except EdgeDLFError as error:
        found = Verdict(False, str(error), is_final=error.exit_code == 3)
    print(json.dumps(asdict(found)), flush=True)


def _decode(path: Path, loras: Adapters, placed: Mapping[str, Any]) -> Verdict:
    import numpy as np

    from ..llama import LlamaBackend, Model

    model = Model(path, **placed, weights=read_info(path).tensors)
    tokens = model.tokenize(b"The capital of France is", special=True) or [0]
    if model.adds_bos and model.bos is not None:
        tokens.insert(0, model.bos)
    for n_ubatch in _attentions():
        backend = LlamaBackend(model, path.name, n_ctx=256, n_ubatch=n_ubatch, loras=loras)
        backend.decode([Run(0, tokens, 1)])
        started = time.perf_counter()
        for _ in range(_N_TOKENS):
            row = backend.logits()[0]
            if not np.isfinite(row).any() or np.isnan(row).any():
                return Verdict(False, "its logits are not numbers")
            backend.decode([Run(0, [int(row.argmax())], 1)])
        elapsed = time.perf_counter() - started
        backend.close()
    return Verdict(True, tps=_N_TOKENS / elapsed)


def _key(shards: Sequence[Path], loras: Adapters) -> str:
    return "\n".join(str(path.resolve()) for path in (shards[0], *(lora for lora, _ in loras)))


def _state(shards: Sequence[Path], loras: Adapters) -> list[Any]:
    """What a verdict holds for: size and time of every file, the build of llama.cpp, what is tried."""
    return [system_info(), _attentions(), *states([*shards, *(lora for lora, _ in loras)])]


def _attentions() -> list[int | None]:
    """Of each kind of attention that a member may have here, the tokens at a time, as `MemberPlan` has them."""
    return [None] if gpus() else [None, PLAIN_TOKENS[0]]
