"""What the doctor says of paths that cannot be used, and that a path which computes something wrong fails it."""

from __future__ import annotations

import pytest
import torch

from fastmoe_cpp import __main__ as commands
from fastmoe_cpp import _extension, doctor, reference


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Pretends a GPU of a capability, and a library built for architectures (None: without CUDA)."""

    def pretend(capability: tuple[int, int] | None, architectures: str | None) -> None:
        built = {
            "torch": torch.__version__,
            "cuda": architectures and "13.0",
            "architectures": architectures,
            "python": "3",
        }
        monkeypatch.setattr(_extension, "build_record", lambda: built)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a pretended GPU")

    return pretend


@pytest.mark.parametrize(
    ("capability", "architectures", "portable", "hopper"),
    [
        (None, None, "built without CUDA", "built without CUDA"),
        ((9, 0), None, "built without CUDA", "built without CUDA"),
        (None, "8.0;9.0a", "no GPU is visible", "no GPU is visible"),
        ((7, 5), "8.0;9.0a", "needs compute capability 8.0 or newer", "needs compute capability 9.0"),
        ((8, 0), "8.0;9.0a", None, "needs compute capability 9.0, and a pretended GPU has 8.0"),
        ((8, 6), "8.0;9.0a", None, "needs compute capability 9.0"),
        ((9, 0), "8.0;9.0a", None, None),
        ((9, 0), "8.0+PTX", None, "without 9.0a"),
        ((9, 0), "8.0 9.0", None, "without 9.0a"),
        ((10, 0), "8.0;9.0a", "TORCH_CUDA_ARCH_LIST=10.0", "needs compute capability 9.0"),
        ((12, 0), "8.0;9.0+PTX", None, "needs compute capability 9.0"),
    ],
)
def test_paths_and_what_they_lack(gpu, capability, architectures, portable, hopper) -> None:
    gpu(capability, architectures)
    cpu, *cuda = doctor.paths()
    assert cpu.lacks is None
    for path, expected in zip(cuda, (portable, hopper), strict=True):
        assert path.lacks is None if expected is None else expected in str(path.lacks), path


def test_doctor_passes_and_reports_every_self_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["doctor"]) == 0
    out = capsys.readouterr().out
    usable = [path for path in doctor.paths() if path.lacks is None]
    assert out.count(" ok: error ") == sum(len(path.layers) for path in usable) >= 2
    assert f"torch {torch.__version__}" in out and "built for" in out


def test_self_check_is_tight() -> None:
    for dtype, tight in ((torch.float64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 6e-2)):
        assert doctor.self_check("cpu", dtype, 48, 40) < tight < 10 * doctor.TOLERANCE[dtype]


def test_doctor_fails_where_a_path_computes_something_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    activate = reference.activate
    monkeypatch.setattr(reference, "activate", lambda x, *a: activate(x.roll(x.shape[-1] // 2, dims=-1), *a))
    assert commands.main(["doctor"]) == 1
    assert "CPU             float32   FAILED: error" in capsys.readouterr().out


def test_doctor_fails_where_a_path_raises(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_):
        raise RuntimeError("kernel is broken\nand more")

    monkeypatch.setattr(doctor, "self_check", broken)
    assert commands.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: RuntimeError: kernel is broken\n" in out and "and more" not in out


def test_unknown_commands_and_arguments_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["distil"], "invalid choice: 'distil'"),
        (["doctor", "--all"], "unrecognized arguments"),
    ):
        with pytest.raises(SystemExit) as refused:
            commands.main(arguments)
        assert refused.value.code == 2 and words in capsys.readouterr().err
