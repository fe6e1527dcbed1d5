"""Evidence: tables of rows, records, composites, memory, figures, and the texts made of these."""

import json
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_CONFIG
from PIL import Image
from synthetic import write_davis


pytest.importorskip("accelerate")
sys.path.insert(0, str(ROOT / "scripts"))

import ablate
import evidence
import make_figures
import measure_features
import measure_gradients
import measure_memory
import measure_objects
import update_numbers

from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel, DeformVosProcessor


@pytest.fixture(scope="module")
def davis(tmp_path_factory):
    """Three sequences of six frames in DAVIS-2016 layout, two of them held out."""
    root = tmp_path_factory.mktemp("evidence") / "davis"
    return write_davis(root, names=("ant", "flamingo", "swing"), frames=6, value=255)


def save_tiny(folder, seed=0, **changes):
    """An untrained tiny model's folder."""
    torch.manual_seed(seed)
    DeformVosModel(DeformVosConfig(**{**TINY_CONFIG, **changes})).save_pretrained(folder)
    DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 64})).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


# ---- records and commands -------------------------------------------------------------------------------------------


def test_records_are_written_whole_and_read_by_kind(tmp_path):
    path = tmp_path / "deep" / "record.json"
    evidence.update_record(path, "memory", lambda record: record.update(values=[1, 2.5, -1e-07, None], name=["a"]))
    assert '"values": [1, 2.5, -1e-07, null]' in path.read_text()
    assert evidence.read_record(path, "memory") == {
        "kind": "memory",
        "values": [1, 2.5, -1e-07, None],
        "name": ["a"],
    }
    with pytest.raises(evidence.EvidenceError, match="kind 'objects', got 'memory'"):
        evidence.read_record(path, "objects")
    path.write_text("{half")
    with pytest.raises(evidence.EvidenceError, match="must be JSON"):
        evidence.read_record(path, "memory")


def test_a_lock_is_held_once(tmp_path):
    with evidence.lock(tmp_path / "lock", wait=False) as first, evidence.lock(tmp_path / "lock", wait=False) as second:
        assert first is not None
        assert second is None


def test_a_command_that_is_out_of_time_is_stopped_with_what_it_started(tmp_path):
    child = f"import time; time.sleep(1); open({str(tmp_path / 'late')!r}, 'w'); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(evidence.OutOfTime):
        evidence.run_command([sys.executable, "-c", parent], tmp_path / "log", evidence.Deadline(0.3 / 60))
    time.sleep(1.5)
    assert not (tmp_path / "late").exists()
    with pytest.raises(evidence.OutOfTime):
        evidence.Deadline(0).remaining()
    failing = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    assert evidence.run_command(failing, tmp_path / "log", evidence.Deadline(None)) == 3
    assert "the reason" in evidence.last_lines(tmp_path / "log")


# ---- the table of the ablation --------------------------------------------------------------------------------------


def table_with(tmp_path, **changes):
    content = json.loads(ablate.TABLE.read_text())
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({**content, **changes}))
    return path


