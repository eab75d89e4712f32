"""Adapters that put fastmoe_cpp's layer into Megatron-LM and its relatives, one a version of the host.

An adapter will translate the host's arguments into a MoEConfig, stand in for its MLP or MoE layer, and return what that
layer returns. No adapter is available yet. ``get_adapter`` refuses every version by name: a version it plans for as not
available yet, any other as unknown, so that nobody runs a host with an adapter made for another version of it.

    get_adapter("v3.0.2")
"""

from __future__ import annotations

from types import ModuleType

#: What an adapter is planned for, by the name get_adapter takes.
PLANNED: dict[str, str] = {
    "v2.2": "Megatron-LM v2.2",
    "v2.5": "Megatron-LM v2.5",
    "v3.0.2": "Megatron-LM v3.0.2",
    "core": "Megatron-Core",
    "gpt-neox": "GPT-NeoX",
}

__all__ = ["PLANNED", "UnsupportedVersionError", "get_adapter"]


class UnsupportedVersionError(ValueError):
    """There is no adapter for the version that was asked for."""


def get_adapter(version: str) -> ModuleType:
    """The adapter of a version named as in ``PLANNED``.

    Raises UnsupportedVersionError, one sentence with the version, the planned ones and what is available, for every
    version today; TypeError where version is not a string.
    """
    if not isinstance(version, str):
        raise TypeError(f"version must be a string such as 'v3.0.2', got {type(version).__name__}")
    planned = ", ".join(repr(name) for name in PLANNED)
    if version in PLANNED:
        raise UnsupportedVersionError(
            f"the adapter for {PLANNED[version]} ({version!r}) is planned and not available yet; no adapter is"
        )
    raise UnsupportedVersionError(
        f"version {version!r} is not one that megatron_adapters knows: planned are {planned}, and none is available yet"
    )
