"""``import fmoe`` for code written for FastMoE."""

from __future__ import annotations

import sys

_OURS = __package__


def install() -> None:
    """Makes ``import fmoe`` and its submodules mean fastmoe_cpp.fmoe from here on. A second call changes nothing.

    Raises ImportError where FastMoE's own fmoe was imported before: its classes may be in use already.
    """
    present = sys.modules.get("fmoe")
    if present is not None and present is not sys.modules[_OURS]:
        raise ImportError(
            f"fmoe is imported already, from {getattr(present, '__file__', None) or 'another package'}: call "
            "fastmoe_cpp.fmoe.install() before the first import of fmoe"
        )
    for name in [n for n in sys.modules if n == _OURS or n.startswith(f"{_OURS}.")]:
        sys.modules["fmoe" + name.removeprefix(_OURS)] = sys.modules[name]


def uninstall() -> None:
    """Takes install() back: ``import fmoe`` finds an installed FastMoE again, or nothing. What was imported stays."""
    if sys.modules.get("fmoe") is not sys.modules[_OURS]:
        return
    for name in [n for n in sys.modules if n == "fmoe" or n.startswith("fmoe.")]:
        del sys.modules[name]
