"""Names of groups as people read them."""

import re
from collections.abc import Sequence


def short_names(names: Sequence[str]) -> list[str]:
    """Return names of groups without what all of them begin with, as ``layer.3`` for ``bert.encoder.layer.3:heads``.

    Of several groups in one place the later ones keep their number, as in ``layer2.0.conv2#2``.

    Args:
        names: Names of groups of one kind.

    Returns:
        A short name for each.
    """
    bare = [name.partition(":")[0].split(".") for name in names]
    shared = 0
    while len(names) > 1 and all(len(b) > shared + 1 and b[shared] == bare[0][shared] for b in bare):
        shared += 1
    # Keep the word before a number, which says what is counted.
    if shared and all(re.fullmatch(r"\d+", b[shared]) for b in bare):
        shared -= 1
    numbers = ["".join(name.partition(":")[2].partition("#")[1:]) for name in names]
    return [".".join(b[shared:]) + number for b, number in zip(bare, numbers, strict=True)]
