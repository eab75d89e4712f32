import importlib.metadata
import os

import pytest
from support import threads


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threads.one_thread():
        yield


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
