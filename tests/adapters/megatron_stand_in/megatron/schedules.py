"""The schedules of v2.5 and v3.0.2: forward_step returns (output, loss_func)."""

import torch
import torch.distributed as dist

from . import get_args, get_num_microbatches, global_vars, mpu
from .model import DistributedDataParallel as LocalDDP
from .model import Float16Module


def forward_step(forward_step_func, data_iterator, model, input_tensor, losses_reduced):
    unwrapped = model
    while isinstance(unwrapped, LocalDDP | Float16Module):
        unwrapped = unwrapped.module
    unwrapped.set_input_tensor(input_tensor)
    output_tensor, loss_func = forward_step_func(data_iterator, model)
    if mpu.is_pipeline_last_stage():
        loss, reduced = loss_func(output_tensor)
        output_tensor = loss / get_num_microbatches()
        losses_reduced.append(reduced)
    return output_tensor


def backward_step(optimizer, input_tensor, output_tensor, output_tensor_grad):
    if input_tensor is not None:
        input_tensor.retain_grad()
    if output_tensor_grad is None:
        output_tensor = optimizer.scale_loss(output_tensor)
    torch.autograd.backward(output_tensor, grad_tensors=output_tensor_grad)
    return None if input_tensor is None else input_tensor.grad


def forward_backward(forward_step_func, data_iterator, model, optimizer, timers, forward_only=False):
    """All micro-batches forward, then all backward; between stages activations and gradients are sent."""
    model, losses_reduced, kept = model[0], [], []
    for _ in range(get_num_microbatches()):
        input_tensor = receive_forward()
        kept.append((input_tensor, forward_step(forward_step_func, data_iterator, model, input_tensor, losses_reduced)))
        send_forward(kept[-1][1])
    for input_tensor, output_tensor in kept if not forward_only else ():
        gradient = backward_step(optimizer, input_tensor, output_tensor, receive_backward(output_tensor))
        send_backward(gradient)
    return losses_reduced


def get_forward_backward_func():
    return forward_backward


def _neighbour(step):
    return dist.get_global_rank(
        mpu.get_pipeline_model_parallel_group(), mpu.get_pipeline_model_parallel_rank() + step
    )  # fmt: skip


def receive_forward():
    if mpu.is_pipeline_first_stage():
        return None
    args = get_args()
    shape = (args.seq_length, args.micro_batch_size, args.hidden_size)
    tensor = torch.empty(shape, dtype=args.params_dtype, device=global_vars._DEVICE)
    dist.recv(tensor, _neighbour(-1))
    return tensor.requires_grad_()


def send_forward(output_tensor):
    if not mpu.is_pipeline_last_stage():
        dist.send(output_tensor.detach(), _neighbour(1))


def receive_backward(output_tensor):
    if mpu.is_pipeline_last_stage():
        return None
    gradient = torch.empty_like(output_tensor)
    dist.recv(gradient, _neighbour(1))
    return gradient


def send_backward(gradient):
    if not mpu.is_pipeline_first_stage():
        dist.send(gradient, _neighbour(-1))
