"""Scenes of animated models, drawn without a GPU, for `scripts/render_videos.py`."""
