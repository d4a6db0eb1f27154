"""Sets that grow together."""

from collections.abc import Hashable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Unions(Generic[T]):
    """Disjoint sets of items, each set known by one of its items.

    Reference: Tarjan, "Efficiency of a Good But Not Linear Set Union Algorithm", Journal of the ACM 1975.

    Args:
        items: The items, each in a set of its own; others may be added by naming them.
    """

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._parent: dict[T, T] = {i: i for i in items}

    def root(self, item: T) -> T:
        """Return the item that stands for the set of ``item``.

        Args:
            item: Any item.

        Returns:
            The same for all items of a set.
        """
        parent = self._parent
        parent.setdefault(item, item)
        while parent[item] != item:
            parent[item] = parent[parent[item]]  # halves the path, which keeps later look-ups short
            item = parent[item]
        return item

    def join(self, a: T, b: T) -> None:
        """Make the sets of two items one.

        Args:
            a: An item.
            b: Another.
        """
        self._parent[self.root(b)] = self.root(a)

    def __iter__(self) -> Iterator[T]:
        """Iterate over the items.

        Returns:
            The iterator.
        """
        return iter(self._parent)

    def sets(self) -> dict[T, list[T]]:
        """Return the items of each set, in the order in which they were first named.

        Returns:
            The sets by the items that stand for them.
        """
        result: dict[T, list[T]] = {}
        for item in self._parent:
            result.setdefault(self.root(item), []).append(item)
        return result
