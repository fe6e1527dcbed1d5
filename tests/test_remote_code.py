"""Code beside the weights: a process that cannot import this package loads the model and gives the same masks."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

from hf_deformvos import (
    DeformVosConfig,
    DeformVosImageProcessor,
    DeformVosModel,
    DeformVosPipeline,
    DeformVosProcessor,
)
from hf_deformvos.publishing.remote_code import AUTO_CLASSES, add_remote_code
from hf_deformvos.video import VideoReader, read_mask


TASK = "video-object-segmentation"
REPO = "org/deformvos-student"
PARTLY_ON_DISK = {"backbone": "cpu", "token_projection": "cpu", "identity_bank": "disk", "layers": "disk",
                  "visual_norm": "cpu", "id_norm": "cpu", "decoder": "disk"}  # fmt: skip

# Runs jobs as somebody who has transformers and not this package; each job's results go to an archive.
STRANGER = '''
import json, sys

BLOCKED = set(sys.argv[2].split(","))


class Without:
    """A finder that finds nothing of the blocked packages, whether they are installed or not."""

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import numpy as np
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, pipeline

torch.set_num_threads(int(sys.argv[3]))
clip = np.load(sys.argv[4])


def segment(model, processor):
    session = processor.init_video_session(video=clip["frames"])
    processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=clip["mask"])
    outputs = list(model.propagate_in_video_iterator(session))
    size = clip["mask"].shape
    return {
        "logits": np.stack([output.pred_masks.float().numpy() for output in outputs]),
        "id_maps": np.stack([processor.post_process_id_map(output, original_size=size) for output in outputs]),
    }


def run(kind, name, options, save):
    trusted = {"trust_remote_code": True, **options}
    if kind == "refused":
        for loader in (AutoConfig, AutoModel, AutoProcessor, AutoImageProcessor):
            try:
                loader.from_pretrained(name, trust_remote_code=False)
            except ValueError as error:
                assert "trust_remote_code" in str(error), error
            else:
                raise AssertionError(f"{loader} ran code that nobody trusts")
        return {}
    if kind == "pipeline":
        task, call = trusted.pop("task", None), trusted.pop("call", {})
        place = {} if "device_map" in trusted else {"device": "cpu"}
        segmenter = pipeline(task, model=name, **place, **trusted)
        results = list(segmenter(**{"video": clip["frames"], "masks": clip["mask"], **call}))
        if save:
            segmenter.save_pretrained(save)
        return {"id_maps": np.stack([result["id_map"] for result in results]),
                "modules": np.array([type(segmenter).__module__, type(segmenter.model).__module__])}
    revision = {key: value for key, value in trusted.items() if key in ("trust_remote_code", "revision")}
    config = AutoConfig.from_pretrained(name, **revision)
    model = AutoModel.from_pretrained(name, **trusted)
    processor = AutoProcessor.from_pretrained(name, **revision)
    image_processor = AutoImageProcessor.from_pretrained(name, **revision)
    assert type(image_processor) is type(processor.image_processor)
    if save:
        model.save_pretrained(save)
        processor.save_pretrained(save)
    modules = [type(thing).__module__ for thing in (config, model, processor, image_processor)]
    return {**segment(model, processor), "modules": np.array(modules), "dtype": np.array(str(model.dtype))}


for number, job in enumerate(json.loads(sys.argv[1])):
    results = run(job["kind"], job["name"], job.get("options", {}), job.get("save"))
    assert all(module.startswith("transformers_modules.") for module in results.get("modules", np.array([])).tolist())
    np.savez(f"job{number}.npz", **results)
assert not BLOCKED & set(sys.modules)
'''


def visit(folder, jobs, clip, env=None, without=()):
    """Run the jobs as a stranger in an empty folder; what each gave."""
    folder.mkdir()
    frames, mask = clip
    np.savez(folder / "clip.npz", frames=frames, mask=mask)
    blocked = ",".join(["hf_deformvos", *without])
    environment = {**os.environ, "HF_HOME": str(folder / "home")} if env is None else dict(env)
    environment.pop("PYTHONPATH", None)
    environment["CUDA_VISIBLE_DEVICES"] = ""  # `device_map="auto"` takes a GPU where there is one, whose sums differ
    command = [sys.executable, "-c", STRANGER, json.dumps(jobs), blocked, str(torch.get_num_threads()), "clip.npz"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stderr[-4000:]
    return [dict(np.load(folder / f"job{number}.npz")) for number in range(len(jobs))]


def at_home(folder, clip, **options):
    """The same with the package."""
    frames, mask = clip
    model, processor = AutoModel.from_pretrained(folder, **options), AutoProcessor.from_pretrained(folder)
    assert type(model) is DeformVosModel
    session = processor.init_video_session(video=frames)
    processor.add_inputs_to_inference_session(session, frame_idx=0, input_masks=mask)
    outputs = list(model.propagate_in_video_iterator(session))
    return {
        "logits": np.stack([output.pred_masks.float().numpy() for output in outputs]),
        "id_maps": np.stack([processor.post_process_id_map(output, original_size=mask.shape) for output in outputs]),
    }


def assert_same(given, expected):
    for name, array in expected.items():
        np.testing.assert_array_equal(given[name], array)


@pytest.fixture(scope="module")
def release(tmp_path_factory, tiny_config):
    """A folder as it is published: model, processor, code."""
    folder = tmp_path_factory.mktemp("releases") / "deformvos-tiny.v1"
    write_release(folder, tiny_config, seed=1)
    return folder


def write_release(folder, config, seed, **options):
    torch.manual_seed(seed)
    DeformVosModel(config).save_pretrained(folder, **options)
    DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 96})).save_pretrained(folder)
    add_remote_code(folder)


@pytest.fixture
def clip(tiny_clip):
    """Four frames and the first one's mask."""
    frames, ids = tiny_clip
    return frames[:4], ids[0]


