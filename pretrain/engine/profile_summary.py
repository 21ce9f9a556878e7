"""The figures of a profile: what each part of a step took, and the screen that shows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pretrain.engine import sections as s
from pretrain.engine.sections import Cost

REST = "rest"
ROWS = (
    s.LOADER, s.WAIT, s.TRANSFER, s.AUGMENTATION, s.EMA_FORWARD, s.FORWARD, s.FA, s.LOSS,
    s.BACKWARD, s.GUARDS, s.OPTIMIZER, s.EMA_UPDATE, s.QUEUE, s.LOGGING,
)  # fmt: skip
PART_OF = {s.FA: s.FORWARD, s.LOSS: s.FORWARD}
_LABELS = {s.LOADER: "loader (waiting)", REST: "rest of the loop"}


def rows_of(costs: Mapping[str, Cost], seconds: float, num_steps: int) -> list[dict[str, Any]]:
    """A row for each part of a step; those that are part of none add up to the step.

    Args:
        costs: Of all steps together.
        seconds: Of all steps together.
        num_steps: How many those were.
    Returns:
        ``name``, ``part_of`` (a row that holds this one, or None), ``is_beside`` (it ran on a
        stream of its own, beside the steps, and is not part of their time), ``ms`` per step,
        ``share`` of the step, ``host_ms`` per step (on a GPU the time to launch it).
    """

    def row(name: str, own: float, host: float, *, is_beside: bool = False) -> dict[str, Any]:
        return {
            "name": name,
            "part_of": PART_OF.get(name),
            "is_beside": is_beside,
            "ms": 1e3 * own / num_steps,
            "share": own / seconds,
            "host_ms": 1e3 * host / num_steps,
        }

    found = {name: costs[name] for name in ROWS if name in costs}
    rest = seconds - sum(cost.own for cost in found.values() if not cost.is_beside)
    rows = []
    for name, cost in found.items():
        own = cost.own + sum(found[part].own for part in found if PART_OF.get(part) == name)
        rows.append(row(name, own, cost.host, is_beside=cost.is_beside))
    return [*rows, row(REST, rest, 0.0)]


def print_summary(summary: Mapping[str, Any], folder: Path) -> None:
    """One screen."""
    step, peak = summary["step_ms"], summary["ceiling"]
    pictures = f"{summary['batch_size']} pictures of {summary['image_size']} px"
    print(
        f"\nprofile of {summary['num_steps']} steps, {pictures}: {summary['device']}, "
        f"{summary['precision']}, {summary['num_threads']} threads, "
        f"{summary['num_processes']} processes\n"
        f"step {step['mean']:.1f} ms (median {step['median']:.1f}, {step['min']:.1f} .. "
        f"{step['max']:.1f}), {summary['images_per_second']:.1f} images/s\n"
    )
    for row in summary["sections"]:
        label = _LABELS.get(row["name"], row["name"])
        label = f"  of it {label}" if row["part_of"] else label
        share = "  beside" if row["is_beside"] else f"{row['share']:8.1%}"
        print(f"  {label:24}{row['ms']:10.2f} ms{share}")
    count = summary["flops"]
    print(
        f"\n{count['per_picture'] / 1e9:.2f} GFLOPs per picture, "
        f"{count['per_step_and_device'] / 1e9:.1f} per step and device: "
        f"MFU {summary['mfu']:.1%} of {peak['flops_per_second'] / 1e12:.2f} TFLOPS "
        f"({peak['source']})\n"
        f"peak memory {summary['peak_memory_bytes'] / 2**20:.0f} MiB; "
        f"under the profiler a step took {summary['trace']['step_ms']:.1f} ms\n"
        f"{folder / 'trace.json.gz'} opens in ui.perfetto.dev; {folder / 'summary.json'}\n"
        "This was no training run: nothing in the folder can be resumed."
    )
