"""An adapter or integration whose host's package is not installed says so."""

import subprocess
import sys


def test_megatron_core_is_named():
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from megatron_adapters import get_adapter\n"
        "try: get_adapter('core')\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith(
        "megatron_adapters.megatron_core needs the package megatron-core (pip install megatron-core)"
    )


def test_gpt_neox_is_named():
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "from megatron_adapters import get_adapter\n"
        "try: get_adapter('neox').install()\n"
        "except ValueError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.startswith("GPT-NeoX: era must be given, no GPT-NeoX can be imported")


def test_torchtitan_is_named():
    code = (
        "import importlib.metadata as metadata\n"
        "def version(name): raise metadata.PackageNotFoundError(name)\n"
        "metadata.version = version\n"
        "try: import fastmoe_cpp.integrations.torchtitan\n"
        "except ImportError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "fastmoe_cpp.integrations.torchtitan needs the package torchtitan (pip install torchtitan)"
