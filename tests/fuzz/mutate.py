"""Damage for any kind of file: bytes, trees of JSON or YAML, text, and what stands in its place."""

import copy
import gzip
import io
import json
import lzma
import os
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from PIL import Image

OUTSIDE = "outside"  # a folder beside the input that must stay empty
NUMBERS = (0, -1, 1, 2, 255, 65536, 2**31 - 1, 2**31, 2**32 + 1, 2**63, -(2**63), 10**30, 10**400)
FLOATS = (0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), float("-inf"))


def deep(levels: int) -> Any:
    """Lists within lists."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def text(rng: Random) -> str:
    """A string that a careless program stumbles over."""
    return rng.choice((
        "", " ", "x\0y", "\ud800", "a\nb", "\ufeffa", "é", "猫", "１２", "1_000", "nan", "1e999", "-5",
        "%s{}$(id)", f"../{OUTSIDE}/x", f"../../{OUTSIDE}/x", "/dev/zero", "/", ".", "..", "~",
        "x" * 300, "A" * 200_000, "[" * 5000, "true", "null", "\u202ex", "<b>&amp;", "s3://x/y",
    ))  # fmt: skip


def hostile(rng: Random) -> Any:
    """A value of any type."""
    return rng.choice((
        lambda: rng.choice(NUMBERS), lambda: rng.choice(FLOATS), lambda: text(rng),
        lambda: rng.choice((None, True, False, [], {}, [None], {"": 1}, [[]], deep(60))),
    ))()  # fmt: skip


def shown(value: Any) -> str:
    """A value in a report."""
    try:
        return repr(value)[:60]
    except (ValueError, RecursionError):
        return type(value).__name__


def damage(data: bytes, rng: Random) -> tuple[bytes, str]:
    """Bytes changed without a look at what they mean."""
    size, at = len(data), rng.randrange(len(data) + 1)
    length = rng.choice((1, 2, 8, 64, 512, max(1, size // 3)))
    how = rng.randrange(9)
    if how <= 1 and size:
        found = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 3, 20))):
            found[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return bytes(found), "bits flipped"
    if how == 2:
        return data[:at], f"cut at {at} of {size}"
    if how == 3:
        return data[:at] + bytes(length) + data[at + length :], f"{length} zeros at {at}"
    if how == 4:
        return data[:at] + data[at + length :], f"{length} bytes taken out at {at}"
    if how == 5:
        return data[:at] + data[at : at + length] + data[at:], f"{length} bytes doubled at {at}"
    if how == 6:
        return data[:at] + rng.randbytes(length) + data[at:], f"{length} bytes put in at {at}"
    if how == 7:
        number = rng.choice(
            (b"\xff" * 4, b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\0" * 4, b"\xff\xfe")
        )
        return data[:at] + number + data[at + len(number) :], f"{number.hex()} at {at}"
    return data + rng.randbytes(length), f"{length} bytes at the end"


def other_file(rng: Random) -> tuple[bytes, str]:
    """Content of another kind."""
    stream = io.BytesIO()
    kind = rng.choice(("jpeg", "zip", "gzip", "xz", "npy", "json", "text", "pickle"))
    if kind == "jpeg":
        Image.new("RGB", (8, 8)).save(stream, "JPEG")
    elif kind == "zip":
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("a", "b")
    elif kind == "npy":
        np.save(stream, np.zeros(3))
    by_kind = {"gzip": gzip.compress(bytes(1000)), "xz": lzma.compress(bytes(1000)),
               "json": b"[1, {}]", "text": b"hello\n", "pickle": b"\x80\x02K\x01."}  # fmt: skip
    return by_kind.get(kind, stream.getvalue()), kind


def replace(path: Path, rng: Random) -> str:
    """Something else at a file's place; a power loss leaves files empty or full of zeros."""
    size = path.stat().st_size
    how = rng.choice(("empty", "zeros", "fifo", "folder", "/dev/zero", "loop", "nowhere", "other"))
    path.unlink()
    if how in ("empty", "zeros"):
        path.write_bytes(bytes(size) if how == "zeros" else b"")
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how == "other":
        content, how = other_file(rng)
        path.write_bytes(content)
    else:
        path.symlink_to({"loop": path.name, "nowhere": "no/such/file"}.get(how, how))
    return f"{how} in its place"


def nodes(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, value in list(pairs):
        found.append((tree, key))
        if isinstance(value, dict | list):
            found += nodes(value)
    return found


def change_tree(tree: Any, rng: Random) -> str:
    """One value of a tree of dicts and lists, changed in place."""
    container, key = rng.choice(nodes(tree))
    how = rng.choice(("set", "set", "set", "remove", "double", "rename", "nest", "swap", "text"))
    if how == "remove":
        del container[key]
    elif how == "double" and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif how == "rename" and isinstance(container, dict):
        container[text(rng)] = container.pop(key)
    elif how == "nest":
        container[key] = [container[key]]
    elif how == "swap":
        other, name = rng.choice(nodes(tree))
        container[key] = copy.deepcopy(other[name])
    elif how == "text":
        container[key] = str(container[key])
    else:
        container[key] = hostile(rng)
        return f"{key!s:.40} = {shown(container[key])}"
    return f"{how} {key!s:.40}"


def change_text(content: str, rng: Random) -> tuple[bytes, str]:
    """Another spelling of a text, or a piece of it where it does not belong."""
    coded = {"bom": "utf-8-sig", "utf-16": "utf-16", "utf-16-le": "utf-16-le", "latin": "latin-1",
             "gb18030": "gb18030", "utf-32": "utf-32"}  # fmt: skip
    how = rng.choice((*coded, "crlf", "lines", "line", "cut", "bombs"))
    if how in coded:
        return content.encode(coded[how], "replace"), how
    if how == "crlf":
        return content.replace("\n", "\r\n").encode(), how
    lines = content.split("\n")
    at = rng.randrange(len(lines))
    if how == "lines":
        lines.insert(at, rng.choice(lines))
    elif how == "line":
        lines[at] = text(rng)
    elif how == "cut":
        return content[: rng.randrange(len(content) + 1)].encode(errors="surrogatepass"), how
    else:
        lines.insert(at, rng.choice(("[" * 100_000, "{" * 50_000, '{"a":' * 30_000, "-" * 10**6)))
    return "\n".join(lines).encode(errors="surrogatepass"), f"{how} at line {at + 1}"


def change_json(path: Path, rng: Random) -> str:
    """A JSON file with a value, its text or its bytes changed, or a key given twice."""
    content = path.read_bytes()
    how = rng.randrange(8)
    if how == 0:
        changed, what = damage(content, rng)
    elif how == 1:
        changed, what = change_text(content.decode(), rng)
    elif how == 2:
        key = rng.choice([str(k) for _, k in nodes(json.loads(content))])
        twice = f"{{{json.dumps(key)}: {json.dumps(hostile(rng))}, "
        changed, what = content.replace(b"{", twice.encode(), 1), f"{key} twice"
    else:
        tree = json.loads(content)
        what = change_tree(tree, rng)
        changed = json.dumps(tree).encode()
    path.write_bytes(changed)
    return what
