from pathlib import Path

import pytest
from support import threads


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    with threads.one_thread():
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Thirty text files, and one that is not text."""
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        lines = [f"def f{i}(x):\n    return x * {i * number} + {i % 7}\n" for i in range(60)]
        (folder / f"file{number:02}.py").write_text("\n".join(lines))
    (folder / "picture.bin").write_bytes(bytes(range(256)))
    return folder
