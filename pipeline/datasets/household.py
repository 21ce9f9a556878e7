"""Object classes found indoors, each defined by its structure and by nothing else."""

from itertools import pairwise

import numpy as np

from pipeline.datasets import outlines as o
from pipeline.datasets.parts import BODY, DARK, LIGHT, SECOND, THIRD, Part, part
from pipeline.datasets.randomness import ShapeDice


def cup(dice: ShapeDice) -> list[Part]:
    """A vessel with an open rim and a handle at its side; sometimes a saucer or a band."""
    height, foot = dice.uniform(0.55, 1.15), dice.uniform(0.4, 0.95)
    rim, size, thick = dice.uniform(0.06, 0.2), dice.uniform(0.3, 0.55), dice.uniform(0.1, 0.2)
    bulge = dice.uniform(-0.12, 0.2)
    top, bottom, half = -height / 2, height / 2, 0.55
    middle = half * (1 + foot) / 2 + bulge
    sides = [
        (half, top),
        (middle + 0.03, 0),
        (half * foot, bottom - 0.06),
        (half * foot * 0.9, bottom),
    ]
    angle = dice.uniform(-12, 12)
    ring = o.arc(half * 0.95, -0.05, size * 0.8, size * height * 0.65, -100 + angle, 100 + angle)
    parts = []
    if dice.chance(0.3):
        saucer = half * dice.uniform(1.3, 1.8)
        parts.append(part(o.ellipse(0, bottom, saucer, 0.1 + rim / 2), slot=SECOND))
    parts.append(part(o.stroke(ring, thick), slot=dice.integer(0, 1)))
    parts.append(part(o.profile(sides)))
    if dice.chance(0.4):
        y = dice.uniform(-0.2, 0.3) * height
        parts.append(part(o.rectangle(-middle, y - 0.07, middle, y + 0.07), slot=THIRD, relief=0))
    parts.append(part(o.ellipse(0, top, half, rim)))
    parts.append(part(o.ellipse(0, top + rim * 0.12, half * 0.87, rim * 0.76), slot=DARK, relief=0))
    return parts


def bottle(dice: ShapeDice) -> list[Part]:
    """A tall body, shoulders, a narrow neck and a cap; often a label."""
    half, neck = dice.uniform(0.22, 0.42), dice.uniform(0.07, 0.15)
    shoulder, rise = dice.uniform(-0.45, 0.1), dice.uniform(0.12, 0.45)
    waist = half * dice.uniform(0.8, 1.1)
    throat = max(shoulder - rise, -0.86)
    sides = [
        (neck, -0.9),
        (neck, throat),
        (half * 0.75, (throat + shoulder) / 2 + rise * 0.1),
        (half, shoulder),
        (waist, (shoulder + 0.9) / 2),
        (half, 0.92),
        (half * 0.9, 1.0),
    ]
    parts = [part(o.profile(sides))]
    if dice.chance(0.7):
        low = dice.uniform(0.45, 0.8)
        high = max(shoulder + 0.08, low - dice.uniform(0.25, 0.6))
        parts.append(part(o.rectangle(-waist, high, waist, low), slot=SECOND, relief=0.3))
    cap = neck * dice.uniform(1.05, 1.6)
    parts.append(part(o.rounded(-cap, -1.0, cap, -0.84, 0.04), slot=THIRD))
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
        foot = (x + np.sign(x - slant) * splay, y + legs * 0.92)
        parts.append(part(o.stroke(np.array([(x, y), foot]), thick * 0.9), slot=SECOND))
    top = -depth - back
    posts = [np.array([(x, y), (x * 1.02 + slant * 0.2, top)]) for x, y in rear]
    if dice.chance(0.35):
        panel = o.polygon(rear[0], tuple(posts[0][1]), tuple(posts[1][1]), rear[1])
        lifted = panel - (0, back * dice.uniform(0.05, 0.3)) * np.array([[1], [0], [0], [1]])
        parts.append(part(lifted, slot=dice.integer(0, 1)))
    else:
        parts += _chair_slats(dice, posts, thick)
    parts += [part(o.stroke(post, thick), slot=SECOND) for post in posts]
    parts.append(part(o.polygon(*front, rear[1], rear[0])))
    parts.append(part(o.rectangle(-half, 0, half, thick * 1.1)))
    for x, y in front:
        foot = (x + np.sign(x) * splay, y + legs)
        parts.append(part(o.stroke(np.array([(x, y), foot]), thick), slot=SECOND))
    return parts


def _chair_slats(dice: ShapeDice, posts: list[np.ndarray], thick: float) -> list[Part]:
    """Return the slats between two posts, lying or upright."""
    count, lying = dice.integer(2, 4), dice.chance(0.5)
    slats = []
    for t in np.linspace(0.3, 0.95, count):
        if lying:
            ends = np.stack([post[0] + t * (post[1] - post[0]) for post in posts])
        else:
            share = (t - 0.3) / 0.65 * 0.6 + 0.2
            ends = (1 - share) * posts[0] + share * posts[1]
        slats.append(part(o.stroke(ends, thick * 0.9), slot=SECOND))
    if not lying:
        slats.append(part(o.stroke(np.stack([p[1] for p in posts]), thick * 1.4), slot=SECOND))
    return slats


