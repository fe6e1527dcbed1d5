"""
What a model's tokens are worth before anything is learned about masks: propagation without training.

    python scripts/measure_features.py --models student=hub_cards/deformvos-student \
        teacher=hub_cards/deformvos-teacher --davis data/davis2016-train

Each patch takes the mean mask of the patches that look most like it, by the cosine of their tokens, in the first frame
and near it in the two before it ("Space-Time Correspondence as a Contrastive Random Walk", NeurIPS 2020, section 4.1,
whose temperature, radius and number of neighbours these are or nearly are). J is that of the mask at 0.5, over 15
frames of each held-out sequence, every third one. The record is docs/numbers/features.json.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from evidence import (
    NUMBERS,
    check_head,
    describe_folder,
    describe_model,
    guarded,
    held_out_of,
    read_pairs,
    read_record,
    update_record,
)

from hf_deformvos import DeformVosImageProcessor, DeformVosModel
from hf_deformvos.data import list_davis
from hf_deformvos.data.store import FrameEntry
from hf_deformvos.evaluation.metrics import region_similarity


RECORD = NUMBERS / "features.json"
NUM_FRAMES, STEP = 15, 3
NEIGHBOURS, TEMPERATURE = 7, 0.07
# In patches; frames before the last that are read beside the first.
RADIUS, RECENT = 10, 2


def backbone_features(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """The last block of a ViT; of a MobileNetV2 its stride-16 features."""
    maps = model.backbone(pixel_values)
    if model.config.backbone == "dinov2":
        return maps[-1][:, -model.backbone.vit.config.hidden_size :]
    return maps[2]


def token_features(model, pixel_values: torch.Tensor) -> torch.Tensor:
    """What the propagation layers are given."""
    return model.encode_images(pixel_values).tokens


def propagate(features: list[torch.Tensor], first: torch.Tensor) -> list[torch.Tensor]:
    """
    A soft mask for each frame but the first.

    Args:
        features (`list[torch.FloatTensor]`): of each frame, `(channels, h, w)`.
        first (`torch.FloatTensor` of shape `(h, w)`): share of the object in each patch of the first frame.
    """
    height, width = first.shape
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()
    is_far = torch.cdist(places, places) > RADIUS
    tokens = [F.normalize(frame.float().flatten(1), dim=0) for frame in features]
    masks = [first.flatten()]
    for index in range(1, len(tokens)):
        # The first frame is read everywhere, the last ones nearby.
        frames = sorted({0, *range(max(0, index - RECENT), index)})
        cosines = [(tokens[index].T @ tokens[frame]).masked_fill(is_far & (frame > 0), -torch.inf) for frame in frames]
        best, where = torch.cat(cosines, dim=1).topk(NEIGHBOURS, dim=1)
        known = torch.cat([masks[frame] for frame in frames])
        masks.append((torch.softmax(best / TEMPERATURE, dim=1) * known[where]).sum(1))
    return [mask.view(height, width) for mask in masks[1:]]


@torch.inference_mode()
def score(model, processor, entries: list[FrameEntry], extract) -> float:
    """Mean J of one sequence, at its own size."""
    frames = processor(images=[entry.read_image() for entry in entries], return_tensors="pt").pixel_values
    features = [extract(model, frame[None])[0] for frame in frames]
    masks = [entry.read_mask(merge=True) == 1 for entry in entries]
    share = F.adaptive_avg_pool2d(torch.from_numpy(masks[0]).float()[None], features[0].shape[-2:])[0]
    values = []
    for soft, mask in zip(propagate(features, share), masks[1:], strict=True):
        grown = F.interpolate(soft[None, None], size=mask.shape, mode="bilinear", align_corners=True)[0, 0]
        values.append(region_similarity(mask, grown.numpy() > 0.5))
    return float(np.mean(values))


def measure(folder: str, davis: str) -> dict:
    """J by kind of features, and of each sequence."""
    model, processor = DeformVosModel.from_pretrained(folder).eval(), DeformVosImageProcessor()
    entry = describe_model(folder)
    sequences = held_out_of(davis)
    for name, extract in (("backbone", backbone_features), ("tokens", token_features)):
        found = {}
        for sequence in sequences:
            entries = list_davis(davis, [sequence])[::STEP][:NUM_FRAMES]
            found[sequence] = round(score(model, processor, entries, extract), 4)
        entry[name] = {"J": round(float(np.mean(list(found.values()))), 4), "sequences": found}
    return entry


def main(arguments: list[str] | None = None) -> int:
    """Measures and records; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, metavar="LABEL=DIR", help="model folders")
    parser.add_argument("--davis", required=True, help="DAVIS-layout folder with the held-out sequences")
    parser.add_argument("--json", type=Path, default=RECORD, help="the record (default docs/numbers/features.json)")
    options = parser.parse_args(arguments)
    models = read_pairs("--models", options.models)
    head = {"command": "python scripts/measure_features.py", "data": [describe_folder(options.davis)]}
    check_head(read_record(options.json, "features"), "models", head)
    for label, folder in models.items():
        entry = measure(folder, options.davis)
        print(f"{label}: backbone {entry['backbone']['J']:.3f}, tokens {entry['tokens']['J']:.3f}", file=sys.stderr)
        update_record(options.json, "features", partial(_keep, head=head, label=label, entry=entry))
    return 0


def _keep(record: dict, head: dict, label: str, entry: dict) -> None:
    """Puts a model's figures into the record."""
    check_head(record, "models", head)
    record.update(head)
    record.setdefault("models", {})[label] = entry


if __name__ == "__main__":
    sys.exit(guarded(main))
