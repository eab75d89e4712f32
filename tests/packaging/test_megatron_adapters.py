"""Every version is refused by name, planned ones as not available yet."""

from __future__ import annotations

import pytest

from megatron_adapters import PLANNED, UnsupportedVersionError, get_adapter


@pytest.mark.parametrize("version", PLANNED)
def test_planned_versions_are_refused_as_not_available_yet(version: str) -> None:
    with pytest.raises(UnsupportedVersionError) as refused:
        get_adapter(version)
    assert repr(version) in str(refused.value) and "planned and not available yet" in str(refused.value)


@pytest.mark.parametrize("version", ["v2.3", "3.0.2", "", "latest"])
def test_unknown_versions_are_refused_with_the_planned_ones(version: str) -> None:
    with pytest.raises(UnsupportedVersionError) as refused:
        get_adapter(version)
    message = str(refused.value)
    assert repr(version) in message and "none is available yet" in message
    assert all(repr(known) in message for known in PLANNED)


def test_a_version_is_a_string() -> None:
    with pytest.raises(TypeError, match=r"version must be a string such as 'v3\.0\.2', got float"):
        get_adapter(2.2)  # type: ignore[arg-type]
