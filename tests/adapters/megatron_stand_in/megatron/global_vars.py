"""What the host keeps for the whole process, and the device that stands for its GPU."""

_GLOBAL_ARGS = None
_GLOBAL_NUM_MICROBATCHES_CALCULATOR = None
_GLOBAL_TIMERS = None
_DEVICE = "cpu"


class Timers:
    """Nothing is measured here."""


def get_args():
    assert _GLOBAL_ARGS is not None, "args is not initialized."
    return _GLOBAL_ARGS


def get_timers():
    return _GLOBAL_TIMERS


def get_num_microbatches():
    return _GLOBAL_NUM_MICROBATCHES_CALCULATOR


def _build_num_microbatches_calculator(args):
    global _GLOBAL_NUM_MICROBATCHES_CALCULATOR
    _GLOBAL_NUM_MICROBATCHES_CALCULATOR = args.global_batch_size // (args.micro_batch_size * args.data_parallel_size)
