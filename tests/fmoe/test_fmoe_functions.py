"""The functions, the balance profile and install(), on one process."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastmoe_cpp.fmoe
from fastmoe_cpp.fmoe import balance, functions, native, utils
from fastmoe_cpp.fmoe.gates.utils import limit_by_capacity, prune_by_count

E = 5


def choices(shape=(13, 2)):
    return torch.randint(-1, E, shape)


@pytest.mark.parametrize("shape", [(13,), (13, 2), (0, 2), (1, 1)])
def test_count_by_gate(shape):
    gate = choices(shape)
    pos, local, global_ = functions.count_by_gate(gate, E, 1)
    flat = gate.flatten()
    assert local.tolist() == global_.tolist() == [int((flat == e).sum()) for e in range(E)]
    assert pos.tolist() == [i for e in range(E) for i in range(flat.numel()) if flat[i] == e]
    assert pos.dtype == local.dtype == torch.int64
    assert functions.count_by_gate(gate, E, 1, require_pos=False)[0] is None


def test_prepare_forward():
    gate = choices()
    pos, local, global_, here, size = functions.prepare_forward(gate, E, 1)
    assert here.tolist() == local.tolist() and size == pos.numel() == int((gate >= 0).sum())


def test_scatter_and_gather():
    gate, x = choices(), torch.randn(13, 3, dtype=torch.float64, requires_grad=True)
    pos, local, global_, here, size = functions.prepare_forward(gate, E, 1)
    rows = functions.MOEScatter.apply(x, pos // 2, local, global_, size, 1)
    assert torch.equal(rows, x[pos // 2])
    output = functions.MOEGather.apply(rows * 2, pos, local, global_, 26, 1)
    expected = (2 * x).repeat_interleave(2, 0) * (gate.view(-1, 1) >= 0)
    assert torch.equal(output, expected)
    weights = torch.randn_like(output)
    ours, theirs = (torch.autograd.grad((y * weights).sum(), x, retain_graph=True)[0] for y in (output, expected))
    torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=f"fwd_batch_size must be the number of rows received, {size}, got 7"):
        functions.MOEScatter.apply(x, pos // 2, local, global_, 7, 1)


def test_an_id_that_is_no_expert():
    with pytest.raises(ValueError, match="got 5"):
        functions.count_by_gate(torch.tensor([0, 5]), E, 1)


def test_pruning_keeps_the_first():
    ids = torch.tensor([[0, 1], [0, 0], [-1, 0], [1, 2]])
    kept = prune_by_count(ids, torch.tensor([2, 1, 0, 3, 3]))
    assert kept.tolist() == [[0, 1], [0, -1], [-1, -1], [-1, -1]]
    new_lec, new_gec, limited = limit_by_capacity(ids, E, 1, 1)
    assert new_lec.tolist() == new_gec.tolist() == [1, 1, 1, 0, 0]
    assert limited.tolist() == [[0, 1], [-1, -1], [-1, -1], [-1, 2]]


def test_the_native_module_by_its_names():
    ids = torch.tensor([[0, 1], [0, 0], [-1, 0], [1, 2]])
    counts = torch.zeros(E, dtype=torch.int32)
    assert native.expert_count(ids, counts) is None and counts.tolist() == [4, 2, 1, 0, 0]
    pos = torch.empty(7, dtype=torch.int64)
    native.assign_pos(counts.cumsum(0).int(), ids, pos)
    assert pos.tolist() == [0, 2, 3, 5, 1, 6, 7]
    assert torch.equal(native.expert_exchange(counts, E, 1), counts)
    pruned = native.prune_gate_by_capacity(ids, torch.tensor([2, 1, 0, 3, 3], dtype=torch.int32), E, 1)
    assert pruned.tolist() == [[0, 1], [0, -1], [-1, -1], [-1, -1]]
    # two processes ask, of three experts
    asked = torch.tensor([3, 1, 4, 2, 5, 0])
    granted = native.limit_by_capacity(asked, torch.tensor([4, 0, 4], dtype=torch.int32), 3, 2)
    assert granted.tolist() == [3, 0, 4, 1, 0, 0]
    with pytest.raises(AttributeError, match="no fmoe_cuda.global_scatter"):
        native.global_scatter(ids)


def test_without_processes_the_group_is_refused():
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        functions.ensure_comm(torch.zeros(1), None)
    with pytest.raises(RuntimeError, match="torch.distributed must be initialised"):
        utils.get_torch_default_comm()


def test_balance_profile():
    profile = {}
    balance.reset_balance_profile(profile, 2, "gshard")
    assert profile == {name: [None, None] for name in [*balance.metrics, "gshard_loss"]}
    ids = torch.tensor([[0, 1], [0, -1], [0, 2]])
    balance.update_balance_profile(profile, ids, None, None, 1, 4, "gshard")
    counts = torch.tensor([3.0, 1, 1, 0])
    assert profile["coefficient-variation"] == [None, counts.std() / counts.mean()]
    assert profile["Lmax-over-Lmin"][1] == 4 and profile["Lmax-over-Lmean"][1] == 2.4


# --- install ----------------------------------------------------------------------------------------------------------

PROGRAM = """
import fastmoe_cpp.fmoe
fastmoe_cpp.fmoe.install()
fastmoe_cpp.fmoe.install()
import fmoe
import fmoe.gates.gshard_gate as module
from fmoe import DistributedGroupedDataParallel, FMoE, FMoELinear, FMoETransformerMLP
from fmoe.balance import metrics, reset_balance_profile, update_balance_profile
from fmoe.distributed import DistributedGroupedDataParallel
from fmoe.functions import AllGather, MOEGather, MOEScatter, Slice, count_by_gate, ensure_comm, get_moe_group
from fmoe.functions import prepare_forward
from fmoe.gates import BaseGate, DCGate, GShardGate, NaiveGate, NoisyGate, SwipeGate, SwitchGate, ZeroGate
from fmoe.gates.base_gate import BaseGate
from fmoe.gates.dc_gate import DCGate
from fmoe.gates.faster_gate import FasterGate, gen_faster_gate
from fmoe.gates.naive_gate import NaiveGate
from fmoe.gates.noisy_gate import NoisyGate
from fmoe.gates.swipe_gate import SwipeGate
from fmoe.gates.switch_gate import SwitchGate
from fmoe.gates.utils import limit_by_capacity
from fmoe.gates.zero_gate import ZeroGate
from fmoe.layers import FMoE as Same, _fmoe_general_global_forward, mark_module_parallel_comm
from fmoe.linear import FMoELinear
from fmoe.transformer import FMoETransformerMLP, _Expert
from fmoe.utils import get_rank_0_in_comm, get_torch_default_comm
from fmoe_cuda import assign_pos, expert_count, expert_exchange, limit_by_capacity, prune_gate_by_capacity
assert fmoe is fastmoe_cpp.fmoe and Same is FMoE is fastmoe_cpp.fmoe.layers.FMoE and GShardGate is module.GShardGate
try:
    from fmoe.megatron import fmoefy
