"""BYOL's two views by NVIDIA DALI on the CPU: one thread, one decoding for both views.

Jitter is DALI's own joined operation (`color_twist`: one matrix for brightness, contrast,
saturation and hue), which does less work than the four operations of the others; its decoder uses
the fast inverse DCT and plain upsampling of the colour planes, and crops are bilinear. Nothing runs
ahead, so that no work falls between the turns.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nvidia.dali import fn, pipeline_def, types  # pyright: ignore[reportMissingImports]

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
BATCH = 16


@pipeline_def(enable_conditionals=True)
def _byol(files: Sequence[str], size: int) -> Any:
    data, _ = fn.readers.file(files=list(files), random_shuffle=True, name="reader")
    image = fn.decoders.image(data, device="cpu", output_type=types.RGB, use_fast_idct=True)
    return _view(image, size, 1.0, 0.0), _view(image, size, 0.1, 0.2)


def _view(image: object, size: int, blur: float, solarize: float) -> object:
    """One view; the `if`s are conditions for each sample, which DALI takes from the source."""
    view = fn.random_resized_crop(image, size=size, random_area=(0.08, 1.0))
    if _chance(0.8):
        view = fn.color_twist(
            view,
            brightness=fn.random.uniform(range=(0.6, 1.4)),
            contrast=fn.random.uniform(range=(0.6, 1.4)),
            saturation=fn.random.uniform(range=(0.8, 1.2)),
            hue=fn.random.uniform(range=(-36.0, 36.0)),
        )
    if _chance(0.2):
        view = fn.hsv(view, saturation=0.0)
    if _chance(blur):
        view = fn.gaussian_blur(view, sigma=fn.random.uniform(range=(0.1, 2.0)))
    if _chance(solarize):
        view = view ^ ((view >= 128) * types.Constant(255, dtype=types.UINT8))
    return fn.crop_mirror_normalize(
        view, mirror=fn.random.coin_flip(), mean=list(MEAN), std=list(STD), dtype=types.FLOAT,
        output_layout="CHW",
    )  # fmt: skip


def _chance(probability: float) -> object:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def byol(files: Sequence[str], size: int) -> Callable[[], None]:
    """Read, decode and make both views of every file; the last batch wraps around."""
    make: Any = _byol  # its decorator adds options
    pipeline = make(
        files, size, batch_size=BATCH, num_threads=1, device_id=None, seed=0,
        exec_pipelined=False, exec_async=False,
    )  # fmt: skip
    pipeline.build()
    if len(files) % BATCH:
        raise ValueError(f"{len(files)} files: must be a multiple of {BATCH}")

    def epoch() -> None:
        for _ in range(len(files) // BATCH):
            pipeline.run()

    return epoch


RECIPES = {"dali": {"NVIDIA DALI, CPU": byol}}
