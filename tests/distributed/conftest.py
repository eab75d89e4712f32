"""The `backend` fixture: gloo with processes on the CPU, and NCCL where there are two GPUs and kernels for them."""

import pytest
import torch

from fastmoe_cpp import _extension


def gpus() -> int:
    """GPUs that the compiled library has kernels for."""
    return torch.cuda.device_count() if (_extension.build_record() or {}).get("cuda") else 0


@pytest.fixture(params=["gloo"] + ([pytest.param("nccl", marks=pytest.mark.cuda)] if gpus() > 1 else []))
def backend(request) -> str:
    return request.param


@pytest.fixture
def enough(backend):
    """Skips a number of ranks for which there are too few GPUs."""

    def check(ranks: int) -> None:
        if backend == "nccl" and ranks > gpus():
            pytest.skip(f"{ranks} ranks need {ranks} GPUs under NCCL, there are {gpus()}")

    return check
