"""What the method's part of the schema refuses, with which words, and what it reads."""

import re

import pytest

from common.errors import UserError
from pretrain.config import FAConfig
from tests.pretrain.conftest import make_fa

REFUSED = [
    ({"method": "rotate"}, "fa.method='rotate': 'rotate' is none of none, cutmix, extrapolate"),
    ({"method": "rotate"}, "noise; join them with + (one after another) and | (one at ran"),
    ({"method": "nn+"}, "fa.method='nn+': '' is none of"),
    ({"method": "mask||noise"}, "'' is none of"),
    ({"method": ""}, "'' is none of"),
    ({"method": "none+mask"}, "fa.method='none+mask': 'none' stands alone"),
    ({"method": "mask|identity"}, "fa.method='mask|identity': 'identity' stands alone"),
    ({"method": "none|none"}, "'none' stands alone"),
    ({"num_features": 0}, "fa.num_features must be >= 1, got 0"),
    ({"method": "identity", "num_features": 2}, "fa.num_features=2 needs a method that draws; 'id"),
    ({"method": "none", "num_features": 3}, "'none' gives the same feature each time"),
    ({"mask": {"ratio": 1.0}}, "fa.mask.ratio must be in [0, 1), got 1.0"),
    ({"mask": {"ratio": float("nan")}}, "fa.mask.ratio must be in [0, 1), got nan"),
    ({"cutmix": {"ratio": -0.1}}, "fa.cutmix.ratio must be in [0, 1), got -0.1"),
    ({"noise": {"sigma": -1.0}}, "fa.noise.sigma must be >= 0, got -1.0"),
    ({"extrapolate": {"scale": -0.5}}, "fa.extrapolate.scale must be >= 0, got -0.5"),
    ({"mixup": {"alpha": 0.0}}, "fa.mixup.alpha must be > 0, got 0.0"),
    ({"strength": 1.5}, "fa.strength must be in [0, 1], got 1.5"),
    ({"strength_start": -0.1}, "fa.strength_start must be in [0, 1], got -0.1"),
    ({"min_fill": 0, "nn": {"top_k": 0}}, "fa: 1 <= top_k (0) <= min_fill (0) must hold"),
    ({"nn": {"top_k": 5}, "min_fill": 4}, "fa: 1 <= top_k (5) <= min_fill (4) must hold"),
    ({"min_fill": 9, "queue_size": 8}, "fa: 1 <= min_fill (9) <= queue_size (8) must hold"),
    ({"method": "mixup", "partner": "queue", "min_fill": 0}, "fa: 1 <= min_fill (0) <= queue_size"),
    ({"num_features": 3, "nn": {"top_k": 2}}, "num_features=3 takes the N nearest and needs top_k"),
    ({"num_features": 2}, "needs top_k >= N, got top_k=1"),
    ({"method": "mask|nn", "num_features": 2}, "needs top_k >= N, got top_k=1"),
    (
        {"num_features": 2, "nn": {"top_k": 2, "choice": "consensus"}},
        "nn.choice=consensus makes one feature of the top_k, so num_features must be 1, got 2",
    ),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_fa_refuses_with_the_value_and_the_remedy(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_fa(**options)


@pytest.mark.parametrize(
    ("method", "chains"),
    [
        ("none", ()),
        (" nn ", (("nn",),)),
        ("nn+noise", (("nn", "noise"),)),
        ("mask|mixup", (("mask",), ("mixup",))),
        ("nn + noise | cutmix+extrapolate", (("nn", "noise"), ("cutmix", "extrapolate"))),
        ("mask|mask|noise", (("mask",), ("mask",), ("noise",))),  # twice as often
    ],
)
def test_plus_binds_closer_than_bar(method, chains):
    fa = FAConfig(method=method)
    expected = tuple(tuple(getattr(fa, name) for name in chain) for chain in chains)
    assert fa.chains() == expected


@pytest.mark.parametrize(
    ("method", "partner", "uses_queue"),
    [
        ("nn", "batch", True),
        ("mask|noise+nn", "view", True),
        ("mixup", "queue", True),
        ("mask|extrapolate", "queue", True),
        ("mixup", "batch", False),
        ("cutmix", "view", False),
        ("mask+noise", "queue", False),
        ("none", "queue", False),
    ],
)
def test_a_queue_is_kept_where_something_reads_it(method, partner, uses_queue):
    assert FAConfig(method=method, partner=partner).uses_queue() == uses_queue
