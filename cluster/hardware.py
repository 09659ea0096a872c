"""Facts of the machine that a process runs on: its CPU's arithmetic, its GPUs, the memory it may use.

No torch, no Ray.
"""

import ctypes
import itertools
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path("/")
"""Where proc and sys are mounted; tests lay out their own."""

_UNLIMITED = 2**60  # cgroup v1 writes "no limit" as the largest multiple of a page


@dataclass(frozen=True)
class Cpu:
    """A CPU's name and the units that decide how fast it multiplies matrices."""

    name: str
    vectors: str
    """"avx512", "avx2", or the architecture's name where neither is there."""
    has_bf16: bool
    """It multiplies in bfloat16 by itself (AMX or AVX512-BF16). Without, torch is some 60 times slower than in fp32."""

    def __str__(self) -> str:
        return f"{self.name} ({self.vectors}, {'bf16 units' if self.has_bf16 else 'no bf16 units'})"


@cache
def cpu(root: Path = ROOT) -> Cpu:
    """This machine's, as the kernel lists it."""
    fields: dict[str, str] = {}
    for line in _read(root / "proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    vectors = next((kind for kind, flag in (("avx512", "avx512f"), ("avx2", "avx2")) if flag in flags), None)
    return Cpu(
        name=fields.get("model name", "unknown CPU"),
        vectors=vectors or platform.machine(),
        has_bf16=bool(flags & {"amx_bf16", "avx512_bf16"}),
    )


def count_gpus(root: Path = ROOT) -> int:
    """NVIDIA GPUs that this process may use, counted without loading CUDA."""
    found = max(len(list(root.glob("dev/nvidia[0-9]*"))), len(list(root.glob("proc/driver/nvidia/gpus/*"))))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    shown = itertools.takewhile(lambda part: part not in ("", "-1"), (part.strip() for part in visible.split(",")))
    return min(found, len(list(shown)))  # CUDA reads the list up to its first name that is no device's


@dataclass(frozen=True)
class Facts:
    """What a node has."""

    cores: int
    """That its processes may use."""
    memory_bytes: int
    cpu: str
    gpus: tuple[str, ...]
    """Names."""


def facts() -> Facts:
    """Of this machine."""
    return Facts(len(os.sched_getaffinity(0)), memory_limit_bytes(), str(cpu()), gpu_names())


def gpu_names(root: Path = ROOT) -> tuple[str, ...]:
    """Names of all NVIDIA GPUs, as their driver lists them."""
    found = sorted(root.glob("proc/driver/nvidia/gpus/*/information"))
    lines = [line for file in found for line in _read(file).splitlines()]
    return tuple(line.partition(":")[2].strip() for line in lines if line.startswith("Model:"))


def memory_limit_bytes(root: Path = ROOT) -> int:
    """The memory that this process may use: the machine's, or what the cgroups above it (v1 or v2) allow."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [
        _number(group / name) for group in _memory_groups(root) for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min([total, *(limit for limit in limits if limit is not None and limit < _UNLIMITED)])


SMALL_SHARED_BYTES = 2**30
"""Free bytes of /dev/shm below which it is no place for Ray's object store."""


def shared_memory_bytes() -> int:
    """What is free of the memory that processes share by files, /dev/shm; 0 without it."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return 0


def oom_kills(root: Path = ROOT) -> int:
    """Processes that the kernel has ended so far because a cgroup above this process was full."""
    counts = [0]
    for group in _memory_groups(root):
        for name in ("memory.events", "memory.oom_control"):
            counts += [
                int(line.split()[1]) for line in _read(group / name).splitlines() if line.startswith("oom_kill ")
            ]
    return max(counts)


def resident_bytes(pid: int, root: Path = ROOT) -> int | None:
    """Resident memory of a process; None where it is gone."""
    fields = _read(root / f"proc/{pid}/statm").split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if fields else None


def give_back_memory() -> None:
    """Returns what this process has freed to the system; its allocator would keep it for seconds, or for ever."""
    allocator = ctypes.CDLL(None)
    if hasattr(allocator, "mallctl"):
        allocator.mallctl(b"arena.4096.purge", None, None, None, ctypes.c_size_t(0))  # 4096: of all arenas
    elif hasattr(allocator, "malloc_trim"):
        allocator.malloc_trim(0)


def _memory_groups(root: Path) -> Iterator[Path]:
    """Directories of the memory cgroups that this process is in, the innermost first.

    In a container the kernel may name a path of the host while only the container's own group is mounted: the mount's
    root stands for it.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        mounts = ("sys/fs/cgroup/memory",) if controllers else ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        for mount in (root / each for each in mounts):
            inner = mount / path.lstrip("/")
            yield from (group for group in (inner, *inner.parents) if group.is_relative_to(mount) and group.is_dir())


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
