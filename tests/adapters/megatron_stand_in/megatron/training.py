"""Building and training, with each version's signatures; v2.2's schedules are here."""

import torch
import torch.distributed as dist

from . import VERSION, get_args, get_num_microbatches, get_timers, global_vars, mpu
from .arguments import parse_args
from .checkpointing import load_checkpoint, save_checkpoint  # noqa: F401
from .model import DistributedDataParallel as LocalDDP
from .model import Float16Module
from .optimizer import get_megatron_optimizer
from .schedules import backward_step, receive_backward, receive_forward, send_backward, send_forward

if VERSION != "2.2":
    from .schedules import get_forward_backward_func


class Scheduler:
    """A constant learning rate."""

    steps = 0

    def step(self, increment):
        self.steps += increment

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state_dict):
        self.steps = state_dict["steps"]


def get_model(model_provider_func):
    args = get_args()
    first, last = mpu.is_pipeline_first_stage(), mpu.is_pipeline_last_stage()
    model = model_provider_func() if VERSION == "2.2" else model_provider_func(pre_process=first, post_process=last)
    model.to(global_vars._DEVICE)
    for parameter in model.parameters():
        mpu.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    if args.fp16 or getattr(args, "bf16", False):
        model = Float16Module(model, args)
    if VERSION == "2.2":
        return LocalDDP(model)
    contiguous = "use_contiguous_buffers_in_ddp" if VERSION == "2.5" else "use_contiguous_buffers_in_local_ddp"
    return [LocalDDP(model, args.accumulate_allreduce_grads_in_fp32, getattr(args, contiguous))]


def setup_model_and_optimizer(model_provider_func, model_type=None):
    assert (model_type is not None) == (VERSION == "3.0.2")
    args = get_args()
    model = get_model(model_provider_func)
    unwrapped = model if VERSION == "2.2" else model[0]
    while isinstance(unwrapped, LocalDDP | Float16Module):
        unwrapped = unwrapped.module
    optimizer = get_megatron_optimizer(unwrapped if VERSION == "2.2" else [unwrapped])
    scheduler = Scheduler()
    args.iteration = 0
    if args.load is not None:
        dist.barrier()
        args.iteration = load_checkpoint(model, optimizer, scheduler)
        dist.barrier()
    return model, optimizer, scheduler


def _v2_2_schedule(forward_step_func, data_iterator, model, optimizer, timers):
    """forward_step takes the stage's input and returns (loss, reduced) on the last stage, a tensor on others."""
    losses_reduced, kept = [], []
    for _ in range(get_num_microbatches()):
        input_tensor = receive_forward()
        output_tensor = forward_step_func(data_iterator, model, input_tensor)
        if mpu.is_pipeline_last_stage():
            loss, reduced = output_tensor
            output_tensor = loss / get_num_microbatches()
            losses_reduced.append(reduced)
        send_forward(output_tensor)
        kept.append((input_tensor, output_tensor))
    for input_tensor, output_tensor in kept:
        send_backward(backward_step(optimizer, input_tensor, output_tensor, receive_backward(output_tensor)))
    return losses_reduced


forward_backward_no_pipelining = forward_backward_pipelining = _v2_2_schedule


def train_step(forward_step_func, data_iterator, model, optimizer, lr_scheduler):
    args = get_args()
    if VERSION == "2.2":
        optimizer.zero_grad()
        losses_reduced = _v2_2_schedule(forward_step_func, data_iterator, model, optimizer, get_timers())
        model.allreduce_params(reduce_after=False, fp32_allreduce=args.fp32_allreduce)
        updated = optimizer.step()
        rest = ()
    else:
        if model[0].use_contiguous_buffers:
            model[0].zero_grad_buffer()
        optimizer.zero_grad()
        run = get_forward_backward_func()
        losses_reduced = run(forward_step_func, data_iterator, model, optimizer, get_timers(), forward_only=False)
        model[0].allreduce_gradients()
        updated, *rest = optimizer.step()
    if updated:
        lr_scheduler.step(increment=1)
    reduced = {}
    for key in losses_reduced[0] if losses_reduced else ():
        reduced[key] = sum(losses[key] for losses in losses_reduced) / len(losses_reduced)
    return (reduced, 0 if updated else 1, *rest)


def _pretrain(model_provider, model_type, forward_step_func, extra_args_provider):
    state, (seed, samples) = global_vars, (1, 4)
    state._GLOBAL_ARGS = args = parse_args(extra_args_provider)
    state._build_num_microbatches_calculator(args)
    mpu.initialize_model_parallel(args.tensor_model_parallel_size, args.pipeline_model_parallel_size)
    torch.manual_seed(seed)
    args.padded_vocab_size = 32
    tokens = torch.randint(32, (samples, args.seq_length + 1))
    model = setup_model_and_optimizer(model_provider, *([] if model_type is None else [model_type]))
    for iteration in range(args.train_iters):
        losses = train_step(forward_step_func, iter([tokens] * get_num_microbatches()), *model)[0]
        print(f"iteration {iteration}", {name: round(float(loss), 4) for name, loss in losses.items()})


if VERSION == "3.0.2":

    def pretrain(
        train_valid_test_dataset_provider, model_provider, model_type, forward_step_func,
        process_non_loss_data_func=None, extra_args_provider=None, args_defaults={},  # noqa: B006
    ):  # fmt: skip
        _pretrain(model_provider, model_type, forward_step_func, extra_args_provider)

else:

    def pretrain(
        train_valid_test_dataset_provider, model_provider, forward_step_func, extra_args_provider=None,
        args_defaults={},  # noqa: B006
    ):  # fmt: skip
        _pretrain(model_provider, None, forward_step_func, extra_args_provider)
