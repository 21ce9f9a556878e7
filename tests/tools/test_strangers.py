"""What every program does with folders and configs that somebody else made, or that are no such."""

import importlib
import os

import pytest

from common.errors import UserError
from pipeline.run import Progress, Runner
from tests.detection.tiny_detection import CONFIGS, ROOT

DEMO, THIN = str(ROOT / "configs/pretrain/demo.yaml"), str(CONFIGS / "thin_R50_C4.yaml")
CALLS = {
    "pretrain.__main__": "{pretrain} out={out} data.shards=none",
    "tools.submit_pretrain": "{pretrain} --cluster local out={out} data.shards=none",
    "tools.train_voc": "random --config {detection} --data none --out {out}",
    "tools.linear_eval": "none.pth --train a --val b --out {out} --config {linear}",
    "tools.make_shards": "{pictures} {out}",
}
CONFIG_OF = {
    "pretrain.__main__": "pretrain",
    "tools.submit_pretrain": "pretrain",
    "tools.train_voc": "detection",
    "tools.linear_eval": "linear",
}


@pytest.fixture
def call(tmp_path, capsys):
    """Run a program: its exit status and what it says."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "linear.yaml").write_text("epochs: 1\n")
    usual = {
        "pretrain": DEMO,
        "detection": THIN,
        "linear": tmp_path / "linear.yaml",
        "pictures": tmp_path / "pictures",
        "out": tmp_path / "out",
    }

    def run(program, **changes):
        words = CALLS[program].format(**usual | changes).split()
        status = importlib.import_module(program).main(words)
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize("program", CALLS)
@pytest.mark.parametrize("make", [lambda path: path.symlink_to("/tmp"), os.mkfifo])
def test_an_out_folder_that_leads_elsewhere_is_refused(program, make, call, tmp_path):
    (tmp_path / "out").mkdir()
    make(tmp_path / "out/log.txt")
    status, message = call(program)
    assert status == 2
    assert "out/log.txt: is a " in message
    assert os.listdir(tmp_path / "out") == ["log.txt"]


def test_a_pipelines_folder_too(tmp_path):
    (tmp_path / "data").symlink_to("/tmp")
    with pytest.raises(UserError, match="data: is a link out of"):
        Runner(ROOT, tmp_path, []).run([], Progress(0))


@pytest.mark.parametrize("program", CONFIG_OF)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: !!python/object/apply:os.mkdir ['{}/ran']", "the tag !!python/object/apply:os.mkdir"),
        ("a: &a [*a]", "*a stands within &a itself"),
    ],
)
def test_no_config_runs_code_or_explodes(program, text, words, call, tmp_path):
    (tmp_path / "evil.yaml").write_text(text.format(tmp_path))
    status, message = call(program, **{CONFIG_OF[program]: tmp_path / "evil.yaml"})
    assert (status, words in message) == (2, True), message
    assert not (tmp_path / "ran").exists()
