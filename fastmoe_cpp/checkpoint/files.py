"""Safe reading: the header of a safetensors file, the files of a folder, and its tensors by name.

A header is checked in full before any tensor is read (format: https://huggingface.co/docs/safetensors): its length
against the file's, every shape against its span of bytes, and the spans against each other, so that they cover the file
without a gap or an overlap. Tensors are then read through the safetensors library.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from .errors import CheckpointError, FileFormatError, MissingTensorError, UnsafeFileError

MAX_HEADER = 100_000_000  # bytes, the library's own limit
MAX_JSON = 100_000_000
CHUNK = 1 << 24  # bytes copied at a time
INDEX = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")

BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
NAMES_OF_DTYPES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: its safetensors dtype ('BF16'), its shape, its file and its bytes there (absolute)."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return self.end - self.begin


class Store(Protocol):
    """Tensors by name, read a slice at a time."""

    infos: Mapping[str, TensorInfo]

    def read(self, name: str, index: slice | int | None = None) -> torch.Tensor:
        """The tensor, or rows of its first dimension."""

    def raw(self, name: str, begin: int = 0, end: int | None = None) -> Iterator[bytes | memoryview]:
        """The tensor's bytes (little-endian, row-major) from begin to end, in pieces of at most CHUNK."""

    def close(self) -> None:
        """Closes its files."""


