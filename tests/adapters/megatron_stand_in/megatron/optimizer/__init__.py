"""The host's optimizers: Adam over float32 parameters, or over float32 copies of 16-bit ones, with a loss scale."""

import torch
import torch.distributed as dist

from .. import VERSION, get_args, global_vars, mpu
from .clip_grads import clip_grad_norm_fp32  # replaced by install()

_KIND = "fp16" if VERSION == "2.2" else "float16"
_HALVES = (f"{_KIND}_groups", f"fp32_from_{_KIND}_groups")


class FP32Optimizer:
    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.clip_grad = get_args().clip_grad

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def get_loss_scale(self):
        return torch.ones(1, device=global_vars._DEVICE)

    def scale_loss(self, loss):
        return self.get_loss_scale() * loss

    def model_parameters(self):
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def zero_grad(self):
        for parameter in self.model_parameters():
            parameter.grad = None

    def reload_model_params(self):
        pass

    def _found_inf(self):
        return False

    def _gradient(self, parameter):
        return parameter.grad if VERSION == "2.2" else parameter.main_grad

    def copy_gradients(self):
        for parameter in self.model_parameters():
            parameter.grad = self._gradient(parameter)

    @torch.no_grad()
    def step(self):
        self.copy_gradients()
        if self._found_inf():
            return (False, None, None) if VERSION != "2.2" else False
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        norm = clip_grad_norm_fp32(parameters, self.clip_grad)
        self.optimizer.step()
        self.copy_parameters()
        return (True, norm, None) if VERSION != "2.2" else True

    def copy_parameters(self):
        pass

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)


class Float16Optimizer(FP32Optimizer):
    def __init__(self, optimizer):
        super().__init__(optimizer)
        args = get_args()
        self.dynamic = args.loss_scale is None and args.fp16
        scale = args.loss_scale or (args.initial_loss_scale if args.fp16 else 1.0)
        self.scale = torch.tensor([scale], device=global_vars._DEVICE)
        self.found_inf = torch.zeros(1, device=global_vars._DEVICE)
        halves, mains = [], []
        for group in optimizer.param_groups:
            halves.append(list(group["params"]))
            for i, parameter in enumerate(group["params"]):
                main = parameter.detach().clone().float()
                main.tensor_model_parallel = parameter.tensor_model_parallel
                group["params"][i] = main
            mains.append(list(group["params"]))
        setattr(self, _HALVES[0], halves)
        setattr(self, _HALVES[1], mains)

    def pairs(self):
        for halves, mains in zip(*(getattr(self, name) for name in _HALVES), strict=True):
            yield from zip(halves, mains, strict=True)

    def model_parameters(self):
        return [half for half, _ in self.pairs()]

    def get_loss_scale(self):
        return self.scale

    def copy_gradients(self):
        for half, main in self.pairs():
            gradient = self._gradient(half)
            main.grad = None if gradient is None else gradient.float()

    def _unscale_main_grads_and_check_for_nan(self):
        gradients = [main.grad for _, main in self.pairs() if main.grad is not None]
        self.found_inf.fill_(float(any(not gradient.isfinite().all() for gradient in gradients)))
        for gradient in gradients:
            gradient /= self.scale
        dist.all_reduce(self.found_inf, op=dist.ReduceOp.MAX, group=mpu.get_model_parallel_group())
        return self.found_inf.item() > 0

    def _found_inf(self):
        found = self._unscale_main_grads_and_check_for_nan()
        if found and self.dynamic:
            self.scale = self.scale / 2
        return found

    @torch.no_grad()
    def copy_parameters(self):
        for half, main in self.pairs():
            half.copy_(main)

    @torch.no_grad()
    def reload_model_params(self):
        for half, main in self.pairs():
            main.copy_(half)

    def state_dict(self):
        return {
            "optimizer": self.optimizer.state_dict(),
            "scale": self.scale,
            "fp32_from_fp16_params": getattr(self, _HALVES[1]),
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scale = state_dict["scale"]
        for group, saved in zip(getattr(self, _HALVES[1]), state_dict["fp32_from_fp16_params"], strict=True):
            for main, tensor in zip(group, saved, strict=True):
                main.copy_(tensor)


def get_megatron_optimizer(model):
    args = get_args()
    modules = model if isinstance(model, list) else [model]
    named = [item for module in modules for item in module.named_parameters()]
    groups = [
        {"params": [parameter for name, parameter in named if not name.endswith("bias")]},
        {"params": [parameter for name, parameter in named if name.endswith("bias")], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=args.lr, eps=args.adam_eps)
    half = args.fp16 or getattr(args, "bf16", False)
    return (Float16Optimizer if half else FP32Optimizer)(adam)
