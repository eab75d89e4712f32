"""Reads the machine code of the Hopper kernels: each must multiply with HGMMA and keep its registers (no local memory).

python benchmarks/check_sass.py LIBRARY_OR_OBJECT [...]
Needs cuobjdump: on PATH, named by CUOBJDUMP, or in Triton's package.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def find_cuobjdump() -> str:
    named = os.environ.get("CUOBJDUMP") or shutil.which("cuobjdump")
    if named:
        return named
    spec = importlib.util.find_spec("triton")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        candidate = Path(folder) / "backends/nvidia/bin/cuobjdump"
        if candidate.exists():
            return str(candidate)
    raise SystemExit("cuobjdump: expected on PATH, in CUOBJDUMP or in Triton's package; found none")


def kernels_of(sass: str) -> dict[str, dict[str, int]]:
    """Instruction counts (HGMMA, local loads and stores) of every Hopper GEMM in a dump."""
    counts: dict[str, dict[str, int]] = {}
    present = None
    for line in sass.splitlines():
        if match := re.search(r"Function : (\S+)", line):
            name = match.group(1)
            ours = "4sm9012grouped_gemm" in name
            present = counts.setdefault(name, {"HGMMA": 0, "LDL": 0, "STL": 0}) if ours else None
        elif present is not None and (match := re.search(r"\*/\s+(?:@!?U?P\w+ )?(HGMMA|LDL|STL)\b", line)):
            present[match.group(1)] += 1
    return counts


def main(paths: list[str]) -> int:
    if not paths:
        raise SystemExit(__doc__)
    tool, seen, faults = find_cuobjdump(), 0, []
    for path in paths:
        dump = subprocess.run([tool, "-sass", path], capture_output=True, text=True)
        if dump.returncode != 0:
            raise SystemExit(f"{path}: cuobjdump failed: {dump.stderr.strip()}")
        for name, count in kernels_of(dump.stdout).items():
            seen += 1
            if count["HGMMA"] == 0 or count["LDL"] or count["STL"]:
                faults.append(f"{name}: {count}")
    print(f"{seen} Hopper GEMM kernels, {len(faults)} without HGMMA or with local memory")
    print("\n".join(faults))
    return 1 if faults or seen == 0 else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
