"""The checks of `edge-dlf doctor`: this machine, this build of llama.cpp, and one family down to a real decode.

Each check ends in a verdict, with one next step where something could be better. What may crash runs in another
process.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import psutil

from .. import __version__
from ..errors import EdgeDLFError, LoadError, ModelFileError, VocabMismatchError
from ..families.files import FamilyFiles, check_files
from ..families.plan import MemberPlan, Planner
from ..families.spec import FILE_NAME, FamilySpec
from ..system.install import LLAMA_CPP, compile_again, cuda_wheel, take_wheel
from ..system.machine import Machine, n_cores, this_machine
from ..system.paths import models_dir
from . import costs

_SLOW_KERNELS_S = 8.0
_TOOL_S = 10.0
_AMX_FLAGS = "-DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"
_GPU_TOOLS = {
    "nvidia-smi": ("-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=native", "cuda"),
    "rocm-smi": ("-DGGML_HIP=on", "rocm72"),
}
"""Program that comes with a GPU's driver, cmake's flag for its backend, and the wheel of that backend."""
_FEATURES = ("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
_USED = {"avx2": "AVX2 = 1", "avx512f": "AVX512 = 1", "asimddp": "DOTPROD = 1", "i8mm": "MATMUL_INT8 = 1"}


Check: TypeAlias = dict[str, Any]
"""Result of one check, as JSON has it.