def test_the_table_has_the_rows_that_are_asked_for():
    table = ablate.read_table(ablate.TABLE, [])
    assert {"vanilla", "grid", "query", "query-zeroed", "object-dependent"} <= set(table.rows)
    assert {"labels", "kl", "mobilevos", "relations", "full", "full-pseudo"} <= set(table.rows)
    vanilla = DeformVosConfig(**table.rows["vanilla"].model)
    assert not vanilla.use_offsets and vanilla.short_term_form == "grid"
    assert vanilla.long_term_stride == vanilla.self_stride == vanilla.short_term_stride == 1
    for name in ("labels", "kl", "mobilevos", "relations", "full"):
        assert len(table.rows[name].seeds) >= 2, f"{name} is decisive"
    assert ["full", "labels"] in table.pairs
    assert ablate.read_table(ablate.TABLE, ["max_train_steps=3"]).train["max_train_steps"] == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {"a": {"title": "a", "train": {"max_train_steps": 9}}}, "pairs": []}, "must not set"),
        (
            {"rows": {"a": {"title": "a", "train": {"train_on_held_out": True}}}, "pairs": []},
            r"must not set \['train_on_held_out'\]: rows differ in losses alone",
        ),
        ({"rows": {"a": {"title": "a", "of": "b"}}, "pairs": []}, "is `of` a row"),
        ({"rows": {"a": {"title": "a", "override": {"use_ofsets": False}}}, "pairs": []}, "no model has"),
        ({"pairs": [["full", "nothing"]]}, "must name rows"),
        ({"train": {"max_train_minutes": 5}}, "equal steps"),
        ({"row": {}}, "unknown parts"),
        (
            {"rows": {"a": {"title": "a", "model": {"use_offset": False}}}},
            r"'a' sets \['use_offset'\], which no model",
        ),
        ({"model": {"hiden_size": 8}}, r"`model` of .* sets \['hiden_size'\], which no model"),
    ],
)
def test_mistakes_in_the_table_are_named(tmp_path, changes, message):
    with pytest.raises(evidence.EvidenceError, match=message):
        ablate.read_table(table_with(tmp_path, **changes), [])


def setting_of(davis, tmp_path, **changes):
    values = {
        "table": ablate.read_table(ablate.TABLE, []),
        "work": tmp_path,
        "davis": [str(davis)],
        "static": [],
        "backbone": None,
        "teacher": None,
        "val": None,
        "cache": None,
        "launch": [],
        "threads": 1,
        "workers": 1,
        "max_frames": None,
    }
    return ablate.Setting(**{**values, **changes})


def test_a_run_is_known_by_what_its_result_depends_on(davis, tiny_folder, tmp_path):
    setting = setting_of(davis, tmp_path)
    runs = {(run.row.name, run.seed): run for run in ablate.all_runs(setting)}
    query = runs["query", 0]
    assert runs["labels", 0].key == query.key, "the same training, the same scores"
    assert runs["query-zeroed", 0].folder == query.folder, "the same weights"
    others = [runs["query-zeroed", 0], runs["query", 1], runs["vanilla", 0], runs["kl", 0]]
    assert len({query.key, *(run.key for run in others)}) == 5
    moved = setting_of(davis, tmp_path / "elsewhere", threads=2, launch=["--cpu"])
    assert ablate.Run(query.row, 0, moved).key == query.key, "neither folders nor threads make another run"
    assert runs["kl", 0].lacks_teacher and not query.lacks_teacher
    taught = setting_of(davis, tmp_path, teacher=tiny_folder)
    assert ablate.Run(runs["kl", 0].row, 0, taught).key != runs["kl", 0].key
    assert ablate.Run(query.row, 0, taught).key == query.key, "labels have no teacher"
    order = [(run.row.name, run.seed) for run in ablate.all_runs(setting)]
    assert order.index(("full", 0)) < order.index(("vanilla", 1)), "every row once before any row twice"


def test_rows_start_alike(davis, tmp_path):
    table = ablate.read_table(table_with(tmp_path, model=TINY_CONFIG), [])
    setting = setting_of(davis, tmp_path / "work", table=table)
    first, again, other = (setting.start_folder(seed) for seed in (0, 0, 1))
    assert first == again != other
    assert evidence.describe_model(first)["sha256"] != evidence.describe_model(other)["sha256"]
    assert setting.model_config({"use_offsets": False}) == {
        "model_type": "deformvos",
        **TINY_CONFIG,
        "use_offsets": False,
    }


def entry_of(scores: dict[str, float], settings=None) -> dict:
    mean = sum(scores.values()) / len(scores)
    return {
        "settings": settings or {},
        "steps": 600,
        "clips": 4080,
        "parameters": 2_350_000,
        "train_seconds": 90.0,
        "weights_sha256": "ab",
        "start": {"name": "fresh"},
        "hardware": {"dtype": "bfloat16", "device_name": "a processor"},
        "curve": {
            "loss_ce": {"step": [10, 20], "value": [0.9, 0.5]},
            "eval_j": {"step": [20], "value": [0.4]},
        },
        "scores": {"held-out": {"JF": mean, "sequences": scores}},
    }


