"""What every test shares: the `device` fixture (the CPU, and a GPU where one is visible and the library has its CUDA
half), and a hypothesis profile that draws the same examples every run."""

import hypothesis
import pytest
import torch

from fastmoe_cpp import _extension

hypothesis.settings.register_profile(
    "fastmoe_cpp", deadline=None, derandomize=True, max_examples=25, database=None, print_blob=True
)
hypothesis.settings.load_profile("fastmoe_cpp")


def has_cuda() -> bool:
    """A GPU is visible and the compiled library has kernels for it."""
    return torch.cuda.is_available() and bool((_extension.build_record() or {}).get("cuda"))


DEVICES = ["cpu"] + ([pytest.param("cuda", marks=pytest.mark.cuda)] if has_cuda() else [])


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: needs a CUDA GPU")


def pytest_collection_modifyitems(items):
    if has_cuda():
        return
    skip = pytest.mark.skip(reason="no GPU is visible, or fastmoe_cpp was built without CUDA")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=DEVICES)
def device(request) -> str:
    return request.param


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def shared_gpu(request):
    """Several processes test on one GPU: none keeps gigabytes in its allocator's cache after a test."""
    yield
    if "cuda" in request.keywords and has_cuda() and torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()
