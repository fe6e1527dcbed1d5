"""Video in and out: streaming reader, mask and overlay writers, drawing."""

from ..masks_deformvos import davis_palette, read_mask
from .overlay import PALETTES, colorblind_palette, draw_overlay
from .pipeline import BackgroundWorker, prefetch
from .reader import IMAGE_SUFFIXES, VideoError, VideoFrame, VideoInfo, VideoReader, natural_key, read_image
from .writer import H264Writer, mask_file_name, read_palette_png, write_palette_png


__all__ = [
    "IMAGE_SUFFIXES",
    "PALETTES",
    "BackgroundWorker",
    "H264Writer",
    "VideoError",
    "VideoFrame",
    "VideoInfo",
    "VideoReader",
    "colorblind_palette",
    "davis_palette",
    "draw_overlay",
    "mask_file_name",
    "natural_key",
    "prefetch",
    "read_image",
    "read_mask",
    "read_palette_png",
    "write_palette_png",
]
