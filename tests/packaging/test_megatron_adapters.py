"""Adapters are found by name and by what a Megatron installation looks like; everything else is refused by name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import megatron_adapters
from megatron_adapters import ADAPTERS, UnsupportedVersionError, detect_version, get_adapter


@pytest.mark.parametrize("version", ["2.2", "2.5", "3.0.2"])
def test_both_spellings_of_a_release_give_one_module(version: str) -> None:
    assert get_adapter(version) is get_adapter("v" + version)
    assert get_adapter(version).__name__ == f"megatron_adapters.{ADAPTERS[version]}"


def test_adapters_are_imported_when_asked_for() -> None:
    code = "import sys, megatron_adapters; print(sorted(m for m in sys.modules if m.startswith('megatron_adapters.')))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


@pytest.mark.parametrize("version", ["2.3", "v3.0", "", "latest", "vcore", "2.2.0"])
def test_unknown_versions_are_refused_with_the_known_ones(version: str) -> None:
    with pytest.raises(UnsupportedVersionError) as refused:
        get_adapter(version)
    message = str(refused.value)
    assert repr(version) in message
    assert all(repr(known) in message for known in ADAPTERS)


def test_a_version_is_a_string() -> None:
    with pytest.raises(TypeError, match=r"version must be a string such as '3\.0\.2', got float"):
        get_adapter(2.2)  # type: ignore[arg-type]


# What tells the hosts apart: path inside the package `megatron`, content.
_V25 = {
    "model/transformer.py": "class ParallelTransformerLayer(MegatronModule):\n",
    "schedules.py": "    output_tensor, loss_func = forward_step_func(data_iterator, model)\n",
}
_INSTALLATIONS: dict[str, dict[str, str]] = {
    "2.2": {
        "model/transformer.py": "class ParallelTransformerLayer(MegatronModule):\n",
        "training.py": "    output_tensor = forward_step_func(data_iterator, model, input_tensor)\n",
    },
    "2.5": _V25,
    "3.0.2": _V25 | {"model/transformer.py": "class SwitchMLP:\nclass ParallelTransformerLayer(MegatronModule):\n"},
    "core": {"core/transformer/moe/moe_layer.py": "", "training/training.py": ""},
    "neox": {"neox_arguments/__init__.py": "", "model/transformer.py": "class ParallelTransformerLayer(nn.Module):\n"},
}


def _install(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "megatron" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize("version", _INSTALLATIONS)
def test_the_version_of_an_installation(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, _INSTALLATIONS[version])
    assert detect_version(tmp_path) == version
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    assert detect_version() == version


def test_no_version_takes_the_installed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _install(tmp_path, _INSTALLATIONS["2.5"])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "megatron", raising=False)
    assert get_adapter() is get_adapter("2.5")


@pytest.mark.parametrize(
    "files",
    [
        {"model/transformer.py": "class Other:\n"},
        {"model/transformer.py": "class ParallelTransformerLayer:\n", "schedules.py": "def forward_step(): ...\n"},
        {"model/transformer.py": "class ParallelTransformerLayer:\n", "training.py": "pass\n"},
    ],
)
def test_other_interfaces_are_refused(files: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedVersionError, match="has the interfaces of none of '2.2'"):
        detect_version(_install(tmp_path, files))


def test_no_megatron_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnsupportedVersionError, match="no Megatron found: .* is not a folder"):
        detect_version(tmp_path)
    monkeypatch.setattr(megatron_adapters.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedVersionError, match="no Megatron found: `import megatron` has nothing to import"):
        get_adapter()
