"""Parent-death signal for stages: `parent_death.py RUNNER_PID COMMAND ...` becomes COMMAND.

The kernel then kills the stage when its runner dies, also after `kill -9` (Linux). This is a
program of its own because Python code between fork and exec is not safe in a runner with threads.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Set what the stage inherits, then become it."""
    runner, *command = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGPIPE):  # Ctrl-C has its usual effect.
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(runner):
            sys.exit("the runner is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
