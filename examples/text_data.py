"""Text for the byte-level language model: a folder's files as bytes, and batches of windows over them."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Folders of the standard library that hold tests, installed packages or tables instead of code people wrote.
NOT_LIBRARY = {"test", "tests", "idlelib", "site-packages", "dist-packages", "encodings", "pydoc_data", "lib2to3"}
MAX_BYTES = 2**30
HELD_OUT_SHARE = 20
#: Stands between two files and before the first; no text file contains it.
SEPARATOR = 0


class BadInput(Exception):
    """Something the user gave that can't be used: one sentence."""


@dataclass(frozen=True)
class Text:
    """Bytes to train on and bytes held out, both 1-D uint8, with SEPARATOR before every file."""

    train: Tensor
    held_out: Tensor
    source: str
    files: int
    skipped: int
    #: Of every byte and the split.
    fingerprint: str


def standard_library() -> tuple[Path, list[Path]]:
    """The folder of this Python's own sources, and the files in it."""
    folder = Path(sysconfig.get_path("stdlib"))
    return folder, [p for p in _walk(folder, NOT_LIBRARY) if p.suffix == ".py"]


def _walk(folder: Path, without: set[str] = frozenset()) -> list[Path]:
    """Files below a folder in an order of their own, without hidden ones, caches, and folders named in `without`."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if f not in without and f != "__pycache__" and not f.startswith(".")]
        found += [Path(here, n) for n in names if not n.startswith(".")]
    return sorted(p for p in found if p.is_file())


def _text_of(path: Path) -> bytes | None:
    """A file's bytes, or None where it is empty, binary (a NUL byte), not UTF-8 or not readable."""
    try:
        content = path.read_bytes()
        content.decode()
    except (OSError, UnicodeDecodeError):
        return None
    return content if content and SEPARATOR not in content else None


def load_text(data: str | None, context: int) -> Text:
    """The text files of a folder (or one file), or without `data` the Python standard library's own sources.

    Every twentieth file is held out; of fewer than twenty files, the last twentieth of the bytes. Raises BadInput for a
    path that is missing, holds no text, or too little text for one window of `context` bytes on both sides.
    """
    if data is None:
        folder, paths = standard_library()
        source = f"the Python standard library ({folder})"
    else:
        folder, source = Path(data).expanduser(), data
        if not folder.exists():
            raise BadInput(f"--data: there is no folder or file {data}")
        paths = [folder] if folder.is_file() else _walk(folder)
    texts, total = [], 0
    for path in paths:
        content = _text_of(path)
        if content is not None:
            texts.append(content)
            total += len(content)
        if total > MAX_BYTES:
            raise BadInput(
                f"--data: {data} holds more than {MAX_BYTES // 2**30} GiB of text; name a smaller folder in it"
            )
    if not texts:
        raise BadInput(f"--data: no text in {source}: {len(paths)} files looked at, all empty, binary or not UTF-8")

    def joined(parts: list[bytes]) -> Tensor:
        return torch.frombuffer(bytearray(b"".join(bytes([SEPARATOR]) + p for p in parts)), dtype=torch.uint8)

    if len(texts) >= HELD_OUT_SHARE:
        held_out = joined(texts[HELD_OUT_SHARE // 2 :: HELD_OUT_SHARE])
        train = joined([t for i, t in enumerate(texts) if i % HELD_OUT_SHARE != HELD_OUT_SHARE // 2])
    else:
        everything = joined(texts)
        cut = everything.numel() - everything.numel() // HELD_OUT_SHARE
        train, held_out = everything[:cut], everything[cut:]
    if min(train.numel(), held_out.numel()) <= context:
        raise BadInput(
            f"--data: {source} holds {total:,} bytes of text, {held_out.numel():,} of it held out: too little for one "
            f"window of {context} bytes; give more text or a smaller --context"
        )
    digest = hashlib.sha256(train.numpy().tobytes())
    digest.update(b"/" + held_out.numpy().tobytes())
    return Text(train, held_out, source, len(texts), len(paths) - len(texts), digest.hexdigest()[:16])


class Batches:
    """Windows at random places of a text: [batch_size, context + 1] int64, the same ones for the same seed.

    ``state()`` and ``restore()`` carry the place in that order into a checkpoint.
    """

    def __init__(self, text: Tensor, batch_size: int, context: int, seed: int) -> None:
        self.text, self.batch_size = text, batch_size
        self.offsets = torch.arange(context + 1)
        self.generator = torch.Generator().manual_seed(seed)

    def next(self) -> Tensor:
        last = self.text.numel() - self.offsets.numel()
        starts = torch.randint(last + 1, (self.batch_size, 1), generator=self.generator)
        return self.text[starts + self.offsets].long()

    def state(self) -> Tensor:
        return self.generator.get_state()

    def restore(self, state: Tensor) -> None:
        self.generator.set_state(state)


def even_windows(text: Tensor, context: int, at_most: int) -> Tensor:
    """[n, context + 1] int64 windows that do not overlap, spread evenly over a text; n is at_most where they fit."""
    count = min(at_most, (text.numel() - 1) // context)
    starts = (
        torch.linspace(0, text.numel() - context - 1, count).long() if count > 1 else torch.zeros(1, dtype=torch.long)
    )
    return text[starts[:, None] + torch.arange(context + 1)].long()
