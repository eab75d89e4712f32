"""Run by torchrun: models that transformers itself spreads over the ranks, with our experts, forward and backward.

    torchrun --nproc_per_node=2 two_ranks.py FOLDER CASE...

FOLDER/FAMILY are the models and FOLDER/CASE.pt the results; a case is FAMILY-ep or FAMILY-tp.
"""

import inspect
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from fastmoe_cpp.integrations.transformers import register

# transformers 5.23 has a size for what was a switch
SIZED = "ep_size" in inspect.signature(DistributedConfig).parameters


def run(folder: str, case: str) -> None:
    family, kind = case.split("-")
    ranks = dist.get_world_size()
    experts = {} if kind == "tp" else {"ep_size": ranks} if SIZED else {"enable_expert_parallel": True}
    model = AutoModelForCausalLM.from_pretrained(
        f"{folder}/{family}",
        experts_implementation="fastmoe_cpp",
        attn_implementation="eager",
        distributed_config=DistributedConfig(tp_size=ranks, tp_plan="auto", **experts),
    ).eval()
    torch.manual_seed(5)
    ids = torch.randint(3, model.config.vocab_size, (2, 12))
    result = model(ids, labels=ids)
    result.loss.backward()

    def whole(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    # a column of two stacked projections, as tensor parallelism cuts them, can't be put together again
    grads = {
        name: whole(parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and (kind == "ep" or ".experts." not in name)
    }
    logits = whole(result.logits.detach())
    if dist.get_rank() == 0:
        torch.save({"logits": logits, "grads": grads}, f"{folder}/{case}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    register()
    for wanted in sys.argv[2:]:
        run(sys.argv[1], wanted)
    dist.barrier()
    # No destructors: transformers' mesh keeps gloo's threads alive, and one that drops a tensor of Python's while the
    # interpreter ends calls std::terminate.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
