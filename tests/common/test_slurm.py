"""One option of three commands: what it takes, what it refuses, and that each has it."""

import argparse

import pytest

from common.errors import add_slurm_option
from tools import ablate, make_shards, submit_pretrain

WRONG = ["account", "account=", "=x", "comment=a\nb", "a=b\n#SBATCH --uid=0"]


def test_pairs() -> None:
    parser = argparse.ArgumentParser()
    add_slurm_option(parser)
    words = ["--slurm-option", "account=vision", "--slurm-option", "x=a=b"]
    assert dict(parser.parse_args(words).slurm_option) == {"account": "vision", "x": "a=b"}
    assert parser.parse_args([]).slurm_option == []


@pytest.mark.parametrize("word", WRONG)
@pytest.mark.parametrize("main", [ablate.main, make_shards.main, submit_pretrain.main])
def test_other_forms_are_refused(main, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["a", "b", "--slurm-option", word])
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert f"{word!r} is not of the form KEY=VALUE" in said
    assert "e.g. account=vision" in said
