"""Safe writing: shards written tensor by tensor, and a folder that appears under its name only when it is whole.

A folder is written beside its place as .NAME.partial: every shard to a temporary file, synced, renamed, and noted in
journal.jsonl; then the index, the configuration and the other files; then the folder is renamed. A run that was cut off
goes on after the last noted shard.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConversionError
from .files import BITS

JOURNAL = "journal.jsonl"
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Target:
    """A tensor to write: its name, safetensors dtype, shape, and its bytes in pieces, made when they are due."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


@dataclass(frozen=True)
class Shard:
    """A file of the target and the tensors in it."""

    name: str
    tensors: tuple[Target, ...]


def shards_of(targets: list[Target], max_bytes: int) -> list[Shard]:
    """The tensors in order, in files of at most max_bytes (a larger tensor has a file of its own)."""
    groups: list[list[Target]] = [[]]
    size = 0
    for target in targets:
        if groups[-1] and size + target.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(target)
        size += target.nbytes
    if len(groups) == 1:
        return [Shard("model.safetensors", tuple(groups[0]))]
    total = len(groups)
    return [Shard(f"model-{i:05d}-of-{total:05d}.safetensors", tuple(group)) for i, group in enumerate(groups, 1)]


def sync_folder(folder: Path) -> None:
    """Makes renames in the folder last."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(file: Path, tensors: Iterable[Target], progress: Progress) -> None:
    """A safetensors file, a piece at a time; it has its name only when it is complete and synced."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    tensors = list(tensors)
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    unfinished = file.with_name(file.name + ".tmp")
    with open(unfinished, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written = 0
            for piece in tensor.pieces():
                written += stream.write(piece)
                progress(len(piece))
            if written != tensor.nbytes:
                raise ConversionError(
                    f"{tensor.name} must have {tensor.nbytes} bytes, {written} came: the source has changed",
                    tensor=tensor.name, expected=tensor.nbytes, found=written,
                )  # fmt: skip
        stream.flush()
        os.fsync(stream.fileno())
    os.rename(unfinished, file)
    sync_folder(file.parent)


def write_text(file: Path, text: str) -> None:
    """A small file, synced."""
    with open(file, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def plan_digest(shards: list[Shard], task: dict[str, Any]) -> str:
    """What a run has to be for its partial folder to be gone on with: the same task on the same source."""
    plan = [[s.name, [[t.name, t.dtype, list(t.shape)] for t in s.tensors]] for s in shards]
    return hashlib.sha256(json.dumps([task, plan], sort_keys=True).encode()).hexdigest()


def partial_folder(target: Path) -> Path:
    """Where target is written until it is whole."""
    return target.parent / f".{target.name}.partial"


def is_begun(target: Path) -> bool:
    """Whether a run for this target was cut off after its journal was begun."""
    try:
        return (partial_folder(target) / JOURNAL).stat().st_size > 0
    except OSError:
        return False


class PartialFolder:
    """The folder under work beside its final place; a context manager that holds its lock.

    An exception leaves it there to be gone on with, unless discard() was called.
    """

    def __init__(self, target: Path, digest: str, restart: bool = False) -> None:
        if target.exists() or target.is_symlink():
            raise ConversionError(f"{target}: must not exist yet, it does: name another, or remove it")
        self.target = target
        self.path = partial_folder(target)
        self.digest = digest
        self.restart = restart
        self.done: dict[str, int] = {}
        self._discard = False

    def __enter__(self) -> PartialFolder:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        if self.path.is_symlink():
            raise ConversionError(f"{self.path}: must be a folder, it is a link")
        self.path.mkdir(exist_ok=True)
        self._journal = open(self.path / JOURNAL, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._journal.close()
            raise ConversionError(f"{self.path}: another process is writing it") from None
        try:
            self._resume()
        except BaseException:
            self._journal.close()
            raise
        return self

    def _resume(self) -> None:
        self._journal.seek(0)
        lines = []
        for line in self._journal.read().splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # cut off while it was written
                break
        if lines and not self.restart and lines[0].get("digest") != self.digest:
            raise ConversionError(
                f"{self.path}: holds the beginning of another conversion (another source, layout or option): finish "
                "that one, or begin anew with --restart (restart=True)"
            )
        if not lines or self.restart:
            for entry in self.path.iterdir():
                if entry.name != JOURNAL:
                    entry.unlink()
            self._journal.truncate(0)
            self.note({"digest": self.digest})
            return
        for line in lines[1:]:
            file = self.path / line["shard"]
            if file.is_file() and file.stat().st_size == line["bytes"]:
                self.done[line["shard"]] = line["bytes"]

    def note(self, line: dict[str, Any]) -> None:
        """Adds a line to the journal and syncs it."""
        self._journal.seek(0, os.SEEK_END)
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def shard(self, shard: Shard, progress: Progress) -> None:
        """Writes a shard, unless a run before has."""
        if shard.name in self.done:
            progress(sum(tensor.nbytes for tensor in shard.tensors))
            return
        file = self.path / shard.name
        write_shard(file, shard.tensors, progress)
        self.note({"shard": shard.name, "bytes": file.stat().st_size})

    def copy(self, file: Path) -> None:
        """Copies a file beside the weights."""
        with open(file, "rb") as source, open(self.path / file.name, "wb") as copy:
            shutil.copyfileobj(source, copy)
            copy.flush()
            os.fsync(copy.fileno())

    def finish(self) -> None:
        """Gives the folder its name."""
        (self.path / JOURNAL).unlink()
        for left in self.path.glob("*.tmp"):
            left.unlink()
        sync_folder(self.path)
        if self.target.exists():
            raise ConversionError(f"{self.target}: must not exist yet, another process has made it")
        os.rename(self.path, self.target)
        sync_folder(self.target.parent)

    def discard(self) -> None:
        """Removes the folder at the end: there is nothing to go on with."""
        self._discard = True

    def __exit__(self, *_: object) -> None:
        self._journal.close()
        if self._discard:
            shutil.rmtree(self.path, ignore_errors=True)


def write_index(folder: Path, shards: list[Shard]) -> None:
    """model.safetensors.index.json, where there is more than one file."""
    if len(shards) == 1:
        return
    tensors = [(tensor, shard) for shard in shards for tensor in shard.tensors]
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor, _ in tensors)},
        "weight_map": {tensor.name: shard.name for tensor, shard in tensors},
    }
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def progress_bar(total: int, title: str, shown: bool) -> Iterator[Progress]:
    """A bar of bytes through tqdm where it is installed; otherwise nothing is shown."""
    try:
        if not shown:
            raise ImportError
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc=title) as bar:
        yield bar.update
