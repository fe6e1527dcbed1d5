"""The step with explicit state: equal to the session, and equal again in onnxruntime."""

import numpy as np
import pytest
import torch

from hf_deformvos import DeformVosConfig, DeformVosModel
from hf_deformvos.export import ExportableStep, StepMemory, export_step_to_onnx


@pytest.fixture(params=[1, 2], ids=["one_layer", "two_layers"])
def model(request, tiny_config):
    torch.manual_seed(0)
    return DeformVosModel(DeformVosConfig(**{**tiny_config.to_dict(), "num_hidden_layers": request.param})).eval()


@pytest.fixture
def step_inputs(model, tiny_processor, tiny_clip):
    """Inputs of the fourth frame of a session, and what the session made of it."""
    frames, ids = tiny_clip
    session = tiny_processor.init_video_session()
    tiny_processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
    for frame in frames[:3]:
        model(inference_session=session, frame=tiny_processor(images=frame).pixel_values[0])
    memory = StepMemory.from_bank(session._memory)
    valid = session._objects.valid(1, torch.device("cpu"))
    pixel_values = tiny_processor(images=frames[3]).pixel_values
    model(inference_session=session, frame=pixel_values[0])
    return (pixel_values, *memory, valid), session._memory.previous


@torch.no_grad()
def test_explicit_state_is_the_sessions(model, step_inputs):
    inputs, frame = step_inputs
    masks, keys, values = ExportableStep(model)(*inputs)
    torch.testing.assert_close(masks, frame.masks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(keys, torch.cat([layer.key for layer in frame.layers]))
    torch.testing.assert_close(values, torch.cat([layer.values for layer in frame.layers]))


@torch.no_grad()
def test_torch_export(model, step_inputs):
    inputs, _ = step_inputs
    program = torch.export.export(ExportableStep(model), inputs)
    for exported, expected in zip(program.module()(*inputs), ExportableStep(model)(*inputs), strict=True):
        torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_onnx_matches(model, step_inputs, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    inputs, _ = step_inputs
    # An untrained offset network would leave the sampling at whole tokens, where little can go wrong.
    for name, parameter in model.named_parameters():
        if name.endswith("offset.weight"):
            parameter.normal_(std=0.3)
    path = tmp_path / "step.onnx"
    export_step_to_onnx(model, path, inputs[0], StepMemory(*inputs[1:-1]), inputs[-1])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    outputs = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
    for output, expected in zip(outputs, ExportableStep(model)(*inputs), strict=True):
        np.testing.assert_allclose(output, expected.numpy(), atol=1e-3)