name: what was looked at.
verdict: "ok", "note" (it works, and could be better) or "problem".
text: what was found.
next_step: one thing to do; None where all is well.
facts: the numbers and names of `text`, for programs.
"""


def _check(name: str, text: object, next_step: str | None = None, *, verdict: str = "", **facts: Any) -> Check:
    """Return a check that is well, or that has a next step and is a note if it is not a problem."""
    verdict = verdict or ("note" if next_step else "ok")
    return {"name": name, "verdict": verdict, "text": str(text), "next_step": next_step, "facts": facts}


_problem = partial(_check, verdict="problem")


def examine_machine() -> Iterator[Check]:
    """Check Python, llama.cpp, CPU, GPUs, memory, threads, kernels and the models folder."""
    version = platform.python_version()
    where = f"{sys.executable}, on {platform.system()} {platform.machine()}"
    yield _check("Python", f"{version} at {where}; edge-dlf {__version__}", version=version)
    try:
        from .. import llama
    except Exception as error:  # a broken build raises whatever its loader does
        yield _problem("llama.cpp", f"llama-cpp-python cannot be loaded: {error}", f"install it: {compile_again()}")
        return
    yield _llama_cpp(llama.system_info(), llama.backends())
    yield _cpu(llama.system_info())
    yield _amx(llama.amx_crashes())
    machine = this_machine(llama.gpus())
    yield _gpus(machine)
    yield _memory(machine)
    yield _threads(llama.default_n_threads())
    yield _kernels()
    yield _families()


def examine_family(load: Callable[[], tuple[FamilySpec, Mapping[str, Any]]]) -> Iterator[Check]:
    """Check a family: its files, tokenizer, memory and chat template, and a decode of every member.

    load: reads the family; gives with it any of `n_ctx`, `n_gpu_layers`, `main_gpu`, `tensor_split`, `type_k` and
        `type_v`, as FusedLlama takes them.
    Raises InvalidParameterError for settings that are out of range.
    """
    try:
        spec, settings = load()
        files = check_files(spec)
    except VocabMismatchError as error:
        yield _problem("tokenizer", error, "take a base and experts made from models of the same series")
        return
    except ModelFileError as error:
        yield _problem("files", error, error.advice)
        return
    except LoadError as error:
        yield _problem("files", error, "correct the family")
        return
    yield _files(files)
    yield _tokenizer(files)
    try:
        from .. import llama
    except Exception:  # `examine_machine` has reported it
        return
    n_ctx, loading = settings.get("n_ctx", 4096), {name: settings[name] for name in settings if name != "n_ctx"}
    planner = Planner(files, this_machine(llama.gpus()), repacks=llama.repacks_weights(), **loading)
    memory = _plan(planner, files, n_ctx)
    yield memory
    yield _template(files)
    if not planner.machine.gpus:
        yield from (_check("quantization", *found) for found in costs.slow_types(files))
    if memory["verdict"] != "problem" or planner.largest_n_cells(256):
        yield from _decodes(files, planner, n_ctx)


def _llama_cpp(info: str, backends: list[str]) -> Check:
    version, _, flags = info.partition(" ")
    step = None if version == LLAMA_CPP else f"edge-dlf is made for {LLAMA_CPP}: {compile_again()}"
    text = f"llama-cpp-python {version}, built with {', '.join(backends)} ({flags})"
    return _check("llama.cpp", text, step, version=version, backends=backends, flags=flags)


def _cpu(info: str) -> Check:
    known = set(" ".join(_cpu_lines("flags", "Features")).split())
    has = [feature for feature in _FEATURES if feature in known]
    unused = [feature for feature, flag in _USED.items() if feature in known and flag not in info]
    name = next(iter(_cpu_lines("model name")), platform.processor() or platform.machine())
    text = f"{name} with {', '.join(has) or 'features that this system does not tell'}"
    text += f"; this build does not use {', '.join(unused)}, as a wheel for all CPUs does not" if unused else ""
    step = f"a build for this CPU computes faster: {compile_again('-DGGML_NATIVE=ON')}" if unused else None
    return _check("CPU", text, step, features=has, unused=unused)


def _amx(crashes: bool) -> Check:
    if not crashes:
        return _check("AMX", "no kernels that crash in this build")
    text = "this build holds kernels that crash (llama.cpp issue 20824); they are kept off, at the price of some speed"
    return _check("AMX", text, f"rebuild: {compile_again(_AMX_FLAGS)}")


def _gpus(machine: Machine) -> Check:
    if machine.gpus:
        each = [f"{gpu.description}, {_gb(gpu.free_bytes)} of {_gb(gpu.total_bytes)} free" for gpu in machine.gpus]
        return _check("GPU", "; ".join(each), gpus=[vars(gpu) for gpu in machine.gpus])
    for tool, (flag, wheel) in _GPU_TOOLS.items():
        if shutil.which(tool):
            step = _build_for(flag, _cuda_of(tool) if wheel == "cuda" else wheel)
            return _check("GPU", f"{tool} is here, but this build has no backend for its GPU", step)
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return _check("GPU", "this build does not use the Mac's GPU", _build_for("-DGGML_METAL=on", "metal"))
    return _check("GPU", "none that this build can use; everything runs on the CPU")


def _build_for(flag: str, wheel: str | None) -> str:
    """The next step towards a build for a GPU, which then computes in place of the CPU."""
    compiled = f"compile llama.cpp for it: {compile_again(flag)}"
    return f"take a wheel: {take_wheel(wheel)}; where there is none, {compiled}" if wheel else compiled


def _cuda_of(tool: str) -> str | None:
    """The wheel for the CUDA that a driver runs; None where it does not tell."""
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run([tool], capture_output=True, text=True, timeout=_TOOL_S).stdout
        if found := re.search(r"CUDA Version: (\d+)\.(\d+)", said):
            return cuda_wheel(int(found[1]), int(found[2]))
    return None


def _memory(machine: Machine) -> Check:
    text = f"{_gb(machine.free_bytes)} of {_gb(psutil.virtual_memory().total)} are free"
    text += f", by {machine.limit}" if machine.limit else ""
    if machine.address_bytes is not None:
        text += f"; ulimit -v leaves {_gb(machine.address_bytes)}"
    return _check("memory", text, free_bytes=machine.free_bytes, address_bytes=machine.address_bytes)


def _threads(default: int) -> Check:
    cores = n_cores()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    text, step = f"{default} threads for {cores} cores that this process may use; load {load:.1f}", None
    if load > cores:
        step = "stop what else runs: threads of llama.cpp that wait for a core hold up all others"
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        value = os.environ.get(name, "")
        if value.isdigit() and int(value) < default:
            text, step = f"{text}; {name}={value}", f"unset {name}"
            break
    return _check("threads", text, step, n_threads=default, cores=cores, load=load)


def _kernels() -> Check:
    started = time.perf_counter()
    try:
        from ..fusion.kernels.cache import cache_folder
        from ..fusion.kernels.memory import read
        from ..fusion.ready import warm_up

        warm_up()
    except Exception as error:  # numba and LLVM document no errors
        return _problem("kernels", f"cannot be compiled: {error}", "install numba again: pip install -U numba")
    took_s = time.perf_counter() - started
    folder, text, step = cache_folder(read), f"ready in {took_s:.1f} s", None
    if took_s >= _SLOW_KERNELS_S:
        text = f"compiled in {took_s:.0f} s; the next start finds them"
        if not folder or not os.access(folder, os.W_OK):
            text = f"took {took_s:.0f} s; {folder or 'no folder'} cannot be written to keep them"
            step = "set NUMBA_CACHE_DIR to a folder that can be written"
    return _check("kernels", text, step, seconds=took_s, folder=str(folder))


def _families() -> Check:
    folder = models_dir()
    names = sorted(path.parent.name for path in folder.glob(f"*/{FILE_NAME}"))
    text = f"{', '.join(names)} in {folder}" if names else f"none in {folder}; a family.toml may be anywhere"
    return _check("families", text, folder=str(folder), families=names)


def _files(files: FamilyFiles) -> Check:
    infos = {info.path: info for info in files.models.values()}
    loras = {path for pairs in files.loras.values() for path, _ in pairs}
    size = sum(info.file_bytes for info in infos.values()) + sum(path.stat().st_size for path in loras)
    names = [path.name for path in [*infos, *sorted(loras)]]
    return _check("files", f"{', '.join(names)}: {_gb(size)}, no header is damaged", bytes=size)


def _plan(planner: Planner, files: FamilyFiles, n_ctx: int) -> Check:
    trained = files.models["large"].metadata.get(f"{files.models['large'].architecture}.context_length")
    largest = planner.largest_n_cells(trained if isinstance(trained, int) and trained > 0 else n_ctx)
    try:
        plan = planner.plan(n_ctx)
    except EdgeDLFError as error:
        step = f"--ctx-size {min(largest, n_ctx)}" if largest else "close other programs, or choose a smaller family"
        return _problem("fits", error, step, largest_n_ctx=largest)
    each = [
        f"{m.name} {_gb(m.weights_bytes)} + {_gb(m.cache_bytes)} cache + {_gb(m.buffer_bytes)} buffers"
        + (f" ({m.n_gpu_layers}/{m.n_layers} layers on {_devices(planner.machine, m)})" if planner.machine.gpus else "")
        for m in plan.members
    ]
    fits = f"the largest that fits is {largest}" if largest else "no context fits"
    text = f"{_gb(plan.n_bytes)} at a context of {n_ctx}; {fits}: {'; '.join(each)}"
    members = [vars(member) for member in plan.members]
    return _check("fits", text, largest_n_ctx=largest, n_ctx=n_ctx, members=members)


def _devices(machine: Machine, member: MemberPlan) -> str:
    """The GPUs that hold layers of a member."""
    if len(machine.gpus) == 1 or not member.n_gpu_layers:
        return "the GPU"
    return " and ".join(gpu.name for gpu, share in zip(machine.gpus, member.split, strict=True) if share)


def _tokenizer(files: FamilyFiles) -> Check:
    matches = files.tokens.matches.values()
    warnings = [warning for match in matches if (warning := match.warning())]
    told = "; ".join([*(match.told() for match in matches), *warnings]) or "the same in every model"
    step = "take small models with more of the large model's control tokens" if warnings else None
    return _check("tokenizer", f"{files.n_vocab:,} tokens, {told}", step, n_vocab=files.n_vocab)


def _template(files: FamilyFiles) -> Check:
    from ..answers.sandbox import TemplateProcess

    source = files.models["large"].metadata.get("tokenizer.chat_template")
    if not isinstance(source, str):
        return _check("chat template", "the large model has none", "use --raw; chat needs one")
    message = {"role": "user", "content": "Hello"}
    try:
        with closing(TemplateProcess(source)) as template:
            template.render([message], {"add_generation_prompt": True}, {"bos_token": "", "eos_token": ""})
    except EdgeDLFError as error:
        return _problem("chat template", error, "use --raw, or get the model from another source")
    return _check("chat template", "renders a message")


def _decodes(files: FamilyFiles, planner: Planner, n_ctx: int) -> Iterator[Check]:
    """Decode a few tokens with every member, each in a process of its own."""
    from ..families import guard
    from ..gguf.info import MERGE

    try:
        plan = planner.plan(n_ctx)
    except EdgeDLFError:
        plan = planner.plan(256)
    seconds: dict[str, Sequence[float]] = {}
    for name, info in files.models.items():
        layers, split = plan.layers[name], plan.splits[name]
        loras = files.loras.get(name, ())
        found = guard.try_model(info.shards, loras, n_gpu_layers=layers, split=split, batches=costs.BATCHES)
        facts: dict[str, Any] = {"member": name, "tps": found.tps, "batch_s": found.batch_s}
        seconds[name] = found.batch_s
        if found.ok:
            yield _check(f"decode {name}", f"{found.tps:.1f} tokens/s alone", **facts)
        else:
            step = f"download the file again, or build llama.cpp again: {compile_again()}"
            step = MERGE if name in files.loras else step
            yield _problem(f"decode {name}", found.reason, step, **facts)
    if all(seconds.values()):
        text = f"{costs.drafting(files, seconds)}; {costs.fusion(files, seconds)}; {costs.batches(seconds)}"
        yield _check("drafting", text)


def _cpu_lines(*names: str) -> list[str]:
    """Values that /proc/cpuinfo gives under `names`; none where the system has no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(names)]


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.0f} MB"