@pytest.fixture
def record(davis, tmp_path):
    """A record of `labels` (and thereby `query`) and `full` with two seeds each, two sequences each."""
    setting = setting_of(davis, tmp_path, teacher=save_tiny(tmp_path / "teacher"))
    runs = ablate.all_runs(setting)
    scores = {
        ("labels", 0): {"flamingo": 0.70, "swing": 0.80},
        ("labels", 1): {"flamingo": 0.72, "swing": 0.78},
        ("full", 0): {"flamingo": 0.74, "swing": 0.82},
        ("full", 1): {"flamingo": 0.78, "swing": 0.76},
    }
    record = {"kind": "ablation"}
    for run in runs:
        found = scores.get((run.row.name, run.seed))
        if found:
            ablate.keep(record, run, entry_of(found), runs, setting.table)
    return record


def test_means_spreads_and_paired_differences(record):
    rows = {row["name"]: row for row in record["rows"]}
    assert set(rows) == {"query", "labels", "full"}, "two names of the same weights"
    full = rows["full"]["scores"]["held-out"]
    assert full["values"] == [0.78, 0.77] and full["mean"] == 0.775
    assert full["deviation"] == pytest.approx(0.00707, abs=1e-5)
    pair = next(pair for pair in record["pairs"] if (pair["one"], pair["other"]) == ("full", "labels"))
    assert pair["by_seed"] == [0.03, 0.02]
    assert pair["by_sequence"] == {"flamingo": 0.05, "swing": 0.0}
    assert pair["difference"] == 0.025
    assert (pair["better"], pair["compared"]) == (3, 4)
    assert pair["interval"] == [0.0, 0.05]
    assert "+ KL of logits" in record["missing"]


def test_scores_of_other_weights_are_not_mixed(record, davis, tmp_path):
    setting = setting_of(davis, tmp_path, teacher=tmp_path / "teacher")
    runs = ablate.all_runs(setting)
    run = next(run for run in runs if run.row.name == "full" and run.seed == 0)
    later = {**entry_of({"cow": 0.9}), "scores": {"val": {"JF": 0.9, "sequences": {"cow": 0.9}}}}
    ablate.keep(record, run, later, runs, setting.table)
    assert set(record["runs"][run.key]["scores"]) == {"held-out", "val"}
    ablate.keep(record, run, {**later, "weights_sha256": "cd"}, runs, setting.table)
    assert set(record["runs"][run.key]["scores"]) == {"val"}


@pytest.mark.slow
def test_rows_are_trained_scored_recorded_and_not_done_again(davis, tmp_path, capsys):
    table = table_with(
        tmp_path,
        model=TINY_CONFIG,
        teacher="hub_cards/not-there",
        evaluate={"short_side": 64},
        train={
            "stages": [{"until": 1.0, "size": [33, 49], "frames": 2, "batch": 1}],
            "max_train_steps": 2,
            "mixed_precision": "no",
            "checkpointing_steps": 1,
            "eval_steps": 2,
            "logging_steps": 1,
        },
        rows={
            "labels": {"title": "labels"},
            "zeroed": {"title": "zeroed", "of": "labels", "override": {"use_offsets": False}},
            "kl": {"title": "KL", "train": {"kl_weight": 1.0}},
        },
        pairs=[["zeroed", "labels"]],
    )
    path = tmp_path / "ablation.json"
    arguments = ["--table", str(table), "--davis", str(davis), "--backbone", "none", "--threads", "1"]
    arguments += ["--work", str(tmp_path / "work"), "--cache", str(tmp_path / "cache"), "--json", str(path)]
    arguments += ["--max-frames", "4"]
    assert ablate.main(arguments) == 1, "one row could not be run"
    assert "kl, seed 0: needs a teacher" in capsys.readouterr().err
    record = json.loads(path.read_text())
    assert [row["name"] for row in record["rows"]] == ["labels", "zeroed"]
    (labels,) = (record["runs"][key] for key in record["rows"][0]["runs"].values())
    assert labels["steps"] == 2 and labels["weights_sha256"] and labels["train_seconds"] > 0
    assert set(labels["scores"]["held-out"]["sequences"]) == {"flamingo", "swing"}
    assert labels["curve"]["loss"]["step"] == [1, 2] and labels["curve"]["eval_j"]["step"] == [2]
    assert record["pairs"][0]["compared"] == 2
    assert str(tmp_path) not in path.read_text(), "the record knows no folder of this machine"
    (run,) = (tmp_path / "work").glob("labels-*")
    assert not list(run.glob("checkpoint-*")) and (run / "model.safetensors").is_file()
    before = path.read_text()
    assert ablate.main([*arguments, "--rows", "labels", "zeroed"]) == 0
    assert "training" not in capsys.readouterr().out
    assert path.read_text() == before


