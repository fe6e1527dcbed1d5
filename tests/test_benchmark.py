"""The benchmark: its arithmetic, a tiny model end to end, mistakes, and peers in turn with a peer that is none."""

import importlib.util
import json
import shutil
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_CONFIG

from hf_deformvos import DeformVosConfig, DeformVosImageProcessor, DeformVosModel, DeformVosProcessor
from hf_deformvos.benchmark import plot, processes
from hf_deformvos.benchmark import run as benchmark_run
from hf_deformvos.benchmark.clip import write_clip
from hf_deformvos.benchmark.clock import STAGES, StageClock
from hf_deformvos.benchmark.engine import EngineConfig, compile_parts, load_engine
from hf_deformvos.benchmark.peers import PeerError, PeerProcess, compare_with_peers, time_alternately
from hf_deformvos.benchmark.roofline import MachineRates, StageWork, compare, count_work
from hf_deformvos.benchmark.stages import SteadyStream, summarize
from hf_deformvos.cli import main
from hf_deformvos.evaluation.macs import count_macs
from hf_deformvos.publishing import cards, measurements
from hf_deformvos.video import VideoReader


SIZE = (96, 160)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    DeformVosModel(DeformVosConfig(**TINY_CONFIG)).save_pretrained(folder)
    DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 64})).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clips") / "clip.mp4", *SIZE, num_frames=6, num_objects=12)


@pytest.fixture
def engine(model_dir):
    return load_engine(EngineConfig(model_dir, device="cpu"))


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_medians_and_percentiles_against_sorting():
    seconds = [0.004, 0.001, 0.003, 0.002, 0.010]
    # Of five values the 95th percentile lies at 0.95 * 4 = 3.8: 0.8 of the way from the fourth to the fifth.
    assert summarize(seconds) == {"median_ms": 3.0, "p95_ms": pytest.approx(4 + 0.8 * 6)}
    many = np.random.default_rng(0).random(101)
    ordered = sorted(many)
    assert summarize(list(many)) == {
        "median_ms": pytest.approx(1e3 * ordered[50], abs=1e-3),
        "p95_ms": pytest.approx(1e3 * ordered[95], abs=1e-3),
    }


def test_a_clock_books_each_moment_to_the_innermost_stage():
    ticks = iter([10.0, 11.0, 13.0, 13.5, 20.0, 20.25])
    waits = []
    clock = StageClock(synchronize=lambda: waits.append(1), now=lambda: next(ticks))
    with clock.stage("propagation"), clock.stage("decoder"):
        pass
    with clock.stage("preprocess"):
        pass
    clock.add("decode", 0.125)
    clock.end_frame()
    assert clock.frames == [{"propagation": 1.5, "decoder": 2.0, "preprocess": 0.25, "decode": 0.125}]
    assert len(waits) == 6
    clock.end_frame()
    assert clock.frames[1] == {}


def test_shares_of_the_machine():
    rates = MachineRates(matmul_gmacs=100.0, copy_gbytes=10.0)
    # Two operations: one bound by its products (10 ms), one by its bytes (20 ms).
    work = StageWork(
        macs=1_000_000_000, num_bytes=250_000_000, operations=[(1_000_000_000, 50_000_000), (0, 200_000_000)]
    )
    assert work.bound_seconds(rates) == pytest.approx(0.030)
    compared = compare({"backbone": {"median_ms": 50.0}, "decode": {"median_ms": 1.0}}, {"backbone": work}, rates)
    assert compared == {
        "backbone": {
            "gmacs": 1.0,
            "gbytes": 0.25,
            "matmul_share": pytest.approx(0.2),
            "copy_share": pytest.approx(0.5),
            "bound_ms": pytest.approx(30.0),
            "bound_share": pytest.approx(0.6),
        }
    }


def test_work_is_counted_by_stage(engine, clip):
    work = count_work(engine, clip, 1)
    assert set(work) >= {"backbone", "propagation", "decoder"}
    session, frame = engine.open_session(), np.zeros((*SIZE, 3), dtype=np.uint8)
    for index in range(engine.num_warmup_frames):
        engine.step(session, frame, clip.mask_of(1) if index == 0 else None)
    with count_macs() as macs:
        engine.step(session, frame)
    assert sum(stage.macs for stage in work.values()) == macs.value
    decoder = engine.model.decoder.classifier
    assert work["decoder"].macs > decoder.in_channels * decoder.out_channels
    # Every stage reads at least its weights.
    weights = sum(parameter.nbytes for parameter in engine.model.backbone.parameters())
    assert work["backbone"].num_bytes > weights
    assert sum(size for _, size in work["backbone"].operations) == work["backbone"].num_bytes


