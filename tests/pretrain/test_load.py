"""The Python API: a backbone with its preprocessing, from files of every kind."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from common.backbone import read_backbone
from common.errors import UserError
from common.network import ResNet
from common.resnet import NAMED, Arch
from detection.convert import convert
from pretrain.load import load_backbone
from tests.detection.tiny_weights import our_checkpoint, save, torchvision_state
from tests.pretrain.data.picture_helpers import smooth_picture

THIN = NAMED["thin_R50"]
CONFIG = {"data": {"image_size": 48}}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{name: file} of one thin network, and its torchvision-named state."""
    folder = tmp_path_factory.mktemp("weights")
    state = torchvision_state(THIN)
    ours = save(our_checkpoint(state, THIN, config=CONFIG), folder / "checkpoint.pth")
    source, out = read_backbone(ours), {"ours": ours, "folder": folder}
    for to, name in (("detectron2", "backbone.pkl"), ("torchvision", "tv.pth")):
        convert(source, folder / name, to=to, size=64)
        out[to] = folder / name
    moco = {f"module.encoder_q.{name}": value for name, value in state.items()}
    out["moco"] = save({"state_dict": moco}, folder / "moco.pth.tar")
    return out, state


@pytest.mark.parametrize("kind", ["ours", "folder", "detectron2", "torchvision", "moco"])
def test_every_kind_of_file_gives_the_network_and_its_preprocessing(files, kind):
    paths, state = files
    before = torch.get_rng_state()
    backbone = load_backbone(paths[kind])
    assert torch.equal(torch.get_rng_state(), before)
    assert not backbone.training
    assert all(p.requires_grad and not p.is_meta for p in backbone.parameters())
    own = backbone.state_dict()
    assert list(own) == list(state)
    assert all(torch.equal(own[name], value) for name, value in state.items())
    expected = ResNet(THIN).eval()
    expected.load_state_dict(state)
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(backbone(images), expected(images))
    # The card of converted weights hands on the size and the pixels.
    pixels = backbone.preprocessing
    size, mean = (224, (0.485, 0.456, 0.406)) if kind == "moco" else (48, (0.5, 0.4, 0.3))
    assert (pixels.image_size, pytest.approx(pixels.mean)) == (size, mean)
    assert bool(backbone.notes) == (kind == "moco")


@pytest.mark.parametrize(
    ("name", "sizes"), [("resnet18", {}), ("resnet50", {"width_per_group": 8})]
)
def test_features_equal_those_of_torchvision(tmp_path, name, sizes):
    theirs = getattr(torchvision.models, name)(**sizes).eval()
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    backbone, images = load_backbone(tmp_path / "w.pth"), torch.randn(2, 3, 64, 96)
    theirs.fc = nn.Identity()
    torch.testing.assert_close(backbone(images), theirs(images), rtol=0, atol=1e-5)
    assert [n for n, _ in backbone.named_children()] == [n for n, _ in theirs.named_children()]
    places = ["layer2", "layer4", "avgpool"]
    for one, other in zip(*(create_feature_extractor(net, places)(images).values()
                            for net in (backbone, theirs)), strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    backbone.fc = nn.Linear(backbone.output_dim, 5)  # a head of one's own, as on torchvision's
    assert backbone(images).shape == (2, 5)


def test_preprocessing_takes_arrays_pillow_pictures_and_files_upright(files, tmp_path):
    pixels = load_backbone(files[0]["ours"]).preprocessing
    stored = smooth_picture(3, 60, 90)
    exif = Image.Exif()
    exif[0x112] = 6
    place = tmp_path / "turned ö.png"
    Image.fromarray(stored).save(place, exif=exif)
    turned = np.ascontiguousarray(np.rot90(stored, -1))
    expected = pixels(turned)
    assert (expected.shape, expected.dtype) == ((3, 48, 48), torch.float32)
    with Image.open(place) as opened:
        for given in (place, str(place), opened, Image.fromarray(turned)):
            assert torch.equal(pixels(given), expected)
    grey = np.full((70, 50, 3), 51, np.uint8)
    wanted = (0.2 - torch.tensor(pixels.mean)) / torch.tensor(pixels.std)
    torch.testing.assert_close(pixels(grey).mean(dim=(1, 2)), wanted)
    for wrong in (stored.astype(np.float32), stored[..., 0], None):
        with pytest.raises(UserError, match=r"give uint8 \[height, width, 3\]"):
            pixels(wrong)


def test_what_cannot_be_loaded_is_said_in_one_sentence(files, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_backbone(tmp_path)
    with pytest.raises(UserError, match="image size 8: give"):
        load_backbone(files[0]["ours"], image_size=8)
    chosen = load_backbone(files[0]["moco"], preprocessing="half", image_size=64).preprocessing
    assert (chosen.mean, chosen.image_size) == ((0.5, 0.5, 0.5), 64)
    wide = save(our_checkpoint(torchvision_state(), Arch(50, 2, 3, 8)), tmp_path / "tiny.pth")
    assert load_backbone(wide).output_dim == 64
