import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """Layers of a test's size gain nothing from a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
