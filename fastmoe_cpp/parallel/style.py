"""ExpertParallel: what torch's parallelize_module does to a MoE layer."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from ..moe import MoE
from .agreement import check_agreement, facts_of
from .exchange import resolve
from .experts import ParallelExperts
from .paths import check_path, choose_path
from .symmetric import Needs

GRADIENTS = ("mean", "sum")


class ExpertParallel(ParallelStyle):
    """Spreads the routed experts of MoE layers over a one-dimensional device mesh::

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "ep"))
        parallelize_module(model, mesh["ep"], {"layers.*.moe": ExpertParallel()})

    The experts' parameters become DTensors with Shard(0): rank r of W holds experts r * E / W to (r + 1) * E / W. The
    router and the shared experts stay whole on every rank. Each rank calls the layer with tokens of its own, as many as
    it has, also none. Every rank of the group must call it, in the same order, with a backward pass on all or none.

    gradient: 'mean' divides the experts' gradients by the number of ranks, as data parallelism averages the gradients
    of everything else; 'sum' leaves the sum over the ranks' tokens, for losses that divide by the whole batch
    themselves. balance_group: the ranks whose tokens are the batch of the balance and z losses and of
    update_expert_bias(); None is the mesh's own ranks, or those the layer has already.

    path: 'all_to_all_single', 'symmetric_memory' (GPUs of one host, all linked by NVLink), or 'auto' for the best that
    the group can do; print(model) shows which. Symmetric memory is set up once, for at most max_tokens tokens of a rank
    in a call; without max_tokens 'auto' is all_to_all_single. With max_rows no pass waits for the host: the experts'
    tensors then have max_rows rows, however many come, and more than that are an error (see SymmetricMemory). No more
    can come than max_tokens * (number of ranks).

    chunks: of all_to_all_single, the parts in which a call's tokens go, so that one is computed while another travels.
    The weight gradients of the parts are added up: the same sums in another order.

    A capacity is counted over each rank's own tokens. Raises ValueError, the same on every rank, where the layers'
    sizes, settings or dtypes differ between ranks, or where the ranks don't divide the experts.
    """

    def __init__(
        self,
        *,
        gradient: str = "mean",
        balance_group: dist.ProcessGroup | None = None,
        path: str = "auto",
        max_tokens: int | None = None,
        max_rows: int | None = None,
        chunks: int = 1,
    ) -> None:
        super().__init__()
        if gradient not in GRADIENTS:
            raise ValueError(f"gradient must be one of {', '.join(map(repr, GRADIENTS))}, got {gradient!r}")
        check_path(path, max_tokens, max_rows)
        if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
            raise ValueError(f"chunks must be an integer of at least 1, got {chunks!r}")
        if chunks > 1 and max_tokens is not None:
            raise ValueError(f"chunks must be 1 with max_tokens, for symmetric memory has none, got {chunks}")
        if balance_group is not None:
            resolve(balance_group)
        self.gradient, self.balance_group, self.path = gradient, balance_group, path
        self.max_tokens, self.max_rows, self.chunks = max_tokens, max_rows, chunks

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim != 1:
            raise ValueError(f"ExpertParallel needs a mesh of one dimension, such as mesh['ep'], got {device_mesh}")
        group = device_mesh.get_group()
        facts = {"the module's type": type(module).__name__, "the group's size": group.size()}
        if isinstance(module, MoE):
            facts |= facts_of(module.config)
            facts |= {f"{name}'s dtype": str(p.dtype) for name, p in module.named_parameters()}
            facts |= {"gradient": self.gradient, "path": self.path, "training": module.training}
            facts |= {"max_tokens": self.max_tokens, "max_rows": self.max_rows, "chunks": self.chunks}
        check_agreement("ExpertParallel", facts, group)
        if not isinstance(module, MoE):
            raise ValueError(f"ExpertParallel parallelizes fastmoe_cpp.MoE layers, got {type(module).__name__}")
        if module.experts.parallel is not None:
            raise ValueError("ExpertParallel must be applied to a layer once, and this one has it already")
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise ValueError("ExpertParallel must be applied before fully_shard, and this layer holds DTensors already")
        if module.config.gradient_accumulation_fusion:
            raise ValueError(
                "ExpertParallel shards weights as DTensors, which have no main_grad: gradient_accumulation_fusion must "
                "be False, got True"
            )
        size, experts = group.size(), module.config.num_experts
        if experts % size:
            raise ValueError(f"ExpertParallel needs a number of ranks that divides num_experts = {experts}, got {size}")
        path = choose_path(self.path, group, self._device(module, device_mesh), self._needs(module))
        source = self.src_data_rank
        if source is not None and module.router.expert_bias is not None:
            bias = distribute_tensor(module.router.expert_bias, device_mesh, [Replicate()], src_data_rank=source)
            module.router.expert_bias.copy_(bias.to_local())
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                if owner is module.experts:
                    sharded = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=source)
                    owner.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
                elif source is not None:
                    whole = distribute_tensor(parameter.detach(), device_mesh, [Replicate()], src_data_rank=source)
                    parameter.data.copy_(whole.to_local())
        scale = 1.0 / size if self.gradient == "mean" else 1.0
        module.experts.parallel = ParallelExperts(path, group.rank(), size, scale, self.chunks)
        if self.balance_group is not None or module.balance_group is None:
            module.balance_group = self.balance_group or group
        return module

    def _needs(self, module: MoE) -> Needs | None:
        if self.max_tokens is None:
            return None
        c = module.config
        element = max(p.element_size() for p in module.parameters())
        return Needs(c.hidden_size, c.top_k, element, self.max_tokens, self.max_rows)

    @staticmethod
    def _device(module: MoE, device_mesh: DeviceMesh) -> torch.device:
        if device_mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(device_mesh.device_type)
