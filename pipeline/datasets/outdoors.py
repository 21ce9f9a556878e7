"""Object classes found outdoors, each defined by its structure and by nothing else."""

from itertools import pairwise

import numpy as np

from pipeline.datasets import outlines as o
from pipeline.datasets.parts import DARK, LIGHT, SECOND, THIRD, Part, part
from pipeline.datasets.randomness import ShapeDice


def car(dice: ShapeDice) -> list[Part]:
    """A body on two wheels with a cabin and windows: from pick-up over saloon to van."""
    sill, bonnet, roof = 0.32, dice.uniform(-0.08, 0.06), dice.uniform(-0.5, -0.25)
    front, rear = dice.uniform(0.15, 0.6), dice.uniform(-0.95, -0.5)
    rake, drop = dice.uniform(0.08, 0.35), dice.uniform(0.05, 0.3)
    boot = bonnet + dice.uniform(-0.1, 0.08)
    cabin = [
        (max(rear - 0.02, -0.98), boot),
        (max(rear + drop * 0.5, -0.97), roof),
        (front - rake, roof),
        (front + 0.05, bonnet),
    ]
    body = [
        (-1, boot + 0.03),
        *cabin,
        (0.93, bonnet + 0.1),
        (1.0, 0.15),
        (0.98, sill),
        (-0.98, sill),
    ]
    wheel = dice.uniform(0.17, 0.26)
    axles = (-dice.uniform(0.5, 0.68), dice.uniform(0.5, 0.68))
    parts = [part(o.smooth(o.polygon(*body), 1))]
    parts += _car_windows(dice, cabin, boot, bonnet)
    if dice.chance(0.5):
        parts.append(part(o.rectangle(-0.97, 0.2, 0.97, sill), slot=SECOND, relief=0.3))
    parts.append(part(o.ellipse(0.9, bonnet + 0.16, 0.07, 0.05), slot=LIGHT))
    for x in axles:
        parts.append(part(o.ellipse(x, sill, wheel, wheel), slot=DARK))
        hub = wheel * dice.uniform(0.4, 0.7)
        parts.append(part(o.ellipse(x, sill, hub, hub), slot=THIRD))
    return parts


def _car_windows(dice: ShapeDice, cabin: list, boot: float, bonnet: float) -> list[Part]:
    """Return one to three windows inside the cabin's outline."""
    quad = np.array(cabin)
    centre = quad.mean(axis=0)
    base = np.array([quad[0], quad[1], quad[2], quad[3]])
    glass = centre + (base - centre) * (0.8, 0.68)
    count = dice.integer(1, 3)
    edges = np.linspace(0, 1, count + 1)
    windows = []
    for left, right in pairwise(edges):
        gap = 0.03 if count > 1 else 0.0
        low = [glass[0] + t * (glass[3] - glass[0]) for t in (left + gap, right - gap)]
        high = [glass[1] + t * (glass[2] - glass[1]) for t in (left + gap, right - gap)]
        windows.append(part(np.array([low[0], high[0], high[1], low[1]]), slot=LIGHT, relief=0.2))
    return windows


def fish(dice: ShapeDice) -> list[Part]:
    """A spindle-shaped body with a forked tail, fins, an eye and a gill."""
    depth, nose = dice.uniform(0.24, 0.62), dice.uniform(0.5, 0.9)
    tail, fork = dice.uniform(0.25, 0.6), dice.uniform(0.0, 0.25)
    hump = dice.uniform(-0.1, 0.35)
    back = [(0.95, 0.02), (nose * 0.8, -depth * 0.6), (hump, -depth), (-0.35, -depth * 0.55)]
    belly = [(-0.35, depth * 0.5), (hump, depth * 0.9), (nose * 0.8, depth * 0.6)]
    body = o.smooth([*back, (-0.62, -0.07), (-0.62, 0.07), *belly], 2)
    flick = dice.uniform(-0.1, 0.1)
    fin = o.polygon(
        (-0.5, 0.04), (-1, tail + flick), (-0.85 + fork, flick), (-1, -tail + flick), (-0.5, -0.04)
    )
    start, rise = dice.uniform(0.05, 0.45), dice.uniform(0.12, 0.4)
    dorsal = o.polygon((start, -depth * 0.7), (start - 0.25, -depth - rise), (-0.4, -depth * 0.4))
    ventral = o.polygon((0.25, depth * 0.7), (0.05, depth + rise * 0.7), (-0.1, depth * 0.7))
    slot = dice.integer(0, 1)
    parts = [part(fin, slot=slot), part(o.smooth(dorsal, 1), slot=slot), part(ventral, slot=slot)]
    parts.append(part(body, relief=1.4))
    for x in np.linspace(-0.3, 0.3, dice.integer(2, 3)) if dice.chance(0.4) else ():
        band = o.ellipse(x, 0, dice.uniform(0.03, 0.08), depth * (0.75 - abs(x)))
        parts.append(part(band, slot=THIRD, relief=0))
    eye = dice.uniform(0.05, 0.09)
    gill = o.arc(0.35, 0, 0.14, depth * 0.6, -60, 60, 8)
    parts.append(part(o.stroke(gill, 0.04), slot=DARK, relief=0))
    parts.append(
        part(o.stroke(o.curve((0.1, 0.08), (0, 0.2), (-0.15, 0.16), 6), (0.16, 0.04)), slot=slot)
    )
    parts.append(part(o.ellipse(0.6, -depth * 0.2, eye, eye), slot=LIGHT, relief=0))
    parts.append(part(o.ellipse(0.6, -depth * 0.2, eye * 0.5, eye * 0.5), slot=DARK, relief=0))
    return parts


