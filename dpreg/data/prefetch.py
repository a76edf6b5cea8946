"""Work ahead of its use."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item], most: int) -> Iterator[Item]:
    """The items, made on a thread of their own, at most so many early. An error comes where its item would."""
    made: queue.Queue[tuple[list[Item], BaseException | None]] = queue.Queue(most)
    stopped = threading.Event()

    def put(made_item: list[Item], error: BaseException | None = None) -> None:
        while not stopped.is_set():
            try:
                return made.put((made_item, error), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put([item])
                if stopped.is_set():
                    return
            put([])
        except BaseException as error:
            put([], error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if not item:
                return
            yield item[0]
    finally:
        stopped.set()
        thread.join()  # it may hold files that the caller is about to close
