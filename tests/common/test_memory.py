"""Large temporaries are kept: allocating them again costs no page faults."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
from common.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
del sys.argv
block = b"x" * (1 << 26)
del block
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    block = b"x" * (1 << 26)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def num_faults(kind: str, **more: str) -> int:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM, kind]
    return int(subprocess.run(command, capture_output=True, check=True, env=plain | more).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_unless_the_environment_says_otherwise() -> None:
    assert num_faults("kept") < 1000
    assert num_faults("plain") > 10_000
    assert num_faults("kept", MALLOC_MMAP_THRESHOLD_="1000000") > 10_000
