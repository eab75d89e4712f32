"""Covering arrays: few cases in which every pair of values of every two parameters occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairs_of(case: Case) -> set[tuple]:
    return {(a, case[a], b, case[b]) for a, b in itertools.combinations(sorted(case), 2)}


def completion(base: Case, values: Mapping[str, Sequence], feasible: Callable[[Case], bool]) -> Case | None:
    """base with every other parameter at its first value that keeps the case feasible: the cheapest, where lists
    rise."""
    case = {name: options[0] for name, options in values.items()} | base
    if feasible(case):
        return case
    # a small search for constraints between the parameters, such as K <= E
    names = [n for n in values if n not in base]
    for name in names:
        for value in values[name]:
            if feasible(case | {name: value}):
                return case | {name: value}
    for a, b in itertools.combinations(names, 2):
        for x, y in itertools.product(values[a], values[b]):
            if feasible(case | {a: x, b: y}):
                return case | {a: x, b: y}
    return None


def feasible_pairs(values: Mapping[str, Sequence], feasible: Callable[[Case], bool]) -> dict[tuple, Case]:
    """Every pair that some feasible case has, with the cheapest such case."""
    found = {}
    for a, b in itertools.combinations(sorted(values), 2):
        for x, y in itertools.product(values[a], values[b]):
            case = completion({a: x, b: y}, values, feasible)
            if case is not None:
                found[(a, x, b, y)] = case
    return found


def cover(
    values: Mapping[str, Sequence], feasible: Callable[[Case], bool] = lambda case: True, seed: int = 0, tries: int = 4
) -> list[Case]:
    """Feasible cases that together have every feasible pair; the same ones every time. Values are listed cheapest
    first."""
    rng = random.Random(seed)
    wanted = feasible_pairs(values, feasible)
    left = set(wanted)
    order = sorted(wanted, key=repr)
    cases = []
    for pair in order:
        if pair not in left:
            continue
        best, best_gain = None, -1
        for _ in range(tries):
            case = dict(wanted[pair])
            names = [n for n in values if n not in (pair[0], pair[2])]
            rng.shuffle(names)
            for name in names:
                gains = []
                for value in values[name]:
                    candidate = case | {name: value}
                    if feasible(candidate):
                        gain = sum(
                            ((name, value, o, candidate[o]) if name < o else (o, candidate[o], name, value)) in left
                            for o in values
                            if o != name
                        )
                        gains.append((gain, rng.random(), value))
                if gains:
                    case[name] = max(gains)[2] if len({g[0] for g in gains}) > 1 else case[name]
            gain = len(pairs_of(case) & left)
            if gain > best_gain:
                best, best_gain = case, gain
        cases.append(best)
        left -= pairs_of(best)
    return cases


def name(case: Case) -> str:
    """A readable test id."""
    words = []
    for key, value in case.items():
        text = str(value).removeprefix("torch.")
        words.append(text if isinstance(value, str) or text[:1].isalpha() else f"{key}{text}")
    return "-".join(words)
