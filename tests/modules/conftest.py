import pytest
from support import threads


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threads.one_thread():
        yield