except ImportError as error:
    assert "megatron_adapters" in str(error), error
else:
    raise AssertionError
fastmoe_cpp.fmoe.uninstall()
fastmoe_cpp.fmoe.uninstall()
import sys
assert not [name for name in sys.modules if name.split(".")[0] in ("fmoe", "fmoe_cuda")]
"""


def test_install_in_a_new_process(tmp_path):
    package = Path(fastmoe_cpp.fmoe.__file__).parents[2]
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": package})


def test_install_refuses_a_fmoe_that_is_there(tmp_path, monkeypatch):
    (tmp_path / "fmoe").mkdir()
    (tmp_path / "fmoe" / "__init__.py").write_text("mine = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    other = importlib.import_module("fmoe")
    assert other.mine
    try:
        with pytest.raises(ImportError, match=r"fmoe is imported already, from .*__init__.py: call .* before"):
            fastmoe_cpp.fmoe.install()
        fastmoe_cpp.fmoe.uninstall()
        assert sys.modules["fmoe"] is other
    finally:
        del sys.modules["fmoe"]
    # installed first, ours is what the import finds; uninstalled, the other is again
    fastmoe_cpp.fmoe.install()
    try:
        assert importlib.import_module("fmoe") is fastmoe_cpp.fmoe
    finally:
        fastmoe_cpp.fmoe.uninstall()
    assert importlib.import_module("fmoe").mine
    del sys.modules["fmoe"]
