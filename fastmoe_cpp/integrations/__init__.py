"""The layers inside other people's models: ``transformers`` and ``torchtitan``, a package each, which need that host."""
