"""The network as a graph whose memory goes in and comes out as tensors."""

from .step import ExportableStep, StepMemory, export_step_to_onnx


__all__ = ["ExportableStep", "StepMemory", "export_step_to_onnx"]
