"""What a shard set holds: counts, sizes, classes, pictures of it."""

import io
import math
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from common.errors import UserError, require
from common.pictures import BadPicture, decode
from pretrain.data.index import NO_LABEL, load_table, read_index, scan_file
from pretrain.data.random_numbers import counter_rng
from pretrain.data.shards import ShardIndex

MAX_LOOKED_AT = 1000  # pictures whose headers are read
MAX_REMOTE_SHARDS = 16  # they lie in so many shards where each must be fetched whole
MAX_CLASS_ROWS = 30
_BAR = 40  # characters of the longest bar
_TILE, _CAPTION, _GAP = 160, 16, 4  # pixels of the contact sheet
_SHEET_COLUMNS, _SHEET_ROWS = 8, 5


@dataclass
class VerifyReport:
    """Result of a check of a shard set; without `problems` all is well."""

    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def verify_shards(
    path: str | Path, *, num_workers: int = 2, progress: bool = False
) -> VerifyReport:
    """Check every shard against the index: size, SHA-256, samples; and tars that nobody listed.

    Args:
        path: Folder with index.json.
        num_workers: Threads; hashing is bound by the disk or one core each.
        progress: Show a progress bar.
    Raises:
        UserError: If there is no readable index at all.
    """
    folder = Path(path)
    require(
        (folder / "index.json").exists(),
        f"{folder / 'index.json'}: missing, so there is nothing to verify against; make the shards "
        "first",
    )
    index = read_index(folder)
    shards = index["shards"]
    report = VerifyReport(len(shards), index["num_samples"], sum(s["bytes"] for s in shards))
    table = None
    try:
        table = load_table(folder, index)
    except UserError as error:
        report.problems.append(str(error))
    listed = {folder / shard["name"] for shard in shards}
    report.problems += [
        f"{tar}: not in the index; take it away, or make the index again"
        for tar in sorted({*folder.glob("*.tar")} - listed)
    ]

    def problem_of(number: int) -> str | None:
        path, shard = folder / shards[number]["name"], shards[number]
        again = "copy it again or make the shards again"
        if not path.exists():
            return f"{path}: missing; {again}"
        if (size := path.stat().st_size) != shard["bytes"]:
            return f"{path}: {size:,} bytes, the index says {shard['bytes']:,}; {again}"
        try:
            part = scan_file(path)
        except UserError as error:
            return str(error)
        if part.shard["sha256"] != shard["sha256"]:
            return f"{path}: its SHA-256 is not the one in the index; {again}"
        part.table["shard"] = number
        if table is not None and not np.array_equal(part.table, table[table["shard"] == number]):
            return (
                f"{path}: samples lie elsewhere than samples.npy says; delete index.json to index "
                "the tars again"
            )
        return None

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        problems = pool.map(problem_of, range(len(shards)))
        bar = tqdm(
            problems, total=len(shards), desc="verifying", unit="shard", disable=not progress
        )
        report.problems += [problem for problem in bar if problem is not None]
    return report


