"""Adapters that put fastmoe_cpp's layer into Megatron-LM and its relatives, one a version of the host.

An adapter translates the host's arguments into a MoEConfig, has the layer for the host's ``mlp`` slot, and returns on
every path what the host expects there.

    get_adapter("3.0.2")    # or "v3.0.2"
    get_adapter()           # the adapter of the Megatron that ``import megatron`` would find
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

#: The adapters' modules by the name get_adapter takes.
ADAPTERS: dict[str, str] = {
    "2.2": "megatron_v2_2",
    "2.5": "megatron_v2_5",
    "3.0.2": "megatron_v3_0_2",
    "core": "megatron_core",
    "neox": "gpt_neox",
}
#: The hosts' names.
HOSTS: dict[str, str] = {
    "2.2": "Megatron-LM v2.2",
    "2.5": "Megatron-LM v2.5",
    "3.0.2": "Megatron-LM v3.0.2",
    "core": "Megatron-Core",
    "neox": "GPT-NeoX",
}
_SPELLINGS = {"megatron-core": "core", "mcore": "core", "gpt-neox": "neox", "gptneox": "neox"}

__all__ = ["ADAPTERS", "HOSTS", "UnsupportedVersionError", "detect_version", "get_adapter"]


class UnsupportedVersionError(ValueError):
    """There is no adapter for the version that was asked for or found."""


def get_adapter(version: str | None = None) -> ModuleType:
    """The adapter of a version named as in ``ADAPTERS`` ("v2.5" and "gpt-neox" are taken too), imported when asked for.

    Without a version, that of the installed Megatron (``detect_version``). Raises UnsupportedVersionError, one sentence
    with the version and the known ones, for any other version; TypeError where version is not a string.
    """
    if version is None:
        version = detect_version()
    if not isinstance(version, str):
        raise TypeError(f"version must be a string such as '3.0.2', got {type(version).__name__}")
    name = version.strip().lower().replace("_", "-")
    name = _SPELLINGS.get(name, name)
    if name[:1] == "v" and name[1:2].isdigit():
        name = name[1:]
    if name not in ADAPTERS:
        raise UnsupportedVersionError(f"version {version!r} has no adapter: the known ones are {_known()}")
    return importlib.import_module(f"{__name__}.{ADAPTERS[name]}")


def _known() -> str:
    return ", ".join(f"{name!r} ({HOSTS[name]})" for name in ADAPTERS)


def detect_version(root: str | os.PathLike[str] | None = None) -> str:
    """The name, as in ``ADAPTERS``, of the Megatron in a checkout or, without one, of what ``import megatron`` finds.

    Nothing of the host is imported: its files are told apart by the interfaces an adapter plugs into. A Megatron-LM of
    another release whose interfaces are those of one of the three passes for it. Raises UnsupportedVersionError where
    there is no Megatron or none of these interfaces.
    """
    if root is None:
        spec = importlib.util.find_spec("megatron")
        places: Iterable[str] = [] if spec is None else spec.submodule_search_locations or []
        folders = [Path(place) for place in places]
        if not folders:
            raise UnsupportedVersionError(
                f"no Megatron found: `import megatron` has nothing to import; name one of {_known()}"
            )
    else:
        folders = [Path(root) / "megatron"]
        if not folders[0].is_dir():
            raise UnsupportedVersionError(f"no Megatron found: {folders[0]} is not a folder")
    for folder in folders:
        found = _version_of(folder)
        if found is not None:
            return found
    raise UnsupportedVersionError(
        f"the Megatron in {', '.join(map(str, folders))} has the interfaces of none of {_known()}"
    )


def _version_of(folder: Path) -> str | None:
    def text(*parts: str) -> str:
        path = folder.joinpath(*parts)
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""

    if (folder / "neox_arguments").is_dir():
        return "neox"
    if (folder / "core" / "transformer" / "moe" / "moe_layer.py").is_file():
        return "core"
    layer, schedules = text("model", "transformer.py"), text("schedules.py")
    if "class ParallelTransformerLayer" not in layer:
        return None
    if not schedules:  # the schedule is inside training.py
        return "2.2" if "forward_step_func(data_iterator, model, input_tensor)" in text("training.py") else None
    # as it is, or as FastMoE patches it
    if not re.search(r"output_tensor, loss_func(, bal_loss)? = forward_step_func\(data_iterator, model\)", schedules):
        return None
    return "3.0.2" if "class SwitchMLP" in layer else "2.5"
