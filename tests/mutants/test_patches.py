"""Every mutant still applies to the code as it is, and names tests that exist. Whether they catch it, run.py finds
out."""

import re
import shlex
from pathlib import Path

import pytest

from mutants.mutants import MUTANTS, check_applies

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_applies(mutant):
    check_applies(mutant, (ROOT / mutant.file).read_text())
    files = [w for w in shlex.split(mutant.tests) if w.endswith(".py")]
    assert files and all((ROOT / f).is_file() for f in files)


def test_names_are_unique():
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 14


def test_a_text_that_no_longer_matches_is_an_error():
    with pytest.raises(ValueError, match="must occur once"):
        check_applies(MUTANTS[0]._replace(old="no such text"), (ROOT / MUTANTS[0].file).read_text())
    assert not [m.name for m in MUTANTS if re.search(r"\s-k\s*$", m.tests)]
