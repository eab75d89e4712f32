"""A wheel of the tree, built over the objects of the last build and installed into a folder, once a session."""

from __future__ import annotations

import pytest
from packaging_support import ROOT, Wheel, run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Wheel:
    folder = tmp_path_factory.mktemp("wheel")
    built = run("-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, ROOT)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    (file,) = folder.glob("*.whl")
    site = folder / "site"
    installed = run("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, file)
    assert installed.returncode == 0, installed.stderr
    return Wheel(file, site)
