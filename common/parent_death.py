"""A process that ends with its parent, also after `kill -9`.

As a program, `parent_death.py PARENT_PID COMMAND ...` becomes COMMAND, which the kernel kills when
its parent dies (Linux). Python code between fork and exec is not safe in a parent with threads.
"""

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def exit_with_parent() -> None:
    """Let this worker of `multiprocessing` end with its parent: it would wait for work for ever."""
    from multiprocessing import parent_process  # costs the program below its start-up

    parent = parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Set what the command inherits, then become it."""
    parent, *command = sys.argv[1:]
    for number in (signal.SIGINT, signal.SIGPIPE):  # Ctrl-C has its usual effect.
        signal.signal(number, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            sys.exit("the parent is gone")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
