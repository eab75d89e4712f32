"""One rank without a GPU for every test here."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_rank():
    from .host import MoEAuxLossAutoScaler, ranks, without_gpu

    with without_gpu(), ranks():
        yield
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
