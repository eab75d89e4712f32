"""Breaks the library on purpose, one break at a time, and reports which breaks the tests catch.

    python tests/mutants/run.py                     every mutant (tens of minutes: most need a rebuild)
    python tests/mutants/run.py ties_to_the_higher_id gate_and_up_swapped
    python tests/mutants/run.py --list

Works on a copy of the tree, built in place there for the CPU. Exits with 1 if a mutant survives, does not apply or does
not build, and with 2 if the tests fail without any break.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from mutants import MUTANTS, Mutant, check_applies  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
COPIED = (
    "csrc", "fastmoe_cpp", "megatron_adapters", "examples", "tests", "cmake",
    "setup.py", "pyproject.toml", "README.md", "LICENSE",
)  # fmt: skip
LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "_build.py", "include", "share")


def run(command: list[str], tree: Path, limit: float) -> tuple[int | None, str]:
    """Exit status (None: it ran past the limit) and output."""
    try:
        done = subprocess.run(
            command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=limit,
            env=os.environ | {"FORCE_CUDA": "0", "PYTHONPATH": str(tree)},
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        return None, (late.stdout or b"").decode(errors="replace")
    return done.returncode, done.stdout


def build(tree: Path) -> str | None:
    """None, or the compiler's output if it failed."""
    status, output = run([sys.executable, "setup.py", "build_ext", "--inplace"], tree, 3600)
    return None if status == 0 else output


def test(tree: Path, arguments: str, limit: float) -> tuple[str, str]:
    """'passed', 'failed', 'hung' or 'broken' (no test ran), and the output."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *shlex.split(arguments),
    ]
    status, output = run(command, tree, limit)
    # a crash of the interpreter is noticed as well
    return {None: "hung", 0: "passed", 2: "broken", 3: "broken", 4: "broken", 5: "broken"}.get(status, "failed"), output


def copy_changed(source: str | Path, target: str | Path) -> None:
    """Copies a file of other content alone: the build compiles what is newer than its object, in a tree used again too,
    whose last build was of a break."""
    if not Path(target).exists() or Path(target).read_bytes() != Path(source).read_bytes():
        shutil.copy(source, target)


def compiled(mutant: Mutant) -> bool:
    return mutant.file.startswith("csrc/")


def attempt(mutant: Mutant, tree: Path, limit: float) -> tuple[str, str]:
    """'caught', 'SURVIVED', 'DOES NOT APPLY', 'DOES NOT BUILD' or 'BROKEN', and the output or the test that noticed."""
    path = tree / mutant.file
    original = path.read_text()
    try:
        check_applies(mutant, original)
    except ValueError as error:
        return "DOES NOT APPLY", str(error)
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        if compiled(mutant) and (output := build(tree)):
            return "DOES NOT BUILD", output
        result, output = test(tree, mutant.tests, limit)
    finally:
        path.write_text(original)
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    if result in ("failed", "hung"):
        return "caught", failed[0].removeprefix("FAILED ").split(" - ")[0] if failed else f"({result})"
    return {"passed": "SURVIVED", "broken": "BROKEN"}[result], output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="mutant")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests")
    parser.add_argument("--tree", type=Path, help="folder of the copy, kept and used again (default: a temporary one)")
    parser.add_argument("--limit", type=float, default=900, help="seconds one test run may take (default 900)")
    options = parser.parse_args()
    unknown = set(options.names) - {m.name for m in MUTANTS}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    # the breaks of Python first, on the library as it is: after the others it is that of the last break
    chosen = sorted((m for m in MUTANTS if not options.names or m.name in options.names), key=compiled)
    if options.list:
        for m in chosen:
            print(f"{m.name:45} {m.file:35} {m.tests}")
        return 0
    temporary = None if options.tree else tempfile.TemporaryDirectory(prefix="mutants")
    tree = options.tree or Path(temporary.name)
    for name in COPIED:
        source, target = ROOT / name, tree / name
        if source.is_dir():
            # what is gone from the source must not stay in a tree used again
            keep = {p.relative_to(source) for p in source.rglob("*")}
            for old in sorted(target.rglob("*"), reverse=True) if target.exists() else ():
                if old.is_file() and old.suffix != ".so" and old.relative_to(target) not in keep:
                    old.unlink()
            shutil.copytree(source, target, ignore=LEFT_OUT, dirs_exist_ok=True, copy_function=copy_changed)
        elif source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            copy_changed(source, target)
    print(f"building {tree}", flush=True)
    if output := build(tree):
        print(output)
        return 2
    for tests in sorted({m.tests for m in chosen}):
        result, output = test(tree, tests, options.limit)
        print(f"without a break: {result:8} {tests}", flush=True)
        if result != "passed":
            print(output)
            return 2
    results = {}
    for m in chosen:
        began = time.monotonic()
        results[m.name], detail = attempt(m, tree, options.limit)
        caught = results[m.name] == "caught"
        print(
            f"{results[m.name]:15} {m.name:45} {time.monotonic() - began:5.0f} s  {detail if caught else ''}",
            flush=True,
        )
        if not caught:
            print("\n".join("    " + line for line in detail.splitlines()[-25:]), flush=True)
    caught = sum(r == "caught" for r in results.values())
    print(f"{caught} of {len(results)} mutants caught")
    return 0 if caught == len(results) else 1


if __name__ == "__main__":
    sys.exit(main())
