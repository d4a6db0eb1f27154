"""Damage to plans: Hypothesis strategies for values that a stranger may write where a plan has others."""

import copy
import math
from typing import Any

from hypothesis import strategies as st

Path = tuple[str | int, ...]

SIZES = [0, 1, 2, 3, 7, -1, -6, 2**20, 2**26, 2**26 + 1, 2**31, 2**31 + 1, 2**63, -(2**63), 10**400, -(10**400)]
REALS = [1.0, 0.5, -0.0, 6.0, 1e29, 1e31, 1e308, -1e308, math.nan, math.inf, -math.inf]
NAMES = [
    "",
    ".",
    "a.b",
    "weight",
    "__class__",
    "__class__.__init__.__globals__",
    "forward",
    "config",
    "config.vocab_size",
    "training",
    "num_attention_heads",
    "a" * 2000,
    "a." * 400 + "a",
    "../../etc/passwd",
    "é.weight",
    "weight\n",
    "\x1b[31m",
    "\ud800",
    "\u0666k",
]
ACTIONS = [
    "k",
    "p",
    "i",
    "4k",
    "kp",
    "3kp",
    "2k2p",
    "20p",
    "20i",
    "67108864p",
    "99999999k",
    "9" * 400 + "k",
    "k" * 30_000,
]
WORDS = ["heads", "ffn", "channels", "producer", "consumer", "aligned", "factor", "statistic", "HEADS", "hap", "hap_hf"]
NESTED: list[Any] = [
    [],
    {},
    [[]],
    [[], []],
    {"": {}},
    [None],
    [0] * 7,
    {"a": [1, 2]},
    {"a": [[[[1]]]]},
    {"groups": []},
    {str(i): i for i in range(300)},
]

odd_values = st.sampled_from([None, True, False, *SIZES, *REALS, *NAMES, *ACTIONS, *WORDS, *NESTED])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | odd_values
json_values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=6),
    max_leaves=40,
)


def places(document: Any) -> list[Path]:
    """Return the path of every value inside a JSON document."""
    found: list[Path] = []
    waiting: list[tuple[Path, Any]] = [((), document)]
    while waiting:
        path, value = waiting.pop()
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, child in inner:
            found.append((*path, key))
            waiting.append(((*path, key), child))
    return found


def at(document: Any, path: Path) -> Any:
    """Return the value at a path."""
    for key in path:
        document = document[key]
    return document


@st.composite
def mutated(draw: st.DrawFn, document: Any, most: int = 5) -> Any:
    """Draw a copy of ``document`` with one to ``most`` of its values replaced, deleted, duplicated or swapped."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        # By depth first: nearly all values are deep inside slices, and the few others matter as much.
        every = places(document)
        depth = draw(st.sampled_from(sorted({len(p) for p in every}) or [0]))
        path = draw(st.sampled_from([p for p in every if len(p) == depth] or [()]))
        if not path:
            return draw(odd_values)
        parent, key = at(document, path[:-1]), path[-1]
        action = draw(st.sampled_from(["replace", "nudge", "delete", "duplicate", "swap"]))
        if action == "replace":
            parent[key] = copy.deepcopy(draw(odd_values | json_values))  # later mutations may go into it
        elif action == "nudge" and type(parent[key]) is int:
            parent[key] += draw(st.sampled_from([-2, -1, 1, 2]))
        elif action == "delete":
            del parent[key]
        elif action == "duplicate" and isinstance(parent, list):
            for _ in range(draw(st.sampled_from([1, 1, 2, 70]))):
                parent.append(copy.deepcopy(parent[key]))
        elif action == "duplicate":
            parent[draw(st.text(max_size=8))] = copy.deepcopy(parent[key])
        else:
            other = draw(st.sampled_from([p for p in every if len(p) == depth]))
            if other != path:
                mine, theirs = copy.deepcopy(parent[key]), copy.deepcopy(at(document, other))
                parent[key], at(document, other[:-1])[other[-1]] = theirs, mine
    return document
