"""The C4 head of our detectors; importing this module registers it with Detectron2."""

import detection.compat  # noqa: F401  (before detectron2)

# isort: split
from detectron2.config import CfgNode
from detectron2.layers import get_norm
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock, ResNet
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

from common.resnet import BLOCKS_PER_STAGE


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """`Res5ROIHeads` whose res5 is the pretrained one, of either block type, plus one norm.

    MoCo's detection protocol puts one more norm behind res5, because the pretrained stage was
    trained with its own statistics and its output goes to the box layers directly. Detectron2's
    stock head builds bottleneck blocks whatever the depth; with ResNet-18/34 weights it would load
    tensors into the wrong places.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        """Build res5.

        Args:
            cfg: Reads MODEL.RESNETS.

        Returns:
            The stage (pooled ROIs (R, C, P, P) -> (R, 2C, P/2, P/2)) and its output channels. Its
            tensors are named res5.0.conv1.weight .. as in the backbone; the norm is res5.norm.
        """
        resnets = cfg.MODEL.RESNETS
        num_blocks = BLOCKS_PER_STAGE[resnets.DEPTH][3]
        out_channels = 8 * resnets.RES2_OUT_CHANNELS
        common = {
            "num_blocks": num_blocks,
            "stride_per_block": [2] + [1] * (num_blocks - 1),
            "in_channels": out_channels // 2,
            "out_channels": out_channels,
            "norm": resnets.NORM,
        }
        if resnets.DEPTH < 50:
            blocks = ResNet.make_stage(BasicBlock, **common)
        else:
            blocks = ResNet.make_stage(
                BottleneckBlock,
                bottleneck_channels=8 * resnets.NUM_GROUPS * resnets.WIDTH_PER_GROUP,
                num_groups=resnets.NUM_GROUPS,
                stride_in_1x1=resnets.STRIDE_IN_1X1,
                **common,
            )
        stage = nn.Sequential(*blocks)
        stage.add_module("norm", get_norm(resnets.NORM, out_channels))
        return stage, out_channels
