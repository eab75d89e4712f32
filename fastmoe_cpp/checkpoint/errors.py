"""What can be wrong with a checkpoint, a class each.

Every message is one sentence with the tensor or the file, what was expected and what was found.
"""

from __future__ import annotations

import re
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that can't be read, converted or loaded. Nothing was changed.

    ``tensor`` is the name of the tensor (or None where a file or a setting is at fault), ``expected`` and ``found`` are
    the two sides where the message compares.
    """

    def __init__(self, message: str, *, tensor: str | None = None, expected: Any = None, found: Any = None) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.expected = expected
        self.found = found


class FileFormatError(CheckpointError):
    """A file that is not what its name says: truncated, overlapping, a header of no sense, an index that lies."""


class UnsafeFileError(CheckpointError):
    """A file that is not opened: outside the checkpoint's folder, or a pickle nobody asked for."""


class MissingTensorError(CheckpointError):
    """A tensor that the configuration promises and no file holds, or a gap in the experts' indices."""


class UnknownTensorError(CheckpointError):
    """A tensor inside a MoE layer that its layout has no place for."""


class ShapeError(CheckpointError):
    """A tensor whose shape is not the configuration's."""


class DtypeError(CheckpointError):
    """A tensor whose dtype can't be read as a weight here, quantised ones among them."""


class NonFiniteError(CheckpointError):
    """A tensor with NaN or infinity in it."""


class ConfigError(CheckpointError):
    """A configuration that is missing, contradicts itself or is of a model that is not known here."""


class ArgumentError(ConfigError):
    """An argument that can't be honoured; as_flags() is the same sentence for the command line.

    sentence has the arguments' names in braces, as the function has them.
    """

    def __init__(self, sentence: str, *, expected: Any = None, found: Any = None) -> None:
        super().__init__(_NAME.sub(r"\1", sentence), expected=expected, found=found)
        self._sentence = sentence

    def as_flags(self) -> str:
        """The sentence with the flags of ``python -m fastmoe_cpp`` in place of the arguments' names."""
        return _NAME.sub(lambda name: "--" + _FLAGS.get(name[1], name[1]).replace("_", "-"), self._sentence)


_NAME = re.compile(r"\{([a-z_]+)\}")
#: Flags that are not the argument's own name.
_FLAGS = {"experts": "expert"}


class LayoutError(CheckpointError):
    """A layout that is not known, or that can't hold the model it is asked to hold."""


class ConversionError(CheckpointError):
    """A target that exists, is being written by another process, or belongs to another conversion."""
