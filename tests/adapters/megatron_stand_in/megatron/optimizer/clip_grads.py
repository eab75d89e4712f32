"""The host's clipping, which must not be met where an adapter is installed."""


def clip_grad_norm_fp32(parameters, max_norm, norm_type=2):
    raise AssertionError("the host's own clipping was called")
