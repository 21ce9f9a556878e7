"""Sizes of shards, memory, and kills: what only shows with many pictures or many runs."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.pack import write_shards
from pretrain.data.pack_plan import ShardOptions, SourcePicture, make_plan, split_evenly
from pretrain.data.shards import ShardIndex
from tests.pretrain.data.picture_helpers import contents, seeded, sources, write_pictures

ROOT = Path(__file__).parents[4]


# -- shards of nearly equal size ------------------------------------------------------------------


def shard_sizes(stored: np.ndarray, options: ShardOptions) -> tuple[list[int], list[int]]:
    """Samples and bytes of each shard."""
    bounds = split_evenly(stored, options)
    assert bounds[0] == 0
    assert bounds[-1] == len(stored)
    parts = [stored[start:end] for start, end in itertools.pairwise(bounds)]
    return [len(part) for part in parts], [int(part.sum()) for part in parts]


@settings(seeded, max_examples=200)
@given(
    st.lists(st.integers(1, 3000), min_size=1, max_size=60),
    st.integers(1, 20),
    st.integers(500, 20_000),
)
def test_no_shard_is_empty_or_over_a_limit(sizes: list[int], most: int, limit: int) -> None:
    options = ShardOptions(max_samples_per_shard=most, shard_size_mb=limit / 1e6)
    counts, totals = shard_sizes(np.array(sizes), options)
    assert sum(totals) == sum(sizes)
    for count, total in zip(counts, totals, strict=True):
        assert 1 <= count <= most
        assert total <= limit or count == 1


@settings(seeded, max_examples=200)
@given(st.integers(1, 5000), st.integers(1, 700))
def test_equal_pictures_are_spread_like_cards(num: int, most: int) -> None:
    """numpy's array_split into as few shards as the limit allows is the reference."""
    counts, _ = shard_sizes(np.full(num, 5000), ShardOptions(max_samples_per_shard=most))
    expected = [len(part) for part in np.array_split(np.arange(num), -(-num // most))]
    assert sorted(counts) == sorted(expected)


@pytest.mark.parametrize("num", [12_345, 20_001, 60_000])
def test_shards_of_photographs_differ_by_a_few_percent(num: int) -> None:
    """Sizes as log-normal as photographs' (54 kB, half of it deviation), shuffled."""
    stored = np.random.default_rng(num).lognormal(10.8, 0.5, num).astype(np.int64)
    for options in (ShardOptions(), ShardOptions(max_samples_per_shard=10**9, shard_size_mb=50)):
        counts, totals = shard_sizes(stored, options)
        fewest = max(num / options.max_samples_per_shard, sum(totals) / 1e6 / options.shard_size_mb)
        assert len(counts) <= 1.06 * fewest + 1
        assert max(totals) / min(totals) < 1.12
        assert max(counts) / min(counts) < 1.12


def test_small_pictures_first_then_large_ones() -> None:
    """Without a shuffle both limits count, each where it is the nearer one."""
    stored = np.concatenate([np.full(4000, 10_000), np.full(1000, 1_000_000)])
    options = ShardOptions(max_samples_per_shard=500, shard_size_mb=100)
    counts, totals = shard_sizes(stored, options)
    assert len(counts) <= 8 + 10 + 1
    assert max(counts[:7]) <= 500
    assert min(counts[:7]) > 400
    assert max(totals) <= 100e6
    assert min(totals[-9:]) > 80e6


def test_giants_get_shards_that_hold_them() -> None:
    stored = np.full(1000, 1000)
    stored[[10, 500, 501]] = [150_000, 60_000, 60_000]
    options = ShardOptions(max_samples_per_shard=10**6, shard_size_mb=0.1)
    counts, totals = shard_sizes(stored, options)
    assert [total for count, total in zip(counts, totals, strict=True) if total > 1e5] == [150_000]
    assert len(counts) < 40


def test_plan_is_the_same_however_the_pictures_are_listed(picture_folder: Path) -> None:
    pictures = sources(picture_folder)
    shuffled = random.Random(3).sample(pictures, len(pictures))
    options = ShardOptions(shard_size_mb=0.03)
    assert make_plan(pictures, options) == make_plan(shuffled, options)


# -- memory ---------------------------------------------------------------------------------------

# Of this program alone; getrusage would count what its parent held before the exec.
PEAK = """
def peak():
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) * 1024 for line in stream if line.startswith("VmHWM:"))
"""
PLAN = (
    PEAK
    + """
import sys, time
from pretrain.data.pack_plan import ShardOptions, SourcePicture, make_plan
before, num = peak(), int(sys.argv[1])
names = (f"n{i % 1000:08d}/n{i % 1000:08d}_{i // 1000:08d}.JPEG" for i in range(num))
pictures = [SourcePicture(f"/nowhere/{name}", name, i % 1000) for i, name in enumerate(names)]
started = time.process_time()
plans = make_plan(pictures, ShardOptions())
assert sum(len(plan.pictures) for plan in plans) == num
print(peak() - before, peak(), time.process_time() - started)
"""
)


def plan_cost(num: int) -> tuple[int, int, float]:
    """Bytes that planning adds at its peak, bytes of the whole process, seconds of one core."""
    command = [sys.executable, "-c", PLAN, str(num)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    added, peak, seconds = done.stdout.split()
    return int(added), int(peak), float(seconds)


def test_planning_takes_less_than_a_kilobyte_per_picture() -> None:
    added, _, _ = plan_cost(60_000)
    assert 60_000 * 100 < added < 60_000 * 1000


@pytest.mark.slow
def test_a_million_pictures_are_planned_in_a_gigabyte_and_a_minute() -> None:
    _, peak, seconds = plan_cost(1_000_000)
    assert peak < 2**30
    assert seconds < 60


WRITE = (
    PEAK
    + """
import sys
from pathlib import Path
from pretrain.data.pack_plan import ShardOptions, SourcePicture
from pretrain.data.pack import write_shards
source, out, num, workers = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
files = sorted(source.rglob("*.jpg"))
pictures = [SourcePicture(str(files[i % len(files)]), f"{i:06d}.jpg") for i in range(num)]
report = write_shards(
    pictures, out, options=ShardOptions(max_samples_per_shard=10), num_workers=workers
)
assert (report.num_samples, report.num_shards) == (num, num // 10)
print(peak())
"""
)


@pytest.mark.parametrize("workers", [1, 2])
def test_memory_of_writing_does_not_grow_with_the_shards(
    picture_folder: Path, tmp_path: Path, workers: int
) -> None:
    """20 and 200 shards; 2 kB per further picture are allowed, for the plan and the index."""
    peaks = []
    for num in (200, 2000):
        words = [str(picture_folder), str(tmp_path / str(num)), str(num), str(workers)]
        command = [sys.executable, "-c", WRITE, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(done.stdout))
    assert peaks[1] - peaks[0] < 1800 * 2000


# -- kills ----------------------------------------------------------------------------------------


def wait_until_gone(group: int) -> None:
    """Workers end by themselves when their parent was killed."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a worker outlived its parent")


def num_parts(out: Path) -> int:
    return len(list((out / ".parts").glob("shard-*.tar.json")))


def run_and_kill(command: list[str], out: Path, more: int, delay: float) -> bool:
    """Kill a run `delay` seconds after it has made `more` shards; False if it ended before."""
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=null, stderr=null, start_new_session=True)
    wanted = num_parts(out) + more
    while num_parts(out) < wanted and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    was_killed = process.wait() == -signal.SIGKILL
    wait_until_gone(process.pid)
    return was_killed


def test_killed_at_any_moment_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", 600)
    out = tmp_path / "out"
    command = [
        sys.executable, str(ROOT / "tools/make_shards.py"), str(tmp_path / "in"), str(out),
        "--max-samples-per-shard", "5", "--num-workers", "2",
    ]  # fmt: skip
    moments, kills = random.Random(7), 0
    for _ in range(4):
        kills += run_and_kill(command, out, moments.randint(0, 12), moments.uniform(0, 0.05))
        kept = {path.name: path.read_bytes() for path in out.glob("shard-*.tar")}
    assert kills >= 3
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "were finished before" in done.stdout
    write_shards(
        sources(tmp_path / "in"), tmp_path / "whole",
        options=ShardOptions(max_samples_per_shard=5), classes=["class-0", "class-1"],
    )  # fmt: skip
    whole = contents(tmp_path / "whole")
    assert contents(out) == whole
    assert kept
    assert all(whole[name] == data for name, data in kept.items())
    index = ShardIndex.open(out)
    assert len({index.key_name(i) for i in range(600)}) == 600


def test_names_that_must_not_meet() -> None:
    """Pictures listed twice are refused even where a plan is made from millions of names."""
    picture = SourcePicture("/nowhere/a.jpg", "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg: listed twice"):
        make_plan([picture, picture], ShardOptions())
