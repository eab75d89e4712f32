"""The adapters of Megatron-LM on a GPU: layer, fmoefy, patched forward step and training steps are those of the CPU.

The checks are in megatron_cuda_checks.py and run in a process of their own, once a version. GPT-NeoX's and
Megatron-Core's are gpt_neox/test_cuda.py and megatron_core/test_cuda.py.
"""

import json

import pytest
from test_megatron_lm import VERSIONS, _finish, _start


@pytest.mark.cuda
@pytest.mark.timeout(300)
@pytest.mark.parametrize("version", VERSIONS)
def test_megatron_lm(version, tmp_path):
    output = tmp_path / "results.json"
    _finish(_start("megatron_cuda_checks.py", version, str(output)))
    failures = {name: why for name, why in json.loads(output.read_text()).items() if why is not None}
    assert not failures, "\n".join(f"{name}:\n{why}" for name, why in failures.items())
