"""An endless walk through a data set, shuffled anew every epoch. Its whole state is one number."""

import random
from collections.abc import Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Cursor(Generic[Item]):
    """`next(n)` gives the next n items; the order depends only on the seed, so `position` is all a checkpoint needs."""

    def __init__(self, items: Sequence[Item], *, seed: str) -> None:
        self.items = items
        self.seed = seed
        self.position = 0
        self._epoch = -1
        self._order: list[int] = []

    def next(self, count: int) -> list[Item]:
        picked = []
        for position in range(self.position, self.position + count):
            epoch, offset = divmod(position, len(self.items))
            if epoch != self._epoch:
                self._epoch, self._order = epoch, list(range(len(self.items)))
                random.Random(f"{self.seed}/{epoch}").shuffle(self._order)
            picked.append(self.items[self._order[offset]])
        self.position += count
        return picked
