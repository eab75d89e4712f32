"""Runs a host's script with our MoE layers: ``python -m megatron_adapters pretrain_gpt.py --fmoefy ...``.

The adapter is that of the Megatron found in the current folder, the script's or on the path; ``--host 2.5`` before the
script names another.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import UnsupportedVersionError, get_adapter

USAGE = "usage: python -m megatron_adapters [--host 2.2|2.5|3.0.2|core|neox] SCRIPT [ARGUMENTS OF THE SCRIPT]"


def main(argv: list[str]) -> None:
    """Installs the adapter and runs the script as __main__."""
    version = None
    if len(argv) > 1 and argv[0] == "--host":
        version, argv = argv[1], argv[2:]
    if not argv or argv[0].startswith("-"):
        sys.exit(USAGE)
    script = Path(argv[0])
    if not script.is_file():
        sys.exit(f"the script must be a file, {script} is none\n{USAGE}")
    sys.path.insert(0, str(script.resolve().parent))
    try:
        adapter = get_adapter(version)
    except (UnsupportedVersionError, ImportError) as error:
        sys.exit(str(error))
    adapter.install()
    sys.argv = argv
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
