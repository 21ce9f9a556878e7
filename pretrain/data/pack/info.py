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

from common.errors import UserError
from common.files import sha256_of
from common.pictures import BadPicture, decode
from pretrain.data.index import NO_LABEL, SAMPLE_DTYPE, read_index, scan_shard, to_table
from pretrain.data.order import counter_rng
from pretrain.data.shards import ShardIndex


@dataclass
class VerifyReport:
    """What a check of a shard set found; empty `problems` means that all is well."""

    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True if nothing is wrong."""
        return not self.problems


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
    if not (folder / "index.json").exists():
        raise UserError(
            f"{folder / 'index.json'}: missing, so there is nothing to verify against; make the "
            "shards first"
        )
    index = read_index(folder / "index.json")
    report = VerifyReport(
        len(index["shards"]), index["num_samples"], sum(s["bytes"] for s in index["shards"])
    )
    table = _load_table(folder, index, report)
    listed = {shard["name"] for shard in index["shards"]}
    for tar in sorted(folder.glob("*.tar")):
        if tar.name not in listed:
            report.problems.append(
                f"{tar}: not in the index; take it away, or make the index again"
            )
    if sum(s["num_samples"] for s in index["shards"]) != index["num_samples"]:
        report.problems.append(
            f"{folder / 'index.json'}: the shards' counts do not add up to num_samples"
        )

    def check(item: tuple[int, dict[str, Any]]) -> str | None:
        return _check_shard(folder, item[0], item[1], table)

    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = pool.map(check, enumerate(index["shards"]))
        for problem in tqdm(
            results, total=len(listed), desc="verifying", unit="shard", disable=not progress
        ):
            if problem is not None:
                report.problems.append(problem)
    return report


def _load_table(folder: Path, index: dict[str, Any], report: VerifyReport) -> np.ndarray | None:
    path = folder / index["samples"]
    try:
        table = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        report.problems.append(
            f"{path}: cannot be read ({error}); delete index.json to index the tars again"
        )
        return None
    if (
        table.dtype != SAMPLE_DTYPE
        or len(table) != index["num_samples"]
        or sha256_of(path) != index["samples_sha256"]
    ):
        report.problems.append(
            f"{path}: differs from what index.json says; delete index.json to index the tars again"
        )
        return None
    return table


def _check_shard(
    folder: Path, number: int, shard: dict[str, Any], table: np.ndarray | None
) -> str | None:
    path = folder / shard["name"]
    if not path.exists():
        return f"{path}: missing; copy it back or make the shards again"
    size = path.stat().st_size
    if size != shard["bytes"]:
        return (
            f"{path}: {size:,} bytes, the index says {shard['bytes']:,}; copy it again or make "
            "the shards again"
        )
    if sha256_of(path) != shard["sha256"]:
        return (
            f"{path}: its SHA-256 is not the one in the index; copy it again or make the shards "
            "again"
        )
    try:
        entries, _ = scan_shard(path)
    except UserError as error:
        return str(error)
    if len(entries) != shard["num_samples"]:
        return (
            f"{path}: {len(entries)} samples, the index says {shard['num_samples']}; make the "
            "index again"
        )
    if table is not None:
        found = to_table([entries])
        found["shard"] = number
        if not np.array_equal(found, table[table["shard"] == number]):
            return (
                f"{path}: samples lie elsewhere than samples.npy says; delete index.json to index "
                "the tars again"
            )
    return None


MAX_LOOKED_AT = 1000  # pictures whose headers are read
MAX_REMOTE_SHARDS = 16  # they lie in so many shards where each must be fetched whole
MAX_CLASS_ROWS = 30
_BAR = 40  # characters of the longest bar
_TILE, _CAPTION, _GAP = 160, 16, 4  # pixels of the contact sheet
_SHEET_COLUMNS, _SHEET_ROWS = 8, 5


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
    if not index.num_samples:
        raise UserError(f"{index.name}: holds no samples")
    chosen = choose_samples(index, look_at, seed)
    sizes, formats = _read_headers(index, chosen)
    pixels = np.array(sizes, dtype=np.int64).reshape(-1, 2)
    median, p95 = np.percentile(index.samples["size"], (50, 95))
    counts, num_unlabelled = _count_classes(index)
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
        class_counts=counts,
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


def _read_headers(
    index: ShardIndex, chosen: np.ndarray
) -> tuple[list[tuple[int, int]], Counter[str]]:
    """Width and height of each picture that opens, and how many there are of each format."""
    sizes, formats = [], Counter()
    for i in chosen.tolist():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(index.read_bytes(i))) as picture:
                    sizes.append(picture.size)
                    formats[f"{picture.format} {picture.mode}"] += 1
        except UserError:
            raise
        except Exception:  # Pillow raises many kinds, OSError and SyntaxError among them
            formats["unreadable"] += 1
    return sizes, formats


def _count_classes(index: ShardIndex) -> tuple[dict[str, int], int]:
    """Samples of each class, in the order of the labels, and samples without a label."""
    labels, counts = np.unique(index.samples["label"], return_counts=True)
    found = dict(zip(labels.tolist(), counts.tolist(), strict=True))
    num_unlabelled = found.pop(NO_LABEL, 0)
    names = _class_names(index, found)
    return {name: found.get(label, 0) for label, name in names.items()}, num_unlabelled


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
    shards, sizes = info.samples_per_shard, info.shard_bytes
    looked = f"{info.num_looked_at:,} of {info.num_samples:,} pictures looked at, from "
    looked += f"{info.num_shards_looked_at:,} of {info.num_shards:,} shards"
    lines = [
        f"{info.name}: {info.num_samples:,} samples in {info.num_shards:,} shards, "
        f"{info.num_bytes / 1e6:,.1f} MB",
        f"samples per shard   {shards.min:,.0f} / {shards.median:,.0f} / {shards.max:,.0f}"
        "  (min / median / max)",
        f"shards, MB          {sizes.min / 1e6:,.2f} / {sizes.median / 1e6:,.2f} / "
        f"{sizes.max / 1e6:,.2f}",
        f"pictures, kB        {info.picture_bytes_median / 1e3:,.1f} (median), "
        f"{info.picture_bytes_p95 / 1e3:,.1f} (95 %)",
        looked + ":",
    ]
    if info.widths and info.heights and info.megapixels:
        for name, spread in (("width", info.widths), ("height", info.heights)):
            lines.append(
                f"  {name + ', pixels':16s}  {spread.min:,.0f} / {spread.median:,.0f} / "
                f"{spread.max:,.0f}"
            )
        pixels = info.megapixels
        lines.append(
            f"  {'megapixels':16s}  {pixels.min:.3g} / {pixels.median:.3g} / {pixels.max:.3g}"
        )
    shares = [f"{name} {n / info.num_looked_at:.1%}" for name, n in info.formats.items()]
    lines += [f"  {'formats':16s}  {', '.join(shares)}", *_class_lines(info), *_made_lines(info)]
    return "\n".join(lines)


def _class_lines(info: ShardInfo) -> list[str]:
    if not info.class_counts:
        return ["no labels"]
    ordered = sorted(info.class_counts.items(), key=lambda item: -item[1])
    shown, rest = ordered[:MAX_CLASS_ROWS], ordered[MAX_CLASS_ROWS:]
    longest, width = max(1, ordered[0][1]), max(len(name[:_BAR]) for name, _ in shown)
    lines = [f"{len(ordered):,} classes, largest first:"]
    for name, count in shown:
        bar = "#" * math.ceil(_BAR * count / longest)
        lines.append(f"  {name[:_BAR]:{width}s}  {count:9,d}  {bar}")
    if rest:
        lines.append(f"  and {len(rest):,} more, {sum(count for _, count in rest):,} samples")
    if info.num_unlabelled:
        lines.append(f"  without a label: {info.num_unlabelled:,}")
    return lines


def _made_lines(info: ShardInfo) -> list[str]:
    options = {name: value for name, value in info.options.items() if name != "fingerprint"}
    words = ", ".join(f"{name} {value}" for name, value in options.items())
    made = "made by another tool" if options.get("foreign") else f"made with: {words}"
    if not info.skipped:
        return [made, "nothing was left out when the set was made"]
    lines = [made, f"left out when the set was made: {len(info.skipped):,}"]
    lines += [f"  {item['file']}: {item['reason']}" for item in info.skipped[:10]]
    if len(info.skipped) > 10:
        lines.append(f"  and {len(info.skipped) - 10:,} more")
    return lines


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
    if path.suffix.lower() not in (".jpg", ".jpeg", ".png"):
        raise UserError(f"{path}: give a name that ends in .jpg or .png")
    chosen = choose_samples(index, _SHEET_COLUMNS * _SHEET_ROWS, seed).tolist()
    columns = min(_SHEET_COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    step_x, step_y = _TILE + _GAP, _TILE + _CAPTION + _GAP
    sheet = Image.new("RGB", (columns * step_x + _GAP, rows * step_y + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    names = _class_names(index, np.unique(index.samples["label"][chosen]).tolist())
    for number, i in enumerate(chosen):
        x, y = _GAP + number % columns * step_x, _GAP + number // columns * step_y
        tile = _tile(index, i)
        sheet.paste(tile, (x + (_TILE - tile.width) // 2, y + (_TILE - tile.height) // 2))
        label = int(index.samples[i]["label"])
        caption = index.key_name(i) if label == NO_LABEL else names[label]
        draw.text((x, y + _TILE + 1), _fit(caption, draw, font), "black", font)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=88)
    return len(chosen)


def _tile(index: ShardIndex, i: int) -> Image.Image:
    """The picture at the size of a tile; a grey one that says so if it does not decode."""
    try:
        tile = Image.fromarray(decode(index.read_bytes(i), where=index.describe(i)))
    except BadPicture:
        tile = Image.new("RGB", (_TILE, _TILE), "lightgrey")
        ImageDraw.Draw(tile).text((8, _TILE // 2 - 8), "does not decode", "black")
        return tile
    tile.thumbnail((_TILE, _TILE), Image.Resampling.LANCZOS)
    return tile


def _fit(text: str, draw: ImageDraw.ImageDraw, font: Any) -> str:
    """As much of a text as fits below a tile."""
    while draw.textlength(text, font) > _TILE and len(text) > 1:
        text = text[:-2] + "\u2026"
    return text
