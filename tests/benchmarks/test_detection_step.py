"""The benchmark of detection: same losses, same AP, and the keys of its JSON."""

import json

import pytest

from benchmarks import detection_step
from benchmarks.detection_step import BFLOAT16, OURS, STOCK
from detection.training.run import ArmSettings

# bfloat16 takes ten times as long as float32 where the processor lacks it, and most for the ROIs.
FEW_ROIS = {
    "SOLVER.IMS_PER_BATCH": "2",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "2",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
}


def few_rois(*places, overrides):
    return ArmSettings(*places, overrides=overrides | FEW_ROIS)


@pytest.mark.slow
def test_tiny(tmp_path, monkeypatch):
    monkeypatch.setattr(detection_step, "ArmSettings", few_rois)
    out = tmp_path / "figures.json"
    assert detection_step.main(["--tiny", "--json", str(out)]) == 0
    figures = json.loads(out.read_text())
    (cell,) = figures["cells"].values()
    assert list(figures["cells"]) == ["thin_R50_C4@64"]
    assert set(cell["step_ms"]) == {OURS, STOCK, BFLOAT16}
    for times in cell["step_ms"].values():
        assert min(times.values()) > 0
        assert times["whole"] == pytest.approx(sum(times[x] for x in detection_step.STAGES))
    assert cell["ratio"][OURS][0] == pytest.approx(
        cell["step_ms"][STOCK]["whole"] / cell["step_ms"][OURS]["whole"]
    )
    assert (cell["num_steps_compared"], cell["largest_difference"]) == (4, 0)
    assert min(*cell["evaluation_ms"].values(), *cell["metric_ms"].values()) > 0
    assert cell["boxes_per_picture"] > 1
