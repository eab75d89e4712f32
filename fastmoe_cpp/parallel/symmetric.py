"""Rows between ranks through memory that each reads and writes of the others: GPUs on NVLink in one host.

A rank's rows are copied once, into its own workspace; every other rank then loads those it serves, straight into the
tensor that the experts read. Their sums are stored straight into the workspace of the rank that wants them, which adds
them up from there. Weights, ids and counts travel along, so a forward pass is two operations of the group, as is a
backward pass, with one barrier each. With `max_rows` nothing of it visits the host, and a CUDA graph can hold it.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops
from ..groups import describe, failed
from ..outputs import DispatchPlan

_ops = torch.ops.fastmoe_cpp_symmetric
MAX_RANKS = 64
_CONTROL_BYTES, _HEADER_BYTES = 4096, 1024
_DEFAULT_TIMEOUT_MS = 600_000


class Needs(NamedTuple):
    """What one layer sends, at the most: the same on every rank."""

    hidden_size: int
    top_k: int
    element_size: int
    max_tokens: int
    max_rows: int | None


class Memory(NamedTuple):
    """This rank's workspace, the address of every rank's as this one reaches it, and whatever keeps them there."""

    own: Tensor
    addresses: list[int]
    keeps: object


def _gpu_memory(group: dist.ProcessGroup, device: torch.device, size: int) -> Memory:
    from torch.distributed import _symmetric_memory as symmetric

    if group.size() == 1:
        own = torch.zeros(size, dtype=torch.uint8, device=device)
        return Memory(own, [own.data_ptr()], None)
    own = symmetric._SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
    own[:_CONTROL_BYTES].zero_()
    # no rank may raise a flag here before it is cleared: the handshake below comes after
    torch.cuda.synchronize(device)
    handle = symmetric.rendezvous(own, group.group_name)
    parts = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(group.size())]
    dist.barrier(group)
    return Memory(own, [part.data_ptr() for part in parts], (handle, parts))


def _gpu_reason(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why the ranks' GPUs can't read each other's memory over NVLink, in the same words on every rank, or None."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = (socket.gethostname(), boot.read_text() if boot.exists() else "")
    found: list[tuple] = [()] * group.size()
    dist.all_gather_object(found, (host, device.index, torch.cuda.device_count()), group=group)
    if len({host for host, *_ in found}) > 1:
        return "its ranks are on several hosts"
    indices = [index for _, index, _ in found]
    if len(set(indices)) < len(indices) or any(index >= count for _, index, count in found):
        return "its ranks do not see each other's GPUs as devices of their own (CUDA_VISIBLE_DEVICES)"
    reason = None
    try:
        links = torch._C._distributed_c10d._detect_dma_connectivity(torch._C._autograd.DeviceType.CUDA, "nvlink").matrix
        if any(not links[a][b] for a in indices for b in indices if a != b):
            reason = "not all of its GPUs are linked by NVLink"
        elif any(not torch.cuda.can_device_access_peer(a, b) for a in indices for b in indices if a != b):
            reason = "not all of its GPUs can read each other's memory"
    except (AttributeError, RuntimeError) as error:
        reason = f"its GPUs' links can't be found out: {str(error).splitlines()[0]}"
    reasons: list[str | None] = [None] * group.size()
    dist.all_gather_object(reasons, reason, group=group)
    return next((each for each in reasons if each), None)


class Provider(NamedTuple):
    """Symmetric memory of one kind of device: why a group lacks it (a collective), and a workspace (a collective)."""

    reason: Callable[[dist.ProcessGroup, torch.device], str | None]
    memory: Callable[[dist.ProcessGroup, torch.device, int], Memory]


PROVIDERS: dict[str, Provider] = {"cuda": Provider(_gpu_reason, _gpu_memory)}


def lacks(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why a group can't exchange rows through symmetric memory, in words that are the same on every rank, or None."""
    if group.size() > MAX_RANKS:
        return f"it has {group.size()} ranks, and {MAX_RANKS} are the most"
    if device.type not in PROVIDERS:
        return f"its tensors are on {device.type}, and it takes CUDA"
    return PROVIDERS[device.type].reason(group, device)


def _timeout_ms(group: dist.ProcessGroup, device: torch.device) -> int:
    try:
        return max(1, int(group._get_backend(device).options._timeout.total_seconds() * 1e3))
    except (AttributeError, RuntimeError):
        return _DEFAULT_TIMEOUT_MS