def after_the_first(results):
    """On the first frame the pipeline gives the mask as it was given, which a session does not."""
    return {"id_maps": results["id_maps"][1:]}


def test_a_stranger_gets_the_same_masks(release, clip, tiny_config, tmp_path):
    pytest.importorskip("accelerate")
    write_release(tmp_path / "sharded", tiny_config, seed=1, max_shard_size="2MB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    own = str(release)
    sharded, again, pipe, trained = (str(tmp_path / name) for name in ("sharded", "again", "pipe", "trained"))
    # Loaded with the package, trained perhaps, and saved again.
    for kind in (AutoModel, AutoProcessor):
        kind.from_pretrained(own).save_pretrained(trained)
    jobs = [
        {"kind": "refused", "name": own},
        {"kind": "model", "name": own, "save": again},
        {"kind": "model", "name": own, "options": {"dtype": "float16"}},
        {"kind": "model", "name": own, "options": {"dtype": "bfloat16"}},
        {"kind": "model", "name": own, "options": {"device_map": "cpu"}},
        {"kind": "model", "name": own, "options": {"device_map": "auto"}},
        {"kind": "model", "name": own, "options": {"device_map": PARTLY_ON_DISK, "offload_folder": "offloaded"}},
        {"kind": "model", "name": own, "options": {"device_map": {"": "disk"}, "offload_folder": "all-offloaded"}},
        {"kind": "model", "name": trained},
        {"kind": "model", "name": sharded},
        {"kind": "model", "name": again},
        {"kind": "pipeline", "name": own, "save": pipe},
        {"kind": "pipeline", "name": own, "options": {"device_map": "auto"}},
        {"kind": "pipeline", "name": again, "options": {"task": TASK}},
        {"kind": "pipeline", "name": pipe},
    ]
    _, plain, half, brain, on_cpu, auto, *others = visit(tmp_path / "stranger", jobs, clip)
    expected, pipes = at_home(release, clip), others[5:]
    for results in (plain, on_cpu, auto, *others[:5]):
        assert_same(results, expected)
    assert_same(half, at_home(release, clip, dtype=torch.float16))
    assert_same(brain, at_home(release, clip, dtype=torch.bfloat16))
    assert (str(half["dtype"]), str(brain["dtype"])) == ("torch.float16", "torch.bfloat16")
    for results in pipes:
        assert_same({"id_maps": results["id_maps"][1:]}, after_the_first(expected))
    assert expected["id_maps"].any() and not np.array_equal(plain["logits"], half["logits"])


@pytest.mark.weights
def test_a_stranger_gets_the_students_masks(student_dir, tmp_path):
    folder = tmp_path / "student"
    folder.mkdir()
    for name in ("config.json", "processor_config.json"):
        (folder / name).write_bytes((student_dir / name).read_bytes())
    (folder / "model.safetensors").symlink_to(student_dir / "model.safetensors")
    add_remote_code(folder)
    video, mask = str(ROOT / "examples" / "bunny.mp4"), str(ROOT / "examples" / "bunny_mask.png")
    with VideoReader(video, max_frames=3) as reader:
        clip = np.stack([frame.image for frame in reader]), read_mask(mask)
    call = {"video": video, "masks": mask, "max_frames": 3}
    jobs = [
        {"kind": "model", "name": str(folder)},
        {"kind": "pipeline", "name": str(folder), "options": {"call": call}},
    ]
    model, pipe = visit(tmp_path / "stranger", jobs, clip)
    expected = at_home(student_dir, clip)
    assert_same(model, expected)
    assert_same({"id_maps": pipe["id_maps"][1:]}, after_the_first(expected))


def test_from_the_hub(hub, release, clip, tiny_config, tmp_path):
    """Pinned by revision, and offline from the cache; with nothing installed that the model does not need."""
    api = hub.api()
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=release).oid
    api.create_tag(REPO, tag="v1", revision=first)
    write_release(tmp_path / "next", tiny_config, seed=2)
    with open(tmp_path / "next" / "pipeline_deformvos.py", "a") as file:
        file.write("\n# a later version\n")
    second = api.upload_folder(repo_id=REPO, folder_path=tmp_path / "next").oid
    jobs = [
        {"kind": "model", "name": REPO},
        {"kind": "model", "name": REPO, "options": {"revision": "v1"}},
        {"kind": "pipeline", "name": REPO},
        {"kind": "pipeline", "name": REPO, "options": {"revision": first}},
    ]
    lean = ("av", "accelerate", "datasets", "torchvision", "cv2", "scipy", "sklearn")
    expected = at_home(tmp_path / "next", clip), at_home(release, clip)
    for offline in (False, True):
        shutil.rmtree(hub.home / "modules", ignore_errors=True)
        before = len(hub.requests)
        env = hub.env(**({"HF_HUB_OFFLINE": "1"} if offline else {}))
        results = visit(tmp_path / f"stranger{offline:d}", jobs, clip, env, without=lean)
        assert_same(results[0], expected[0])
        assert_same(results[1], expected[1])
        assert_same({"id_maps": results[2]["id_maps"][1:]}, after_the_first(expected[0]))
        assert_same({"id_maps": results[3]["id_maps"][1:]}, after_the_first(expected[1]))
        for number, commit in enumerate((second, first, second, first)):
            assert all(commit in module for module in results[number]["modules"].tolist())
        assert (len(hub.requests) == before) == offline


