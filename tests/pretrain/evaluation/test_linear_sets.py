"""Which samples are trained on: label fractions, lists, held-out parts, and what is refused."""

import cv2
import numpy as np
import pytest

from common.errors import UserError
from pretrain.data.loader import Loader, ViewDataset
from pretrain.data.order import OrderedSamples, SourceSizes
from pretrain.data.pack import ShardOptions, SourcePicture, write_shards
from pretrain.data.policy import Crop, ViewPolicy
from pretrain.data.shards import ShardIndex, Subset
from pretrain.evaluation.linear.config import LinearConfig
from pretrain.evaluation.linear.run import balanced, listed, open_sets, stratified

NUM = 1000


@pytest.fixture
def labelled() -> tuple[np.ndarray, np.ndarray]:
    """Labels of 5 classes of very different sizes, and keys."""
    rng = np.random.default_rng(0)
    labels = rng.choice(5, NUM, p=[0.5, 0.25, 0.15, 0.08, 0.02]).astype(np.int64)
    return labels, rng.integers(-(2**62), 2**62, NUM)


@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_a_fraction_is_balanced(labelled, share):
    labels, keys = labelled
    chosen = balanced(labels, keys, share, seed=0)
    due = round(share * NUM / 5)
    expected = [min(due, count) for count in np.bincount(labels)]
    assert np.bincount(labels[chosen]).tolist() == expected
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_a_fraction_is_a_function_of_seed_and_keys(labelled):
    labels, keys = labelled
    chosen = keys[balanced(labels, keys, 0.1, seed=3)]
    shuffled = np.random.default_rng(1).permutation(NUM)
    again = keys[shuffled][balanced(labels[shuffled], keys[shuffled], 0.1, seed=3)]
    assert set(chosen) == set(again)
    other = keys[balanced(labels, keys, 0.1, seed=4)]
    assert len(set(chosen) & set(other)) < 0.5 * len(chosen)


def test_a_smaller_fraction_lies_within_a_larger_one(labelled):
    small, large = (set(balanced(labelled[0], labelled[1], share, seed=0)) for share in (0.01, 0.1))
    assert small < large


def test_the_held_out_part_is_stratified_and_independent_of_the_fraction(labelled):
    labels, keys = labelled
    held_out = stratified(labels, keys, 0.1, seed=0)
    counts = np.bincount(labels)
    assert np.bincount(labels[held_out]).tolist() == np.rint(0.1 * counts).tolist()
    fraction = balanced(labels, keys, 0.1, seed=0)
    assert len(np.intersect1d(held_out, fraction)) < 0.5 * len(held_out)


def sets_of(train, val=None, **options):
    return open_sets(str(train), str(val or train), LinearConfig(**options))


def test_fitted_and_held_out_share_nothing_and_make_up_the_chosen(shards):
    sets = sets_of(shards, fraction=0.5, holdout=0.2)
    assert len(sets.held_out) == 4
    assert sorted([*sets.fitted, *sets.held_out]) == list(range(20))
    assert np.bincount(sets.chosen.labels).tolist() == [10, 10]
    assert np.bincount(sets.part(sets.held_out).labels).tolist() == [2, 2]
    assert sets.part(sets.fitted).sample_ids.tolist() == [
        sample for i, sample in enumerate(sets.chosen.sample_ids) if i not in sets.held_out
    ]
    assert sets.classes == ["class-0", "class-1"]


