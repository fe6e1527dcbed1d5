"""What every test gets: no network, few threads, fixed seeds, and a tiny model."""

import logging
import os


# Before transformers and huggingface_hub are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Of the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import numpy as np
import pytest
import torch
from demo_server import demo_server  # noqa: F401  fixture
from hub_server import hub, hub_datasets  # noqa: F401  fixtures


ROOT = Path(__file__).resolve().parent.parent
STUDENT = ROOT / "hub_cards" / "deformvos-student"

# Small on purpose: the tests are about shapes, state and rules, and run on 96x160 images.
TINY_CONFIG = {
    "hidden_size": 16,
    "key_size": 16,
    "value_size": 16,
    "offset_hidden_size": 16,
    "decoder_sizes": [16, 16, 16],
    "short_term_window": 3,
    "correlation_radius": 1,
    "long_term_slots": 3,
    "memory_interval": 2,
}


def pytest_configure(config):
    # One thread: on images this small more would wait for one another, and sums of floats do not change with the
    # number of cores, nor with that of the processes that share them.
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Skip what lacks its material, with a message that says how to get it."""
    data = os.environ.get("DEFORMVOS_DATA")
    no_data = pytest.mark.skip(reason="set DEFORMVOS_DATA to a folder with data sets in DAVIS layout")
    no_weights = pytest.mark.skip(reason="hub_cards/deformvos-student/model.safetensors is missing")
    for item in items:
        if item.get_closest_marker("data") and not (data and Path(data).is_dir()):
            item.add_marker(no_data)
        if item.get_closest_marker("weights") and not (STUDENT / "model.safetensors").is_file():
            item.add_marker(no_weights)


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same random numbers in every run, whichever tests are chosen."""
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  seeds the code under test, which may use the global generator


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The folder of data sets; for tests marked `data`."""
    return Path(os.environ["DEFORMVOS_DATA"])


@pytest.fixture(scope="session")
def student_dir() -> Path:
    """The bundled student's folder; for tests marked `weights`."""
    return STUDENT


@pytest.fixture(scope="session")
def tiny_config():
    """A configuration that a test may copy but not change."""
    from hf_deformvos import DeformVosConfig

    return DeformVosConfig(**TINY_CONFIG)


@pytest.fixture
def tiny_model(tiny_config):
    """An untrained model in evaluation mode, the same weights in every test."""
    import copy

    from transformers import AutoModel

    torch.manual_seed(0)
    return AutoModel.from_config(copy.deepcopy(tiny_config)).eval()


@pytest.fixture
def tiny_processor():
    """A processor that brings frames to a short side of 96 pixels."""
    from hf_deformvos import DeformVosImageProcessor, DeformVosProcessor

    return DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 96}))


@pytest.fixture(scope="session")
def tiny_clip() -> tuple[np.ndarray, np.ndarray]:
    """Two squares moving over noise: uint8 frames (6, 96, 160, 3) and id maps (6, 96, 160) with ids 1 and 2."""
    generator = np.random.default_rng(0)
    frames = np.repeat(generator.integers(60, 120, (1, 96, 160, 3), dtype=np.uint8), 6, axis=0)
    ids = np.zeros((6, 96, 160), dtype=np.uint8)
    for t in range(6):
        for number, (top, left, colour) in enumerate(
            [(10, 10 + 6 * t, (250, 20, 20)), (60, 120 - 6 * t, (20, 20, 250))], 1
        ):
            frames[t, top : top + 24, left : left + 24] = colour
            ids[t, top : top + 24, left : left + 24] = number
    return frames, ids


@pytest.fixture
def warnings_of_package(caplog):
    """transformers' loggers do not propagate; this lets caplog see ours."""
    logger = logging.getLogger("hf_deformvos")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def options(tmp_path):
    """Of readers of data sets: a cache of their own, and no bars."""
    return {"cache_dir": tmp_path / "cache", "show_progress_bar": False}


@pytest.fixture
def one_thread():
    """On tensors this small, threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
