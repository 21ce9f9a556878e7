"""Outlines as point lists: the few curves from which every generated shape is put together.

Coordinates are object units (an object spans about -1..1), x to the right, y downwards.
Every function returns float arrays of shape (num_points, 2).
"""

from collections.abc import Sequence

import numpy as np

Points = np.ndarray
Place = Sequence[float] | Points


def polygon(*corners: tuple[float, float]) -> Points:
    """Return the given corners as an outline."""
    return np.array(corners, dtype=np.float64)


def rectangle(x0: float, y0: float, x1: float, y1: float) -> Points:
    """Return an axis-aligned rectangle."""
    return polygon((x0, y0), (x1, y0), (x1, y1), (x0, y1))


def rounded(x0: float, y0: float, x1: float, y1: float, radius: float) -> Points:
    """Return a rectangle whose corners are quarter circles of the given radius."""
    radius = min(radius, abs(x1 - x0) / 2, abs(y1 - y0) / 2)
    corners = ((x1, y0, -90), (x1, y1, 0), (x0, y1, 90), (x0, y0, 180))
    centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
    pieces = []
    for x, y, start in corners:
        inward = np.sign(centre - (x, y)) * radius
        pieces.append(arc(x + inward[0], y + inward[1], radius, radius, start, start + 90, 5))
    return np.concatenate(pieces)


def arc(
    x: float, y: float, rx: float, ry: float, start: float, stop: float, num_points: int = 16
) -> Points:
    """Return points on an ellipse from one angle to another (degrees, clockwise on the screen)."""
    angles = np.deg2rad(np.linspace(start, stop, num_points))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def ellipse(x: float, y: float, rx: float, ry: float) -> Points:
    """Return a closed ellipse."""
    return arc(x, y, rx, ry, 0, 345, 24)


def smooth(corners: Sequence[tuple[float, float]] | Points, rounds: int = 2) -> Points:
    """Round a closed outline by cutting its corners (Chaikin's scheme)."""
    points = np.asarray(corners, dtype=np.float64)
    for _ in range(rounds):
        following = np.roll(points, -1, axis=0)
        cut = np.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], axis=1)
        points = cut.reshape(-1, 2)
    return points


def profile(pairs: Sequence[tuple[float, float]], rounds: int = 0) -> Points:
    """Return the outline symmetric about x = 0 that passes through (half width, y) pairs."""
    right = np.asarray(pairs, dtype=np.float64)
    left = right[::-1] * (-1, 1)
    outline = np.concatenate([right, left])
    return smooth(outline, rounds) if rounds else outline


def stroke(path: Points, width: float | tuple[float, float]) -> Points:
    """Return the outline of a line along `path`; a pair of widths makes it taper."""
    path = np.asarray(path, dtype=np.float64)
    first, last = width if isinstance(width, tuple) else (width, width)
    tangent = np.gradient(path, axis=0)
    tangent /= np.maximum(np.linalg.norm(tangent, axis=1, keepdims=True), 1e-9)
    normal = tangent[:, ::-1] * (-1, 1)
    half = np.linspace(first, last, len(path))[:, None] / 2
    return np.concatenate([path + half * normal, (path - half * normal)[::-1]])


def curve(p0: Place, p1: Place, p2: Place, num: int = 12) -> Points:
    """Return a quadratic Bezier curve from p0 to p2 that bends towards p1."""
    t = np.linspace(0, 1, num)[:, None]
    first, pull, last = (np.asarray(p, dtype=np.float64) for p in (p0, p1, p2))
    return (1 - t) ** 2 * first + 2 * t * (1 - t) * pull + t**2 * last


def blob(rng: np.random.Generator, num_corners: int = 7, roughness: float = 0.4) -> Points:
    """Return a smooth random closed outline around the origin."""
    angles = np.linspace(0, 2 * np.pi, num_corners, endpoint=False) + rng.uniform(0, 6)
    radii = 1 - roughness * rng.random(num_corners)
    return smooth(np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1))
