"""
One of the peers, EdgeTAM or SAM 2 tiny of transformers, in a process and an environment of its own. It answers every
line of its input with the time of one frame, so that whoever asks decides who runs when:

    python peer_process.py '{"peer": "edgetam", "clip": "clip.mp4", "mask": "mask.npy", "threads": 2, ...}'

It needs torch, torchvision, timm, transformers, av and numpy, and nothing of this package. Weights are random: the
time does not depend on them, and nothing is downloaded.
"""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def prepare_torchvision():
    """
    Lets torchvision be imported beside a torch that it was not built for. Its compiled operators are not used here,
    but the import fails where the two that it describes in Python do not exist.
    """
    import torch

    folder = Path(importlib.util.find_spec("torchvision").origin).parent
    try:
        for library in folder.glob("_C*"):
            torch.ops.load_library(str(library))
    except (OSError, RuntimeError):
        signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", signature)


def build_edgetam():
    """
    EdgeTAM as it was published, with random weights.

    The default configuration has a larger backbone, that of SAM 2; the values here are those with which the library's
    own conversion made facebook/EdgeTAM (RepViT-M1 for the frames, no temporal position of object pointers, no
    embedding of occlusion).
    """
    from transformers import EdgeTamVideoConfig, EdgeTamVideoModel, EdgeTamVisionConfig, TimmWrapperConfig

    backbone = TimmWrapperConfig(
        architecture="repvit_m1.dist_in1k",
        model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]},
    )
    config = EdgeTamVideoConfig(
        vision_config=EdgeTamVisionConfig(backbone_config=backbone),
        enable_temporal_pos_encoding_for_object_pointers=False,
        enable_occlusion_spatial_embedding=False,
    )
    return EdgeTamVideoModel(config)


def build_sam2_tiny():
    """SAM 2.1 tiny, whose values are the defaults of its configuration, with random weights."""
    from transformers import Sam2VideoConfig, Sam2VideoModel

    return Sam2VideoModel(Sam2VideoConfig())


BUILDERS = {"edgetam": build_edgetam, "sam2_tiny": build_sam2_tiny}


class Peer:
    """A peer's stream, in the manner of its documentation: 1024x1024 inside, masks of the frame's size outside."""

    def __init__(self, request: dict):
        import numpy as np
        import torch
        from transformers import Sam2ImageProcessor, Sam2VideoProcessor, Sam2VideoVideoProcessor

        self.torch, self.device = torch, request["device"]
        torch.manual_seed(0)
        torch.set_num_threads(request["threads"])
        dtype = getattr(torch, request["dtype"])
        self.model = BUILDERS[request["peer"]]().eval().to(self.device, dtype)
        self.processor = Sam2VideoProcessor(Sam2ImageProcessor(), Sam2VideoVideoProcessor())
        self.session = self.processor.init_video_session(inference_device=self.device, dtype=dtype)
        ids = np.load(request["mask"])
        self.given = {int(i): ids == i for i in np.unique(ids) if i}
        self.frames = decoded(request["clip"])

    def step(self) -> dict:
        """The next frame, from the file to its masks."""
        started = time.perf_counter()
        image = next(self.frames)
        with self.torch.inference_mode():
            inputs = self.processor(images=image, device=self.device, return_tensors="pt")
            size = image.shape[:2]
            if self.given:
                self.processor.add_inputs_to_inference_session(
                    self.session,
                    frame_idx=0,
                    obj_ids=list(self.given),
                    input_masks=list(self.given.values()),
                    original_size=size,
                )
                self.given = {}
            pixel_values = inputs.pixel_values[0].to(self.session.dtype)
            output = self.model(inference_session=self.session, frame=pixel_values)
            masks = self.processor.post_process_masks([output.pred_masks], original_sizes=[size])[0].cpu()
        return {"seconds": time.perf_counter() - started, "masks": list(masks.shape)}

    def describe(self) -> dict:
        """Facts for the record."""
        from importlib.metadata import version

        names = ("torch", "torchvision", "timm", "transformers")
        return {
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "versions": {name: version(name) for name in names},
        }


def decoded(path: str) -> Iterator:
    """Frames `(height, width, 3)` without end, each decoded when it is asked for."""
    import av

    while True:
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            for frame in container.decode(stream):
                yield frame.to_ndarray(format="rgb24")


def main():
    """Answers until the input ends."""
    # Beside this file lie modules whose names must not be found before those of packages.
    sys.path.pop(0)
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Libraries that print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    prepare_torchvision()
    peer = Peer(json.loads(sys.argv[1]))
    print(json.dumps(peer.describe()), file=answers)
    for _ in sys.stdin:
        print(json.dumps(peer.step()), file=answers)


if __name__ == "__main__":
    main()