def test_mistakes_on_the_command_line_are_one_line(davis, capsys):
    wanted = ["--davis", str(davis), "--backbone", "none", "--list"]
    for arguments, message in (
        (["--davis", str(davis), "--list"], "needs --backbone"),
        ([*wanted, "--set", "max_train_steps=3"], "needs --json"),
        ([*wanted, "--rows", "nothing"], "--rows takes rows and groups"),
        ([*wanted, "--teacher", "nowhere"], "--teacher must be a folder"),
        ([], "Give --davis"),
    ):
        assert evidence.guarded(lambda arguments=arguments: ablate.main(arguments)) == 2
        captured = capsys.readouterr().err
        assert captured.startswith("error: ") and message in captured and captured.count("\n") == 1


# ---- objects --------------------------------------------------------------------------------------------------------


def test_a_sequence_is_played_forwards_and_backwards():
    assert [measure_objects.turning(position, 4) for position in range(8)] == [0, 1, 2, 3, 2, 1, 0, 1]
    assert measure_objects.turning(5, 1) == 0


def test_composites_are_the_same_every_time_and_grow_by_an_object(davis):
    sequences = list(evidence.held_out_dataset(davis).sequences)
    assert [sequence.name for sequence in sequences] == ["flamingo", "swing"]
    base, others = sequences[0], sequences[1:]
    pieces = measure_objects.choose_pieces(base, others, 3)
    assert pieces == measure_objects.choose_pieces(base, others, 3)
    assert pieces[:1] == measure_objects.choose_pieces(base, others, 1)
    alone, crowd = (list(measure_objects.compose(base, pieces[:count], 4)) for count in (0, 3))
    true = base.read_ids(base.annotations[base.images[0].stem])
    assert np.array_equal(alone[0][1], true), "no piece, no change"
    assert np.array_equal(np.asarray(alone[0][0]), np.asarray(Image.open(base.images[0])))
    image, ids = crowd[0]
    assert set(np.unique(ids)) == {0, 1, 2, 3, 4}
    assert not ((ids == 1) & (true == 0)).any(), "the clip's own object is where it was, or hidden"
    same = ids == alone[0][1]
    # The edge of a pasted object is soft.
    changed = (np.asarray(image) != np.asarray(alone[0][0])).any(-1)
    assert changed[same & (true > 0)].mean() < 0.2
    boxes = [np.argwhere(later == 2).mean(0) for _, later in crowd]
    assert np.ptp(boxes, axis=0).max() > 0, "it moves"


