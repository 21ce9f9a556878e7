import argparse
import errno
from pathlib import Path

import pytest

from common import errors


def broken(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (errors.UserError("--size 0: give 1 or more"), 2, "error: --size 0: give 1 or more"),
        (errors.RunFailed("stage a failed"), 1, "error: stage a failed"),
        (errors.StoppedBySignal(15, "stopped by SIGTERM"), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
        (OSError("our own sentence"), 1, "error: our own sentence"),
        (PermissionError(errno.EACCES, "Permission denied", "a/out"), 2,
         "error: a/out: not allowed; change its rights or its folder's, or choose another place"),
        (PermissionError(errno.EPERM, "Operation not permitted", "out"), 2,
         "error: out: not allowed; change its owner or rights, or choose another place"),
        (OSError(errno.EROFS, "Read-only file system", "out"), 2,
         "error: out: is on a disk that is mounted read-only; choose another place"),
        (OSError(errno.EIO, "Input/output error", "a.txt"), 1,
         "error: Input/output error (a.txt)"),
        (OSError(errno.ENOSPC, "No space left on device"), 1,
         "error: disk full: free some space and run the same command again"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 2,
         "error: out: a file is in the way; choose another name"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"a\xff/b"), 2,
         "error: a\\xff/b: a file is where a folder is expected; choose another name"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a.json"), 2,
         "error: a.json: a folder is where a file is expected; choose another name"),
        (errors.UserError("\udcff.jpg: no picture"), 2, "error: \\xff.jpg: no picture"),
        (errors.UserError("\ud800: no name"), 2, "error: \\ud800: no name"),
        (errors.UserError("x" * 9000), 2, f"error: {'x' * 7993} .. (9,007 characters)"),
    ],
)  # fmt: skip
def test_an_error_becomes_a_message_and_an_exit_status(error, status, message, capsys):
    assert errors.run_command(broken(error)) == status
    assert capsys.readouterr() == ("", message + "\n")


def test_file_names_that_are_no_utf8_are_printed(capsys):
    def work():
        print("runs/\udcff")
        return 0

    assert errors.run_command(work) == 0
    assert capsys.readouterr().out == "runs/\\udcff\n"


def test_a_bug_keeps_its_traceback_unless_it_is_a_named_failure(capsys):
    with pytest.raises(RuntimeError, match="bug"):
        errors.run_command(broken(RuntimeError("bug")))
    assert errors.run_command(broken(RuntimeError("no memory")), failures=(RuntimeError,)) == 1
    assert capsys.readouterr().err == "error: no memory\n"


def test_slurm_options_are_pairs(capsys):
    parser = argparse.ArgumentParser()
    errors.add_slurm_option(parser)
    words = ["--slurm-option", "account=vision", "--slurm-option", "x=a=b"]
    assert dict(parser.parse_args(words).slurm_option) == {"account": "vision", "x": "a=b"}
    for word in ("account", "account=", "=x", "a=b\n#SBATCH --uid=0"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--slurm-option", word])
        assert "is not of the form KEY=VALUE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "parsed"),
    [
        (["--check", "a=1"], ("all", 0, ["a=1"])),
        (["--check", "settings", "a=1"], ("settings", 0, ["a=1"])),
        (["a=1", "--check"], ("all", 0, ["a=1"])),
        (["--check", "--json", "a=1"], ("all", 0, ["a=1"])),
        (["--profile", "a=1", "b=2"], (None, 20, ["a=1", "b=2"])),
        (["--profile", "3", "b=2"], (None, 3, ["b=2"])),
        (["--report", "a.pth", "--report", "b.json"], (None, 0, ["a.pth"])),
    ],
)
@pytest.mark.parametrize("parse", ["parse_args", "parse_intermixed_args"])
def test_an_optional_value_is_no_word_of_another_kind(parse, words, parsed):
    parser = errors.command_parser("")
    errors.add_check_options(parser)
    parser.add_argument("--profile", nargs="?", const=20, type=int, default=0)
    parser.add_argument("--report", type=errors.json_file, nargs="?", const=Path("-"))
    parser.add_argument("words", nargs="*")
    options = getattr(parser, parse)(words)
    assert (options.check, options.profile, options.words) == parsed
    assert parser.parse_args(["--", "--check", "b=2"]).words == ["--check", "b=2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--check", "setings"], "unknown value 'setings'; did you mean settings?"),
        (["--format=vok"], "unknown value 'vok'; did you mean voc?"),
        (["--format", "png"], "unknown value 'png'; known are coco, voc"),
        (["--otu=x", "--xyz"], "unrecognized arguments: --otu=x --xyz; did you mean --out?"),
        (["run", "--lst"], "unrecognized arguments: --lst; did you mean --list?"),
        (["rnu"], "unknown value 'rnu'; did you mean run?"),
        (["--batch", "0"], "--batch: 0: give 1 or more"),
        (["--batch", "1.5"], "--batch: invalid whole_number value: '1.5'"),
    ],
)
def test_a_wrong_word_is_answered_with_what_it_may_be(words, message, capsys):
    parser = errors.command_parser("")
    errors.add_check_options(parser)
    parser.add_argument("--format", choices=("voc", "coco"))
    parser.add_argument("--out")
    parser.add_argument("--batch", type=errors.whole(1))
    parser.add_subparsers().add_parser("run").add_argument("--list")
    with pytest.raises(SystemExit):
        parser.parse_args(words)
    assert message in capsys.readouterr().err


def test_a_missing_file_is_answered_with_its_neighbour(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    near = f"{tmp_path}/photo: no such file or folder; did you mean {tmp_path}/photos?"
    assert errors.no_such_file(tmp_path / "photo", "give a folder") == near
    assert errors.no_such_file(tmp_path / "x", "give a folder").endswith("folder; give a folder")
    assert errors.run_command(lambda: open(tmp_path / "photo").close() or 0) == 1
    assert near in capsys.readouterr().err


def test_figures_are_rounded_for_people(capsys):
    times = {0.04: "0.0 s", 9.96: "10 s", 59.4: "59 s", 59.6: "1 min 0 s", 3725: "1 h 2 min"}
    assert {seconds: errors.duration(seconds) for seconds in times} == times
    facts = {"seconds": 77.11447, "disk_bytes": 54944592, "mean": [123.67512, 1.0], "n": 100000}
    assert errors.print_check(facts, as_json=False) is False
    assert capsys.readouterr().out.splitlines() == [
        "seconds: 1 min 17 s", "disk_bytes: 54.9 MB", "mean: 123.68, 1", "n: 100000",
    ]  # fmt: skip
