"""Plans and weights are those that were stored: what pruning gives changes on purpose, or not at all."""

import json
from pathlib import Path

import pytest
from stored_models import CASES, differences, summary

STORED = json.loads((Path(__file__).parent / "stored" / "results.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_pruning_gives_what_it_gave(case):
    assert differences(STORED[case], summary(case)) == []


def test_another_result_is_told_from_the_stored_one():
    other = json.loads(json.dumps(STORED["bert"]))
    other["numbers"]["loss"] *= 1 + 1e-4
    assert len(differences(STORED["bert"], other)) == 1