@dataclass(frozen=True)
class Spread:
    """Smallest, middle and largest of some numbers."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> "Spread":
        """The spread of at least one number."""
        return cls(float(np.min(values)), float(np.median(values)), float(np.max(values)))

    def text(self, spec: str, unit: float = 1) -> str:
        """The three numbers in a unit, by a format specification."""
        numbers = (self.min, self.median, self.max)
        return " / ".join(format(number / unit, spec) for number in numbers)


@dataclass(frozen=True)
class ShardInfo:
    """What a shard set holds.

    Attributes:
        name: What the set was called.
        num_samples: Samples of all shards.
        num_shards: Shards.
        num_bytes: Bytes of all tars.
        samples_per_shard: Over the shards.
        shard_bytes: Over the shards.
        picture_bytes_median: Median over all pictures as stored.
        picture_bytes_p95: 95th percentile, the same.
        num_looked_at: Pictures whose headers were read, drawn by a seed.
        num_shards_looked_at: Shards these lie in.
        widths: Pixels, of those looked at that could be read; None if none could.
        heights: The same.
        megapixels: The same.
        formats: Number of each of those looked at, such as {"JPEG RGB": 990, "unreadable": 10}.
        class_counts: Samples of each class by its name, or number where no names are known.
        num_unlabelled: Samples without a label.
        skipped: What was left out when the set was made.
        options: What it was made with.
    """

    name: str
    num_samples: int
    num_shards: int
    num_bytes: int
    samples_per_shard: Spread
    shard_bytes: Spread
    picture_bytes_median: float
    picture_bytes_p95: float
    num_looked_at: int
    num_shards_looked_at: int
    widths: Spread | None
    heights: Spread | None
    megapixels: Spread | None
    formats: dict[str, int]
    class_counts: dict[str, int]
    num_unlabelled: int
    skipped: list[dict[str, str]]
    options: dict[str, Any]


def gather_info(index: ShardIndex, *, seed: int = 0, look_at: int = MAX_LOOKED_AT) -> ShardInfo:
    """Describe a shard set from its index, and from the headers of some pictures.

    Args:
        index: The set.
        seed: Of the choice of pictures.
        look_at: How many pictures at most.
    Raises:
        UserError: If the set is empty, or a shard cannot be read.
    """
    require(index.num_samples > 0, f"{index.name}: holds no samples")
    chosen = choose_samples(index, look_at, seed)
    sizes, formats = [], Counter()
    for i in chosen.tolist():
        data = io.BytesIO(index.read_bytes(i))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(data) as picture:
                    sizes.append(picture.size)
                    formats[f"{picture.format} {picture.mode}"] += 1
        except Exception:  # Pillow raises many kinds, OSError and SyntaxError among them
            formats["unreadable"] += 1
    pixels = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    median, p95 = np.percentile(index.samples["size"], (50, 95))
    labels, counts = np.unique(index.samples["label"], return_counts=True)
    count_of = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    num_unlabelled = count_of.pop(NO_LABEL, 0)
    names = _class_names(index, count_of)
    return ShardInfo(
        name=index.name,
        num_samples=index.num_samples,
        num_shards=len(index.shard_names),
        num_bytes=sum(index.shard_bytes),
        samples_per_shard=Spread.of(index.shard_sizes),
        shard_bytes=Spread.of(index.shard_bytes),
        picture_bytes_median=float(median),
        picture_bytes_p95=float(p95),
        num_looked_at=len(chosen),
        num_shards_looked_at=len(np.unique(index.samples["shard"][chosen])),
        widths=Spread.of(pixels[:, 0]) if len(pixels) else None,
        heights=Spread.of(pixels[:, 1]) if len(pixels) else None,
        megapixels=Spread.of(pixels.prod(axis=1) / 1e6) if len(pixels) else None,
        formats=dict(formats.most_common()),
        class_counts={name: count_of.get(label, 0) for label, name in names.items()},
        num_unlabelled=num_unlabelled,
        skipped=index.skipped,
        options=index.options,
    )


def choose_samples(index: ShardIndex, count: int, seed: int) -> np.ndarray:
    """Numbers of samples drawn by a seed, int64 [at most `count`], ascending; from a few shards
    only where the set is remote.
    """
    rng = counter_rng("samples to show", seed)
    there = np.arange(index.num_samples)
    filled = np.flatnonzero(index.shard_sizes)
    if index.is_remote and len(filled) > MAX_REMOTE_SHARDS:
        shards = rng.choice(filled, MAX_REMOTE_SHARDS, replace=False)
        there = np.flatnonzero(np.isin(index.samples["shard"], shards))
    return np.sort(rng.choice(there, min(count, len(there)), replace=False))


def _class_names(index: ShardIndex, labels: Iterable[int]) -> dict[int, str]:
    """Names by label, in the order of the labels: of all classes, and the number where it has none.

    Names that occur twice, or are another one's number, get their number appended.
    """
    plain = {**{label: str(label) for label in labels}, **dict(enumerate(index.classes or []))}
    times = Counter(plain.values())
    unique = {k: name if times[name] == 1 else f"{name} ({k})" for k, name in plain.items()}
    return dict(sorted(unique.items()))


def format_info(info: ShardInfo) -> str:
    """The description as text for a terminal."""
    lines = [
        f"{info.name}: {info.num_samples:,} samples in {info.num_shards:,} shards, "
        f"{info.num_bytes / 1e6:,.1f} MB",
        f"samples per shard   {info.samples_per_shard.text(',.0f')}  (min / median / max)",
        f"shards, MB          {info.shard_bytes.text(',.2f', 1e6)}",
        f"pictures, kB        {info.picture_bytes_median / 1e3:,.1f} (median), "
        f"{info.picture_bytes_p95 / 1e3:,.1f} (95 %)",
        f"{info.num_looked_at:,} of {info.num_samples:,} pictures looked at, from "
        f"{info.num_shards_looked_at:,} of {info.num_shards:,} shards:",
    ]
    if info.widths and info.heights and info.megapixels:
        lines += [
            f"  width, pixels     {info.widths.text(',.0f')}",
            f"  height, pixels    {info.heights.text(',.0f')}",
            f"  megapixels        {info.megapixels.text('.3g')}",
        ]
    shares = [f"{name} {n / info.num_looked_at:.1%}" for name, n in info.formats.items()]
    lines.append(f"  formats           {', '.join(shares)}")

    # Classes, the largest with bars.
    ordered = sorted(info.class_counts.items(), key=lambda item: -item[1])
    listed, rest = ordered[:MAX_CLASS_ROWS], ordered[MAX_CLASS_ROWS:]
    lines.append(f"{len(ordered):,} classes, largest first:" if ordered else "no labels")
    width = max((len(name[:_BAR]) for name, _ in listed), default=0)
    for name, count in listed:
        bar = "#" * math.ceil(_BAR * count / max(1, ordered[0][1]))
        lines.append(f"  {name[:_BAR]:{width}s}  {count:9,d}  {bar}")
    if rest:
        lines.append(f"  and {len(rest):,} more, {sum(count for _, count in rest):,} samples")
    if ordered and info.num_unlabelled:
        lines.append(f"  without a label: {info.num_unlabelled:,}")

    # How the set was made.
    options = [f"{name} {value}" for name, value in info.options.items() if name != "fingerprint"]
    is_ours = "fingerprint" in info.options
    lines.append(f"made with: {', '.join(options)}" if is_ours else "made by another tool")
    if not info.skipped:
        lines.append("nothing was left out when the set was made")
        return "\n".join(lines)
    lines.append(f"left out when the set was made: {len(info.skipped):,}")
    lines += [f"  {item['file']}: {item['reason']}" for item in info.skipped[:10]]
    if len(info.skipped) > 10:
        lines.append(f"  and {len(info.skipped) - 10:,} more")
    return "\n".join(lines)


def save_pictures(index: ShardIndex, path: Path, *, seed: int = 0) -> int:
    """Write a sheet of pictures drawn by a seed, each with its label, or its key if it has none.

    Args:
        index: The set.
        path: Picture to write, .jpg or .png.
        seed: Of the choice of pictures.
    Returns:
        Number of pictures on the sheet.
    Raises:
        UserError: If the name ends otherwise, or a shard cannot be read.
    """
    require(
        path.suffix.lower() in (".jpg", ".jpeg", ".png"),
        f"{path}: give a name that ends in .jpg or .png",
    )
    chosen = choose_samples(index, _SHEET_COLUMNS * _SHEET_ROWS, seed).tolist()
    columns = min(_SHEET_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    step_x, step_y = _TILE + _GAP, _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    names = _class_names(index, np.unique(index.samples["label"][chosen]).tolist())
    for number, i in enumerate(chosen):
        x, y = _GAP + number % columns * step_x, _GAP + number // columns * step_y
        try:
            tile = Image.fromarray(decode(index.read_bytes(i), where=index.describe(i)))
            tile.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
        except BadPicture:
            tile = Image.new("RGB", (_TILE, _TILE), "lightgrey")
            ImageDraw.Draw(tile).text((8, _TILE // 2 - 8), "does not decode", "black")
        sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
        label = int(index.samples[i]["label"])
        caption = index.key_name(i) if label == NO_LABEL else names[label]
        while draw.textlength(caption, font) > _TILE and len(caption) > 1:
            caption = caption[:-2] + "\u2026"
        draw.text((x, y + _TILE + 1), caption, "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88)
    return len(chosen)
