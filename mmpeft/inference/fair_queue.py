"""A bounded queue with a fair share for every finetune: nobody waits longer because another one floods.

Who goes next is the longest waiting request of the finetune that has the fewest rows. Who may still wait is decided by
dynamic thresholds: a finetune may have as many waiting as there are places left. One that floods takes half of the
places, two take a third each, and whoever comes then finds one.

Source: Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches", 1998.
"""

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """What waits, by the finetune that it is for.

    Args:
        max_rows: how many may be taken out and not given back.
        max_waiting: how many may wait beyond what free rows will take at once.
    """

    def __init__(self, max_rows: int, max_waiting: int):
        self.max_rows, self.max_waiting = max_rows, max_waiting
        self.rows: Counter[Hashable] = Counter()
        """Owner -> those that were taken out and not given back."""
        self._queues: dict[Hashable, deque[tuple[int, Item]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def __iter__(self) -> Iterator[Item]:
        return (item for queue in self._queues.values() for _, item in queue)

    @property
    def free_rows(self) -> int:
        return self.max_rows - self.rows.total()

    @property
    def places_of_one(self) -> int:
        """What one owner may have taken out and waiting while nobody else is there."""
        return self.max_rows + -(-self.max_waiting // 2)

    def has_place(self, owner: Hashable) -> bool:
        """Whether one more of this owner may wait."""
        waiting = max(0, len(self) - self.free_rows)
        own = max(0, len(self._queues.get(owner, ())) - self.free_rows)
        return len(self) < self.free_rows or own < self.max_waiting - waiting

    def put(self, owner: Hashable, item: Item) -> None:
        """Appends it, whether there is a place or not."""
        self._queues.setdefault(owner, deque()).append((self._count, item))
        self._count += 1

    def take(self, ready: Callable[[Item], bool]) -> Item | None:
        """The next one, which has a row from now on; None where there is no free row or nobody is ready."""
        if self.free_rows <= 0:
            return None
        heads = [
            (self.rows[owner], number, owner, place)
            for owner, queue in self._queues.items()
            for place, (number, item) in enumerate(queue)
            if ready(item)
        ]
        if not heads:
            return None
        _, _, owner, place = min(heads, key=lambda head: head[:2])
        queue = self._queues[owner]
        _, item = queue[place]
        del queue[place]
        if not queue:
            del self._queues[owner]
        self.rows[owner] += 1
        return item

    def give_back(self, owner: Hashable) -> None:
        """A row of this owner is free."""
        self.rows[owner] -= 1
        if not self.rows[owner]:
            del self.rows[owner]

    def remove(self, unwanted: Callable[[Item], bool]) -> list[Item]:
        """Takes those out that nobody wants any more; they have no row."""
        gone = [item for item in self if unwanted(item)]
        for owner, queue in list(self._queues.items()):
            self._queues[owner] = kept = deque(pair for pair in queue if not any(pair[1] is g for g in gone))
            if not kept:
                del self._queues[owner]
        return gone