# ---- clip, stream, processes ----------------------------------------------------------------------------------------


def test_the_clip_is_a_video_with_objects_that_move(clip):
    with VideoReader(clip.path) as reader:
        assert reader.info.codec == "h264" and (reader.info.height, reader.info.width) == SIZE
        frames = [frame.image.astype(int) for frame in reader]
    assert len(frames) == clip.num_frames == 6
    assert np.abs(frames[0] - frames[5]).mean() > 5
    assert set(np.unique(clip.first_mask)) == set(range(13))
    assert set(np.unique(clip.mask_of(3))) == {0, 1, 2, 3}
    with pytest.raises(ValueError, match="200 objects do not fit 32x32 pixels"):
        write_clip(clip.path.with_name("small.mp4"), 32, 32, 2, 200)


@pytest.mark.parametrize("num_objects", [1, 12])
def test_stages_add_up_and_leave_no_trace(engine, clip, num_objects):
    stream = SteadyStream(engine, clip, num_objects)
    before = set(vars(engine.model)), set(vars(stream.session))
    result = stream.time_stages(3)
    assert list(result["stages"]) == list(STAGES)
    assert all(stage["median_ms"] > 0 for stage in result["stages"].values())
    medians = sum(stage["median_ms"] for stage in result["stages"].values())
    assert medians == pytest.approx(result["frame"]["median_ms"], rel=0.8)
    assert (set(vars(engine.model)), set(vars(stream.session))) == before
    assert not engine.model.decoder._forward_hooks and not engine.model.decoder._forward_pre_hooks
    assert len(stream.session.object_ids) == num_objects
    assert stream.time_stream(2)["fps"] > 0 and stream.time_written_stream(2)["fps"] > 0
    # The memory was full before anything was timed.
    assert len(stream.session._memory.long_term) == TINY_CONFIG["long_term_slots"]


@pytest.mark.slow
def test_memory_and_start_in_processes_of_their_own(model_dir, clip):
    config = EngineConfig(model_dir, device="cpu", threads=1)
    memory = processes.measure_memory(config, clip, 1, 52)
    if memory["imported_bytes"] is not None:
        assert 0 < memory["above_imports_bytes"] < 500e6 < memory["peak_bytes"] + 500e6
        assert memory["above_imports_bytes"] == memory["peak_bytes"] - memory["imported_bytes"]
        assert 0 <= memory["growth_bytes"] < 50e6
    start = processes.measure_start(config, clip, num_runs=1)
    assert start["total_s"] == pytest.approx(start["import_s"] + start["load_s"] + start["first_mask_s"], abs=0.01)
    with pytest.raises(ValueError, match=r"ended with exit code 1: ValueError: The folder .* holds no config.json"):
        processes.measure_start(EngineConfig(str(clip.path.parent)), clip, num_runs=1)


def test_compiled_parts_give_the_same_masks_and_stages(engine, model_dir, clip):
    compiled = load_engine(EngineConfig(model_dir, device="cpu"))
    # What is captured is the same for every compiler; the default one takes minutes.
    compile_parts(compiled.model, compiler="eager")
    with VideoReader(clip.path, max_frames=3) as reader:
        frames = [frame.image for frame in reader]
    masks = []
    for each in (engine, compiled):
        session, given = each.open_session(), [clip.mask_of(2), None, None]
        masks.append([each.step(session, image, mask) for image, mask in zip(frames, given, strict=True)])
    # An untrained model is undecided: a few pixels may fall the other way.
    assert all((one == other).mean() > 0.99 for one, other in zip(*masks, strict=True))
    assert list(SteadyStream(compiled, clip, 1).time_stages(2)["stages"]) == list(STAGES)


def test_every_form_of_every_layer_is_compiled(tiny_clip):
    """Two layers share their code, and with it PyTorch's bound of how many forms of it there may be."""
    model = DeformVosModel(DeformVosConfig(**TINY_CONFIG, num_hidden_layers=2)).eval()
    compile_parts(model, compiler="eager")
    processor = DeformVosProcessor(DeformVosImageProcessor(size={"shortest_edge": 33}))
    frames, ids = tiny_clip
    session = processor.init_video_session()
    processor.add_inputs_to_inference_session(session, 0, input_masks=ids[0])
    torch._dynamo.utils.counters.clear()
    with torch.inference_mode():
        for index in range(7):  # until the bank is full, and beyond
            pixel_values = processor(frames[index % 6], return_tensors="pt").pixel_values[0]
            model(inference_session=session, frame=pixel_values)
    assert sum(torch._dynamo.utils.counters["frames"].values()) > 16
    assert not torch._dynamo.utils.counters["recompile_limit"], "a form beyond the limit would be an error"


