"""What the ranks of a group must agree on, compared once, before anything depends on it."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch.distributed as dist

from ..groups import describe, failed


def facts_of(config: Any, prefix: str = "") -> dict[str, Any]:
    """A dataclass's fields by name, nested ones by their path."""
    facts: dict[str, Any] = {}
    for field in fields(config):
        value = getattr(config, field.name)
        facts |= facts_of(value, f"{prefix}{field.name}.") if is_dataclass(value) else {prefix + field.name: str(value)}
    return facts


def gathered(what: str, own: Any, *groups: dist.ProcessGroup) -> list[Any]:
    """What every rank of the mesh of these groups has, in the same order on each. A collective."""
    found = [own]
    for group in groups:
        parts: list[list[Any]] = [[]] * group.size()
        try:
            dist.all_gather_object(parts, found, group=group)
        except RuntimeError as error:
            raise failed(f"{what}: comparing what the ranks have", group, error) from error
        found = [each for part in parts for each in part]
    return found


def check_agreement(what: str, facts: dict[str, Any], *groups: dist.ProcessGroup) -> None:
    """Raises the same ValueError on every rank unless all of them hold the same facts. A collective.

    The ranks are those of one group, or of the mesh of which each group is one dimension.
    """
    label = f"rank {groups[0].rank()}" if len(groups) == 1 else f"global rank {dist.get_rank()}"
    labels, facts_of_ranks = zip(*gathered(what, (label, facts), *groups), strict=True)
    for name in sorted({name for each in facts_of_ranks for name in each}):
        values = [each.get(name, "nothing") for each in facts_of_ranks]
        other = next((i for i, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            raise ValueError(
                f"{what}: {name} must be the same on every rank, got {values[0]} on {labels[0]} and {values[other]} on "
                f"{labels[other]} (this is {describe(groups[0])})"
            )
