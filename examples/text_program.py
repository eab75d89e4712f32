"""What the examples' command lines have in common: paths and GPUs refused before training, and Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from text_data import BadInput

#: The exit status of a program that Ctrl-C ended, as shells have it.
INTERRUPTED = 130


def make_folder(option: str, folder: Path) -> None:
    """Makes the folder an option names, or BadInput where that can't be or nothing can be written into it.

    Called before training: what is found out after it costs the user the weights.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"{option}: {folder} must be a folder, and is a file")
        folder.mkdir(parents=True, exist_ok=True)
        # permissions alone don't tell: of root's, or of a file system that is read-only
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{option}: can't write into the folder {folder}: {error.strerror}") from None


def check_file(option: str, path: Path) -> None:
    """Makes the folder of the file an option names, or BadInput where the file can't be written."""
    make_folder(option, path.parent)
    try:
        is_folder = path.is_dir()
    except OSError as error:
        raise BadInput(f"{option}: can't write the file {path}: {error.strerror}") from None
    if is_folder:
        raise BadInput(f"{option} must name a file, and {path} is a folder")


def check_gpu() -> None:
    """BadInput where this process, alone or one of torchrun's, has no GPU."""
    if not torch.cuda.is_available():
        raise BadInput("--device cuda: torch sees no GPU here")
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus:
        raise BadInput(f"--device cuda needs a GPU for each process, and here are {processes} and {gpus} GPUs")


class Stop:
    """Within it, Ctrl-C is a wish to end after this step, which `asked` tells; once more ends the program at once."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.asked = False

    def __enter__(self) -> Stop:
        self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_: object) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if not self.quiet:
            # past Python's buffers, of which the handler may have interrupted one in the middle of a line
            line = "stopping after this step (Ctrl-C again: at once, without saving)\n"
            with contextlib.suppress(OSError):
                os.write(2, (("\n" if os.isatty(2) else "") + line).encode())

    def asked_on_any_rank(self, device: torch.device) -> bool:
        """`asked` of any process: none may wait in a collective for one that has left."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return self.asked
        flag = torch.tensor(int(self.asked), device=device)
        dist.all_reduce(flag)
        return bool(flag)
