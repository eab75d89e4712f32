"""``import fmoe`` for code written for FastMoE."""

from __future__ import annotations

import sys

from . import native

_OURS = __package__


def install() -> None:
    """Makes ``import fmoe`` and its submodules mean fastmoe_cpp.fmoe from here on. A second call changes nothing.

    ``import fmoe_cuda`` gets what gates call of FastMoE's native module. Raises ImportError where FastMoE's own fmoe
    or fmoe_cuda was imported before: its classes may be in use already.
    """
    for name, ours in (("fmoe", sys.modules[_OURS]), ("fmoe_cuda", native)):
        present = sys.modules.get(name, ours)
        if present is not ours:
            raise ImportError(
                f"{name} is imported already, from {getattr(present, '__file__', None) or 'another package'}: call "
                f"fastmoe_cpp.fmoe.install() before the first import of {name}"
            )
    for name in [n for n in sys.modules if n == _OURS or n.startswith(f"{_OURS}.")]:
        sys.modules["fmoe" + name.removeprefix(_OURS)] = sys.modules[name]
    sys.modules["fmoe_cuda"] = native


def uninstall() -> None:
    """Takes install() back: ``import fmoe`` finds an installed FastMoE again, or nothing. What was imported stays."""
    if sys.modules.get("fmoe") is not sys.modules[_OURS]:
        return
    for name in [n for n in sys.modules if n == "fmoe" or n.startswith("fmoe.")]:
        del sys.modules[name]
    if sys.modules.get("fmoe_cuda") is native:
        del sys.modules["fmoe_cuda"]
