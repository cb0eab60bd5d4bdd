"""Segmentation with WaveMix: digits scattered over a picture, with the digit, or none, predicted at every
position.

Command: seqlab train digits_segment      (the digits come with scikit-learn: pip install scikit-learn)
Measured: 83 s of processor time (7 min on two busy cores), mean IoU 0.554 over ten digits and the background.
"""

import fiddle as fdl

from seqlab.configs import parts
from seqlab.models.images import ImageToMap, PatchStem, WaveMixing, wave_backbone
from seqlab.train.images import DigitScenes
from seqlab.train.vision import class_loss, mean_iou


def base() -> fdl.Config:
    mixer, stem = fdl.Partial(WaveMixing, levels=2), fdl.Partial(PatchStem, patch=2)
    backbone = fdl.Partial(wave_backbone, dim=48, depth=4, mixer=mixer, stem=stem, inputs=1)
    model = fdl.Partial(ImageToMap, outputs=11, backbone=backbone, widths=(24,))
    data = fdl.Config(DigitScenes, task="segment")
    return parts.image_run(
        model, data, loss=class_loss, metric=mean_iou, steps=600, batch_size=32, validation_windows=200
    )
