"""The host's checkpoints: data-parallel rank 0 writes, every rank reads the same file, all wait for each other."""

import os

import torch
import torch.distributed as dist

from . import get_args, mpu

_CHECKPOINT_VERSION = None


def _name(folder, iteration):
    rank = f"mp_rank_{mpu.get_tensor_model_parallel_rank():02d}"
    if mpu.get_pipeline_model_parallel_world_size() > 1:
        rank += f"_{mpu.get_pipeline_model_parallel_rank():03d}"
    return os.path.join(folder, f"iter_{iteration:07d}", rank, "model_optim_rng.pt")


def _tracker(folder):
    return os.path.join(folder, "latest_checkpointed_iteration.txt")


def _inner(model):
    model = model[0] if isinstance(model, list) else model
    while hasattr(model, "module"):
        model = model.module
    return model


def save_checkpoint(iteration, model, optimizer, lr_scheduler):
    args = get_args()
    if mpu.get_data_parallel_rank() == 0:
        state = {"iteration": iteration, "model": _inner(model).state_dict_for_save_checkpoint()}
        if not args.no_save_optim:
            state["optimizer"] = optimizer.state_dict()
            state["lr_scheduler"] = lr_scheduler.state_dict()
        os.makedirs(os.path.dirname(_name(args.save, iteration)), exist_ok=True)
        torch.save(state, _name(args.save, iteration))
    dist.barrier()
    if dist.get_rank() == 0:
        with open(_tracker(args.save), "w") as file:
            file.write(str(iteration))
    dist.barrier()


def load_checkpoint(model, optimizer, lr_scheduler, load_arg="load", strict=True):
    args = get_args()
    folder = getattr(args, load_arg)
    if not os.path.isfile(_tracker(folder)):
        return 0
    with open(_tracker(folder)) as file:
        iteration = int(file.read())
    state = torch.load(_name(folder, iteration), weights_only=False)
    _inner(model).load_state_dict(state["model"], strict=strict)
    if not args.no_load_optim and not args.finetune:
        optimizer.load_state_dict(state["optimizer"])
        lr_scheduler.load_state_dict(state["lr_scheduler"])
    dist.barrier()
    return state["iteration"]
