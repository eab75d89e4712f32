"""This Python in a process of its own, on the source tree or on an installed wheel."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*command: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs this Python; FASTMOE's own variables of the caller stay out of the way."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)


@dataclass(frozen=True)
class Wheel:
    file: Path
    #: Where it is installed.
    site: Path

    def run(self, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
        """This Python with the installed wheel before everything else, in a folder that is not the source tree."""
        return run(*command, cwd=self.site.parent, PYTHONPATH=str(self.site), **variables)
