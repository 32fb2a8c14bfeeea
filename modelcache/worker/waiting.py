"""Waiting for what arrives: asleep, or awake for a moment.

Who sleeps has to be woken up, and his processor often with him: on a virtual machine that takes longer than a small
model's prediction. A lone caller asks the next as soon as he has an answer. Where the last wait was so short, the next
is spent looking, as long as that, before sleep: as guests of KVM wait for interrupts (``halt_poll_ns``), and idle
threads of Go's scheduler for work. After each look the processor is offered to whoever else wants it.
"""

from __future__ import annotations

import os
import select
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket

_AWAKE = 0.00025
"""Seconds: an answer reaches the caller, and his next request comes back, in a third of it, or twice that where his
models are in two workers."""
_LOST = 0.0005
"""Seconds for which a processor that was offered is gone, if it was to somebody who computes; to the caller, or to
another worker of his, it is a tenth of that."""
_ASLEEP = 1.0
"""Seconds for which there is no staying awake then: who is woken up goes before those who compute, who offers does not.
"""

_give_way = getattr(os, "sched_yield", lambda: None)  # not everywhere


class Arrival:
    """Tells when there is something to be read from ``sock``."""

    def __init__(self, sock: socket.socket) -> None:
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._was_short = False
        self._sleeps_until = 0.0

    def wait(self, *, awake: bool) -> None:
        """Return when there is; ``awake``: look for it for a while, if that was enough the last time."""
        # Not in recv(): on Linux, who waits there is woken up as well when the other side has read what was sent.
        began = monotonic()
        if not (awake and self._was_short and began > self._sleeps_until and self._look_from(began)):
            self._poll.poll()
        self._was_short = monotonic() - began < _AWAKE

    def _look_from(self, began: float) -> bool:
        """Look for a while, and say whether something has come."""
        poll, last = self._poll.poll, began
        while not poll(0):
            _give_way()
            now = monotonic()
            if now - last > _LOST:
                self._sleeps_until = now + _ASLEEP
            if now - began > _AWAKE:
                return False
            last = now
        return True
