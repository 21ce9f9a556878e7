import argparse
import errno

import pytest

from common.errors import RunFailed, StoppedBySignal, UserError, add_slurm_option, run_command


def broken(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (UserError("--size 0: give 1 or more"), 2, "error: --size 0: give 1 or more"),
        (RunFailed("stage a failed"), 1, "error: stage a failed"),
        (StoppedBySignal(15, "stopped by SIGTERM"), 143, "stopped by SIGTERM"),
        (KeyboardInterrupt(), 130, "stopped; the same command goes on"),
        (OSError("our own sentence"), 1, "error: our own sentence"),
        (PermissionError(errno.EACCES, "Permission denied", "a.txt"), 1,
         "error: Permission denied (a.txt)"),
        (OSError(errno.ENOSPC, "No space left on device"), 1,
         "error: disk full: free some space and run the same command again"),
        (FileExistsError(errno.EEXIST, "File exists", "out"), 2,
         "error: out: a file is in the way; choose another name"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", b"a\xff/b"), 2,
         "error: a\\xff/b: a file is where a folder is expected; choose another name"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "a.json"), 2,
         "error: a.json: a folder is where a file is expected; choose another name"),
        (UserError("\udcff.jpg: no picture"), 2, "error: \\xff.jpg: no picture"),
        (UserError("\ud800: no name"), 2, "error: \\ud800: no name"),
        (UserError("x" * 9000), 2, f"error: {'x' * 7993} .. (9,007 characters)"),
    ],
)  # fmt: skip
def test_an_error_becomes_a_message_and_an_exit_status(error, status, message, capsys):
    assert run_command(broken(error)) == status
    assert capsys.readouterr() == ("", message + "\n")


def test_file_names_that_are_no_utf8_are_printed(capsys):
    def work():
        print("runs/\udcff")
        return 0

    assert run_command(work) == 0
    assert capsys.readouterr().out == "runs/\\udcff\n"


def test_a_bug_keeps_its_traceback_unless_it_is_a_named_failure(capsys):
    with pytest.raises(RuntimeError, match="bug"):
        run_command(broken(RuntimeError("bug")))
    assert run_command(broken(RuntimeError("no memory")), failures=(RuntimeError,)) == 1
    assert capsys.readouterr().err == "error: no memory\n"


def test_slurm_options_are_pairs(capsys):
    parser = argparse.ArgumentParser()
    add_slurm_option(parser)
    words = ["--slurm-option", "account=vision", "--slurm-option", "x=a=b"]
    assert dict(parser.parse_args(words).slurm_option) == {"account": "vision", "x": "a=b"}
    for word in ("account", "account=", "=x", "a=b\n#SBATCH --uid=0"):
        with pytest.raises(SystemExit):
            parser.parse_args(["--slurm-option", word])
        assert "is not of the form KEY=VALUE" in capsys.readouterr().err
