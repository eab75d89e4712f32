"""What the ranks of a group must agree on, compared once, before anything depends on it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch.distributed as dist

from .exchange import describe, failed


def facts_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """A dataclass's fields by name, nested ones by their path."""
    facts: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        facts |= facts_of(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name: str(value)}
    return facts


def check_agreement(what: str, facts: dict[str, Any], group: dist.ProcessGroup) -> None:
    """Raises the same ValueError on every rank unless all of them hold the same facts. A collective."""
    gathered: list[dict[str, Any]] = [{}] * group.size()
    try:
        dist.all_gather_object(gathered, facts, group=group)
    except RuntimeError as error:
        raise failed(f"{what}: comparing the ranks' settings", group, error) from error
    for name in sorted({name for each in gathered for name in each}):
        values = [each.get(name, "nothing") for each in gathered]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{what}: {name} must be the same on every rank, got {values[0]} on rank 0 and {values[other]} on rank "
                f"{other} (this is {describe(group)})"
            )
