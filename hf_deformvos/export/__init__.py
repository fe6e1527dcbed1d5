"""The network as graphs whose memory goes in and comes out as tensors, and sessions on them without PyTorch."""

from .exporting import DTYPES, FORMATS, export_model


__all__ = ["DTYPES", "FORMATS", "export_model"]