def safetensors_library() -> Any:
    """The safetensors module, or ImportError in one sentence."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            "fastmoe_cpp.checkpoint reads weights through the safetensors package, which is not installed: "
            "pip install safetensors"
        ) from error
    return safetensors


def _unique(file: Path):
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            names = [name for name, _ in items]
            twice = next(name for name in names if names.count(name) > 1)
            raise FileFormatError(f"{file}: the name {twice!r} must occur once, it occurs twice", tensor=twice)
        return found

    return pairs


def parse_json(file: Path, text: bytes, what: str) -> dict[str, Any]:
    """A JSON object without duplicate names, or FileFormatError."""
    try:
        found = json.loads(text.decode("utf-8"), object_pairs_hook=_unique(file))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{file}: the {what} must be JSON, and it is not ({error})") from None
    if not isinstance(found, dict):
        raise FileFormatError(f"{file}: the {what} must be a JSON object, got {type(found).__name__}")
    return found


def read_json(file: Path, what: str) -> dict[str, Any]:
    """The JSON object of a file of at most MAX_JSON bytes."""
    try:
        size = file.stat().st_size
        if size > MAX_JSON:
            raise FileFormatError(f"{file}: the {what} must be at most {MAX_JSON} bytes, it has {size}")
        return parse_json(file, file.read_bytes(), what)
    except OSError as error:
        raise FileFormatError(f"{file}: the {what} can't be read ({error.strerror})") from None


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Every tensor of a safetensors file by name, or FileFormatError; no data is read."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            first = stream.read(8)
            if len(first) < 8:
                raise FileFormatError(f"{file}: a safetensors file must have at least 8 bytes, it has {size}")
            length = int.from_bytes(first, "little")
            if length > MAX_HEADER:
                raise FileFormatError(
                    f"{file}: the header must be at most {MAX_HEADER} bytes, it claims {length}", found=length
                )
            if length > size - 8:
                raise FileFormatError(
                    f"{file}: the header claims {length} bytes and the file has {size - 8} after the first 8: it is "
                    "truncated or no safetensors file", expected=length, found=size - 8,
                )  # fmt: skip
            text = stream.read(length)
    except OSError as error:
        raise FileFormatError(f"{file}: can't be read ({error.strerror})") from None
    if not text.startswith(b"{"):
        raise FileFormatError(f"{file}: the header must begin with '{{', got {text[:1]!r}")
    header = parse_json(file, text, "header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileFormatError(f"{file}: __metadata__ must map names to strings")
    start = 8 + length
    infos = {name: _tensor(file, name, entry, start) for name, entry in header.items()}
    _check_spans(file, infos, start, size)
    return infos


def _tensor(file: Path, name: str, entry: Any, start: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise FileFormatError(
            f"{file}: {name} must have a dtype, a shape and data_offsets, and nothing else", tensor=name
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise FileFormatError(
            f"{file}: the dtype of {name} must be one of {', '.join(BITS)}, got {str(dtype)[:40]!r}",
            tensor=name, expected=tuple(BITS), found=dtype,
        )  # fmt: skip
    if not isinstance(shape, list) or not all(map(_integer, shape)):
        raise FileFormatError(
            f"{file}: the shape of {name} must be a list of integers of at least 0, got {str(shape)[:80]}", tensor=name
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_integer, offsets)) or offsets[0] > offsets[1]:
        raise FileFormatError(
            f"{file}: data_offsets of {name} must be two ascending integers, got {str(offsets)[:80]}", tensor=name
        )
    bits = math.prod(shape) * BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise FileFormatError(
            f"{file}: {name} of dtype {dtype} and shape {shape} must have {bits / 8:g} bytes, data_offsets give it "
            f"{offsets[1] - offsets[0]}", tensor=name, expected=bits // 8, found=offsets[1] - offsets[0],
        )  # fmt: skip
    return TensorInfo(dtype, tuple(shape), file, start + offsets[0], start + offsets[1])


def _check_spans(file: Path, infos: Mapping[str, TensorInfo], start: int, size: int) -> None:
    end, before = start, "the header"
    for name, info in sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)):
        if info.begin != end:
            fault = "overlaps" if info.begin < end else "leaves a gap after"
            raise FileFormatError(
                f"{file}: {name} must begin at byte {end}, it begins at {info.begin} and {fault} {before}",
                tensor=name, expected=end, found=info.begin,
            )  # fmt: skip
        end, before = info.end, name
    if end != size:
        fault = "truncated" if end > size else "longer than its header says"
        raise FileFormatError(f"{file}: must have {end} bytes, it has {size}: {fault}", expected=end, found=size)


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # a sum is many times faster and is finite only where every term is; it may overflow where all are
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def inside(folder: Path, file: Path) -> Path:
    """The file, or UnsafeFileError where it leads out of the folder by a link or by '..'.

    A snapshot of a hub cache (models--X/snapshots/REVISION) may link into the cache's own blobs folder.
    """
    home, real = folder.resolve(), file.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(root) for root in allowed):
        raise UnsafeFileError(f"{file}: must lie inside {home}, it leads to {real}")
    return file


def weight_files(folder: Path) -> dict[str, list[str] | None]:
    """The safetensors files of a folder, by name: the tensors its index promises in each, None where there is no index.

    Without an index: model.safetensors alone where it is, otherwise all of them. Raises for an index that points
    outside the folder or at a file that is missing.
    """
    indexes = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors.index.json"))
    if len(indexes) > 1 and INDEX in indexes:
        indexes = [INDEX]
    if len(indexes) > 1:
        raise FileFormatError(f"{folder}: must have one index, it has {', '.join(indexes)}")
    if indexes:
        return _indexed(folder, inside(folder, folder / indexes[0]))
    names = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    if "model.safetensors" in names:
        names = ["model.safetensors"]
    for name in names:
        inside(folder, folder / name)
        stem, _, total = name.removesuffix(".safetensors").rpartition("-of-")
        if stem and total.isdigit() and (family := stem.rpartition("-")[0]):
            found = sum(
                other.startswith(family + "-") and other.endswith(f"-of-{total}.safetensors") for other in names
            )
            if found != int(total):
                raise MissingTensorError(
                    f"{folder}: {name} is one of {int(total)} files, {found} are here and there is no index",
                    expected=int(total), found=found,
                )  # fmt: skip
    return dict.fromkeys(names)


def _indexed(folder: Path, index: Path) -> dict[str, list[str] | None]:
    weights = read_json(index, "index").get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(file, str) for file in weights.values()):
        raise FileFormatError(f"{index}: weight_map must map names of tensors to names of files")
    files: dict[str, list[str] | None] = {}
    for tensor, name in weights.items():
        if name not in files:
            parts = Path(name).parts
            if not name.endswith(".safetensors") or Path(name).is_absolute() or ".." in parts or "\0" in name:
                raise UnsafeFileError(
                    f"{index}: {tensor} must lie in a .safetensors file of this folder, the index says {name!r}",
                    tensor=tensor, found=name,
                )  # fmt: skip
            inside(folder, folder / name)
            if not (folder / name).is_file():
                raise MissingTensorError(f"{index}: {tensor} must lie in {name}, which is missing", tensor=tensor)
            files[name] = []
        files[name].append(tensor)
    return files


class SafetensorsStore:
    """The tensors of a .safetensors file or of a folder of them; every header is checked when it is made."""

    def __init__(self, path: Path) -> None:
        safetensors_library()
        self.folder = path if path.is_dir() else path.parent
        files = weight_files(path) if path.is_dir() else {path.name: None}
        if not files:
            raise MissingTensorError(f"{path}: must hold at least one .safetensors file, it holds none")
        self.infos: dict[str, TensorInfo] = {}
        for name, promised in files.items():
            header = read_header(self.folder / name)
            self._add(name, header, promised)
        self._open: dict[Path, Any] = {}

    def _add(self, name: str, header: dict[str, TensorInfo], promised: list[str] | None) -> None:
        for tensor in promised or ():
            if tensor not in header:
                raise MissingTensorError(
                    f"{self.folder / name}: must hold {tensor}, as the index says, and it does not", tensor=tensor
                )
        for tensor, info in header.items():
            if tensor in self.infos:
                raise FileFormatError(
                    f"{self.folder}: {tensor} must lie in one file, it lies in {self.infos[tensor].file.name} and in "
                    f"{name}", tensor=tensor,
                )  # fmt: skip
            if promised is not None and tensor not in promised:
                raise FileFormatError(f"{self.folder / name}: {tensor} is in no index", tensor=tensor)
            self.infos[tensor] = info

    def read(self, name: str, index: slice | int | None = None) -> torch.Tensor:
        """The tensor, or rows of its first dimension: a copy in ordinary memory."""
        info = self.infos[name]
        if info.dtype not in TORCH_DTYPES:
            raise KeyError(f"{name} has dtype {info.dtype}")
        if info.file not in self._open:
            self._open[info.file] = safetensors_library().safe_open(info.file, framework="pt")
        view = self._open[info.file].get_slice(name)
        return view[:] if index is None else view[index]

    def raw(self, name: str, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
        """The tensor's bytes from begin to end, in pieces of at most CHUNK."""
        info = self.infos[name]
        with open(info.file, "rb") as stream:
            stream.seek(info.begin + begin)
            left = (info.nbytes if end is None else end) - begin
            while left:
                piece = stream.read(min(CHUNK, left))
                if not piece:
                    raise FileFormatError(
                        f"{info.file}: {name} ended {left} bytes early: the file has changed", tensor=name
                    )
                left -= len(piece)
                yield piece

    def close(self) -> None:
        """Closes its files."""
        self._open.clear()
