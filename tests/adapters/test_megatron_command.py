"""``python -m megatron_adapters SCRIPT``: a script of the host, unchanged, with MoE layers."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

#: What a script of the host looks like: it knows nothing of experts.
SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from megatron.training import pretrain
import megatron_host
megatron_host.open_world()
host = megatron_host.Host({version!r})
kind = [host.module("model").ModelType.encoder_or_decoder] if host.version == "3.0.2" else []
pretrain(None, host.provider(), *kind, host.forward_step(), args_defaults={{}})
"""
ARGUMENTS = (
    "--num-layers 2 --hidden-size 16 --max-position-embeddings 8 --seq-length 8 --train-iters 3 --lr 0.01 "
    "--micro-batch-size 2 --global-batch-size 4"
).split()


def run(folder: Path, version: str, *argv: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(HERE / "megatron_stand_in"), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "megatron_adapters", *argv],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, "MEGATRON_STAND_IN": version, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("version", ["2.2", "2.5", "3.0.2"])
def test_a_script_trains_experts_unchanged(version: str, tmp_path: Path) -> None:
    script = tmp_path / "pretrain_gpt.py"
    script.write_text(SCRIPT.format(here=str(HERE), version=version))
    fmoe = ["--fmoefy", "--num-experts", "4", "--balance-strategy", "gshard"]
    done = run(tmp_path, version, "--host", version, str(script), *ARGUMENTS, *fmoe)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"iteration \d \{'lm loss': ([\d.]+), 'gshard_loss': ([\d.]+)\}", done.stdout)
    assert len(shown) == 3
    assert float(shown[2][0]) < float(shown[0][0])


def test_what_is_wrong_is_said_in_a_sentence(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("")
    for argv, sentence in (
        ((), "usage: python -m megatron_adapters"),
        (("--fmoefy",), "usage: python -m megatron_adapters"),
        (("missing.py",), "the script must be a file, missing.py is none"),
        (("--host", "2.3", "script.py"), "version '2.3' has no adapter: the known ones are '2.2'"),
        (("script.py",), "has the interfaces of none of"),
    ):
        done = run(tmp_path, "2.5", *argv)
        assert done.returncode == 1
        assert done.stderr.startswith(sentence) or sentence in done.stderr
        assert "Traceback" not in done.stderr
