"""Damage for any kind of file: bytes, text, a value of its tree, what stands in its place."""

import copy
import gzip
import io
import json
import lzma
import os
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

OUTSIDE = "outside"  # a folder beside the input that must stay empty
_DEEP: Any = [1]
for _ in range(60):
    _DEEP = [_DEEP]
VALUES = (
    0, -1, 1, 255, 65536, 2**31 - 1, 2**31, 2**32 + 1, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0,
    1e-320, 1e308, float("nan"), float("inf"), float("-inf"), None, True, [], {}, {"": 1}, _DEEP,
)  # fmt: skip
TEXTS = (
    "", " ", "x\0y", "\ud800", "a\nb", "\ufeffa", "é", "猫", "１２", "1_000", "nan", "1e999", "-5",
    "~", "%s{}$(id)", f"../{OUTSIDE}/x", f"../../{OUTSIDE}/x", "/dev/zero", "/", ".", "..",
    "x" * 300, "A" * 200_000, "[" * 5000, "true", "null", "\u202ex", "<b>&amp;", "s3://x/y",
)  # fmt: skip
LINES = ("[" * 100_000, "{" * 50_000, '{"a":' * 30_000, "-" * 10**6, *TEXTS[:9])
CODINGS = ("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "gb18030")
_JPEG = io.BytesIO()
Image.new("RGB", (8, 8)).save(_JPEG, "JPEG")
OTHERS = {
    "jpeg": _JPEG.getvalue(), "gzip": gzip.compress(bytes(999)), "xz": lzma.compress(bytes(999)),
    "json": b"[1, {}]", "text": b"hello\n", "pickle": b"\x80\x02K\x01.",
    "zip": b"PK\5\6" + bytes(18),
}  # fmt: skip


def hostile(rng: Random) -> Any:
    """A value that a careless program stumbles over."""
    return rng.choice(rng.choice((VALUES, TEXTS)))


def damage(path: Path, rng: Random) -> str:
    """Change a file's bytes without a look at what they mean; returns what was done."""
    data = path.read_bytes()
    at, length = rng.randrange(len(data)), rng.choice((1, 2, 8, 64, 512, len(data) // 3))
    head, piece, tail = data[:at], data[at : at + length], data[at + length :]
    number = rng.choice((b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80", bytes(4), b"\xff\xfe"))
    changed = {
        "cut": head, "zeros": head + bytes(len(piece)) + tail, "taken out": head + tail,
        "doubled": head + piece + piece + tail, "put in": head + rng.randbytes(length) + data[at:],
        "number": head + number + data[at + len(number) :], "added": data + rng.randbytes(length),
    }  # fmt: skip
    how = rng.choice((*changed, "bits", "bits"))
    flipped = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 3, 20))):
        flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(changed.get(how, flipped))
    return f"{how} at {at} of {len(data)}, length {length}"


def replace(path: Path, rng: Random) -> str:
    """Put something else at a file's place; a loss of power leaves it empty or full of zeros."""
    data, links = path.read_bytes(), {"loop": path.name, "nowhere": "no/file", "zero": "/dev/zero"}
    how = rng.choice(("empty", "zeros", "cut", "fifo", "folder", "other", *links))
    path.unlink()
    if how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how in links:
        path.symlink_to(links[how])
    else:
        contents = {
            "empty": b"",
            "zeros": bytes(len(data)),
            "cut": data[: rng.randrange(len(data))],
        }
        how = rng.choice(list(OTHERS)) if how == "other" else how
        path.write_bytes({**OTHERS, **contents}[how])
    return f"{how} in its place"


def change_tree(tree: Any, rng: Random) -> str:
    """Change one value of a tree of dicts and lists, in place."""

    def nodes(container: Any) -> list[tuple[Any, Any]]:
        pairs = list(container.items() if isinstance(container, dict) else enumerate(container))
        inner = [node for _, v in pairs if isinstance(v, dict | list) for node in nodes(v)]
        return [(container, key) for key, _ in pairs] + inner

    container, key = rng.choice(nodes(tree))
    value, other = container[key], rng.choice(nodes(tree))
    how = rng.choice(("set", "set", "set", "remove", "double", "rename", "nest", "swap", "text"))
    if how == "remove":
        del container[key]
    elif how == "double" and isinstance(container, list):
        container.insert(key, copy.deepcopy(value))
    elif how == "rename" and isinstance(container, dict):
        container[rng.choice(TEXTS)] = container.pop(key)
    else:
        new = {"nest": [value], "text": str(value), "swap": copy.deepcopy(other[0][other[1]])}
        container[key] = new[how] if how in new else hostile(rng)
        how = f"{how}: {container[key]!r:.60}"
    return f"{key!s:.40} {how}"


def change_text(path: Path, rng: Random) -> str:
    """Write a text in another encoding, or lines where they do not belong."""
    content, how = path.read_text(encoding="utf-8"), rng.choice((*CODINGS, "crlf", "twice", "line"))
    lines = content.split("\n")
    at = rng.randrange(len(lines))
    if how in ("twice", "line"):
        lines.insert(at, rng.choice(lines if how == "twice" else LINES))
        path.write_bytes("\n".join(lines).encode(errors="surrogatepass"))
        return f"{how} at line {at + 1}: {lines[at]:.30}"
    content = content.replace("\n", "\r\n") if how == "crlf" else content
    path.write_bytes(content.encode("utf-8" if how == "crlf" else how, "replace"))
    return how


def change_json(path: Path, rng: Random) -> str:
    """Change a value, the text or the bytes of a JSON file, or give a key twice."""
    how = rng.randrange(8)
    if how <= 1:
        return (damage, change_text)[how](path, rng)
    content = path.read_text()
    tree = json.loads(content)
    if how == 2 and isinstance(tree, dict):
        key = rng.choice(list(tree))
        path.write_text(f"{{{json.dumps(key)}: {json.dumps(hostile(rng))}, {content[1:]}")
        return f"{key} twice"
    what = change_tree(tree, rng)
    path.write_text(json.dumps(tree))
    return what