def lamp(dice: ShapeDice) -> list[Part]:
    """A foot, a straight or jointed arm, and a shade that opens downwards or sideways."""
    foot, thin = dice.uniform(0.25, 0.45), dice.uniform(0.05, 0.1)
    top, bottom = dice.uniform(0.12, 0.3), dice.uniform(0.35, 0.6)
    tall = dice.uniform(0.3, 0.6)
    shade = o.polygon((-top, -tall), (top, -tall), (bottom, 0), (-bottom, 0))
    if dice.chance(0.35):
        shade = np.concatenate([o.arc(0, 0, bottom, tall, 180, 360, 14)])
    if dice.chance(0.5):
        arm = np.array([(0, 0.95), (0, -0.35)])
        place, tilt = np.array([0, -0.35]), dice.uniform(-5, 5)
    else:
        knee = (-dice.uniform(0.2, 0.5), dice.uniform(-0.1, 0.2))
        head = (dice.uniform(0.0, 0.4), dice.uniform(-0.65, -0.4))
        arm = np.array([(0, 0.95), knee, head])
        place, tilt = np.array(head) + np.array([0.05, 0.1]), dice.uniform(-60, -15)
    turn = np.deg2rad(tilt)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    parts = [part(o.stroke(np.stack(a), thin), slot=SECOND) for a in pairwise(arm)]
    if dice.chance(0.5):
        parts.append(part(o.ellipse(0, 0.95, foot, foot * dice.uniform(0.2, 0.4)), slot=SECOND))
    else:
        parts.append(part(o.profile([(foot * 0.4, 0.8), (foot, 0.95), (foot, 1.02)]), slot=SECOND))
    bulb = o.ellipse(0, 0.03, bottom * 0.4, 0.13) @ rotation + place
    parts.append(part(bulb, slot=LIGHT))
    parts.append(part(shade @ rotation + place))
    return parts


def key(dice: ShapeDice) -> list[Part]:
    """A bow with a hole, a shaft, and teeth at one side of its end."""
    radius, hole = dice.uniform(0.26, 0.42), dice.uniform(0.4, 0.72)
    thick, aspect = dice.uniform(0.09, 0.17), dice.uniform(0.7, 1.3)
    kind, x = dice.integer(0, 3), -0.62
    if kind == 0:
        bow = o.ellipse(x, 0, radius * aspect**0.5, radius)
    elif kind == 1:
        bow = o.rounded(x - radius, -radius * aspect, x + radius, radius * aspect, radius * 0.4)
    elif kind == 2:
        bow = o.polygon(
            (x - radius, 0), (x, -radius * aspect), (x + radius, 0), (x, radius * aspect)
        )
    else:
        angles = np.linspace(0, 2 * np.pi, 36, endpoint=False)
        wavy = radius * (0.85 + 0.2 * np.cos(3 * angles))
        bow = np.stack([x + wavy * np.cos(angles), wavy * np.sin(angles)], axis=1)
    inner = (bow - (x, 0)) * hole + (x, 0)
    parts = [part(o.rectangle(x + radius * 0.8, -thick / 2, 1.0, thick / 2))]
    count = dice.integer(2, 4)
    for end in np.linspace(0.95, 0.95 - 0.16 * count, count):
        long, wide = dice.uniform(0.12, 0.34), dice.uniform(0.06, 0.11)
        parts.append(part(o.rectangle(end - wide, 0, end, thick / 2 + long)))
    parts.append(part(bow, inner))
    if dice.chance(0.4):
        collar = x + radius + dice.uniform(0.05, 0.2)
        parts.append(part(o.rounded(collar, -thick, collar + 0.09, thick, 0.03), slot=SECOND))
    return parts


def umbrella(dice: ShapeDice) -> list[Part]:
    """A canopy with a scalloped edge in wedges, on a stick with a hooked handle."""
    wide, high = dice.uniform(0.75, 1.0), dice.uniform(0.45, 0.8)
    rim, count = dice.uniform(-0.25, 0.05), dice.integer(3, 6)
    sag, hook = dice.uniform(0.04, 0.14), dice.uniform(0.1, 0.22)
    thin, end = dice.uniform(0.04, 0.08), dice.uniform(0.65, 0.95)
    side = 1 if dice.chance(0.5) else -1
    handle = o.arc(side * hook, end - hook, hook, hook, 180, 180 - side * 200, 12)
    if side < 0:
        handle = o.arc(-hook, end - hook, hook, hook, 0, 200, 12)
    parts = [
        part(o.stroke(np.array([(0, rim - high), (0, end - hook)]), thin), slot=SECOND),
        part(o.stroke(handle, thin * 1.5), slot=SECOND),
    ]
    spots = np.sin(np.linspace(-np.pi / 2, np.pi / 2, count + 1)) * wide
    two_tone = dice.chance(0.5)
    for i, (left, right) in enumerate(pairwise(spots)):
        up = o.curve((left, rim), (left * 0.95, rim - high * 0.75), (0, rim - high))
        down = o.curve((0, rim - high), (right * 0.95, rim - high * 0.75), (right, rim))
        edge = o.curve((right, rim), ((left + right) / 2, rim - sag * 2), (left, rim))
        wedge = np.concatenate([up, down, edge])
        parts.append(part(wedge, slot=THIRD if two_tone and i % 2 else BODY, relief=0.7))
    parts.append(part(o.rectangle(-thin / 2, rim - high - 0.12, thin / 2, rim - high), slot=SECOND))
    return parts