def test_objects_are_measured_once(davis, tmp_path, capsys):
    model, path = save_tiny(tmp_path / "tiny"), tmp_path / "objects.json"
    arguments = ["--models", str(model), "--davis", str(davis), "--counts", "1", "2", "--max-frames", "4"]
    arguments += ["--short-side", "64", "--threads", "1", "--json", str(path)]
    assert measure_objects.main(arguments) == 0
    assert capsys.readouterr().out.count("objects, J&F") == 4 + 2
    record = json.loads(path.read_text())
    entry = record["models"]["tiny"]
    assert set(entry["points"]) == {"flamingo/1", "flamingo/2", "swing/1", "swing/2"}
    two = entry["points"]["swing/2"]
    assert two["num_objects"] == 2 and two["JF"] == pytest.approx(np.mean(two["objects"]), abs=1e-5)
    assert [row["num_objects"] for row in entry["summary"]] == [1, 2]
    assert entry["summary"][1]["num_composites"] == 2 and "pasted" in record["settings"]["synthetic"]
    before = path.read_text()
    measure_objects.main(arguments)
    assert path.read_text() == before
    assert evidence.guarded(lambda: measure_objects.main([*arguments, "--max-frames", "3"])) == 2
    assert "other settings (max_frames)" in capsys.readouterr().err
    save_tiny(model, seed=1)
    measure_objects.main([*arguments, "--minutes", "0"])
    assert "points" in json.loads(path.read_text())["models"]["tiny"], "kept until the new weights are measured"
    assert "The time is up" in capsys.readouterr().out


def test_a_composite_that_was_left_half_way_is_made_anew(davis, tmp_path):
    base = evidence.held_out_dataset(davis).sequences[0]
    frames = list(measure_objects.compose(base, [], 3))

    def broken():
        yield frames[0]
        raise KeyboardInterrupt

    masks = tmp_path / "Annotations" / "480p" / "one"
    with pytest.raises(KeyboardInterrupt):
        measure_objects.write_composite(tmp_path, "one", broken())
    assert not masks.exists()
    measure_objects.write_composite(tmp_path, "one", iter(frames))
    assert len(list(masks.iterdir())) == len(list((tmp_path / "JPEGImages" / "480p" / "one").iterdir())) == 3


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_one_setting_is_changed_at_a_time(tiny_folder):
    cases = measure_memory.cases_of(
        str(tiny_folder), {"long_term_slots": [1, 3], "memory_interval": [2, 4], "short_side": [480, 240]}
    )
    usual = cases["long_term_slots=3, memory_interval=2, short_side=480"]
    assert usual["series"] == ["long_term_slots", "memory_interval", "short_side"]
    assert len(cases) == 4 and all(len(case["series"]) == 1 for case in cases.values() if case is not usual)


def test_state_grows_with_slots(davis, tiny_folder, tmp_path):
    options = ["--models", str(tiny_folder), "--davis", str(davis), "--threads", "1", "--max-frames", "5"]
    results = []
    for slots in (1, 3):
        case = {"long_term_slots": slots, "memory_interval": 1, "short_side": 64, "series": ["long_term_slots"]}
        path = tmp_path / f"{slots}.json"
        assert measure_memory.main([*options, "--case", json.dumps(case), "--json", str(path)]) == 0
        results.append(json.loads(path.read_text()))
    few, many = results
    assert many["state_bytes"] == 1.5 * few["state_bytes"], "with one slot, the previous frame is held beside it"
    assert few["num_sequences"] == 2 and few["num_frames"] == 10 and few["network_size"] == [65, 113]
    assert few["peak_bytes"] > 0 and 0 <= few["JF"] <= 1


@pytest.mark.slow
def test_each_case_has_a_process_of_its_own(davis, tiny_folder, tmp_path):
    path = tmp_path / "memory.json"
    arguments = ["--models", str(tiny_folder), "--davis", str(davis), "--threads", "1", "--max-frames", "4"]
    arguments += ["--long-term-slots", "3", "--memory-interval", "--short-side", "--json", str(path)]
    assert measure_memory.main(arguments) == 0
    (case,) = json.loads(path.read_text())["models"]["tiny"]["cases"].values()
    assert case["series"] == ["long_term_slots"] and case["peak_bytes"] > case["loaded_bytes"] / 2


# ---- texts and figures ----------------------------------------------------------------------------------------------


