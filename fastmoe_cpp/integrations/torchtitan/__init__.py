"""TorchTitan's MoE layers on fastmoe_cpp's kernels.

TorchTitan 0.2 takes a model converter, in the job's TOML (the first line imports this package, which registers it)::

    [experimental]
    custom_import = "fastmoe_cpp.integrations.torchtitan"
    [model]
    converters = ["fastmoe_cpp"]

TorchTitan 0.3 takes an override, on its command line or in its configuration::

    --override.imports fastmoe_cpp.integrations.torchtitan.v0_3.fast_moe

Parameters, buffers, their names and their initialisation are TorchTitan's, so its checkpoints go both ways.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    version("torchtitan")
except PackageNotFoundError as error:
    raise ImportError(
        "fastmoe_cpp.integrations.torchtitan needs the package torchtitan (pip install torchtitan)"
    ) from error

SERIES = ".".join(version("torchtitan").split(".")[:2])

if SERIES == "0.2":
    from .v0_2 import FastMoEConverter, convert

    __all__ = ["FastMoEConverter", "convert"]
elif SERIES == "0.3":
    from .v0_3 import fast_moe

    __all__ = ["fast_moe"]
else:
    raise ImportError(f"fastmoe_cpp serves TorchTitan 0.2 and 0.3, found {version('torchtitan')}")
