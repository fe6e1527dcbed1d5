"""
Where the memory is read: how far sampled points lie from their reference points, in tokens, over DAVIS-layout videos.

    python scripts/measure_offsets.py --root data/davis2016-train --sequences bmx-bumps dog-agility

What the offsets are worth is another measurement: `deformvos evaluate --override use_offsets=false`.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from hf_deformvos.evaluation.layouts import load_dataset_layout
from hf_deformvos.inference import load_for_inference
from hf_deformvos.propagation_deformvos import QueryDeformableAttention, reference_points


def distances(attention: torch.nn.Module, locations: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Distance of each sampled location from its reference point, both inside the frame."""
    if isinstance(attention, QueryDeformableAttention):
        references = attention._window(*size, attention.radius, locations.device)
    else:
        references = reference_points(*size, attention.stride, locations.device).flatten(0, 1)
    last = references.new_tensor([size[0] - 1, size[1] - 1])
    inside = [torch.minimum(points.clamp_min(0), last) for points in (locations, references)]
    return (inside[0] - inside[1]).norm(dim=-1)


def main():
    """Stream the sequences and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="hub_cards/deformvos-student")
    parser.add_argument("--root", type=Path, required=True, help="a DAVIS-2016 folder")
    parser.add_argument("--sequences", nargs="+", required=True)
    parser.add_argument("--split", default="train")
    parser.add_argument("--max-frames", type=int, default=30)
    arguments = parser.parse_args()
    model, processor = load_for_inference(arguments.model, "cpu")
    found = defaultdict(list)
    dataset = load_dataset_layout(
        "davis2016",
        arguments.root,
        split=arguments.split,
        sequences=arguments.sequences,
        max_frames=arguments.max_frames,
    )
    for sequence in dataset.sequences:
        session = processor.init_video_session()
        for index, path in enumerate(sequence.images):
            image = np.asarray(Image.open(path).convert("RGB"))
            if index == 0:
                mask = sequence.given_mask(path.stem)
                processor.add_inputs_to_inference_session(session, 0, input_masks=mask.astype(np.int32))
            pixel_values = processor(images=image).pixel_values[0]
            output = model(inference_session=session, frame=pixel_values, output_attentions=True)
            size = tuple((side - 1) // 16 + 1 for side in pixel_values.shape[-2:])
            for number, points in enumerate(output.sampled_locations or ()):
                layer = model.layers[number]
                parts = {"long_term": layer.long_term, "short_term": layer.short_term, "self": layer.self_attention}
                for name, attention in parts.items():
                    found[f"layer {number}, {name}"].append(distances(attention, points[name], size).flatten())
    for name, values in found.items():
        values = torch.cat(values)
        print(
            f"{name}: mean {values.mean():.2f} tokens, median {values.median():.2f}, "
            f"95th percentile {values[::7].quantile(0.95):.2f}, largest {values.max():.2f}"
        )


if __name__ == "__main__":
    main()
