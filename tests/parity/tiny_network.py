"""The backbone of the comparison with solo-learn; it imports torch alone, since both sides do."""

from torch import nn


class TinyNetwork(nn.Sequential):
    """Two convolutions with BN, and the mean over the picture: [n, 3, s, s] -> [n, 24]."""

    output_dim = inplanes = 24

    def __init__(self):
        super().__init__(
            nn.Conv2d(3, 12, 3, stride=2, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
            nn.Conv2d(12, 24, 3, stride=2, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.fc = nn.Identity()