MEMORY = {
    "kind": "memory",
    "command": "python scripts/measure_memory.py",
    "settings": {"dtype": "float32"},
    "models": {
        "tiny": {
            "sha256": "ab" * 32,
            "cases": {
                str(slots): {
                    "long_term_slots": slots,
                    "memory_interval": 8,
                    "short_side": 480,
                    "series": ["long_term_slots"] + ["memory_interval", "short_side"] * (slots == 3),
                    "JF": 0.8 + slots / 100,
                    "state_bytes": slots * 1_000_000,
                    "loaded_bytes": 300_000_000,
                    "peak_bytes": 420_000_000,
                    "peak_device_bytes": None,
                    "network_ms": 80.4,
                    "num_frames": 410,
                }
                for slots in (1, 3)
            },
        }
    },
}
OBJECTS = {
    "kind": "objects",
    "command": "python scripts/measure_objects.py",
    "settings": {"max_frames": 40},
    "models": {
        "tiny": {
            "sha256": "ab" * 32,
            "summary": [
                {"num_objects": count, "mean": 0.8 - count / 50, "deviation": 0.1, "first_mean": 0.8 - count / 99}
                for count in (1, 2, 3)
            ],
            "videos": {"girls": {"num_objects": 7, "JF": 0.5}},
        }
    },
}


def test_gradients_are_compared_with_those_by_labels(davis, tiny_folder, tmp_path, one_thread, monkeypatch):
    small = [{"until": 1.0, "size": [65, 97], "frames": 3, "batch": 2}]
    table = ablate.read_table(ablate.TABLE, [f"stages={json.dumps(small)}"])
    monkeypatch.setattr(measure_gradients, "read_table", lambda *_: table)
    teacher = save_tiny(tmp_path / "teacher", seed=1)
    arguments = ["--teacher", str(teacher), "--davis", str(davis), "--batches", "2", "--threads", "1"]
    records = []
    for name in ("one", "again"):
        path = tmp_path / f"{name}.json"
        assert measure_gradients.main([*arguments, "--students", f"tiny={tiny_folder}", "--json", str(path)]) == 0
        records.append(json.loads(path.read_text()))
    terms = records[0]["students"]["tiny"]["terms"]
    assert terms == records[1]["students"]["tiny"]["terms"]
    assert set(terms) == {"kl", "representation", "intra", "inter", "att"}
    assert all(term["length"] > 0 and -1 <= term["cosine"] <= 1 for term in terms.values())
    assert terms["kl"]["length"] != terms["intra"]["length"]
    shown = update_numbers.render_evidence(records[0], "", None, tmp_path)
    assert f"| L_att = 1 − CKA | {terms['att']['length']:.2f} | {terms['att']['cosine']:.2f} |" in shown
    with pytest.raises(evidence.EvidenceError, match="LABEL=DIR"):
        measure_gradients.main([*arguments, "--students", str(tiny_folder)])


