"""Golden gate: batches of the streaming loader, and what a cut tar does to a run."""

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.__main__ import main
from pretrain.config import DataConfig
from pretrain.data.index import sample_hash
from pretrain.data.input_pipeline import InputPipeline
from pretrain.data.policy import AugmentationPolicy
from tests.golden.gate import check, digest
from tests.golden.pictures import pixels, png, write_tar

ROOT = Path(__file__).parents[2]
NUM_PER_TAR = (12, 7, 9)
NAMES = {
    sample_hash(name): name
    for tar, num in enumerate(NUM_PER_TAR)
    for name in (f"{tar}-{i:02d}" for i in range(num))
}


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Three tars of 12, 7 and 9 pictures with labels."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for tar, num in enumerate(NUM_PER_TAR):
        files = {}
        for i in range(num):
            files[f"{tar}-{i:02d}.cls"] = str(tar).encode()
            files[f"{tar}-{i:02d}.png"] = png(pixels(50 * tar + i, 24, 32))
        write_tar(folder / f"part-{tar}.tar", files)
    return folder


def pipeline_of(shards: Any, folder: Path, num_workers: int) -> InputPipeline:
    data = DataConfig(
        shards=shards, image_size=16, batch_size=8, streaming=True, samples_per_epoch=34,
        augmentation=AugmentationPolicy.of("symmetric_strong"), shuffle_window=12,
        num_workers=num_workers,
    )  # fmt: skip
    return InputPipeline(
        data, seed=5, device=torch.device("cpu"), channels_last=True, folder=folder
    )


@pytest.mark.parametrize(
    ("shards", "num_workers"), [("part-*.tar", 0), ("part-*.tar", 2), ("part-0.tar", 2)]
)
def test_batches(tars: Path, tmp_path: Path, shards: str, num_workers: int) -> None:
    """Two epochs, and the second again from its middle; also of fewer tars than workers."""
    pipeline = pipeline_of(str(tars / shards), tmp_path, num_workers)
    measured, bits = {}, []
    for epoch, start_step in ((0, 0), (1, 0), (1, 2)):
        batches = []
        for one in pipeline.epoch(epoch, start_step):
            names = [NAMES[key % 2**64] for key in one.samples.sample_hashes.tolist()]
            assert one.samples.labels.tolist() == [int(name[0]) for name in names]
            batches.append({"names": names, "visits": one.samples.repeats.tolist()})
            assert isinstance(one.views, torch.Tensor)
            bits.append(digest(one.views.contiguous().numpy().tobytes()))
        measured[f"epoch {epoch} from step {start_step}"] = batches
    source = "one_tar" if shards == "part-0.tar" else "three_tars"
    check(f"streaming_{source}_{num_workers}_workers", measured, bits=bits)


def test_sets_with_weights(tars: Path, tmp_path: Path) -> None:
    shards = {str(tars / "part-0.tar"): 1.0, str(tars / "part-[12].tar"): 3.0}
    pipeline = pipeline_of(shards, tmp_path, num_workers=1)
    measured = [
        {"numbers": one.samples.sample_ids.tolist(), "tars": one.samples.labels.tolist()}
        for one in pipeline.epoch(0)
    ]
    check("streaming_weights", measured)


def cut(tar: Path, place: str) -> None:
    whole = tar.read_bytes()
    with tarfile.open(tar) as stream:
        fifth = stream.getmembers()[4].offset
    tar.write_bytes(whole[: fifth if place == "between members" else len(whole) // 2])


@pytest.fixture
def arguments(tars: Path, tmp_path: Path) -> list[str]:
    """A command line that trains a tiny network on the three tars, in `tmp_path`/run."""
    config = {
        "out": str(tmp_path / "run"),
        "arch": {"depth": 50, "width_per_group": 8, "stem_channels": 8, "res2_channels": 32},
        "data": {
            "shards": str(tars), "image_size": 16, "batch_size": 8, "streaming": True,
            "samples_per_epoch": 32, "shuffle_window": 12,
        },
        "heads": {"projector_hidden_dim": 16, "predictor_hidden_dim": 16, "output_dim": 8},
        "fa": {"queue_size": 16, "min_fill": 8},
        "optim": {"name": "sgd", "epochs": 1, "warmup_epochs": 0.0},
        "engine": {"device": "cpu", "precision": "fp32", "num_threads": 1},
        "eval": {"num_pictures": 0},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return [str(tmp_path / "config.yaml")]


def outcome(status: int, stderr: str, folder: Path) -> dict[str, Any]:
    errors = [line for line in stderr.splitlines() if line.startswith("error:")]
    return {
        "status": status,
        "errors": [line.replace(str(folder / "tars"), "TARS") for line in errors],
        "checkpoint": (folder / "run" / "checkpoint.pth").exists(),
    }


@pytest.mark.parametrize("place", ["in a member", "between members"])
def test_cut_tar_ends_the_run(
    tars: Path, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    cut(tars / "part-1.tar", place)
    status = main([*arguments, "data.num_workers=0"])
    measured = outcome(status, capsys.readouterr().err, tmp_path)
    check(f"streaming_cut_{place.replace(' ', '_')}", measured)


@pytest.mark.slow
def test_cut_tar_ends_the_run_and_its_workers(
    tars: Path, arguments: list[str], tmp_path: Path
) -> None:
    cut(tars / "part-1.tar", "in a member")
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *arguments, "data.num_workers=2"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    check("streaming_cut_with_workers", outcome(done.returncode, done.stderr, tmp_path))
