"""The layers inside other people's models: ``transformers`` and ``torchtitan``, each of which needs that host."""
