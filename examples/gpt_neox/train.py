"""GPT-NeoX's train.py with fastmoe_cpp's experts: the host's own, and the one line before it.

In a checkout of GPT-NeoX, of either era, in the place of its train.py:

    python deepy.py .../examples/gpt_neox/train.py configs/125M.yml configs/local_setup.yml .../moe_now.yml
"""

import os
import sys

# The launcher puts this file's folder on the path; the host is where it was started.
sys.path.insert(0, os.getcwd())

from megatron_adapters import gpt_neox

gpt_neox.install()

from megatron.neox_arguments import NeoXArgs  # noqa: E402
from megatron.training import pretrain  # noqa: E402


def main(input_args: list[str] | None = None, overwrite_values: dict | None = None) -> None:
    neox_args = NeoXArgs.consume_neox_args(input_args=input_args, overwrite_values=overwrite_values)
    neox_args.configure_distributed_args()
    neox_args.build_tokenizer()
    neox_args.initialize_tensorboard_writer()
    if hasattr(neox_args, "initialize_comet"):
        neox_args.initialize_comet()
    pretrain(neox_args=neox_args)


if __name__ == "__main__":
    main()
