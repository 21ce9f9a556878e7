"""The six object classes of the generated world, and the things that belong to none.

Shape parameters are drawn on [0, 1]. Training objects never take a value in HELD_OUT_BANDS, test
and probe/val objects take nothing else: unseen objects with the same spread as the seen ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

HELD_OUT_BANDS = ((0.15, 0.35), (0.65, 0.85))
_SEEN_BANDS = ((0.0, 0.15), (0.35, 0.65), (0.85, 1.0))
BODY, SECOND, THIRD, DARK, LIGHT = range(5)


@dataclass(frozen=True)
class ShapeDice:
    """Draws the parameters of one object's shape, either from the seen or from the held-out bands.

    Attributes:
        rng: Source of random numbers; advanced by every draw.
        held_out: True for objects of the test and probe/val parts.
    """

    rng: np.random.Generator
    held_out: bool = False

    def uniform(self, low: float, high: float) -> float:
        """Draw a length, ratio or angle in [low, high] from the bands of this part."""
        bands = HELD_OUT_BANDS if self.held_out else _SEEN_BANDS
        widths = [stop - start for start, stop in bands]
        place = self.rng.random() * sum(widths)
        for (start, _), width in zip(bands, widths, strict=True):
            if place <= width:
                return low + (high - low) * (start + place)
            place -= width
        return low + (high - low) * bands[-1][1]

    def integer(self, low: int, high: int) -> int:
        """Draw an integer in low..high, both included."""
        return int(self.rng.integers(low, high + 1))

    def chance(self, probability: float) -> bool:
        """Return True with the given probability."""
        return bool(self.rng.random() < probability)


@dataclass(frozen=True)
class Part:
    """One painted piece: outlines filled by the even-odd rule, so that inner outlines are holes.

    Attributes:
        contours: Outlines in object units.
        slot: Which material it wears; DARK and LIGHT are shades for windows, tyres and openings.
        relief: Strength of the rounded shading, 0 is flat.
    """

    contours: Sequence[np.ndarray]
    slot: int = BODY
    relief: float = 1.0


def part(*contours: np.ndarray, slot: int = BODY, relief: float = 1.0) -> Part:
    """Make a part from its outlines."""
    return Part(contours, slot, relief)


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
    left, right, top, bottom = x0 + radius, x1 - radius, y0 + radius, y1 - radius
    corners = ((right, top, -90), (right, bottom, 0), (left, bottom, 90), (left, top, 180))
    return np.concatenate([arc(x, y, radius, radius, at, at + 90, 5) for x, y, at in corners])


def arc(
    x: float, y: float, rx: float, ry: float, start: float, stop: float, num_points: int = 16
) -> Points:
    """Return points on an ellipse from one angle to another (degrees, clockwise on the screen)."""
    angles = np.deg2rad(np.linspace(start, stop, num_points))
    return np.stack([x + rx * np.cos(angles), y + ry * np.sin(angles)], axis=1)


def polar(radii: float | Points, angles: Points) -> Points:
    """Return points around the origin from their distances and angles (radians)."""
    return np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=1)


def turned(points: Points, angle: float) -> Points:
    """Return points turned about the origin (radians, clockwise on the screen)."""
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


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


def profile(pairs: Sequence[tuple[float, float]]) -> Points:
    """Return the outline symmetric about x = 0 that passes through (half width, y) pairs."""
    right = np.asarray(pairs, dtype=np.float64)
    return np.concatenate([right, right[::-1] * (-1, 1)])


def stroke(path: Sequence[Place] | Points, width: float | tuple[float, float]) -> Points:
    """Return the outline of a line along `path`; a pair of widths makes it taper."""
    path = np.array(path, dtype=np.float64)
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
    return smooth(polar(radii, angles))


def car(dice: ShapeDice) -> list[Part]:
    """A body on two wheels with a cabin and windows: from pick-up over saloon to van."""
    sill, bonnet, roof = 0.32, dice.uniform(-0.08, 0.06), dice.uniform(-0.5, -0.25)
    front, rear = dice.uniform(0.15, 0.6), dice.uniform(-0.95, -0.5)
    rake, drop = dice.uniform(0.08, 0.35), dice.uniform(0.05, 0.3)
    boot = bonnet + dice.uniform(-0.1, 0.08)
    cabin = [(max(rear - 0.02, -0.98), boot), (max(rear + drop * 0.5, -0.97), roof)]
    cabin += [(front - rake, roof), (front + 0.05, bonnet)]
    nose = [(0.93, bonnet + 0.1), (1.0, 0.15), (0.98, sill)]
    body = [(-1, boot + 0.03), *cabin, *nose, (-0.98, sill)]
    wheel = dice.uniform(0.17, 0.26)
    axles = (-dice.uniform(0.5, 0.68), dice.uniform(0.5, 0.68))
    parts = [part(smooth(body, 1))]

    # One to three windows inside the cabin's outline.
    quad = np.array(cabin)
    centre = quad.mean(axis=0)
    glass = centre + (quad - centre) * (0.8, 0.68)
    count = dice.integer(1, 3)
    for left, right in pairwise(np.linspace(0, 1, count + 1)):
        gap = 0.03 if count > 1 else 0.0
        low, high = (
            [glass[a] + t * (glass[b] - glass[a]) for t in (left + gap, right - gap)]
            for a, b in ((0, 3), (1, 2))
        )
        parts.append(part(np.array([low[0], *high, low[1]]), slot=LIGHT, relief=0.2))

    # A stripe, a lamp, wheels.
    if dice.chance(0.5):
        parts.append(part(rectangle(-0.97, 0.2, 0.97, sill), slot=SECOND, relief=0.3))
    parts.append(part(ellipse(0.9, bonnet + 0.16, 0.07, 0.05), slot=LIGHT))
    for x in axles:
        parts.append(part(ellipse(x, sill, wheel, wheel), slot=DARK))
        hub = wheel * dice.uniform(0.4, 0.7)
        parts.append(part(ellipse(x, sill, hub, hub), slot=THIRD))
    return parts


def fish(dice: ShapeDice) -> list[Part]:
    """A spindle-shaped body with a forked tail, fins, an eye and a gill."""
    depth, nose = dice.uniform(0.24, 0.62), dice.uniform(0.5, 0.9)
    tail, fork = dice.uniform(0.25, 0.6), dice.uniform(0.0, 0.25)
    hump = dice.uniform(-0.1, 0.35)
    back = [(0.95, 0.02), (nose * 0.8, -depth * 0.6), (hump, -depth), (-0.35, -depth * 0.55)]
    belly = [(-0.35, depth * 0.5), (hump, depth * 0.9), (nose * 0.8, depth * 0.6)]
    body = smooth([*back, (-0.62, -0.07), (-0.62, 0.07), *belly], 2)
    flick = dice.uniform(-0.1, 0.1)
    tips = (-1, tail + flick), (-0.85 + fork, flick), (-1, -tail + flick)
    fin = polygon((-0.5, 0.04), *tips, (-0.5, -0.04))
    start, rise = dice.uniform(0.05, 0.45), dice.uniform(0.12, 0.4)
    dorsal = polygon((start, -depth * 0.7), (start - 0.25, -depth - rise), (-0.4, -depth * 0.4))
    ventral = polygon((0.25, depth * 0.7), (0.05, depth + rise * 0.7), (-0.1, depth * 0.7))
    slot = dice.integer(0, 1)
    parts = [part(fin, slot=slot), part(smooth(dorsal, 1), slot=slot), part(ventral, slot=slot)]
    parts.append(part(body, relief=1.4))
    for x in np.linspace(-0.3, 0.3, dice.integer(2, 3)) if dice.chance(0.4) else ():
        band = ellipse(x, 0, dice.uniform(0.03, 0.08), depth * (0.75 - abs(x)))
        parts.append(part(band, slot=THIRD, relief=0))
    eye = dice.uniform(0.05, 0.09)
    gill = arc(0.35, 0, 0.14, depth * 0.6, -60, 60, 8)
    parts.append(part(stroke(gill, 0.04), slot=DARK, relief=0))
    side_fin = curve((0.1, 0.08), (0, 0.2), (-0.15, 0.16), 6)
    parts.append(part(stroke(side_fin, (0.16, 0.04)), slot=slot))
    parts.append(part(ellipse(0.6, -depth * 0.2, eye, eye), slot=LIGHT, relief=0))
    parts.append(part(ellipse(0.6, -depth * 0.2, eye * 0.5, eye * 0.5), slot=DARK, relief=0))
    return parts


def tree(dice: ShapeDice) -> list[Part]:
    """A trunk that carries a crown: tiers, one round mass, or several on branches."""
    width, split = dice.uniform(0.08, 0.2), dice.uniform(-0.05, 0.4)
    lean, spread = dice.uniform(-0.12, 0.12), dice.uniform(0.4, 0.75)
    trunk = stroke(curve((0, 1.0), (lean, 0.6), (lean, split - 0.25)), (width * 1.4, width))
    parts = [part(trunk, slot=SECOND)]
    kind = dice.integer(0, 2)
    if kind == 0:
        tiers = dice.integer(2, 4)
        for i in range(tiers):
            half = spread * (1 - i / (tiers + 0.8))
            foot = split - i * (split + 0.55) / tiers
            peak = foot - (split + 1) / tiers * dice.uniform(0.9, 1.4)
            parts.append(part(polygon((lean - half, foot), (lean, peak), (lean + half, foot))))
    elif kind == 1:
        centre = (split - 1) / 2
        crown = blob(dice.rng, 9, 0.3) * (spread, (split + 1) / 2)
        parts.append(part(crown + np.array([lean, centre]), relief=1.5))
    else:
        for i, x in enumerate(np.linspace(-spread, spread, dice.integer(3, 4))):
            tip = (lean + x * 0.9, split - 0.35 - 0.35 * (1 - abs(x)) - 0.1 * (i % 2))
            branch = curve((lean, split), (lean + x * 0.2, split - 0.3), tip)
            parts.append(part(stroke(branch, (width * 0.7, width * 0.4)), slot=SECOND))
            size = dice.uniform(0.22, 0.38)
            parts.append(part(blob(dice.rng, 7, 0.3) * size + tip, relief=1.5))
    return parts


def cup(dice: ShapeDice) -> list[Part]:
    """A vessel with an open rim and a handle at its side; sometimes a saucer or a band."""
    height, foot = dice.uniform(0.55, 1.15), dice.uniform(0.4, 0.95)
    rim, size, thick = dice.uniform(0.06, 0.2), dice.uniform(0.3, 0.55), dice.uniform(0.1, 0.2)
    bulge = dice.uniform(-0.12, 0.2)
    top, bottom, half = -height / 2, height / 2, 0.55
    middle = half * (1 + foot) / 2 + bulge
    sides = [(half, top), (middle + 0.03, 0)]
    sides += [(half * foot, bottom - 0.06), (half * foot * 0.9, bottom)]
    angle = dice.uniform(-12, 12)
    ring = arc(half * 0.95, -0.05, size * 0.8, size * height * 0.65, -100 + angle, 100 + angle)
    parts = []
    if dice.chance(0.3):
        saucer = half * dice.uniform(1.3, 1.8)
        parts.append(part(ellipse(0, bottom, saucer, 0.1 + rim / 2), slot=SECOND))
    parts.append(part(stroke(ring, thick), slot=dice.integer(0, 1)))
    parts.append(part(profile(sides)))
    if dice.chance(0.4):
        y = dice.uniform(-0.2, 0.3) * height
        parts.append(part(rectangle(-middle, y - 0.07, middle, y + 0.07), slot=THIRD, relief=0))
    parts.append(part(ellipse(0, top, half, rim)))
    parts.append(part(ellipse(0, top + rim * 0.12, half * 0.87, rim * 0.76), slot=DARK, relief=0))
    return parts


def bottle(dice: ShapeDice) -> list[Part]:
    """A tall body, shoulders, a narrow neck and a cap; often a label."""
    half, neck = dice.uniform(0.22, 0.42), dice.uniform(0.07, 0.15)
    shoulder, rise = dice.uniform(-0.45, 0.1), dice.uniform(0.12, 0.45)
    waist = half * dice.uniform(0.8, 1.1)
    throat = max(shoulder - rise, -0.86)
    sides = [(neck, -0.9), (neck, throat), (half * 0.75, (throat + shoulder) / 2 + rise * 0.1)]
    sides += [(half, shoulder), (waist, (shoulder + 0.9) / 2), (half, 0.92), (half * 0.9, 1.0)]
    parts = [part(profile(sides))]
    if dice.chance(0.7):
        low = dice.uniform(0.45, 0.8)
        high = max(shoulder + 0.08, low - dice.uniform(0.25, 0.6))
        parts.append(part(rectangle(-waist, high, waist, low), slot=SECOND, relief=0.3))
    cap = neck * dice.uniform(1.05, 1.6)
    parts.append(part(rounded(-cap, -1.0, cap, -0.84, 0.04), slot=THIRD))
    return parts


def chair(dice: ShapeDice) -> list[Part]:
    """A seat seen from above its front edge, four legs, and a back of slats, bars or board."""
    half, depth, slant = dice.uniform(0.38, 0.6), dice.uniform(0.16, 0.34), dice.uniform(-0.3, 0.3)
    legs, back = dice.uniform(0.5, 0.9), dice.uniform(0.6, 1.0)
    thick, splay = dice.uniform(0.06, 0.13), dice.uniform(0.0, 0.14)
    rear = [(-half + slant, -depth), (half + slant, -depth)]
    front = [(-half, 0.0), (half, 0.0)]
    parts = []
    for x, y in rear:
        leg = [(x, y), (x + np.sign(x - slant) * splay, y + legs * 0.92)]
        parts.append(part(stroke(leg, thick * 0.9), slot=SECOND))
    top = -depth - back
    posts = [np.array([(x, y), (x * 1.02 + slant * 0.2, top)]) for x, y in rear]
    if dice.chance(0.35):
        panel = polygon(rear[0], tuple(posts[0][1]), tuple(posts[1][1]), rear[1])
        lifted = panel - (0, back * dice.uniform(0.05, 0.3)) * np.array([[1], [0], [0], [1]])
        parts.append(part(lifted, slot=dice.integer(0, 1)))
    else:
        # Slats between the posts, lying or upright.
        count, lying = dice.integer(2, 4), dice.chance(0.5)
        for t in np.linspace(0.3, 0.95, count):
            share = (t - 0.3) / 0.65 * 0.6 + 0.2
            ends = (1 - share) * posts[0] + share * posts[1]
            if lying:
                ends = np.stack([post[0] + t * (post[1] - post[0]) for post in posts])
            parts.append(part(stroke(ends, thick * 0.9), slot=SECOND))
        if not lying:
            parts.append(part(stroke([p[1] for p in posts], thick * 1.4), slot=SECOND))
    parts += [part(stroke(post, thick), slot=SECOND) for post in posts]
    parts.append(part(polygon(*front, rear[1], rear[0])))
    parts.append(part(rectangle(-half, 0, half, thick * 1.1)))
    legs_in_front = ([(x, y), (x + np.sign(x) * splay, y + legs)] for x, y in front)
    return parts + [part(stroke(leg, thick), slot=SECOND) for leg in legs_in_front]


CLASSES: dict[str, Callable[[ShapeDice], list[Part]]] = {
    make.__name__: make for make in (cup, bottle, chair, car, fish, tree)
}


def distractor(dice: ShapeDice) -> list[Part]:
    """One to three joined primitives that belong to no class."""

    def ring() -> list[Points]:
        inner = dice.uniform(0.4, 0.8)
        return [ellipse(0, 0, 1, 1), ellipse(0, 0, inner, inner)]

    def star() -> list[Points]:
        angles = np.linspace(0, 2 * np.pi, dice.integer(3, 7) * 2, endpoint=False)
        return [polar(np.where(np.arange(len(angles)) % 2, dice.uniform(0.3, 0.9), 1.0), angles)]

    def letter_t() -> list[Points]:
        a = dice.uniform(0.15, 0.4)
        return [rectangle(-1, -a, 1, a), rectangle(-a, a, a, 1)]

    makers: Sequence[Callable[[], list[Points]]] = (
        lambda: [blob(dice.rng, dice.integer(5, 9), 0.6)],
        lambda: [rectangle(-1, -1, 1, 1)],
        lambda: [ellipse(0, 0, 1, 1)],
        *(ring, star),
        lambda: [stroke(curve((-1, 0), dice.rng.uniform(-1, 1, 2), (1, 0)), 0.25)],
        letter_t,
    )
    parts: list[Part] = []
    for _ in range(dice.integer(1, 3)):
        size = np.array([dice.uniform(0.15, 0.8), dice.uniform(0.15, 0.8)])
        spot = np.array([dice.uniform(-0.5, 0.5), dice.uniform(-0.5, 0.5)])
        contours = makers[dice.integer(0, len(makers) - 1)]()
        turn = dice.rng.uniform(0, 2 * np.pi)
        placed = [turned(c * size, turn) + spot for c in contours]
        parts.append(part(*placed, slot=dice.integer(0, 4), relief=dice.uniform(0, 1.2)))
    return parts
