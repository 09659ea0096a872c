"""Machine facts, on files laid out as kernels write them."""

import os
from pathlib import Path

import pytest

from cluster.hardware import count_gpus, cpu, memory_limit_bytes, oom_kills, resident_bytes

GIB = 2**30


def lay(root: Path, **files: str) -> Path:
    """Files below a root of a test's own; "__" in a name stands for "/"."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("flags", "vectors", "has_bf16"),
    [
        ("fpu avx2 fma", "avx2", False),
        ("fpu avx2 avx512f", "avx512", False),
        ("fpu avx2 avx512f avx512_bf16", "avx512", True),
        ("fpu avx2 avx512f amx_tile amx_bf16", "avx512", True),
        ("fpu avx2 amx_tile", "avx2", False),  # tiles of integers alone
    ],
)
def test_a_cpus_units_are_read_from_its_flags(tmp_path: Path, flags: str, vectors: str, has_bf16: bool) -> None:
    text = f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\nprocessor\t: 1\nmodel name\t: Some CPU\n"
    found = cpu(lay(tmp_path, proc__cpuinfo=text))
    assert (found.name, found.vectors, found.has_bf16) == ("Some CPU", vectors, has_bf16)


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [(None, 3), ("", 0), ("-1", 0), ("1", 1), ("0, 2", 2), ("0,-1,1", 1), ("GPU-a,GPU-b", 2), ("0,1,2,3", 3)],
)
def test_visible_devices_bound_the_gpus(tmp_path, monkeypatch, visible, gpus) -> None:
    lay(tmp_path, dev__nvidia0="", dev__nvidia1="", dev__nvidia2="", dev__nvidiactl="", dev__null="")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert count_gpus(tmp_path) == gpus


def test_without_cgroups_the_limit_is_the_machines_memory(tmp_path: Path) -> None:
    assert memory_limit_bytes(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert oom_kills(tmp_path) == 0


def test_the_smallest_limit_above_the_process_holds_in_version_2(tmp_path: Path) -> None:
    root = lay(tmp_path, proc__self__cgroup="0::/a/b\n")
    lay(root / "sys/fs/cgroup", a__memory__x="")
    lay(root / "sys/fs/cgroup/a", **{"memory.max": str(3 * GIB), "memory.events": "low 0\noom 4\noom_kill 3\n"})
    lay(root / "sys/fs/cgroup/a/b", **{"memory.max": "max\n", "memory.events": "oom_kill 1\n"})
    assert memory_limit_bytes(root) == 3 * GIB
    assert oom_kills(root) == 3


def test_the_limit_of_version_1_and_none_written_as_a_huge_number(tmp_path: Path) -> None:
    root = lay(tmp_path, proc__self__cgroup="4:memory:/small\n3:cpu:/\n0::/\n")
    memory = root / "sys/fs/cgroup/memory"
    lay(memory, **{"memory.limit_in_bytes": "9223372036854771712\n"})
    lay(
        memory / "small", **{"memory.limit_in_bytes": f"{2 * GIB}\n", "memory.oom_control": "under_oom 0\noom_kill 7\n"}
    )
    assert memory_limit_bytes(root) == 2 * GIB
    assert oom_kills(root) == 7


def test_a_container_whose_own_group_is_the_mount(tmp_path: Path) -> None:
    root = lay(tmp_path, proc__self__cgroup="4:memory:/docker/0123\n")
    lay(root / "sys/fs/cgroup/memory", **{"memory.limit_in_bytes": str(GIB)})
    assert memory_limit_bytes(root) == GIB


def test_resident_memory_of_this_process_and_of_none() -> None:
    assert (resident_bytes(os.getpid()) or 0) > 2**20
    assert resident_bytes(2**22 + 1) is None
