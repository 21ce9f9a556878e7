"""The identity."""

from tests.pretrain.features.helpers import augment, features, random_of


def test_features_stay_as_they_are():
    z = features()
    assert augment("identity", z, random_of(64), strength=0.3) is z
