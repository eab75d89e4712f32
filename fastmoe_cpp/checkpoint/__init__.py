"""Checkpoints of every MoE layout: look at them, convert them, load them, make them from dense models.

    Checkpoint(path).moe                       # the MoEConfig of a checkpoint's layers
    load_moe(layer, path, layer_index)         # a layer's weights, whatever the layout
    convert(source, target, "torchtitan")      # python -m fastmoe_cpp convert
    inspect(path)                              # python -m fastmoe_cpp inspect
    upcycle(dense, target, num_experts=8)      # python -m fastmoe_cpp upcycle

Weights are read through the safetensors package, which has to be installed (pip install safetensors). Everything that
can be wrong with a checkpoint is a CheckpointError.
"""

from .convert import Conversion, convert
from .errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    DtypeError,
    FileFormatError,
    LayoutError,
    MissingTensorError,
    NonFiniteError,
    ShapeError,
    UnknownTensorError,
    UnsafeFileError,
)
from .inspect import Inspection, inspect
from .layouts import LAYOUTS
from .load import load_moe
from .source import Checkpoint
from .upcycle import upcycle

__all__ = [
    "LAYOUTS",
    "Checkpoint",
    "CheckpointError",
    "ConfigError",
    "Conversion",
    "ConversionError",
    "DtypeError",
    "FileFormatError",
    "Inspection",
    "LayoutError",
    "MissingTensorError",
    "NonFiniteError",
    "ShapeError",
    "UnknownTensorError",
    "UnsafeFileError",
    "convert",
    "inspect",
    "load_moe",
    "upcycle",
]
