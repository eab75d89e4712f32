"""What must hold of an adapter in its host, on one rank.

As a program: ``megatron_checks.py VERSION (CHECKOUT | stand-in) OUTPUT`` runs the checks of megatron_layer_checks.py,
megatron_schedule_checks.py and megatron_training_checks.py in one process and writes {check: None or its traceback} as
JSON.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from megatron_compare import CHECKS
from megatron_host import Host, open_world, prepare


def main(version: str, source: str, output: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    prepare(version, source)
    open_world()
    import megatron_layer_checks  # noqa: F401
    import megatron_schedule_checks  # noqa: F401
    import megatron_training_checks  # noqa: F401

    host = Host(version)
    uninstall = host.adapter.install()
    only = os.environ.get("CHECK")
    results = {}
    for name, function in CHECKS.items():
        if only and name != only:
            continue
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                function(host)
            results[name] = None
        except (Exception, SystemExit):
            results[name] = traceback.format_exc()
    uninstall()
    Path(output).write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
