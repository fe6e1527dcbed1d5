"""The repository's own texts: versions agree, figures are the measured ones, nothing points outside."""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

from hf_deformvos.publishing import measurements


def tracked_texts():
    """Every text file that git tracks, as (path, text)."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    assert listed.returncode == 0, listed.stderr.decode()
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file() or path.stat().st_size > 1_000_000:
            continue
        try:
            yield path, path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue


def load_script(name):
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_texts_name_no_private_paths():
    private = re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|work|mnt|opt|srv)/[\w.-]+")
    for path, text in tracked_texts():
        found = private.search(text) if path.name != "test_repository.py" else None
        assert not found, f"{path.relative_to(ROOT)} names {found and found[0]}"


def test_relative_paths_stay_inside():
    for path, text in tracked_texts():
        if path.suffix not in {".md", ".jinja"}:
            continue
        for target in re.findall(r"(?<![\w./])(?:\.\./)+[\w./-]+", text):
            resolved = (path.parent / target.rstrip(".")).resolve()
            assert resolved.is_relative_to(ROOT) and resolved.exists(), (
                f"{path.relative_to(ROOT)}: {target} leads nowhere"
            )


def test_links_of_the_texts_lead_somewhere():
    for path, text in tracked_texts():
        if path.suffix != ".md":
            continue
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not re.match(r"[a-z]+:", target):
                assert (path.parent / target).exists(), f"{path.relative_to(ROOT)} links to {target}, which is missing"


def test_versions_agree():
    import hf_deformvos

    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1]
    assert hf_deformvos.__version__ == project == citation


def test_every_dependency_that_the_checks_install_is_pinned():
    project = (ROOT / "pyproject.toml").read_text()
    lines = project[project.index("dependencies = [") : project.index("[project.scripts]")].splitlines()
    wanted = {match[1].lower() for line in lines if (match := re.match(r'\s+"([\w-]+)[><=!]', line))}
    pins = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert wanted and wanted <= {pin.lower() for pin in pins}, wanted - {pin.lower() for pin in pins}


def test_texts_state_the_measured_figures():
    assert load_script("update_numbers").check() == []


STATISTICS = {"mean": 0.8, "recall": 0.9, "decay": 0.1}
REPORT = {
    "weights_sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",  # of the bytes "abc"
    "config": {"model": "a path of the machine"},
    "model": {"num_parameters": 2_000_000},
    "hardware": {"device_name": "a processor", "threads_per_process": 2, "dtype": "float32"},
    "versions": {"torch": "2"},
    "dataset": {"name": "davis2016", "root": "a path of the machine", "num_sequences": 1, "num_frames": 104},
    "totals": {"J&F": 0.8124, "J": STATISTICS, "F": STATISTICS, "frames_per_second": 9.96, "network_ms_median": 80.2},
    "sequences": [{"name": "cow", "J&F": 0.9, "J": STATISTICS, "F": STATISTICS, "objects": ["long lists"]}],
}


@pytest.fixture
def small_repository(tmp_path):
    """A README with three blocks, one record, one weights file."""
    (tmp_path / "docs" / "numbers").mkdir(parents=True)
    (tmp_path / "hub_cards" / "m").mkdir(parents=True)
    weights = tmp_path / "hub_cards" / "m" / "model.safetensors"
    weights.write_bytes(b"abc")
    record = load_script("update_numbers").as_record(REPORT, "hub_cards/m", weights, "deformvos evaluate")
    assert "a path of the machine" not in json.dumps(record) and "long lists" not in json.dumps(record)
    (tmp_path / "docs" / "numbers" / "m-val.json").write_text(json.dumps(record))
    block = "<!-- numbers:{0}:begin -->old<!-- numbers:{0}:end -->"
    names = ("m-val", "m-val.sequences", "m-val.JF")
    (tmp_path / "README.md").write_text("before\n" + "\n".join(block.format(name) for name in names) + "\nafter\n")
    return tmp_path


def test_numbers_are_rendered_once_and_for_all(small_repository):
    numbers = load_script("update_numbers")
    assert "states other figures" in numbers.check(small_repository)[0]
    assert numbers.render(small_repository) == [small_repository / "README.md"]
    text = (small_repository / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "-->0.812<!--" in text and "| cow | 0.900 |" in text and "| 2.00 M | 0.0 MB | 80 ms | 10.0 |" in text
    assert numbers.render(small_repository) == []
    assert numbers.check(small_repository) == []


def test_numbers_of_other_weights_are_refused(small_repository):
    numbers = load_script("update_numbers")
    numbers.render(small_repository)
    (small_repository / "hub_cards" / "m" / "model.safetensors").write_bytes(b"retrained")
    assert "other weights" in numbers.check(small_repository)[0]
    (small_repository / "hub_cards" / "m" / "model.safetensors").unlink()
    assert "missing" in numbers.check(small_repository)[0]


@pytest.mark.parametrize("exported", [None, "int8"])
def test_what_was_measured_names_its_commands(small_repository, monkeypatch, exported):
    numbers = load_script("update_numbers")
    (small_repository / "data" / "davis2016-val" / "JPEGImages").mkdir(parents=True)
    report = {**REPORT, "dataset": {**REPORT["dataset"], "num_sequences": numbers.NUM_SEQUENCES}}
    report |= {"weights_sha256": "of the graphs"} if exported else {}
    ran = []

    def run(*arguments, root):
        ran.append(arguments[0])
        if arguments[0] == "evaluate":
            Path(arguments[arguments.index("--json") + 1]).write_text(json.dumps(report))

    monkeypatch.setattr(numbers, "run_deformvos", run)
    options = ["--threads", "2"]
    path = numbers.measure(small_repository / "data", "hub_cards/m", options, "x", exported, root=small_repository)
    record = json.loads(path.read_text())
    evaluated = "--dataset davis2016 --split val --threads 2 --root davis2016-val"
    if exported:
        assert ran == ["export", "evaluate"] and record["exported"] == "int8"
        assert record["command"] == (
            f"deformvos export hub_cards/m exported --dtype int8 && deformvos evaluate --model exported {evaluated}"
        )
    else:
        assert ran == ["evaluate"] and "exported" not in record
        assert record["command"] == f"deformvos evaluate --model hub_cards/m {evaluated}"
    assert path.name == "m-davis2016-val-x.json"
    weights = small_repository / "hub_cards" / "m" / "model.safetensors"
    assert record["weights_sha256"] == numbers.sha256_of(weights)
    assert bool(measurements.find_records([path], weights)) is (exported is None), "cards show the weights themselves"
    ran.clear()
    assert list(numbers.remeasure(small_repository / "data", [], root=small_repository)) == [path]
    assert ran == (["export", "evaluate"] if exported else ["evaluate"])
    assert json.loads(path.read_text()) == record
    with pytest.raises(numbers.NumbersError, match="m-val is no record of an evaluation; there are m-davis2016-val-x"):
        list(numbers.remeasure(small_repository / "data", ["m-val"], root=small_repository))


def test_numbers_not_measured_are_said_to_be_so(small_repository):
    numbers = load_script("update_numbers")
    (small_repository / "docs" / "numbers" / "m-val.json").unlink()
    numbers.render(small_repository)
    text = (small_repository / "README.md").read_text()
    assert text.count("Not measured yet") == 3 and "0.812" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- numbers:m-val:begin -->", "do not pair up"),
        ("<!-- numbers:m-val:begin -->1<!-- numbers:m-vel:end -->", "do not pair up"),
        ("<!-- numbers:m-val.speed:begin -->1<!-- numbers:m-val.speed:end -->", "has no field 'speed'"),
    ],
)
def test_wrong_markers_are_named(small_repository, text, message):
    (small_repository / "README.md").write_text(text)
    assert message in load_script("update_numbers").check(small_repository)[0]