def test_texts_take_their_tables_from_the_records(record, tmp_path):
    numbers, docs = tmp_path / "docs" / "numbers", tmp_path / "docs"
    numbers.mkdir(parents=True)
    names = ("ablation.distillation", "ablation.other", "ablation.pairs", "objects", "memory", "figures.memory")
    block = "<!-- numbers:{0}:begin -->\n<!-- numbers:{0}:end -->"
    text = docs / "EVIDENCE.md"
    text.write_text("\n".join(block.format(name) for name in names))
    update_numbers.render(tmp_path)
    assert text.read_text().count("Not measured yet") == 5 and "Not drawn yet" in text.read_text()
    for name, content in (("ablation", record), ("objects", OBJECTS), ("memory", MEMORY)):
        (numbers / f"{name}.json").write_text(json.dumps(content))
    (docs / "images").mkdir()
    (docs / "images" / "memory.png").write_bytes(b"a picture")
    source = {"memory.json": evidence.sha256_of(numbers / "memory.json")}
    figure = {"file": "memory.png", "caption": "What it takes.", "command": "python draw.py", "sources": source}
    (numbers / "figures.json").write_text(json.dumps({"kind": "figures", "figures": {"memory": figure}}))
    update_numbers.render(tmp_path)
    shown = text.read_text()
    assert "| + all three: L_intra, L_inter, L_att (CKA) | 2 | 77.5 ± 0.7 | - | 2.35 M | 1.5 min |" in shown
    assert "600 steps and 4080 clips each, from fresh weights" in shown and "Not run yet: vanilla" in shown
    assert "No row of the group *other*" in shown
    assert "| held-out | 2 | +2.5 | +0.0 to +5.0 | 3 of 4 |" in shown
    assert "| 2 | 76.0 | 78.0 |" in shown and "| 7 (girls, real) | 50.0 |  |" in shown and "synthetic" in shown
    assert "| tiny | 3 | 8 | 480 | 83.0 | 3.0 MB | 120 MB | 80 ms |" in shown
    assert "![What it takes.](images/memory.png)" in shown
    assert update_numbers.check(tmp_path) == []
    (numbers / "memory.json").write_text(json.dumps({**MEMORY, "settings": {"dtype": "bfloat16"}}))
    (docs / "images" / "memory.png").unlink()
    problems = update_numbers.check(tmp_path)
    assert any("drawn from another memory.json" in problem for problem in problems)
    assert any("memory.png is missing" in problem for problem in problems)