def test_with_the_package_nobody_need_be_trusted(release, clip, tmp_path):
    for options in ({}, {"trust_remote_code": False}, {"trust_remote_code": True}):
        assert type(AutoConfig.from_pretrained(release, **options)) is DeformVosConfig
        assert type(AutoModel.from_pretrained(release, **options)) is DeformVosModel
        assert type(AutoProcessor.from_pretrained(release, **options)) is DeformVosProcessor
        assert type(AutoImageProcessor.from_pretrained(release, **options)) is DeformVosImageProcessor
        assert type(pipeline(TASK, model=str(release), device="cpu", **options)) is DeformVosPipeline
    frames, mask = clip
    for options in ({}, {"trust_remote_code": True}):
        segmenter = pipeline(model=str(release), device="cpu", **options)
        assert type(segmenter) is DeformVosPipeline
    results = np.stack([result["id_map"] for result in segmenter(frames, masks=mask)])
    np.testing.assert_array_equal(results[1:], at_home(release, clip)["id_maps"][1:])
    segmenter.save_pretrained(tmp_path)
    assert "custom_pipelines" in json.loads((tmp_path / "config.json").read_text())


def test_with_the_package_from_the_hub(hub, release):
    api = hub.api()
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=release)
    assert type(AutoModel.from_pretrained(REPO)) is DeformVosModel
    assert type(AutoProcessor.from_pretrained(REPO)) is DeformVosProcessor
    assert type(pipeline(model=REPO, device="cpu")) is DeformVosPipeline
    assert not hub.seen(r"/resolve/.*\.py"), "code was fetched that is installed"


