"""A thread that works as long as there is work, and sleeps otherwise."""

import logging
import threading
from collections.abc import Callable


class Worker:
    """Calls `work()` in a daemon thread while `busy()`.

    An exception of `work` is logged, and the thread goes on: whoever waits for a result learns of it in
    another way.
    """

    def __init__(self, name: str, work: Callable[[], object], busy: Callable[[], bool]):
        self._name, self._work, self._busy = name, work, busy
        self._thread: threading.Thread | None = None
        self._awake, self._ended = threading.Event(), False

    @property
    def started(self) -> bool:
        """Whether the thread runs."""
        return self._thread is not None

    def start(self) -> None:
        """Start the thread; nothing if it runs or has been stopped."""
        if self._thread is None and not self._ended:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Look for work."""
        self._awake.set()

    def stop(self) -> None:
        """End the thread after the work in hand, for good."""
        self._ended = True
        self.wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        self._thread = None

    def _run(self) -> None:
        while not self._ended:
            self._awake.clear()
            if not self._busy():
                self._awake.wait()
                continue
            try:
                self._work()
            except Exception:
                logging.getLogger(__name__).exception("%s: work failed", self._name)