def test_plots_are_drawn_from_records_alone(record, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    for name, content in (("ablation", record), ("objects", OBJECTS)):
        (numbers / f"{name}.json").write_text(json.dumps(content))
    assert make_figures.main(["plots", "--numbers", str(numbers), "--output", str(tmp_path / "images")]) == 0
    assert "memory: memory.json is not there yet" in capsys.readouterr().out
    (numbers / "memory.json").write_text(json.dumps(MEMORY))
    make_figures.main(["plots", "--only", "memory", "--numbers", str(numbers), "--output", str(tmp_path / "images")])
    for name in make_figures.PLOTS:
        with Image.open(tmp_path / "images" / f"{name}.png") as picture:
            assert min(picture.size) > 300, name
    first = (tmp_path / "images" / "memory.png").read_bytes()
    make_figures.main(["plots", "--only", "memory", "--numbers", str(numbers), "--output", str(tmp_path / "images")])
    assert (tmp_path / "images" / "memory.png").read_bytes() == first


def test_models_are_drawn(davis, tiny_folder, tmp_path):
    pytest.importorskip("matplotlib")
    vanilla = save_tiny(tmp_path / "v", short_term_form="grid", use_offsets=False)
    models = ["--models", f"query={tiny_folder}", f"grid={vanilla}", "--davis", str(davis), "--output", str(tmp_path)]
    assert make_figures.main(["attention", *models, "--sequence", "swing", "--frame", "2"]) == 0
    assert make_figures.main(["strips", *models, "--sequences", "swing", "--count", "2"]) == 0
    assert (tmp_path / "attention.jpg").stat().st_size > 10_000 < (tmp_path / "strips.jpg").stat().st_size
    assert (
        evidence.guarded(lambda: make_figures.main(["attention", *models, "--sequence", "swing", "--frame", "9"])) == 2
    )


def test_clips_of_adaptation_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    assert make_figures.main(["clips", "--batches", "2", "--output", str(tmp_path)]) == 0
    with Image.open(tmp_path / "adaptation_clips.jpg") as picture:
        colours = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    assert colours.std(0).min() > 30 and picture.width > 3 * picture.height / 2


def test_attention_is_spread_where_it_is_read(davis, tiny_folder, tmp_path):
    sequence = next(s for s in evidence.held_out_dataset(davis).sequences if s.name == "swing")
    vanilla = save_tiny(tmp_path / "v", short_term_form="grid", use_offsets=False, long_term_stride=1, self_stride=1)
    followed = make_figures.Followed(str(vanilla), sequence, [2], attentions=True)
    height, width = followed.grid
    for name in make_figures.PROPAGATIONS:
        dense, points = make_figures.weights_on_grid(followed, name, 5)
        weights = followed.attentions[name][0, 5, : height * width].numpy()
        assert np.allclose(dense.ravel(), weights / weights.max(), atol=1e-5), "every token is read where it lies"
        assert points.shape == (height * width, 2)
    deformed = make_figures.Followed(str(tiny_folder), sequence, [2], attentions=True)
    dense, points = make_figures.weights_on_grid(deformed, "short_term", 5)
    assert points.shape == (9, 2) and dense.shape == deformed.grid
    assert np.count_nonzero(dense) <= 36
    true = sequence.read_ids(sequence.annotations["00002"])
    row, column = make_figures.inner_token(true, followed.grid)
    assert true[row * 95 // (height - 1), column * 159 // (width - 1)] == 1


# ---- features -------------------------------------------------------------------------------------------------------


def test_masks_go_where_what_looks_alike_goes():
    # Every patch has a look of its own, and the picture moves by two patches a frame.
    looks = torch.eye(12 * 20).view(-1, 12, 20)
    mask = torch.zeros(12, 20)
    mask[4:8, 2:6] = 1
    frames = [looks.roll(2 * t, dims=2) for t in range(4)]
    moved = measure_features.propagate(frames, mask)
    # One neighbour in seven is alike, at a cosine of 1 to 0: the others hardly count.
    for t, soft in enumerate(moved, start=1):
        assert torch.equal(soft > 0.5, mask.roll(2 * t, dims=1) > 0.5)


def test_features_are_scored_and_shown(davis, tiny_folder, tmp_path, one_thread):
    path = tmp_path / "features.json"
    arguments = ["--davis", str(davis), "--json", str(path)]
    assert measure_features.main([*arguments, "--models", f"tiny={tiny_folder}"]) == 0
    entry = json.loads(path.read_text())["models"]["tiny"]
    for part in ("backbone", "tokens"):
        assert set(entry[part]["sequences"]) == {"flamingo", "swing"}
        assert entry[part]["J"] == pytest.approx(np.mean(list(entry[part]["sequences"].values())), abs=1e-4)
    # Even an untrained backbone tells rectangles from a plain ground; a random projection of it need not.
    assert entry["backbone"]["J"] > 0.3
    shown = update_numbers.render_evidence(json.loads(path.read_text()), "", None, tmp_path)
    assert f"| tiny | {100 * entry['backbone']['J']:.1f} | {100 * entry['tokens']['J']:.1f} |" in shown
    with pytest.raises(evidence.EvidenceError, match="LABEL=DIR"):
        measure_features.main([*arguments, "--models", str(tiny_folder)])
    empty, before = write_davis(tmp_path / "davis", frames=2), path.read_text()
    again = ["--davis", str(empty), "--models", f"tiny={tiny_folder}", "--json"]
    with pytest.raises(evidence.EvidenceError, match="held-out"):
        measure_features.main([*again, str(tmp_path / "other.json")])
    with pytest.raises(evidence.EvidenceError, match=r"measured with other settings \(data\): name another"):
        measure_features.main([*again, str(path)])
    assert path.read_text() == before


def test_models_of_one_name_are_refused():
    """Records tell them apart by it: the second would take the place of the first."""
    evidence.check_names(["runs/a/best", "runs/b/other"])
    with pytest.raises(evidence.EvidenceError, match="must have different names, got best twice"):
        evidence.check_names(["runs/a/best", "runs/b/best"])


def test_a_series_without_points_is_not_drawn():
    case = {"series": ["long_term_slots"], "state_bytes": 1e6, "memory_interval": 8, "long_term_slots": 3, "JF": 0.8}
    figure = make_figures.draw_memory({"models": {"tiny": {"cases": {"a": case}}}})
    points = [line.get_xydata().tolist() for axis in figure.axes for line in axis.lines]
    assert points == [[[1.0, 80.0]], [], []]
