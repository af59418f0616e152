"""What `edge-dlf doctor` looks at: this machine, this build of llama.cpp, and one family down to a real decode.

Every check ends in a verdict, and one next step where it is not well. Nothing here ends the process: what may crash is
tried in another one.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from .. import __version__
from ..errors import EdgeDLFError, LoadError, ModelFileError, VocabMismatchError
from ..families.files import FamilyFiles, check_files
from ..families.plan import MemberPlan, Planner
from ..families.spec import FILE_NAME, FamilySpec
from ..system.machine import Machine, this_machine
from ..system.paths import models_dir

LLAMA_CPP = "0.3.36"
_REINSTALL = f"pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python=={LLAMA_CPP}"
_SLOW_KERNELS_S = 8.0
_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
_USED = {"avx2": "AVX2 = 1", "avx512f": "AVX512 = 1", "asimddp": "DOTPROD = 1", "i8mm": "MATMUL_INT8 = 1"}


@dataclass(frozen=True)
class Check:
    """One verdict: "ok", "note" (it works, and could be better) or "problem". facts: the same as numbers and names."""

    name: str
    verdict: str
    text: str
    next_step: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def examine_machine() -> Iterator[Check]:
    """Python, llama.cpp, CPU, GPUs, memory, threads, kernels, families."""
    yield _python()
    try:
        from .. import llama
    except Exception as error:  # a broken build raises whatever its loader does
        yield Check("llama.cpp", "problem", f"llama-cpp-python cannot be loaded: {error}", f"install it: {_REINSTALL}")
        return
    yield _llama_cpp(llama.system_info())
    yield _cpu(llama.system_info())
    yield _amx(llama.amx_crashes(), llama.AMX_REBUILD)
    gpus = llama.gpus()
    machine = this_machine(gpus)
    yield _gpus(machine)
    yield _memory(machine)
    yield _threads(llama.default_n_threads())
    yield _kernels()
    yield _families()


def examine_family(load: Callable[[], FamilySpec], *, n_ctx: int = 4096, **loading: Any) -> Iterator[Check]:
    """One family: its files, its tokenizer, the memory it takes, its chat template, and a decode of every member.

    load: reads the family. loading: `n_gpu_layers`, `main_gpu`, `tensor_split`, `type_k`, `type_v` as FusedLlama has
    them.
    Raises InvalidParameterError for settings that cannot be.
    """
    try:
        files = check_files(load())
    except VocabMismatchError as error:
        yield Check("tokenizer", "problem", str(error), "take a base and experts made from models of the same series")
        return
    except ModelFileError as error:
        yield Check("files", "problem", str(error), "correct the path, or download the file again")
        return
    except LoadError as error:
        yield Check("files", "problem", str(error), "correct the family")
        return
    yield _files(files)
    yield _tokenizer(files)
    try:
        from .. import llama
    except Exception:  # said above
        return
    planner = Planner(files, this_machine(llama.gpus()), repacks=llama.repacks_weights(), **loading)
    memory = _plan(planner, files, n_ctx)
    yield memory
    yield _template(files)
    if memory.verdict == "problem" and not planner.largest_n_cells(256):
        return
    yield from _decodes(files, planner, n_ctx)


def _python() -> Check:
    text = f"{platform.python_version()} at {sys.executable}, on {platform.system()} {platform.machine()}"
    return Check("Python", "ok", f"{text}; edge-dlf {__version__}", facts={"version": platform.python_version()})


def _llama_cpp(info: str) -> Check:
    version, _, flags = info.partition(" ")
    facts = {"version": version, "flags": flags}
    text = f"llama-cpp-python {version} ({flags})"
    if version != LLAMA_CPP:
        return Check("llama.cpp", "note", text, f"edge-dlf is made for {LLAMA_CPP}: {_REINSTALL}", facts)
    return Check("llama.cpp", "ok", text, facts=facts)


def _cpu(info: str) -> Check:
    known = _cpu_flags()
    has = [feature for feature in _FEATURES if feature in known]
    unused = [feature for feature, flag in _USED.items() if feature in known and flag not in info]
    text = f"{_cpu_name()} with {', '.join(has) or 'features that this system does not tell'}"
    facts = {"features": has, "unused": unused}
    if unused:
        step = f"build llama.cpp on this machine: CMAKE_ARGS='-DGGML_NATIVE=ON' {_REINSTALL}"
        return Check("CPU", "note", f"{text}; this build does not use {', '.join(unused)}", step, facts)
    return Check("CPU", "ok", text, facts=facts)


def _amx(crashes: bool, rebuild: str) -> Check:
    if not crashes:
        return Check("AMX", "ok", "no kernels that crash in this build")
    text = "this build holds kernels that crash (llama.cpp issue 20824); they are kept off, at the price of some speed"
    return Check("AMX", "note", text, f"rebuild: {rebuild}")


def _gpus(machine: Machine) -> Check:
    if machine.gpus:
        each = [f"{gpu.description}, {_gb(gpu.free_bytes)} of {_gb(gpu.total_bytes)} free" for gpu in machine.gpus]
        facts = {"gpus": [vars(gpu) for gpu in machine.gpus]}
        return Check("GPU", "ok", "; ".join(each), facts=facts)
    wanted = {"nvidia-smi": "-DGGML_CUDA=on", "rocm-smi": "-DGGML_HIP=on"}
    for tool, flag in wanted.items():
        if shutil.which(tool):
            step = f"build llama.cpp for it: CMAKE_ARGS='{flag}' {_REINSTALL}"
            return Check("GPU", "note", f"{tool} is here, but this build has no backend for its GPU", step)
    return Check("GPU", "ok", "none that this build can use; everything runs on the CPU")


def _memory(machine: Machine) -> Check:
    text = f"{_gb(machine.free_bytes)} of {_gb(psutil.virtual_memory().total)} are free"
    text += f", by {machine.limit}" if machine.limit else ""
    if machine.address_bytes is not None:
        text += f"; ulimit -v leaves {_gb(machine.address_bytes)}"
    return Check("memory", "ok", text, facts={"free_bytes": machine.free_bytes, "address_bytes": machine.address_bytes})


def _threads(default: int) -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    facts = {"n_threads": default, "cores": cores, "load": load}
    text = f"{default} threads for {cores} cores that this process may use; load {load:.1f}"
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) < default:
            return Check("threads", "note", f"{text}; {name}={value}", f"unset {name}", facts)
    if load > cores:
        step = "stop what else runs: threads of llama.cpp that wait for a core hold up all others"
        return Check("threads", "note", text, step, facts)
    return Check("threads", "ok", text, facts=facts)


def _kernels() -> Check:
    started = time.perf_counter()
    try:
        from ..fusion import kernels
        from ..fusion.fuser import warm_up

        warm_up()
    except Exception as error:  # of numba or LLVM, none of which is foreseen
        return Check("kernels", "problem", f"cannot be compiled: {error}", "install numba again: pip install -U numba")
    took_s = time.perf_counter() - started
    folder = kernels.cache_folder(kernels.read)
    facts = {"seconds": took_s, "folder": str(folder)}
    if took_s < _SLOW_KERNELS_S:
        return Check("kernels", "ok", f"ready in {took_s:.1f} s", facts=facts)
    if folder is None or os.access(folder, os.W_OK):
        return Check("kernels", "ok", f"compiled in {took_s:.0f} s; the next start finds them", facts=facts)
    step = "set NUMBA_CACHE_DIR to a folder that can be written"
    return Check("kernels", "note", f"took {took_s:.0f} s; {folder} cannot be written to keep them", step, facts)


def _families() -> Check:
    folder = models_dir()
    names = sorted(path.parent.name for path in folder.glob(f"*/{FILE_NAME}")) if folder.is_dir() else []
    facts = {"folder": str(folder), "families": names}
    if names:
        return Check("families", "ok", f"{', '.join(names)} in {folder}", facts=facts)
    return Check("families", "ok", f"none in {folder}; a family.toml may be anywhere", facts=facts)


def _files(files: FamilyFiles) -> Check:
    infos = {info.path: info for info in files.models.values()}
    loras = {path for pairs in files.loras.values() for path, _ in pairs}
    size = sum(info.file_bytes for info in infos.values()) + sum(path.stat().st_size for path in loras)
    names = [path.name for path in [*infos, *sorted(loras)]]
    return Check("files", "ok", f"{', '.join(names)}: {_gb(size)}, no header is damaged", facts={"bytes": size})


def _tokenizer(files: FamilyFiles) -> Check:
    return Check(
        "tokenizer", "ok", f"{files.n_vocab:,} tokens, the same in every model", facts={"n_vocab": files.n_vocab}
    )


def _plan(planner: Planner, files: FamilyFiles, n_ctx: int) -> Check:
    trained = files.models["large"].metadata.get(f"{files.models['large'].architecture}.context_length")
    largest = planner.largest_n_cells(trained if isinstance(trained, int) and trained > 0 else n_ctx)
    fits = f"the largest that fits is {largest}" if largest else "no context fits"
    try:
        plan = planner.plan(n_ctx)
    except EdgeDLFError as error:
        step = f"--ctx-size {min(largest, n_ctx)}" if largest else "close other programs, or choose a smaller family"
        return Check("fits", "problem", str(error), step, {"largest_n_ctx": largest})
    each = [
        f"{m.name} {_gb(m.weights_bytes)} + {_gb(m.cache_bytes)} cache + {_gb(m.buffer_bytes)} buffers"
        + (f" ({m.n_gpu_layers}/{m.n_layers} layers on {_devices(planner.machine, m)})" if planner.machine.gpus else "")
        for m in plan.members
    ]
    text = f"{_gb(plan.n_bytes)} at a context of {n_ctx}; {fits}: {'; '.join(each)}"
    facts = {"largest_n_ctx": largest, "n_ctx": n_ctx, "members": [vars(member) for member in plan.members]}
    return Check("fits", "ok", text, facts=facts)


def _devices(machine: Machine, member: MemberPlan) -> str:
    """The GPUs that hold layers of a member."""
    if len(machine.gpus) == 1 or not member.n_gpu_layers:
        return "the GPU"
    return " and ".join(gpu.name for gpu, share in zip(machine.gpus, member.split, strict=True) if share)


def _template(files: FamilyFiles) -> Check:
    from ..answers.sandbox import TemplateProcess

    source = files.models["large"].metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return Check("chat template", "note", "the large model has none", "use --raw; chat needs one")
    template = None
    try:
        template = TemplateProcess(source)
        template.render([{"role": "user", "content": "Hello"}], bos_token="", eos_token="", add_generation_prompt=True)
    except EdgeDLFError as error:
        return Check("chat template", "problem", str(error), "use --raw, or get the model from another source")
    finally:
        if template:
            template.close()
    return Check("chat template", "ok", "renders a message")


def _decodes(files: FamilyFiles, planner: Planner, n_ctx: int) -> Iterator[Check]:
    """A few tokens from every member, each in a process of its own."""
    from ..families import guard

    try:
        plan = planner.plan(n_ctx)
    except EdgeDLFError:
        plan = planner.plan(256)
    for name, info in files.models.items():
        found = guard.attempt(
            info.shards, files.loras.get(name, ()), n_gpu_layers=plan.layers[name], split=plan.splits[name]
        )
        facts = {"member": name, "tps": found.tps}
        if found.ok:
            yield Check(f"decode {name}", "ok", f"{found.tps:.1f} tokens/s alone", facts=facts)
        else:
            step = "download the file again, or build llama.cpp again: " + _REINSTALL
            yield Check(f"decode {name}", "problem", found.reason, step, facts)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.partition(":")[2].split()}


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
