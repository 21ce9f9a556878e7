import errno
import json
import math
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from contextlib import nullcontext

import pytest

from common import files
from common.config import read_yaml
from common.errors import UserError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(ZeroDivisionError):
        files.write_atomically(path, lambda file: file.write(b"half") / 0)
    assert path.read_text() == "old"
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["a.txt"]


def test_json_comes_back_with_nan_as_null_and_any_file_name(tmp_path):
    path = tmp_path / "a.json"
    value = {"ap": math.nan, "rows": [{"loss": math.inf}, 1.5], "file": "\udcff é 鳥 \u2028"}
    files.write_json(path, value)
    expected = {"ap": None, "rows": [{"loss": None}, 1.5], "file": "\udcff é 鳥 \u2028"}
    assert files.read_json(path) == expected
    with pytest.raises(IsADirectoryError):
        files.write_json(tmp_path, value)
    assert json.loads(path.read_text(encoding="utf-8")) == expected


def test_a_damaged_or_missing_json_is_one_clear_error(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json: cannot be read \(No such file"):
        files.read_json(path)
    deep = '[{"a":' * 30 + "1" + "}]" * 30
    for text in ('{"a": 1', "[" * 100_000, deep, "9" * 5000, "\xff"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.json: is damaged, no JSON .*delete it"):
            files.read_json(path)
        assert files.read_json_or_none(path) is None


NO_FILES = {
    "pipe": os.mkfifo,
    "link": lambda path: path.symlink_to("/dev/zero"),
    "folder": os.mkdir,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_no_reader_waits_on_what_is_no_file(tmp_path, kind):
    path = tmp_path / "a"
    NO_FILES[kind](path)
    for read in (files.read_text, files.read_json, read_yaml):
        with pytest.raises(UserError, match=r"/a: cannot be read \(is a .* where a file"):
            read(path)
    for read in (files.sha256_of, files.read_json_lines, files.require_regular):
        with pytest.raises(OSError, match="where a file is expected"):
            read(path)


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("a/log", lambda path: path.symlink_to("../../other"), "a link out of"),
        ("a/seed-0", lambda path: path.symlink_to("/tmp"), "a link out of"),
        ("a/round", lambda path: path.symlink_to("round"), "a link out of"),
        ("a/pipe", os.mkfifo, "a pipe, device or socket"),
        ("a/newest", lambda path: path.symlink_to("b"), None),
    ],
)
def test_a_folder_to_write_to_leads_nowhere_else(tmp_path, name, make, words):
    files.check_out_folder(tmp_path / "missing")
    (tmp_path / "out/a/b").mkdir(parents=True)
    (tmp_path / "link").symlink_to("out")  # the folder itself may be one
    make(tmp_path / "out" / name)
    with pytest.raises(UserError, match=f"{name}: is {words}") if words else nullcontext():
        files.check_out_folder(tmp_path / "link")


def test_a_file_larger_than_the_bound_is_not_read(tmp_path):
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    for read in (files.read_text, files.read_json, read_yaml):
        with pytest.raises(UserError, match=r"a\.json: has 1,099,511,627,776 bytes, at most"):
            read(path)


def test_numbers_are_finite_and_no_larger_than_a_float():
    values = (1, -1.5, 10**300, math.nan, math.inf, True, "1", None, 10**400)
    assert [files.is_number(value) for value in values] == [True] * 3 + [False] * 6


def test_json_lines_leave_out_a_line_that_was_cut(tmp_path):
    path = tmp_path / "a.jsonl"
    assert files.read_json_lines(path) == []
    files.write_json_lines(path, [{"step": 1}, {"step": 2, "text": "a\u2028b"}])
    with path.open("a") as file:
        file.write('{"step": 3')
    told = []
    assert len(files.read_json_lines(path, {"step": int}, report=told.append)) == 2
    assert told == [], "what a kill cut off is no damage"
    files.append_json_lines(path, [{"step": 4}])
    rows = files.read_json_lines(path, {"step": int}, report=told.append)
    assert rows == [{"step": 1}, {"step": 2, "text": "a\u2028b"}, {"step": 4}]
    assert told == [f"{path} has 1 damaged line, left out: 3"]


@pytest.mark.parametrize(
    "line", [b"", b"\0" * 9, b"[1]", b"7", b"null", b'{"kind": "train"}', b'{"step": "1"}',
             b'{"step": 1, "text": "\xff"}', b"[" * 100_000],
)  # fmt: skip
def test_a_damaged_line_is_left_out_and_told(tmp_path, line):
    path, told = tmp_path / "a.jsonl", []
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    rows = files.read_json_lines(path, {"step": int}, report=told.append)
    assert (rows, told) == ([{"step": 1}, {"step": 2}], [f"{path} has 1 damaged line, left out: 2"])


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\0" * 9, b"[1]", b"7", b"null", b"\xff",
                                     b"{}", b'{"a": "1"}'])  # fmt: skip