def _aligned(size: int) -> int:
    return -(-size // 128) * 128


@dataclass
class Workspace:
    """The memory that the layers of one group share, one after another."""

    group: dist.ProcessGroup
    device: torch.device
    timeout_ms: int
    half: int = 0
    peers: Tensor | None = None
    #: Every memory there was: a captured graph goes on using the one it saw.
    memories: list[Memory] = field(default_factory=list)

    def reserve(self, needs: Needs) -> None:
        """Room for a layer's operations, or for more than there was. A collective, outside of any other operation."""
        size = self.group.size()
        tokens, rows = needs.max_tokens, needs.max_tokens * min(needs.top_k, size)
        row, weight = needs.hidden_size * needs.element_size, 8
        pulled = _HEADER_BYTES + _aligned(rows * 4) + _aligned(tokens * needs.top_k * 4)
        pulled += _aligned(tokens * needs.top_k * weight) + tokens * row
        pushed = _aligned(rows * row) + rows * needs.top_k * weight
        half = _aligned(max(pulled, pushed))
        if half <= self.half:
            return
        try:
            memory = PROVIDERS[self.device.type].memory(self.group, self.device, _CONTROL_BYTES + 2 * half)
        except RuntimeError as error:
            raise failed(f"symmetric memory of {_CONTROL_BYTES + 2 * half} bytes", self.group, error) from error
        self.memories.append(memory)
        self.half = half
        self.peers = torch.tensor(memory.addresses, dtype=torch.int64, device=self.device)


_WORKSPACES: dict[tuple[str, torch.device], Workspace] = {}


class SymmetricMemory:
    """Rows through symmetric memory: what every rank passes in a call is at most max_tokens tokens.

    max_rows is the number of rows that a rank's experts compute on, received or not; None reads it on the host in every
    pass. More rows than that are not dropped: on the CPU a ValueError, on a GPU one printed sentence and a trap.
    """

    name = "symmetric_memory"

    def __init__(self, group: dist.ProcessGroup, device: torch.device, needs: Needs) -> None:
        self.group, self.needs = group, needs
        key = (group.group_name, device)
        known = _WORKSPACES.get(key)
        if known is None or known.group is not group:
            known = _WORKSPACES[key] = Workspace(group, device, _timeout_ms(group, device))
        self.workspace = known
        known.reserve(needs)

    def apply(
        self,
        compute: Callable[[Tensor, Tensor, DispatchPlan], Tensor],
        hidden_states: Tensor,
        topk_weights: Tensor,
        plan: DispatchPlan,
        each: int,
    ) -> Tensor:
        """[T, H]: for every token the sum of what its ranks, of `each` experts, make of its row.

        That is compute(rows [R, H], weights [R, K], plan of R tokens), [R, H].

        Differentiable in hidden_states [T, H] and topk_weights [T, K]. A collective.
        """
        needs, size = self.needs, self.group.size()
        if hidden_states.shape[0] > needs.max_tokens:
            raise ValueError(
                f"a call must have at most max_tokens = {needs.max_tokens} tokens on every rank, "
                f"got {hidden_states.shape[0]} on {describe(self.group)}"
            )
        ids, ranks, pairs = _ops.token_ranks(plan.token_slot, plan.expert_offsets, each, size)
        send = ops.dispatch(ranks, size)
        wide = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
        space = self._space(each)
        rows, weights, ids, layout, on_host = _ops.dispatch(
            hidden_states, topk_weights.to(wide), ids, send.slot_index, send.token_slot, send.expert_offsets, pairs,
            self.workspace.peers, space, "expert-parallel dispatch", -1 if needs.max_rows is None else needs.max_rows,
        )  # fmt: skip
        local = ops.dispatch(ids, each)
        if needs.max_rows is None:
            local = local._replace(slot_index=local.slot_index[: int(on_host[1])])
        return _ops.combine(
            compute(rows, weights, local), layout, send.slot_index, send.token_slot, send.expert_offsets, pairs,
            self.workspace.peers, space, "expert-parallel combine",
        )  # fmt: skip

    def _space(self, each: int) -> Sequence[int]:
        n, w = self.needs, self.workspace
        return (self.group.rank(), n.top_k, each, n.max_tokens, w.half, w.timeout_ms)
