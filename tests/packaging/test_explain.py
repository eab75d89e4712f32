"""``python -m fastmoe_cpp bench --explain``: with the CUDA half built it needs no GPU, without it says so."""

from __future__ import annotations

import re

import pytest

from fastmoe_cpp import _C, _extension, explain
from fastmoe_cpp import __main__ as commands

PRODUCTS = ("up", "down", "act_grad", "input_grad", "gate_up_weight_grad", "down_weight_grad")
built = pytest.mark.skipif(
    not (_extension.build_record() or {}).get("cuda"), reason="fastmoe_cpp was built without CUDA"
)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = commands.main(["bench", "--explain", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_without_the_cuda_half_it_says_so(capsys, monkeypatch):
    monkeypatch.delattr(_C, "explain_experts", raising=False)
    code, out, err = run(capsys)
    assert code == 1 and not out
    assert "was built without its CUDA half" in err and _extension.REBUILD_WITH_CUDA in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ["1,2,3", "1,2,3,4", "1,2,3,4,x", "1,0,3,4,2", "8,8,8,2,3", "-1,8,8,2,1"])
def test_a_shape_that_is_none(capsys, text):
    with pytest.raises(SystemExit) as ended:
        run(capsys, "--", text)
    assert ended.value.code == 2 and "a shape is T,H,I,E,K" in capsys.readouterr().err


def test_what_it_asks_and_prints(capsys, monkeypatch):
    """The arguments by name as the library takes them, the lines as it returns them."""
    asked = []

    def library(*sizes, **named):
        asked.append((sizes, named))
        return ["some path: some reason", *(f"{product}: words" for product in PRODUCTS)]

    monkeypatch.setattr(_C, "explain_experts", library, raising=False)
    monkeypatch.setenv("FASTMOE_CPP_PATH", "portable")
    code, out, _ = run(
        capsys, "5,16,8,4,2", "0,8,8,2,1", "--device", "a100", "--dtype", "float16", "--activation", "relu2"
    )
    facts = {"capability": 80, "multiprocessors": 108, "shared_bytes": 166912, "wish": "portable"}
    assert code == 0
    assert asked == [(("float16", 5, 16, 8, 4, 2, "relu2"), facts), (("float16", 0, 8, 8, 2, 1, "relu2"), facts)]
    assert out.splitlines()[0].startswith("A100 SXM: compute capability 8.0, 108 multiprocessors, 163 KiB")
    assert "T = 5, H = 16, I = 8, E = 4, K = 2, float16, relu2" in out
    assert out.count("  some path: some reason") == 2 and out.count("    down: words") == 2


@built
@pytest.mark.parametrize("device", explain.KNOWN)
@pytest.mark.parametrize("dtype", explain.DTYPES)
def test_every_product_of_every_shape(device, dtype, monkeypatch):
    monkeypatch.delenv("FASTMOE_CPP_PATH", raising=False)
    hopper = _C.build_info()["hopper"] and explain.KNOWN[device].capability == 90 and "16" in dtype
    for sizes in (*explain.SHAPES, (0, 64, 64, 4, 2), (7, 5, 3, 2, 1)):
        path, *products = explain.explain(sizes, dtype, "swiglu", explain.KNOWN[device])
        aligned = sizes[1] % 8 == 0 and sizes[2] % 8 == 0
        assert path.startswith("Hopper path: " if hopper and aligned else "portable path: "), path
        assert [line.split(":")[0] for line in products] == list(PRODUCTS)
        assert all(len(line) > 20 and "\n" not in line for line in products)
        few = ["16" in dtype and aligned and sizes[0] <= 1 and name in ("up", "down") for name in PRODUCTS]
        assert ["matrix-vector" in line for line in products] == few


@built
@pytest.mark.parametrize("device", explain.KNOWN)
def test_few_tokens_take_matrix_vector_kernels(device, monkeypatch):
    """Up to some number of tokens and of products, which the path's line names; never where portable is asked for."""
    monkeypatch.delenv("FASTMOE_CPP_PATH", raising=False)
    known = explain.KNOWN[device]
    for activation, rows in (("swiglu", "2 rows (gate and up)"), ("gelu", "2 neighbouring rows")):
        path, up, down, *backward = explain.explain((1, 2048, 768, 128, 8), "float16", activation, known)
        assert rows in up and "4 neighbouring rows" in down
        limit = int(re.search(r"; up and down by matrix-vector kernels: at most (\d+) tokens$", path).group(1))
        assert not any("matrix-vector" in line for line in backward)

    def path_and_up(*sizes: int) -> tuple[str, bool]:
        path, up, down, *_ = explain.explain(sizes, "bfloat16", "swiglu", known)
        assert ("matrix-vector" in up) == ("matrix-vector" in down)
        return path, "matrix-vector" in up

    assert path_and_up(limit, 2048, 768, 128, 8)[1]
    path, taken = path_and_up(limit + 1, 2048, 768, 128, 8)
    assert not taken and path.endswith(f"; up and down by tiles: more than {limit} tokens")
    assert path_and_up(limit, 1024, 4096, 2 * limit, 3)[1]  # 3 slots for 2 experts
    path, taken = path_and_up(limit, 1024, 4096, 2 * limit - 1, 3)
    assert not taken and path.endswith(
        "; up and down by tiles: more than 2 tokens with more than 3 slots for 2 experts"
    )
    assert path_and_up(2, 1024, 4096, 3, 3)[1]
    monkeypatch.setenv("FASTMOE_CPP_PATH", "portable")
    assert not any("matrix-vector" in line for line in explain.explain((1, 64, 64, 4, 2), "bfloat16", "swiglu", known))


@built
@pytest.mark.skipif(not _C.build_info()["hopper"], reason="fastmoe_cpp was built without the Hopper kernels")
def test_who_sums_the_input_gradients(monkeypatch):
    monkeypatch.delenv("FASTMOE_CPP_PATH", raising=False)
    training, decoding = (
        explain.explain(sizes, "bfloat16", "swiglu", explain.KNOWN["h100"])
        for sizes in ((16384, 2048, 768, 128, 8), (64, 2048, 768, 128, 8))
    )
    assert "of 132 multiprocessors sum the slots' input gradients into tokens meanwhile" in training[5]
    assert "input gradients are summed into tokens before it" in decoding[5]


@built
def test_the_environment_s_wish_and_a_bad_one(capsys, monkeypatch):
    monkeypatch.setenv("FASTMOE_CPP_PATH", "portable")
    code, out, _ = run(capsys, "64,64,64,4,2", "--device", "h100")
    assert code == 0 and "portable path: FASTMOE_CPP_PATH=portable asks for it" in out


@pytest.mark.cuda
def test_the_gpu_of_this_machine(capsys):
    import torch

    code, out, _ = run(capsys)
    assert code == 0 and out.startswith(torch.cuda.get_device_name()) and "no GPU" not in out
