"""
How well objects are proposed without any mask: the IoU of proposals with the truth, on a DAVIS-layout training set.

    python scripts/measure_proposals.py --davis data/davis2016-train --model hub_cards/deformvos-student
    python scripts/measure_proposals.py ... --vit data/vit-small-patch14 --pictures outputs/proposals --held-out

Features are the model's tokens or, with --vit, the last block of a plain ViT in DINOv2 layout on the same token grid.
"cut" is the mask as cut from the features, "settled" the same after the model has drawn it anew. By default the first
frame of each sequence is cut; --choose takes the frame that `label_videos` would start from.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evidence import guarded
from PIL import Image
from transformers import Dinov2Backbone

from hf_deformvos.data import HELD_OUT_SEQUENCES, davis_sequences, list_davis
from hf_deformvos.inference import load_for_inference
from hf_deformvos.training.proposals import propose_masks
from hf_deformvos.training.pseudo_labels import (
    proposal_pixels,
    propose_in_frame,
    propose_objects,
    settle_masks,
)
from hf_deformvos.video import draw_overlay


class FileFrames:
    """Frames of one sequence, opened when they are asked for."""

    def __init__(self, entries):
        self.entries = entries

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> np.ndarray:
        return np.asarray(self.entries[index].read_image())


@torch.no_grad()
def cut_by_vit(image: np.ndarray, vit, model, processor, threshold: float) -> list:
    """Proposals from a plain ViT's last block, at the frame size that the model's tokens would have."""
    pixels = F.pad(proposal_pixels(image, model, processor), (8, 7, 8, 7), mode="replicate")
    size = [side // 16 * vit.config.patch_size for side in pixels.shape[-2:]]
    resized = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)
    return propose_masks(vit(resized).feature_maps[-1][0], image.shape[:2], threshold=threshold)


def intersection_over_union(mask: np.ndarray, truth: np.ndarray) -> float:
    """1 where both are empty."""
    union = (mask | truth).sum()
    return float((mask & truth).sum() / union) if union else 1.0


def main() -> int:
    """Measures and prints a line a sequence, then the means; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--davis", required=True, metavar="DIR", help="DAVIS-layout folder, training sequences")
    parser.add_argument("--model", required=True, metavar="DIR", help="whose tokens are cut, and who draws anew")
    parser.add_argument("--vit", metavar="DIR", help="cut this ViT's features instead")
    parser.add_argument("--vit-threshold", type=float, default=0.3, help="cosine that joins the ViT's tokens (0.3)")
    parser.add_argument("--held-out", action="store_true", help="the held-out sequences, not the others")
    parser.add_argument("--choose", action="store_true", help="the frame that labelling would start from")
    parser.add_argument("--pictures", metavar="DIR", help="write overlays there")
    arguments = parser.parse_args()
    model, processor = load_for_inference(arguments.model, device="cpu")
    vit = Dinov2Backbone.from_pretrained(arguments.vit, dtype=torch.float32).eval() if arguments.vit else None
    names = [name for name in davis_sequences(arguments.davis) if (name in HELD_OUT_SEQUENCES) == arguments.held_out]
    scores: dict[str, dict] = {}
    for name in names:
        entries = list_davis(arguments.davis, [name])
        index, cut = 0, None
        if arguments.choose:
            index, settled = propose_objects(FileFrames(entries), model, processor)
        image, truth = np.asarray(entries[index].read_image()), entries[index].read_mask(merge=True) > 0
        if not arguments.choose:
            found = (
                cut_by_vit(image, vit, model, processor, arguments.vit_threshold)
                if vit is not None
                else propose_in_frame(image, model, processor)
            )
            cut = found[0].mask if found else np.zeros_like(truth)
            settled = settle_masks(image, [cut], model, processor) if found else np.zeros_like(truth)
        scores[name] = {"frame": index, "settled": round(intersection_over_union(settled > 0, truth), 3)}
        if cut is not None:
            scores[name]["cut"] = round(intersection_over_union(cut, truth), 3)
        print(name, json.dumps(scores[name]), flush=True)
        if arguments.pictures:
            Path(arguments.pictures).mkdir(parents=True, exist_ok=True)
            overlay = draw_overlay(image, (settled > 0).astype(np.uint8))
            Image.fromarray(overlay).save(Path(arguments.pictures) / f"{name}.png")
    for kind in ("cut", "settled"):
        values = [score[kind] for score in scores.values() if kind in score]
        if values:
            above = sum(value > 0.5 for value in values)
            print(f"{kind}: mean IoU {np.mean(values):.3f}, above 0.5 in {above} of {len(values)}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
