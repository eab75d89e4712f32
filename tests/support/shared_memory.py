"""Symmetric memory of processes on one host, in files that all of them map: the CPU's stand-in for GPUs on NVLink."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from fastmoe_cpp.parallel import symmetric


def _memory(group: dist.ProcessGroup, device: torch.device, size: int) -> symmetric.Memory:
    folder: list[str | None] = [tempfile.mkdtemp() if group.rank() == 0 else None]
    dist.broadcast_object_list(folder, group=group, group_src=0)
    files = [Path(str(folder[0]), str(rank)) for rank in range(group.size())]
    with files[group.rank()].open("wb") as file:
        file.truncate(size)
    dist.barrier(group)
    mapped = [torch.from_file(str(file), shared=True, size=size, dtype=torch.uint8) for file in files]
    dist.barrier(group)
    if group.rank() == 0:
        for file in files:
            file.unlink()
        files[0].parent.rmdir()
    return symmetric.Memory(mapped[group.rank()], [each.data_ptr() for each in mapped], mapped)


def provide() -> None:
    """From here on, groups of this process on the CPU can take path 'symmetric_memory'."""
    symmetric.PROVIDERS["cpu"] = symmetric.Provider(lambda group, device: None, _memory)
