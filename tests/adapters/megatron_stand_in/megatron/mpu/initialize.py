"""The process groups: tensor-parallel ranks are neighbours, then data-parallel ones, then pipeline stages."""

import torch.distributed as dist

_TENSOR_MODEL_PARALLEL_GROUP = None
_PIPELINE_MODEL_PARALLEL_GROUP = None
_MODEL_PARALLEL_GROUP = None
_DATA_PARALLEL_GROUP = None


def initialize_model_parallel(tensor_size=1, pipeline_size=1):
    global _TENSOR_MODEL_PARALLEL_GROUP, _PIPELINE_MODEL_PARALLEL_GROUP, _MODEL_PARALLEL_GROUP, _DATA_PARALLEL_GROUP
    assert _DATA_PARALLEL_GROUP is None, "the groups are initialized already"
    world, mine = dist.get_world_size(), dist.get_rank()
    data_size = world // (tensor_size * pipeline_size)

    def place(rank):
        return rank // (tensor_size * data_size), rank // tensor_size % data_size, rank % tensor_size

    def group(*same):
        """The group of ranks that agree with this one on the given coordinates; every rank makes every group."""
        found = None
        for key in sorted({tuple(place(rank)[i] for i in same) for rank in range(world)}):
            ranks = [rank for rank in range(world) if tuple(place(rank)[i] for i in same) == key]
            made = dist.new_group(ranks)
            found = made if mine in ranks else found
        return found

    _DATA_PARALLEL_GROUP = group(0, 2)
    _TENSOR_MODEL_PARALLEL_GROUP = group(0, 1)
    _PIPELINE_MODEL_PARALLEL_GROUP = group(1, 2)
    _MODEL_PARALLEL_GROUP = group(1)


def get_data_parallel_group():
    return _DATA_PARALLEL_GROUP


def get_model_parallel_group():
    return _MODEL_PARALLEL_GROUP


def get_tensor_model_parallel_group():
    return _TENSOR_MODEL_PARALLEL_GROUP


def get_pipeline_model_parallel_group():
    return _PIPELINE_MODEL_PARALLEL_GROUP


def get_data_parallel_rank():
    return dist.get_rank(_DATA_PARALLEL_GROUP)


def get_data_parallel_world_size():
    return dist.get_world_size(_DATA_PARALLEL_GROUP)


def get_tensor_model_parallel_rank():
    return dist.get_rank(_TENSOR_MODEL_PARALLEL_GROUP)


def get_tensor_model_parallel_world_size():
    return dist.get_world_size(_TENSOR_MODEL_PARALLEL_GROUP)


def get_pipeline_model_parallel_rank():
    return dist.get_rank(_PIPELINE_MODEL_PARALLEL_GROUP)


def get_pipeline_model_parallel_world_size():
    return dist.get_world_size(_PIPELINE_MODEL_PARALLEL_GROUP)


def is_pipeline_first_stage():
    return get_pipeline_model_parallel_rank() == 0


def is_pipeline_last_stage():
    return get_pipeline_model_parallel_rank() == get_pipeline_model_parallel_world_size() - 1
