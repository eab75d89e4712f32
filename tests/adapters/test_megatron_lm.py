"""The adapters of Megatron-LM v2.2, v2.5 and v3.0.2 in their hosts, on one rank and on two (gloo).

The checks are in megatron_*_checks.py. They run in processes of their own, once a host:
against a stand-in that keeps the host's contracts, and against the host's own code where FASTMOE_CPP_MEGATRON_LM_2_2,
..._2_5 or ..._3_0_2 names a checkout of it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
VERSIONS = ("2.2", "2.5", "3.0.2")


def _names(*files: str) -> list[str]:
    """The checks in files, without importing them: they need their host."""
    return [name for file in files for name in re.findall(r"(?m)^@check\ndef (\w+)", (HERE / file).read_text())]


ONE_RANK = _names("megatron_layer_checks.py", "megatron_schedule_checks.py", "megatron_training_checks.py")
TWO_RANKS = _names("megatron_rank_checks.py")


def _source(version: str, kind: str) -> str:
    if kind == "stand-in":
        return kind
    variable = "FASTMOE_CPP_MEGATRON_LM_" + version.replace(".", "_")
    if variable not in os.environ:
        pytest.skip(f"{variable} names no checkout of Megatron-LM v{version}")
    return os.environ[variable]


def _environment(**given: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    return {**kept, "OMP_NUM_THREADS": "1", **given}


def _start(program: str, *inputs: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(HERE / program), *inputs],
        env=_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(process: subprocess.Popen) -> None:
    try:
        shown = process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        shown = process.communicate()[0] + "\nit took more than 240 s"
    assert process.returncode == 0, shown[-4000:]


@functools.cache
def _one_rank(version: str, source: str) -> dict[str, str | None]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "results.json"
        _finish(_start("megatron_checks.py", version, source, str(output)))
        return json.loads(output.read_text())


@functools.cache
def _two_ranks(version: str, source: str) -> list[dict[str, str | None]]:
    program = "megatron_rank_checks.py"
    with tempfile.TemporaryDirectory() as folder, socket.socket() as port:
        _finish(_start(program, version, source, folder))
        port.bind(("127.0.0.1", 0))
        number = str(port.getsockname()[1])
        port.close()
        world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": number}
        ranks = [_start(program, version, source, folder, RANK=str(rank), **world) for rank in range(2)]
        for process in ranks:
            _finish(process)
        return [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ONE_RANK)
@pytest.mark.parametrize("kind", ["stand-in", "checkout"])
@pytest.mark.parametrize("version", VERSIONS)
def test_on_one_rank(version: str, kind: str, name: str) -> None:
    failure = _one_rank(version, _source(version, kind))[name]
    assert failure is None, failure


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", TWO_RANKS)
@pytest.mark.parametrize("kind", ["stand-in", "checkout"])
@pytest.mark.parametrize("version", VERSIONS)
def test_on_two_ranks(version: str, kind: str, name: str) -> None:
    for rank, results in enumerate(_two_ranks(version, _source(version, kind))):
        failure = results.get(name, "an earlier check failed")
        assert failure is None, f"rank {rank}: {failure}"
