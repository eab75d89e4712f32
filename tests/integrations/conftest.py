import importlib.metadata
import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Models of a test's size gain nothing from a second thread and wait for it where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def require(package: str, series: str) -> None:
    """Skips the calling test file unless that release series of the package is installed.

    In an environment made for a host (FASTMOE_CPP_HOST is its name, such as transformers-4) whose package this is, it
    fails instead.
    """
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found.startswith(f"{series}."):
        return
    reason = f"needs {package} {series}, found {found}"
    if os.environ.get("FASTMOE_CPP_HOST") in (package, f"{package}-{series}"):
        raise RuntimeError(reason)
    pytest.skip(reason, allow_module_level=True)
