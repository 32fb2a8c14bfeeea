"""Stop a worker process where it is, and let it go on."""

from __future__ import annotations

import os
import signal


def halt(pid: int) -> None:
    """Stop the child process ``pid``, and return when each of its threads stands still.

    The signal is taken by whichever thread the kernel chooses. Until that one has a processor the others go on, for as
    long as a load takes on a busy machine. The parent is told when the last of them has stopped.
    """
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


def go_on(pid: int) -> None:
    """Let a process that was halted go on."""
    os.kill(pid, signal.SIGCONT)
