"""ExpertParallel and ExpertTensorParallel: what torch's parallelize_module does to a MoE layer."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from ..groups import resolve
from ..moe import MoE
from .agreement import check_agreement, facts_of, gathered
from .experts import ParallelExperts
from .paths import Path, check_path, choose_path
from .stored import take_whole
from .symmetric import Needs, SymmetricMemory
from .tensor import TensorParallel, to_parts

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
            raise ValueError(
                f"ExpertParallel needs a mesh of one dimension, such as mesh['ep'], got {device_mesh}; "
                "ExpertTensorParallel takes two, such as mesh['ep', 'tp']"
            )
        return self._spread(module, device_mesh, device_mesh.get_group(), None)

    def _spread(
        self, module: nn.Module, mesh: DeviceMesh, experts: dist.ProcessGroup | None, tensor: dist.ProcessGroup | None
    ) -> nn.Module:
        """The experts over one group, and each expert's intermediate size over the other: mesh has these dimensions."""
        name, groups = type(self).__name__, [group for group in (experts, tensor) if group is not None]
        facts = {"the module's type": type(module).__name__}
        facts |= {"the group's size": groups[0].size()} if len(groups) == 1 else {"the mesh's shape": mesh.shape}
        if isinstance(module, MoE):
            facts |= facts_of(module.config)
            facts |= {f"{name}'s dtype": str(p.dtype) for name, p in module.named_parameters()}
            facts |= {"gradient": self.gradient, "path": self.path, "training": module.training}
            facts |= {"max_tokens": self.max_tokens, "max_rows": self.max_rows, "chunks": self.chunks}
        check_agreement(name, facts, *groups)
        if not isinstance(module, MoE):
            raise ValueError(f"{name} parallelizes fastmoe_cpp.MoE layers, got {type(module).__name__}")
        if module.experts.parallel is not None:
            other = "" if tensor is None else ": experts over one dimension and parts of them over another are one mesh"
            raise ValueError(
                f"{name} must be applied to a layer once, and this one has {module.experts.parallel}{other}"
            )
        if any(isinstance(p, DTensor) for p in module.parameters()):
            raise ValueError(f"{name} must be applied before fully_shard, and this layer holds DTensors already")
        if module.config.gradient_accumulation_fusion:
            raise ValueError(
                f"{name} shards weights as DTensors, which have no main_grad: gradient_accumulation_fusion must "
                "be False, got True"
            )
        if experts is None:
            for field, default in (("path", "auto"), ("max_tokens", None), ("max_rows", None), ("chunks", 1)):
                if getattr(self, field) != default:
                    raise ValueError(
                        f"{field} must be {default!r} over a mesh of one dimension, where {name} exchanges no rows, "
                        f"got {getattr(self, field)!r}"
                    )
        c, size = module.config, 1 if experts is None else experts.size()
        if c.num_experts % size:
            raise ValueError(f"{name} needs a number of ranks that divides num_experts = {c.num_experts}, got {size}")
        if tensor is not None:
            self._check_parts(module, tensor, groups)
        path = None if experts is None else self._path(module, mesh, experts, tensor)
        self._distribute(module, mesh, experts is not None, tensor is not None)
        module.experts.register_load_state_dict_pre_hook(take_whole)
        scale = 1.0 / size if self.gradient == "mean" else 1.0
        parts = None if tensor is None else TensorParallel(tensor)
        rank = 0 if experts is None else experts.rank()
        module.experts.parallel = ParallelExperts(path, rank, size, scale, self.chunks, parts)
        if self.balance_group is not None or module.balance_group is None:
            # ranks that have the same tokens count them once
            module.balance_group = self.balance_group or experts
        return module

    def _check_parts(self, module: MoE, tensor: dist.ProcessGroup, groups: list[dist.ProcessGroup]) -> None:
        """What ranks that compute the same outside of the experts need. A collective; raises on all ranks or none."""
        name, inner = type(self).__name__, module.config.intermediate_size
        if inner % tensor.size():
            raise ValueError(
                f"{name} needs a number of ranks that divides intermediate_size = {inner}, got {tensor.size()}"
            )
        if not module.config.router.jitter_eps:
            return
        device = module.router.weight.device
        state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
        digest = hashlib.sha256(bytes(state.tolist())).hexdigest()
        same = len(set(gathered(name, digest, tensor))) == 1
        if not all(gathered(name, same, *groups)):
            raise ValueError(
                f"{name}: with jitter_eps = {module.config.router.jitter_eps} the ranks that have the same tokens must "
                "draw the same numbers, and the state of torch's random number generator differs: give them one seed"
            )

    def _path(
        self, module: MoE, mesh: DeviceMesh, experts: dist.ProcessGroup, tensor: dist.ProcessGroup | None
    ) -> Path | SymmetricMemory:
        path, error = None, None
        try:
            path = choose_path(self.path, experts, self._device(module, mesh), self._needs(module))
        except ValueError as refused:
            error = str(refused)
        if tensor is not None:
            # the groups of a mesh differ in what they can do
            error = next((each for each in gathered(type(self).__name__, error, tensor) if each), None)
        if error is not None:
            raise ValueError(error)
        return path

    def _distribute(self, module: MoE, mesh: DeviceMesh, by_expert: bool, by_part: bool) -> None:
        """The experts' parameters become DTensors of mesh; everything else becomes the source rank's."""
        source, whole = self.src_data_rank, [Replicate()] * mesh.ndim
        if source is not None and module.router.expert_bias is not None:
            bias = distribute_tensor(module.router.expert_bias, mesh, whole, src_data_rank=source)
            module.router.expert_bias.copy_(bias.to_local())
        for owner in module.modules():
            for name, parameter in list(owner.named_parameters(recurse=False)):
                values, placements = parameter.detach(), list[Placement]([Shard(0)] if by_expert else [])
                if owner is module.experts:
                    if by_part:
                        values, placement = to_parts(name, values, module.config)
                        placements.append(placement)
                    sharded = distribute_tensor(values, mesh, placements, src_data_rank=source)
                    owner.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
                elif source is not None:
                    parameter.data.copy_(distribute_tensor(values, mesh, whole, src_data_rank=source).to_local())

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