# The folder


def test_folder_holds_what_its_configurations_name(release):
    config = json.loads((release / "config.json").read_text())
    processor = json.loads((release / "processor_config.json").read_text())
    assert set(config["auto_map"]) == set(AUTO_CLASSES)
    assert processor["auto_map"] == {"AutoProcessor": "processing_deformvos.DeformVosProcessor"}
    assert set(processor["image_processor"]["auto_map"]) == {"AutoImageProcessor"}
    places = [*config["auto_map"].values(), config["custom_pipelines"][TASK]["impl"]]
    places += [*processor["auto_map"].values(), *processor["image_processor"]["auto_map"].values()]
    for place in places:
        module, name = place.split(".")
        assert f"class {name}(" in (release / f"{module}.py").read_text()
    package = {path.name: path.read_bytes() for path in (ROOT / "hf_deformvos").glob("*_deformvos.py")}
    assert {path.name: path.read_bytes() for path in release.glob("*.py")} == package


def test_a_second_call_changes_nothing(release):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in release.iterdir()}
    files = add_remote_code(release)
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in release.iterdir()} == before
    assert [path.name for path in files[:2]] == ["config.json", "processor_config.json"]
    assert set(files) == set(release.iterdir()) - {release / "model.safetensors"}


def test_changed_code_is_renewed(release, tmp_path):
    for name in ("config.json", "processor_config.json"):
        (tmp_path / name).write_bytes((release / name).read_bytes())
    (tmp_path / "modeling_deformvos.py").write_text("# an older version\n")
    add_remote_code(tmp_path)
    assert (tmp_path / "modeling_deformvos.py").read_bytes() == (release / "modeling_deformvos.py").read_bytes()


def test_other_folders_are_refused(release, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        add_remote_code(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="'bert'"):
        add_remote_code(tmp_path)
    (tmp_path / "config.json").write_bytes((release / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"processor_config\.json is missing"):
        add_remote_code(tmp_path)
    (tmp_path / "processor_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        add_remote_code(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "processor_config.json"]


def test_the_configuration_keeps_what_it_was_given(tiny_config):
    entries = {TASK: {"impl": "pipeline_deformvos.DeformVosPipeline", "pt": ["AutoModel"]}}
    config = DeformVosConfig(custom_pipelines=entries)
    config.custom_pipelines[TASK]["pt"] = (AutoModel,)  # as `pipeline` does
    assert (
        config.to_dict()["custom_pipelines"] == entries
        and TASK in json.loads(config.to_json_string())["custom_pipelines"]
    )
    assert list(config.custom_pipelines) == [TASK] and TASK not in config.custom_pipelines
    assert "custom_pipelines" not in tiny_config.to_dict() and len(tiny_config.custom_pipelines) == 0