def test_compiling_needs_a_compiler(engine, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        compile_parts(engine.model)


# ---- command line ---------------------------------------------------------------------------------------------------


def run(model_dir, *arguments) -> int:
    return main(["benchmark", "--model", model_dir, "--device", "cpu", "--threads", "1", *map(str, arguments)])


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command_line_end_to_end(tmp_path, model_dir, capsys):
    path = tmp_path / "out" / "benchmark.json"
    options = ["--sizes", "96x160,64x96", "--objects", "1,11", "--frames", 2, "--skip", "start,memory"]
    assert run(model_dir, *options, "--json", path) == 0
    printed = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert (report["kind"], report["schema"], report["backend"], report["preset"]) == ("benchmark", 1, "torch", None)
    assert [(case["size"], case["objects"]) for case in report["cases"]] == [
        ([96, 160], 1),
        ([96, 160], 11),
        ([64, 96], 1),
        ([64, 96], 11),
    ]
    parameters = sum(p.numel() for p in DeformVosModel(DeformVosConfig(**TINY_CONFIG)).parameters())
    # Folding takes the batch norms' scales away and gives the convolutions biases.
    assert 0.9 * parameters < report["model"]["parameters"] <= parameters
    assert report["hardware"]["threads_per_process"] == 1 and report["rates"]["matmul_gmacs"] > 0
    assert report["settings"] == {"frames": 2, "warmup_frames": 7}
    for case in report["cases"]:
        assert list(case["stages"]) == list(STAGES) and case["gmacs"] > 0
        assert case["frame"]["median_ms"] <= case["frame"]["p95_ms"]
        assert {"backbone", "propagation", "decoder"} <= set(case["roofline"])
        assert "memory" not in case
    assert report["cases"][0]["network_size"] == [65, 113]
    assert "160x96, 11 objects" in printed and "frames/s" in printed and "this machine:" in printed
    assert "start" not in report
    assert report["command"] == (
        f"deformvos benchmark --model {model_dir} --sizes 96x160,64x96 --objects 1,11 --threads 1 --device cpu "
        "--frames 2 --skip start,memory"
    )


def test_records_become_tables(tmp_path, model_dir):
    folder = tmp_path / "docs" / "numbers"
    assert run(model_dir, "--sizes", "64x96", "--frames", 2, "--skip", "start,memory", "--preset", "fast",
               "--json", folder / "benchmark-fast.json") == 0  # fmt: skip
    record = json.loads((folder / "benchmark-fast.json").read_text())
    assert record["preset"] == "fast"
    models = {
        "deformvos": {"title": "DeformVOS", "dtype": "x", "parameters": 2e6, "median_ms": 50.0, "fps": 20.0},
        "edgetam": {"title": "EdgeTAM", "dtype": "float32", "parameters": 13.9e6, "median_ms": 2e3, "fps": 0.5},
    }
    models["edgetam"]["ratio"] = 40.0
    record["peers"] = [{"size": [64, 96], "objects": 1, "rounds": 5, "models": models}]
    record["start"] = {"import_s": 1.0, "load_s": 0.5, "first_mask_s": 0.25, "total_s": 1.75, "runs": 3}
    (folder / "benchmark-fast.json").write_text(json.dumps(record))
    numbers = load_script("update_numbers")
    names = ("benchmark", "benchmark-fast.stages", "benchmark.peers", "benchmark-fast.start", "benchmark-gone")
    text = "\n".join(f"<!-- numbers:{name}:begin -->old<!-- numbers:{name}:end -->" for name in names)
    (tmp_path / "README.md").write_text(text)
    assert numbers.render(tmp_path) == [tmp_path / "README.md"]
    rendered = (tmp_path / "README.md").read_text()
    assert "| EdgeTAM (float32) | 96x64 | 1 | 13.90 M | 2000 ms | 0.50 | 1/40.0 |" in rendered
    assert "| 1.00 s | 0.50 s | 0.25 s | 1.75 s |" in rendered
    assert "Not measured yet: `deformvos benchmark" in rendered
    assert rendered.count("| backbone |") == 1 and rendered.count("| 96x64 | 97x65 | 1 |") == 1
    assert numbers.check(tmp_path) == []
    with pytest.raises(numbers.NumbersError, match="has no 'speed'"):
        numbers.render_text("<!-- numbers:benchmark.speed:begin -->1<!-- numbers:benchmark.speed:end -->", {})


def test_memory_alone(tmp_path, model_dir, capsys, monkeypatch):
    memory = {"frames": 10_000, "above_imports_bytes": 170e6, "growth_bytes": 4e6, "peak_device_bytes": None}
    monkeypatch.setattr(benchmark_run, "measure_memory", lambda config, clip, objects, frames: memory)
    path = tmp_path / "benchmark-long.json"
    assert run(model_dir, "--sizes", "64x96", "--skip", "timing,start", "--memory-frames", 10_000, "--json", path) == 0
    assert "170 MB above the libraries at the peak, +4.0 MB from frame 50 to 10000" in capsys.readouterr().out
    record = json.loads(path.read_text())
    assert record["cases"] == [{"size": [64, 96], "network_size": [65, 97], "objects": 1, "memory": memory}]
    assert "rates" not in record
    render = measurements.BENCHMARK_VIEWS
    assert "| float32 | 96x64 | 1 | 10,000 | 170 MB | +4 MB |" in render["memory"]([record])
    assert "96x64" not in render[""]([record]) and "96x64" not in render["stages"]([record])
    (shown,) = cards._benchmark_parts([record])  # no table of times without a row
    assert "10,000" in shown


def test_what_was_measured_before_a_failure_is_kept(tmp_path, model_dir, capsys, monkeypatch):
    def fail(config, clip):
        raise ValueError("the process that starts ended")

    monkeypatch.setattr(benchmark_run, "measure_start", fail)
    path = tmp_path / "benchmark.json"
    assert run(model_dir, "--sizes", "64x96", "--skip", "timing,memory", "--json", path) == 2
    assert "the process that starts ended" in capsys.readouterr().err
    record = json.loads(path.read_text())
    assert record["complete"] is False and len(record["cases"]) == 1 and record["command"]
    weights = Path(model_dir) / "model.safetensors"
    assert measurements.find_records([tmp_path], weights) == {}
    monkeypatch.setattr(benchmark_run, "measure_start", lambda config, clip: {})
    monkeypatch.setattr("hf_deformvos.benchmark.report.start_line", lambda start: "")
    assert run(model_dir, "--sizes", "64x96", "--skip", "timing,memory", "--json", path) == 0
    assert "complete" not in json.loads(path.read_text())
    assert list(measurements.find_records([tmp_path], weights)) == ["benchmark"]


def test_cards_find_the_benchmarks_of_their_weights(tmp_path, student_dir):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"abc")
    mine = {"kind": "benchmark", "weights_sha256": measurements.sha256_of(weights)}
    (tmp_path / "benchmark-a.json").write_text(json.dumps(mine))
    (tmp_path / "benchmark-b.json").write_text(json.dumps({**mine, "weights_sha256": "other"}))
    found = measurements.find_records([tmp_path], weights)
    assert found == {"benchmark-a": mine}
    assert measurements.own_benchmarks(weights, found) == [mine]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "480"], "must be HEIGHTxWIDTH"),
        (["--sizes", "8x480"], "at least 16 pixels"),
        (["--objects", "0"], "must be numbers from 1 to 255"),
        (["--objects", "1,x"], "must be numbers from 1 to 255"),
        (["--skip", "peers"], "must be of timing, roofline, memory, start"),
        (["--frames", "0"], "must be at least 1"),
        (["--backend", "tensorrt"], "invalid choice"),
    ],
)
def test_mistakes_that_argparse_finds(model_dir, capsys, arguments, message):
    with pytest.raises(SystemExit) as exit_info:
        run(model_dir, *arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], '`dtype` "int8" needs the backend'),
        (["--peers", "--peers-python", "nowhere/python"], "scripts/make_peers_env.sh makes one"),
        (["--plot", "figure.png", "--skip", "timing"], "drop one of the two"),
        (["--plot", "figure.gif"], "A plot is written as .png, .svg, .pdf"),
        (["--sizes", "16x16", "--objects", "100"], "100 objects do not fit 16x16 pixels"),
    ],
)
def test_mistakes_in_what_is_asked(model_dir, capsys, arguments, message):
    assert run(model_dir, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.replace("`dtype`", "dtype") in error


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_results_that_cannot_be_written_are_named_first(tmp_path, model_dir, capsys, monkeypatch, option):
    monkeypatch.setattr(benchmark_run, "run_benchmark", lambda *args, **kwargs: pytest.fail("the work was begun"))
    monkeypatch.setattr(plot, "check_plot", lambda path: None)
    (tmp_path / "file").write_text("")
    assert run(model_dir, option, tmp_path / "file" / "result.png") == 2
    assert "result.png cannot be written" in capsys.readouterr().err


def test_the_record_of_a_budget_names_all_that_was_chosen(tmp_path, monkeypatch):
    budget = load_script("measure_budget")
    monkeypatch.setattr(budget, "build_cases", lambda arguments: {})
    path = tmp_path / "budget.json"
    options = ["--threads", "1", "--frames", "3", "--short-side", "240", "--variants"]
    monkeypatch.setattr(sys, "argv", ["measure_budget.py", *options, "--json", str(path)])
    budget.main()
    assert json.loads(path.read_text())["command"] == f"python scripts/measure_budget.py {' '.join(options)}"


def test_a_plot_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        plot.check_plot(tmp_path / "figure.png")


def test_a_plot_is_drawn(tmp_path, model_dir):
    pytest.importorskip("matplotlib")
    path = tmp_path / "out" / "figure.png"
    assert run(model_dir, "--sizes", "64x96", "--frames", 1, "--skip", "start,memory,roofline", "--plot", path) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


# ---- peers ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_worker(tmp_path):
    """A peer that writes down when it works, and when it is asked to, fails."""
    worker = tmp_path / "worker.py"
    worker.write_text(
        textwrap.dedent(
            """
            import json, sys, time
            request = json.loads(sys.argv[1])
            if request["peer"] == "broken":
                raise RuntimeError("no such layer\\nand more")
            print(json.dumps({"parameters": 7, "versions": {"torch": "x"}}), flush=True)
            for number, _ in enumerate(sys.stdin):
                if request["peer"] == "tired" and number == 2:
                    sys.exit("out of breath")
                started = time.time()
                time.sleep(0.02)
                with open(request["clip"] + ".log", "a") as log:
                    log.write(f"{request['peer']} {started} {time.time()}\\n")
                print(json.dumps({"seconds": 0.02, "masks": [1, 1, 96, 160]}), flush=True)
            """
        )
    )
    return worker


def test_turns_are_taken_in_order_and_last_their_time():
    order = []

    def step(name):
        def take():
            order.append(name)
            return {"quick": 0.2, "even": 0.25, "slow": 2.0}[name]

        return take

    names = ["quick", "even", "slow"]
    seconds = time_alternately({name: step(name) for name in names}, num_rounds=2, num_warmup=1, settle_seconds=0)
    assert order == [*["quick"] * 3, *["even"] * 2, "slow"] * 3
    assert seconds == {"quick": [0.2] * 6, "even": [0.25] * 4, "slow": [2.0] * 2}


def test_peers_beside_ours(engine, clip, fake_worker):
    compared = compare_with_peers(
        engine, clip, 1, 3, sys.executable, peers=("one", "two"), worker=fake_worker, turn_seconds=0
    )
    assert list(compared["models"]) == ["deformvos", "one", "two"]
    ours, one = compared["models"]["deformvos"], compared["models"]["one"]
    assert (one["median_ms"], one["fps"], one["parameters"], one["masks"]) == (20.0, 50.0, 7, [1, 1, 96, 160])
    assert one["ratio"] == pytest.approx(20.0 / ours["median_ms"], abs=0.01)
    lines = [line.split() for line in clip.path.with_name("clip.mp4.log").read_text().splitlines()]
    assert [name for name, _, _ in lines] == ["one", "two"] * 11
    ends = [float(end) for _, _, end in lines]
    starts = [float(start) for _, start, _ in lines]
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))


def test_a_peer_that_fails_is_named(clip, fake_worker, tmp_path):
    request = {"clip": str(tmp_path / "clip")}
    with pytest.raises(PeerError, match="broken ended with exit code 1: RuntimeError: no such layer"):
        PeerProcess("broken", [sys.executable, str(fake_worker), json.dumps({"peer": "broken", **request})])
    with pytest.raises(PeerError, match="gone cannot be started"):
        PeerProcess("gone", [str(tmp_path / "no-python")])
    peer = PeerProcess("tired", [sys.executable, str(fake_worker), json.dumps({"peer": "tired", **request})])
    assert [peer.step(), peer.step()] == [0.02, 0.02]
    with pytest.raises(PeerError, match="tired ended with exit code 1: out of breath"):
        peer.step()
    peer.close()
