"""
Loads a model folder as a stranger would and segments a synthetic clip.

The text of this file is run by `python -c` where `hf_deformvos` cannot be imported, so it imports nothing of it; the
package runs the same functions on the model that it loads itself, and compares.
"""

import json
import sys

import numpy as np
import torch


NUM_FRAMES = 4
HEIGHT, WIDTH = 96, 160


def make_clip():
    """Two squares moving over a texture: uint8 frames `(T, H, W, 3)` and the first id map `(H, W)`, ids 1 and 2."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    texture = (80 + (rows * 7 + columns * 13) % 40).astype(np.uint8)
    frames = np.repeat(np.repeat(texture[None, :, :, None], NUM_FRAMES, axis=0), 3, axis=3)
    ids = np.zeros((HEIGHT, WIDTH), np.uint8)
    for t in range(NUM_FRAMES):
        for number, top, left, colour in ((1, 10, 10 + 5 * t, (240, 30, 30)), (2, 56, 120 - 5 * t, (30, 30, 240))):
            frames[t, top : top + 28, left : left + 28] = colour
            if t == 0:
                ids[top : top + 28, left : left + 28] = number
    return frames, ids


def segment(model, processor):
    """The logits of every frame, float32 `(T, N, h, w)`, and the id maps at full size, `(T, H, W)`."""
    frames, ids = make_clip()
    session = processor.init_video_session()
    logits, maps = [], []
    for index, frame in enumerate(frames):
        inputs = processor(images=frame, return_tensors="pt")
        if index == 0:
            processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=ids)
        with torch.inference_mode():
            output = model(inference_session=session, frame=inputs.pixel_values[0])
        logits.append(output.pred_masks[:, 0].float().cpu().numpy())
        maps.append(processor.post_process_id_map(output, original_size=(HEIGHT, WIDTH)))
    return np.stack(logits), np.stack(maps)


def main():
    """`FOLDER OUTPUT.npz THREADS`: loads, segments, writes."""
    folder, output, threads = sys.argv[1:]
    # Even where the package is installed: None makes an import of it fail.
    sys.modules["hf_deformvos"] = None
    torch.set_num_threads(int(threads))
    from transformers import AutoModel, AutoProcessor

    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    problems = {
        name: sorted(map(str, report[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    logits, maps = segment(model.eval(), processor)
    np.savez(output, logits=logits, maps=maps, problems=json.dumps(problems))


if __name__ == "__main__":
    main()