@pytest.mark.parametrize("options", [{"lrs": [0.1]}, {"protocol": "knn"}])
def test_nothing_is_held_out_where_nothing_is_selected(shards, options):
    sets = sets_of(shards, **options)
    assert len(sets.held_out) == 0
    assert sets.fitted.tolist() == list(range(40))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Shards made of class folders, two of which hold a picture of the same name."""
    folder = tmp_path_factory.mktemp("tree")
    names = ("n01/n01_7.JPEG", "n01/n01_8.JPEG", "n02/n02_7.JPEG", "n02/x.JPEG", "n01/x.JPEG")
    pictures = []
    for number, name in enumerate(names):
        path = folder / f"{number}.jpg"
        cv2.imwrite(str(path), np.full((20, 20, 3), 40 * number, np.uint8))
        pictures.append(SourcePicture(str(path), name, int(name[2]) - 1))
    write_shards(pictures, folder / "shards", options=ShardOptions(), classes=["n01", "n02"])
    return folder / "shards"


def test_official_lists_name_files_without_their_folder(tree, tmp_path):
    path = tmp_path / "1percent.txt"
    path.write_text("# two of them\nn02_7.JPEG\n\nn01/n01_8\n")
    index = ShardIndex.open(tree)
    names = [index.key_name(int(i)) for i in listed(index, path)]
    assert sorted(names) == ["n01/n01_8", "n02/n02_7"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n01_9.JPEG\n", r"'n01_9.JPEG' names 0 samples of .* \(whose first key is 'n0"),
        ("x.JPEG\n", r"'x.JPEG' names 2 samples of"),
        ("# nothing\n", "is empty"),
        (None, r"list\.txt: no such file"),
    ],
)
def test_a_list_that_does_not_fit_is_refused(tree, tmp_path, text, message):
    path = tmp_path / "list.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        listed(ShardIndex.open(tree), path)


def test_other_classes_are_refused(shards, make_shards):
    other = make_shards("other", num=4, classes=["class-0", "class-9"])
    message = r"--val .*: other classes than --train .* \(class-1, class-9\)"
    with pytest.raises(UserError, match=message):
        sets_of(shards, other)
    turned = make_shards("turned", num=4, classes=["class-1", "class-0"])
    with pytest.raises(UserError, match=r"other classes .* \(another order\)"):
        sets_of(shards, turned)


def test_a_class_that_is_only_in_val_is_refused(make_shards):
    """The class names are the same, but training has no picture of one."""
    few = make_shards("few", num=1, classes=["class-0", "class-1"])
    both = make_shards("both", num=4, classes=["class-0", "class-1"])
    with pytest.raises(
        UserError, match=r"--val .* has samples of class-1 \(1 classes\), of which --train .* has"
    ):
        sets_of(few, both)


def test_a_subset_reads_the_samples_it_is_made_of(shards):
    index = ShardIndex.open(shards)
    subset = Subset(index, np.array([31, 2, 5, 18]))
    ids = [2, 5, 18, 31]
    assert subset.sample_ids.tolist() == ids
    assert subset.num_samples == 4
    assert subset.sources == [SourceSizes([2, 1, 1])]
    assert subset.labels.tolist() == index.labels[ids].tolist()
    assert (subset.labels >= 0).all()
    assert [subset.key_name(i) for i in range(4)] == [index.key_name(i) for i in ids]
    assert [subset.read_bytes(i) for i in range(4)] == [index.read_bytes(i) for i in ids]
    assert subset.read_many(np.array([3, 0])) == [index.read_bytes(31), index.read_bytes(2)]
    assert subset.describe(3) == index.describe(31)
    assert subset.fingerprint != Subset(index, np.array([2, 5, 18, 30])).fingerprint


def test_a_loader_gives_each_sample_of_a_subset_the_crops_it_has_in_the_whole_set(shards):
    index = ShardIndex.open(shards)
    ids = np.array([1, 4, 12, 13, 27, 39])
    options = {"image_size": 32, "views": (ViewPolicy(Crop((0.3, 1.0))),), "seed": 2}
    (batch,) = Loader(ViewDataset(Subset(index, ids), **options), batch_size=6).epoch(3)
    assert sorted(ids[batch.sample_ids.numpy()]) == ids.tolist()
    assert batch.views.shape == (1, 6, 3, 32, 32)
    whole = ViewDataset(index, **options)
    request = OrderedSamples(ids[batch.sample_ids.numpy()], batch.repeats.numpy())
    assert (batch.views == whole[request].batch.views).all()
    assert (batch.labels.numpy() == index.labels[ids[batch.sample_ids.numpy()]]).all()
