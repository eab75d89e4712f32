"""torch's own files (.bin, .pt, .pth), read only where they are asked for, and never by running what they say."""

from __future__ import annotations

import ctypes
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .errors import DtypeError, FileFormatError, MissingTensorError, UnsafeFileError
from .files import CHUNK, TensorInfo, inside, read_json

SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
# where trainers keep the model inside what they save
_MODEL_KEYS = ("model", "module", "state_dict", "model_state_dict")


def pickle_files(path: Path) -> list[Path]:
    """The pickled weight files of a folder: those of its index, otherwise all of them."""
    if not path.is_dir():
        return [path] if path.suffix in SUFFIXES else []
    index = path / "pytorch_model.bin.index.json"
    if index.is_file():
        weights = read_json(inside(path, index), "index").get("weight_map")
        if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
            raise FileFormatError(f"{index}: weight_map must map names of tensors to names of files")
        names = sorted(set(weights.values()))
        for name in names:
            if ".." in Path(name).parts or Path(name).is_absolute():
                raise UnsafeFileError(f"{index}: a file must lie in this folder, the index says {name!r}", found=name)
            if not inside(path, path / name).is_file():
                raise MissingTensorError(f"{index}: {name} is missing")
        return [path / name for name in names]
    skipped = ("training_args", "optimizer", "scheduler", "rng_state")
    return sorted(inside(path, f) for f in path.iterdir() if f.suffix in SUFFIXES and not f.name.startswith(skipped))


def _flatten(state: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value


class PickleStore:
    """The tensors of torch.save files, through torch.load(weights_only=True, mmap=True).

    Of a trainer's file only the model is taken ('model', 'module' or 'state_dict' where there is one); nested
    dictionaries become names with dots.
    """

    def __init__(self, files: list[Path]) -> None:
        self.infos: dict[str, TensorInfo] = {}
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            for name, tensor in _flatten(self._load(file)):
                if name in self._tensors:
                    raise FileFormatError(f"{file}: {name} must lie in one file, it lies in two", tensor=name)
                if tensor.dtype not in _DTYPES:
                    raise DtypeError(f"{file}: {name} has a dtype that can't be copied, {tensor.dtype}", tensor=name)
                self._tensors[name] = tensor.detach()
                size = tensor.numel() * tensor.element_size()
                self.infos[name] = TensorInfo(_DTYPES[tensor.dtype], tuple(tensor.shape), file, 0, size)

    @staticmethod
    def _load(file: Path) -> Mapping[Any, Any]:
        try:
            try:
                state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError:  # the format of before torch 1.6 can't be mapped
                state = torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            first = str(error).strip().partition("\n")[0]
            raise FileFormatError(f"{file}: must be a file of tensors alone that torch.save wrote ({first})") from None
        for key in _MODEL_KEYS:
            if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
                state = state[key]
        if not isinstance(state, Mapping):
            raise FileFormatError(f"{file}: must hold a dictionary of tensors, it holds {type(state).__name__}")
        return state

    def read(self, name: str, index: slice | int | None = None) -> torch.Tensor:
        """The tensor, or rows of its first dimension."""
        tensor = self._tensors[name]
        return tensor if index is None else tensor[index]

    def raw(self, name: str, begin: int = 0, end: int | None = None) -> Iterator[memoryview]:
        """The tensor's bytes from begin to end, in pieces of at most CHUNK."""
        tensor = self._tensors[name].contiguous()
        size = tensor.numel() * tensor.element_size()
        if size == 0:
            return
        view = memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")
        view = view[begin:end]
        for start in range(0, len(view), CHUNK):
            yield view[start : start + CHUNK]

    def close(self) -> None:
        """Lets go of its files."""
        self._tensors.clear()