def test_a_damaged_record_is_refused_by_name(tmp_path, content):
    path = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"a\.json: is missing; make it"):
        files.read_record(path, {"a": int}, remedy="make it")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.json: is damaged; make it"):
        files.read_record(path, {"a": int}, remedy="make it")
    assert files.read_record_or_none(path, {"a": int}) is None
    assert files.is_whole(path) == (content[:1] == b"{" and content[-1:] == b"}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_from_windows_is_read(tmp_path, encoding):
    path = tmp_path / "list.txt"
    path.write_bytes("photo 1\r\nVögel\r\n".encode(encoding))
    assert files.read_text(path) == "photo 1\nVögel\n"


def test_text_in_another_encoding_is_refused_with_the_byte(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("鳥".encode("gb2312", "replace") + "鸟".encode("gb2312"))
    with pytest.raises(UserError, match=r"list\.txt: is no UTF-8 text .* at byte \d.*save it as"):
        files.read_text(path)


def test_a_name_is_held_by_one_and_disappears_when_it_is_free(tmp_path):
    path = tmp_path / "name.lock"
    with files.locked(path) as first, files.locked(path) as second:
        assert first is not None
        assert second is None
        with (
            pytest.raises(UserError, match=rf"name: process {os.getpid()} on .* since 2.*\(.+\)"),
            files.held(path, patience=0.0, of_process=False),
        ):
            pass
        assert path.exists()
    assert not path.exists()


def test_waiters_for_a_name_get_it_one_after_the_other(tmp_path):
    inside, most = [], []

    def work():
        with files.locked(tmp_path / "name.lock", patience=math.inf) as is_mine:
            inside.append(is_mine)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert most == [1] * 8
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("of_process", [True, False], ids=["process", "file"])
def test_locks_of_processes_and_files_see_each_other_and_only_files_pass_theirs_on(
    tmp_path, of_process
):
    asking = (
        "import sys; from common.files import lock_file\n"
        "for kind in (True, False):\n"
        "    with open(sys.argv[1], 'a+') as file:\n"
        "        print(*(lock_file(file, '.', shared=shared, of_process=kind)\n"
        "                for shared in (True, False)))"
    )

    def others_can_lock():
        command = [sys.executable, "-c", asking, str(tmp_path / "a")]
        return set(subprocess.run(command, capture_output=True, text=True).stdout.split())

    file = open(tmp_path / "a", "a")  # noqa: SIM115
    assert files.lock_file(file, tmp_path, of_process=of_process)
    assert others_can_lock() == {"False"}
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    file.close()
    assert others_can_lock() == {str(of_process)}
    child.kill()
    child.join()
    assert others_can_lock() == {"True"}


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def no_locks(file, kind, of_process):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files, "_set_lock", no_locks)
    with (
        pytest.raises(UserError, match=r"offers no locks; choose another"),
        files.locked(tmp_path / "name.lock"),
    ):
        pass


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path, monkeypatch):
    """Permissions do not hold for root, who may run the tests."""
    for name in ("a/one.jpg", "b/two.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert [path.name for path in files.walk(tmp_path)] == ["one.jpg", "two.jpg"]
    assert list(files.walk(tmp_path / "nowhere")) == []
    list_folder = os.scandir

    def refusing(path):
        if str(path).endswith("/b"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match=r"/b: cannot be read \(Permission denied\); allow it"):
        list(files.walk(tmp_path))
