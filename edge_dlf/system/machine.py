"""Free memory of this machine, under every limit on this process; address space; GPUs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ..errors import LoadError

if sys.platform != "win32":
    import resource

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


MAX_THREADS = 512
"""Most threads that llama.cpp computes with; thousands more overflow its stack."""


def require_platform() -> None:
    """Raise LoadError on a system that edge-dlf does not run on."""
    if sys.platform == "win32":
        raise LoadError(
            "edge-dlf runs on Linux and macOS; on Windows, run it in WSL: https://learn.microsoft.com/windows/wsl/install"
        )


def n_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class GPU:
    """A device that llama.cpp can offload layers to. shares_host: it has no memory of its own, but uses the host's."""

    name: str
    description: str
    free_bytes: int
    total_bytes: int
    shares_host: bool = False


@dataclass(frozen=True)
class Machine:
    """Memory that this process may still take.

    free_bytes: on the host, file cache that can be dropped included. limit: what sets it where that is not the memory
    itself. address_bytes: of address space; None where it has no limit.
    """

    free_bytes: int
    limit: str | None = None
    address_bytes: int | None = None
    gpus: tuple[GPU, ...] = ()


def this_machine(gpus: Sequence[GPU] = ()) -> Machine:
    """What is free now; `gpus` as llama.cpp reports them."""
    free, limit = psutil.virtual_memory().available, None
    for left in cgroup_bytes():
        if left < free:
            free, limit = left, "a limit of its control group"
    return Machine(free, limit, address_space_left(), tuple(gpus))


def address_space_left() -> int | None:
    """Bytes that `ulimit -v` leaves to this process; None where there is no such limit."""
    if sys.platform == "win32":
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return max(0, limit - int(psutil.Process().memory_info().vms))


def cgroup_bytes(root: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> Iterator[int]:
    """Bytes left under the memory limit of each control group, of version 1 or 2, that this process is in."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _left(root, path, "memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            yield from _left(root / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def _left(root: Path, path: str, limit_file: str, usage_file: str, prefix: str) -> Iterator[int]:
    """Bytes left in the group at `path` and in all above it. A container may see its own group as the root."""
    group = root / path.strip("/")
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            return
        try:
            limit = (folder / limit_file).read_text().strip()
            if limit != "max":
                usage = int((folder / usage_file).read_text())
                yield max(0, int(limit) - usage + _file_cache(folder / "memory.stat", prefix))
        except (OSError, ValueError):
            continue


def _file_cache(stat: Path, prefix: str) -> int:
    """Bytes of cached files, which are dropped when memory runs short."""
    pairs = (line.split() for line in stat.read_text().splitlines())
    return sum(int(value) for key, value in pairs if key in (f"{prefix}inactive_file", f"{prefix}active_file"))