class ExpertTensorParallel(ExpertParallel):
    """Spreads each routed expert's intermediate size over a device mesh, and with two dimensions also the experts::

        mesh = init_device_mesh("cuda", (2, 4, 2), mesh_dim_names=("dp", "ep", "tp"))
        parallelize_module(model, mesh["tp"], {"layers.*.moe": ExpertTensorParallel()})
        parallelize_module(model, mesh["ep", "tp"], {"layers.*.moe": ExpertTensorParallel()})  # or this

    The ranks of the last dimension call the layer with the same tokens and get the same outputs and gradients. Each
    holds 1 / W of every expert's intermediate size, in the state of DTensors: down_proj with Shard(2), gate_up_proj and
    its bias with Shard(1), or where gate rows precede up rows kept as [E, 2, I, ...] with Shard(2). down_bias, the
    router and the shared experts are whole on every rank, and computed by each. save_checkpoint, load_checkpoint and
    export_safetensors have the tensors of one rank, [E, 2 * I, ...].

    The first of two dimensions is what ExpertParallel spreads the experts over, with its arguments; its ranks have
    tokens of their own. Over one dimension there is nothing to exchange, so path, max_tokens, max_rows and chunks can't
    be given, and balance_group stays the layer's.

    Raises ValueError as ExpertParallel does, and where the ranks don't divide the intermediate size. Kernels are
    fastest where the parts are multiples of 8.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if device_mesh.ndim == 2:
            return self._spread(module, device_mesh, device_mesh.get_group(0), device_mesh.get_group(1))
        if device_mesh.ndim != 1:
            raise ValueError(
                "ExpertTensorParallel needs a mesh of one or two dimensions, such as mesh['tp'] or mesh['ep', 'tp'], "
                f"got {device_mesh}"
            )
        return self._spread(module, device_mesh, None, device_mesh.get_group())