def tree(dice: ShapeDice) -> list[Part]:
    """A trunk that carries a crown: tiers, one round mass, or several on branches."""
    width, split = dice.uniform(0.08, 0.2), dice.uniform(-0.05, 0.4)
    lean, spread = dice.uniform(-0.12, 0.12), dice.uniform(0.4, 0.75)
    trunk = o.stroke(o.curve((0, 1.0), (lean, 0.6), (lean, split - 0.25)), (width * 1.4, width))
    parts = [part(trunk, slot=SECOND)]
    kind = dice.integer(0, 2)
    if kind == 0:
        tiers = dice.integer(2, 4)
        for i in range(tiers):
            half = spread * (1 - i / (tiers + 0.8))
            foot = split - i * (split + 0.55) / tiers
            peak = foot - (split + 1) / tiers * dice.uniform(0.9, 1.4)
            parts.append(part(o.polygon((lean - half, foot), (lean, peak), (lean + half, foot))))
    elif kind == 1:
        centre = (split - 1) / 2
        crown = o.blob(dice.rng, 9, 0.3) * (spread, (split + 1) / 2)
        parts.append(part(crown + np.array([lean, centre]), relief=1.5))
    else:
        for i, x in enumerate(np.linspace(-spread, spread, dice.integer(3, 4))):
            tip = (lean + x * 0.9, split - 0.35 - 0.35 * (1 - abs(x)) - 0.1 * (i % 2))
            branch = o.curve((lean, split), (lean + x * 0.2, split - 0.3), tip)
            parts.append(part(o.stroke(branch, (width * 0.7, width * 0.4)), slot=SECOND))
            size = dice.uniform(0.22, 0.38)
            parts.append(part(o.blob(dice.rng, 7, 0.3) * size + tip, relief=1.5))
    return parts


def house(dice: ShapeDice) -> list[Part]:
    """Walls under a pitched roof, with a door, windows and often a chimney."""
    half, floor = dice.uniform(0.5, 0.8), 0.85
    eaves, ridge = dice.uniform(-0.3, 0.15), dice.uniform(0.35, 0.75)
    over, peak = dice.uniform(0.03, 0.2), dice.uniform(-0.3, 0.3)
    flat = half * (dice.uniform(0.2, 0.8) if dice.chance(0.4) else 0.0)
    top = eaves - ridge
    parts = []
    if dice.chance(0.6):
        x = half * dice.uniform(0.3, 0.65) * (1 if dice.chance(0.5) else -1)
        parts.append(part(o.rectangle(x - 0.09, top - 0.02, x + 0.09, eaves), slot=THIRD))
    parts.append(part(o.rectangle(-half, eaves, half, floor), relief=0.4))
    roof = [(-half - over, eaves + 0.04), (peak * half - flat, top), (peak * half + flat, top)]
    parts.append(part(o.polygon(*roof, (half + over, eaves + 0.04)), slot=SECOND, relief=0.6))
    door, wide, high = (
        dice.uniform(-0.6, 0.6) * half,
        dice.uniform(0.1, 0.17),
        dice.uniform(0.35, 0.55),
    )
    high = min(high, (floor - eaves) * 0.8)
    frame = o.rectangle(door - wide, floor - high, door + wide, floor)
    parts.append(part(frame, slot=dice.integer(2, 3), relief=0.4))
    glass = dice.integer(3, 4)
    size, row = dice.uniform(0.09, 0.15), eaves + (floor - eaves) * dice.uniform(0.25, 0.4)
    for x in np.linspace(-half + 0.2, half - 0.2, dice.integer(2, 3)):
        if abs(x - door) > wide + size or row + size < floor - high:
            pane = o.rectangle(x - size, row - size, x + size, row + size)
            parts.append(part(pane, slot=glass, relief=0.2))
    return parts
