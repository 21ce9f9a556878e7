"""Another process that holds a lock."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HOLDER = """
import sys
from pathlib import Path
from common.files import held
with held(Path(sys.argv[1]), of_process=sys.argv[2] == "process"):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holding(lock: Path, kind: str = "process") -> Iterator[subprocess.Popen]:
    """Hold a lock of a kind, "process" or "file"; given back at the end, or when it is killed."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(lock), kind],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    ) as other:  # fmt: skip
        assert other.stdout.readline() == "held\n"
        yield other
