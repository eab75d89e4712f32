"""One test for each failure that public issue threads report of other MoE layers, where one device can show it. Every
docstring says in a sentence what went wrong and, in brackets, in which systems."""
