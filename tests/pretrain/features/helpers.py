"""Features, random numbers, and a call of one method of feature augmentation."""

import torch

from pretrain.features.augmentations.base import AugmentationContext, FeatureAugmentation, RowRandom


def random_of(n, seed=0):
    return RowRandom.whole(torch.Generator().manual_seed(seed), n)


def features(n=64, d=32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(n, d, generator=generator, dtype=torch.float64)


def neighbours(n=64, k=5, d=32, seed=9):
    """As the queue returns them: unit length, fp32."""
    return torch.nn.functional.normalize(features(n * k, d, seed), dim=1).view(n, k, d).float()


def augment(name, z, random, others=None, *, strength=1.0, number=None, **parameters):
    """One method by its name, with these parameters."""
    method = FeatureAugmentation.registry[name](**parameters)
    return method(z, others, AugmentationContext(random, strength, number))
