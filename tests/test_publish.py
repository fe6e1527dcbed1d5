"""Publishing against a Hub on loopback: what is refused, what one commit holds, and how every fault ends."""

import copy
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import zipfile
from dataclasses import fields
from types import SimpleNamespace

import hub_server
import numpy as np
import pytest
import torch
from conftest import ROOT
from hub_server import is_ref_name
from huggingface_hub import constants, metadata_load
from safetensors.numpy import save_file
from safetensors.torch import load_file
from synthetic import write_static_set

import train_distill
from hf_deformvos.cli import main
from hf_deformvos.publishing import cards
from hf_deformvos.publishing import hub as publishing_hub
from hf_deformvos.publishing import publish as publish_module
from hf_deformvos.publishing import space as publishing_space
from hf_deformvos.publishing.collect import collect_release, collect_space
from hf_deformvos.publishing.hub import PublishError, Target, Upload, publish_files, redact
from hf_deformvos.publishing.measurements import sha256_of
from hf_deformvos.publishing.publish import publish_release
from hf_deformvos.publishing.release import SETTINGS as RECORDED_SETTINGS
from hf_deformvos.publishing.release import data_names, release_run
from hf_deformvos.publishing.space import build_wheel, read_settings, stage_space
from hf_deformvos.training.config import TrainingConfig
from hf_deformvos.training.lineage import describe_origin, total_clips


SETTINGS = {
    "supervision": "labels",
    "stages": [{"until": 1.0, "size": [97, 161], "frames": 3, "batch": 2}],
    "learning_rate": 0.001,
    "backbone_lr_scale": 0.1,
    "mixed_precision": "no",
}
FACTS = {"steps": 1, "clips": 2, "minutes": 0.5, "parameters": 1234, "data": ["ecssd"], "settings": SETTINGS}
REPO = "org/tiny"
COMMIT = r"^POST /api/models/org/tiny/commit/"


@pytest.fixture
def waits(monkeypatch):
    """Attempts follow at once; the seconds they would have waited."""
    seconds = []
    monkeypatch.setattr(publishing_hub, "time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def release(tmp_path, tiny_model, tiny_processor):
    """A release folder with a tiny model."""
    folder = tmp_path / "tiny"
    tiny_model.save_release(folder)
    tiny_processor.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(FACTS))
    return folder


@pytest.fixture
def files(tmp_path):
    """Writes files of the names and contents given, and describes them; a card and weights without a model."""

    def write(**contents):
        folder = tmp_path / "files"
        folder.mkdir(exist_ok=True)
        contents = {"README.md": cards.seal("---\nlicense: mit\n---\ntext\n"), "config.json": "{}", **contents}
        save_file({"weight": np.arange(5000, dtype=np.float32)}, folder / "model.safetensors")
        for name, text in contents.items():
            (folder / name).write_text(text)
        return [Upload.of(path.name, path) for path in sorted(folder.iterdir())]

    return write


def publish(uploads, target=None, **options):
    return publish_files(uploads, target or Target(REPO), "Publish", **options)


def names(hub, repo=REPO, revision="main"):
    return set(hub.repos[repo].at(revision).files) - {".gitattributes"}


# What is collected


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("pytorch_model.bin", "pickle"),
        ("model.pt", "pickle"),
        ("weights.PKL", "pickle"),
        ("last.ckpt", "pickle"),
        ("optimizer.safetensors", "state of training"),
        ("scheduler.json", "state of training"),
        ("trainer_state.json", "state of training"),
        ("notes.txt", "not part of a release"),
        (".env", "hidden"),
        ("sub/config.json", "not part of a release"),
    ],
)
def test_what_is_no_part_of_a_release_is_named(release, name, reason):
    (release / name).parent.mkdir(exist_ok=True)
    (release / name).write_text("{}")
    with pytest.raises(ValueError, match=f"{name} .*{reason}"):
        collect_release(release)


def test_links_are_refused(release, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (release / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"LICENSE .*outside the folder"):
        collect_release(release)
    (release / "LICENSE").unlink()
    (release / "picture.jpg").symlink_to(release / "config.json")
    with pytest.raises(ValueError, match=r"picture.jpg \(a link\)"):
        collect_release(release)


def test_a_token_in_a_file_is_refused(release):
    (release / "training.json").write_text(json.dumps({"note": "hf_" + "a" * 34}))
    with pytest.raises(ValueError, match="contains an access token"):
        collect_release(release)


def test_large_pictures_and_what_tools_leave_behind(release):
    (release / ".cache").mkdir()
    (release / ".cache" / "x.lock").write_text("")
    (release / "picture.png").write_bytes(b"\x89PNG" + bytes(100))
    assert {"picture.png", "model.safetensors"} <= {path.name for path in collect_release(release)}
    (release / "picture.png").write_bytes(bytes(600_000))
    with pytest.raises(ValueError, match=r"picture\.png"):
        collect_release(release)


def test_weights_must_be_whole_and_of_one_kind(release, tiny_model):
    weights = (release / "model.safetensors").read_bytes()
    (release / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="no safetensors file, or damaged"):
        collect_release(release)
    (release / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights"):
        collect_release(release)
    tiny_model.save_pretrained(release, max_shard_size="200kB")
    shards = sorted(release.glob("model-*.safetensors"))
    assert len(shards) > 1
    collect_release(release)
    (release / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="keep one of the two"):
        collect_release(release)
    (release / "model.safetensors").unlink()
    shards[0].unlink()
    with pytest.raises(ValueError, match=f"not those of its index; differing: {shards[0].name}"):
        collect_release(release)


def test_a_run_is_told_from_a_release(release):
    (release / "all_results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"make a release of it with scripts/make_release\.py"):
        collect_release(release)


# The command


def test_publish_checks_commits_once_and_says_when_nothing_changed(release, hub, waits, capsys):
    assert main(["publish", str(release), "--repo", REPO]) == 0
    assert "published" in capsys.readouterr().out
    repo = hub.repos[REPO]
    assert len(repo.commits) == 2 and not repo.private  # the Hub's own and ours
    code = {path.name for path in (ROOT / "hf_deformvos").glob("*_deformvos.py")}
    written = {"README.md", "LICENSE", "config.json", "processor_config.json", "model.safetensors", "training.json"}
    assert names(hub) == code | written
    assert hub.read(REPO, "model.safetensors") == (release / "model.safetensors").read_bytes()
    assert "auto_map" in json.loads(hub.read(REPO, "config.json"))
    assert "auto_map" not in json.loads((release / "config.json").read_text()), "the folder itself was changed"
    card = hub.read(REPO, "README.md").decode()
    assert f'from_pretrained("{REPO}"' in card and "numbers:" not in card and cards.is_unedited(card)
    assert not (release / "README.md").exists()

    assert main(["publish", str(release), "--repo", REPO]) == 0
    assert "nothing changed" in capsys.readouterr().out and len(repo.commits) == 2

    facts = {**FACTS, "clips": 4321}
    (release / "training.json").write_text(json.dumps(facts))
    assert main(["publish", str(release), "--repo", REPO, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[1] for line in lines if line.startswith("changed")} == {"README.md", "training.json"}
    assert "one commit would be made" in lines[-1] and len(repo.commits) == 2


def test_a_dry_run_needs_neither_token_nor_repository(release, hub, monkeypatch, capsys):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(publish_module, "check_release", lambda staged, original: 0.0)
    assert main(["publish", str(release), "--repo", REPO, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "does not exist yet" in output and "model.safetensors" in output and f"{hub.url}/{REPO}" in output
    assert not hub.repos and not hub.seen("^(POST|PUT)")
    assert main(["publish", str(release), "--repo", REPO]) == 2
    assert "needs a token" in capsys.readouterr().err and not hub.repos


def test_what_does_not_load_is_not_published(release, hub, capsys):
    config = json.loads((release / "config.json").read_text())
    (release / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert main(["publish", str(release), "--repo", REPO]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "missing keys" in message.splitlines()[-1]
    assert not hub.repos


def test_a_release_that_computes_something_else_is_not_published(release, hub, monkeypatch):
    from hf_deformvos.publishing import remote_code

    genuine = remote_code.add_remote_code

    def sabotage(folder):
        files = genuine(folder)
        config = json.loads((folder / "processor_config.json").read_text())
        config["image_processor"]["image_mean"] = [0.1, 0.2, 0.3]
        (folder / "processor_config.json").write_text(json.dumps(config))
        return files

    monkeypatch.setattr(remote_code, "add_remote_code", sabotage)
    with pytest.raises(ValueError, match="logits differ"):
        publish_release(release, REPO)
    assert not hub.repos


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["publish", "no-such-folder", "--repo", REPO], "no folder"),
        (["publish", ".", "--repo", "name"], "named org/name"),
        (["publish", ".", "--repo", "a/b/c"], "named org/name"),
        (["publish", ".", "--repo", REPO, "--revision", "0" * 40], "must be a branch"),
        (["publish", ".", "--repo", REPO, "--revision", "bad branch"], "named as git allows"),
        (["publish", ".", "--repo", REPO, "--token-file", "nowhere"], "no such file"),
        (["publish-space", "no-such-folder", "--repo", REPO], "no folder"),
        (["publish-space", str(ROOT / "demo"), "--repo", REPO, "--models", "name"], "named org/name, got 'name'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("error: ")


BRANCHES = "main v1.0 feature/x a./b a@b dev_2 ä"
NO_BRANCHES = "|bad branch|a..b|.a|a/.b|a.lock|a.lock/b|a.|a/|/a|a//b|-a|a~b|a^b|a:b|a?b|a*b|a[b|a\\b|a@{b|HEAD|a\tb"


@pytest.mark.parametrize(
    ("name", "allowed"),
    [(name, True) for name in BRANCHES.split()] + [(name, False) for name in NO_BRANCHES.split("|")],
)
def test_branches_are_named_as_git_allows(name, allowed):
    if shutil.which("git"):
        result = subprocess.run(["git", "check-ref-format", "--branch", name], capture_output=True)
        assert (result.returncode == 0) == allowed
    assert is_ref_name(name) == allowed
    if allowed:
        assert Target(REPO, revision=name).revision == name
    else:
        with pytest.raises(PublishError, match="must be a branch to publish to"):
            Target(REPO, revision=name)


@pytest.fixture
def no_check(monkeypatch):
    """The load check, which takes long, is left out; how often it was asked for."""
    calls = []
    monkeypatch.setattr(publish_module, "check_release", lambda staged, original: calls.append(staged))
    return calls


def test_a_token_is_tried_before_the_work(release, hub, no_check, space, waits, monkeypatch, capsys):
    commands = (["publish", str(release), "--repo", REPO], ["publish-space", str(space), "--repo", "org/demo"])
    monkeypatch.setattr(publish_module, "stage_release", pytest.fail)
    monkeypatch.setattr(publishing_space, "stage_space", pytest.fail)
    for command in commands:
        monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 34)
        assert main(command) == 2
        assert "does not accept the token (401)" in capsys.readouterr().err
        monkeypatch.delenv("HF_TOKEN")
        assert main(command) == 2
        assert "needs a token" in capsys.readouterr().err
    assert not no_check and not hub.repos


def test_a_card_without_scores_says_so(release, hub, waits, no_check, capsys):
    sha256 = sha256_of(release / "model.safetensors")
    for options in (["--dry-run"], []):
        assert main(["publish", str(release), "--repo", REPO, *options]) == 0
        output = capsys.readouterr().out
        assert f"note: no measurement of these weights (sha256 {sha256[:12]}...) was found in " in output
        assert "docs/numbers: the card has no scores" in output


# What a dry run finds out


def test_a_dry_run_is_refused_what_would_be_refused(files, hub, waits):
    publish(files())
    for options in ({"dry_run": True}, {}):
        with pytest.raises(PublishError, match="is public and --private was asked for"):
            publish(files(more="x"), Target(REPO, private=True), **options)
    hub.repos["spaces/org/demo"] = hub_server.Repo("spaces", "org/demo", private=True)
    hub.repos["spaces/org/demo"].add_commit("main", "first", "", {})
    with pytest.raises(PublishError, match="a private Space cannot fetch the wheel"):
        publish(files(), Target("org/demo", repo_type="space", must_be_public=True), dry_run=True)
    edited = hub.read(REPO, "README.md").replace(b"text", b"better text")
    hub.api().upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=REPO)
    new = files(**{"README.md": cards.seal("---\nlicense: mit\n---\nnew text\n")})
    # A branch that is missing would be made from main, with the card that was edited there.
    for target in (Target(REPO), Target(REPO, revision="v2")):
        with pytest.raises(PublishError, match="was edited on the Hub"):
            publish(new, target, dry_run=True)
    plan = publish(new, Target(REPO, revision="v2"), dry_run=True, force=True).plan
    assert [upload.name for upload in plan.changed] == ["README.md"] and "made from main" in plan.notes[-1]
    assert set(hub.repos[REPO].branches) == {"main"}
    with pytest.raises(PublishError, match="does not accept the token"):
        publish(new, dry_run=True, token="hf_" + "x" * 34)


def test_scores_are_not_lost_unasked(files, hub, waits):
    scores = "model-index:\n- name: tiny\n  results: []\n"
    publish(files(**{"README.md": cards.seal(f"---\nlicense: mit\n{scores}---\ntext\n")}))
    new = files()
    for options in ({"dry_run": True}, {}):
        with pytest.raises(PublishError, match=r"has scores, and the new one has none; nothing .* --numbers FILE"):
            publish(new, **options)
    assert b"model-index" in hub.read(REPO, "README.md")
    result = publish(new, force=True)
    assert "has scores" in result.plan.notes[0] and b"model-index" not in hub.read(REPO, "README.md")
    assert not cards.has_scores("text\n---\nmodel-index:\n---\n")


def test_a_hub_that_cannot_be_reached_is_asked_once(release, hub, waits, no_check, monkeypatch, capsys):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert main(["publish", str(release), "--repo", REPO, "--dry-run"]) == 0
        output = capsys.readouterr().out
        assert "note: the Hub could not be asked what it has, so every file is listed as new: the Hub at" in output
        assert "failed" not in output and "what would change is not known; nothing was sent" in output and not waits
        assert main(["publish", str(release), "--repo", REPO]) == 2
        assert "cannot be reached" in capsys.readouterr().err and len(waits) == 3 and len(no_check) == 1
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(publishing_hub, "_FIRST_ANSWER", 0.2)
        plan = publish_release(release, REPO, dry_run=True).plan
        assert not plan.is_known and "no answer within 0.2 s" in plan.notes[0]
        with pytest.raises(PublishError, match=r"nothing was published: .* no answer within 0\.2 s"):
            publish_release(release, REPO)


# The commit


def test_branches_private_repositories_and_token_files(files, hub, waits, tmp_path):
    uploads = files()
    result = publish(uploads, Target(REPO, revision="v2", private=True))
    assert result.committed and names(hub, revision="v2") == {upload.name for upload in uploads}
    assert hub.repos[REPO].private and not names(hub), "main was touched"
    result = publish(uploads, Target(REPO, revision="v2", private=True))
    assert not result.committed
    publish(files(), Target("org/public"))
    with pytest.raises(PublishError, match="is public and --private was asked for"):
        publish(files(more="x"), Target("org/public", private=True))


def test_stale_shards_and_code_go_and_strangers_files_stay(files, hub, waits):
    publish(files(), owns=lambda name: False)
    api = hub.api()
    for name in ("model-00001-of-00002.safetensors", "old_deformvos.py", "mine.onnx"):
        api.upload_file(path_or_fileobj=b"x", path_in_repo=name, repo_id=REPO)
    from hf_deformvos.publishing.collect import is_replaced

    result = publish(files(), owns=is_replaced)
    assert result.plan.removed == ["model-00001-of-00002.safetensors", "old_deformvos.py"]
    assert "mine.onnx" in names(hub) and not names(hub) & set(result.plan.removed)


def test_an_edited_card_is_kept(files, hub, waits):
    publish(files())
    edited = hub.read(REPO, "README.md").replace(b"text", b"better text")
    hub.api().upload_file(path_or_fileobj=edited, path_in_repo="README.md", repo_id=REPO)
    new = files(**{"README.md": cards.seal("---\nlicense: mit\n---\nnew text\n"), "config.json": '{"a": 1}'})
    before = dict(hub.repos[REPO].commits)
    with pytest.raises(PublishError, match="was edited on the Hub"):
        publish(new)
    assert hub.repos[REPO].commits == before and hub.read(REPO, "config.json") == b"{}"
    result = publish(new, force=True)
    assert result.committed and "is overwritten" in result.plan.notes[0]
    assert b"new text" in hub.read(REPO, "README.md")


def test_line_ends_are_no_edit():
    text = cards.seal("a\n\nb\n")
    assert cards.is_unedited(text) and cards.is_unedited(text.replace("\n", "\r\n")) and cards.seal(text) == text
    assert not cards.is_unedited(text.replace("b", "c")) and not cards.is_unedited("a\n\nb\n")


def test_who_commits_meanwhile_loses_nothing(files, hub, waits, monkeypatch):
    publish(files())
    real, api = publishing_hub._Client.commit, hub.api()

    def late(self, *arguments):
        if "late.txt" not in names(hub):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="late.txt", repo_id=REPO)
        return real(self, *arguments)

    monkeypatch.setattr(publishing_hub._Client, "commit", late)
    result = publish(files(**{"config.json": '{"a": 1}'}))
    assert result.committed and "late.txt" in names(hub) and hub.read(REPO, "config.json") == b'{"a": 1}'
    assert hub.seen(COMMIT)[-2].status == 412


def test_two_who_take_turns_end(files, hub, waits, monkeypatch):
    publish(files())
    real, api = publishing_hub._Client.commit, hub.api()

    def busy(self, *arguments):
        api.upload_file(path_or_fileobj=os.urandom(8), path_in_repo="busy.txt", repo_id=REPO)
        return real(self, *arguments)

    monkeypatch.setattr(publishing_hub._Client, "commit", busy)
    with pytest.raises(PublishError, match="changed by somebody else 3 times"):
        publish(files(**{"config.json": '{"a": 1}'}))
    assert hub.read(REPO, "config.json") == b"{}"


# Faults


PASSING = {
    "commit 503": ("status", COMMIT, {"status": 503}),
    "commit 429": ("status", COMMIT, {"status": 429, "retry_after": 7}),
    "commit 409": ("status", COMMIT, {"status": 409}),
    "commit cut": ("cut_upload", COMMIT, {"after": 10}),
    "commit's answer lost": ("drop_response", COMMIT, {}),
    "create 500": ("status", r"^POST /api/repos/create", {"status": 500}),
    "create's answer lost": ("drop_response", r"^POST /api/repos/create", {}),
    "batch 503": ("status", r"^POST /org/tiny.git/info/lfs/objects/batch", {"status": 503}),
    "upload cut": ("cut_upload", r"^PUT /uploads/", {"after": 1000}),
    "upload 500": ("status", r"^PUT /uploads/", {"status": 500}),
    "upload truncated": ("truncate", r"^PUT /uploads/", {"after": 1000}),
    "upload corrupted": ("corrupt", r"^PUT /uploads/", {}),
    "listing 500": ("status", r"^GET /api/models/org/tiny/tree/", {"status": 500}),
    "listing lies": ("wrong_sha", r"^GET /api/models/org/tiny/tree/", {}),
    "way back cut": ("cut_download", r"^GET /objects/", {"after": 1000}),
    "way back truncated": ("truncate", r"^GET /objects/", {"after": 1000}),
    "way back corrupted": ("corrupt", r"^GET /objects/", {}),
    "whoami 503": ("status", r"^GET /api/whoami", {"status": 503}),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_fault_is_overcome(name, files, hub, waits):
    kind, match, options = PASSING[name]
    hub.inject(kind, match, **options)
    uploads = files()
    result = publish(uploads)
    assert result.committed and len(hub.repos[REPO].commits) == 2
    for upload in uploads:
        assert hub.read(REPO, upload.name) == upload.path.read_bytes()
    if name == "commit 429":
        assert waits == [7]
    assert not publish(uploads).committed


LASTING = {
    "token unknown": ("status", r"^GET /api/whoami", {"status": 401}, "does not accept the token"),
    "create forbidden": ("status", r"^POST /api/repos/create", {"status": 403}, "may not write"),
    "commit forbidden": ("status", COMMIT, {"status": 403}, "may not write"),
    "commit 401": ("status", COMMIT, {"status": 401}, r"does not accept the token \(401\)"),
    "commit 404": ("status", COMMIT, {"status": 404}, "is not found"),
    "commit 409": ("status", COMMIT, {"status": 409}, "another change"),
    "commit 429": ("status", COMMIT, {"status": 429, "retry_after": 1000}, "asks to send less"),
    "commit 500": ("status", COMMIT, {"status": 500}, "in trouble"),
    "commit cut": ("cut_upload", COMMIT, {"after": 10}, "connection broke"),
    "upload cut": ("cut_upload", r"^PUT /uploads/", {"after": 1000}, "connection broke"),
    "upload truncated": ("truncate", r"^PUT /uploads/", {"after": 1000}, r"refused \(422\)"),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_lasting_fault_leaves_the_repository_as_it_was(name, files, hub, waits):
    publish(files())
    before = hub.repos[REPO].at("main")
    kind, match, options, message = LASTING[name]
    missing = name == "create forbidden"
    target = Target("org/other") if missing else None
    hub.inject(kind, match, times=None, **options)
    uploads = files(**{"config.json": '{"a": 1}'})
    save_file({"weight": np.ones(5000, dtype=np.float32)}, uploads[-1].path)
    uploads[-1] = Upload.of("model.safetensors", uploads[-1].path)
    with pytest.raises(PublishError, match=message) as caught:
        publish(uploads, target)
    assert "nothing was published" in str(caught.value) and "\n" not in str(caught.value)
    assert hub.token not in str(caught.value)
    assert hub.repos[REPO].at("main") == before and "org/other" not in hub.repos
    assert max(waits, default=0) <= 60


def test_a_storage_that_spoils_everything_is_noticed_and_taken_back(files, hub, waits):
    publish(files())
    before = hub.repos[REPO].at("main").files
    uploads = files(**{"config.json": '{"a": 1}', "training.json": "{}"})
    save_file({"weight": np.ones(5000, dtype=np.float32)}, uploads[-1].path.parent / "model.safetensors")
    uploads = [Upload.of(upload.name, upload.path) for upload in uploads]
    hub.inject("corrupt", r"^PUT /uploads/", times=None)
    with pytest.raises(PublishError, match=r"other content of model\.safetensors .*taken back"):
        publish(uploads)
    assert hub.repos[REPO].at("main").files == before


def test_a_comparison_that_fails_is_told_from_a_publication_that_did(files, hub, waits):
    uploads = files()
    fault = hub.inject("status", r"^GET /objects/", times=None, status=503)
    with pytest.raises(PublishError, match=r"after the commit .*was not compared"):
        publish(uploads)
    hub.faults.remove(fault)
    fault.fired = 1
    assert not publish(uploads).committed


def test_no_token_gets_into_texts(files, hub, waits, capsys, caplog):
    hub.inject("status", COMMIT, times=None, status=403, message=f"token {hub.token} is wrong")
    with pytest.raises(PublishError) as caught:
        publish(files())
    everything = str(caught.value) + caplog.text + "".join(capsys.readouterr())
    assert "hf_***" in str(caught.value) and hub.token not in everything
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    assert redact("x https://a.b/c?signature=1 hf_abcdefghij\ny") == "x https://a.b/c hf_*** y"


def test_somebody_elses_token(files, hub, waits):
    with pytest.raises(PublishError, match=r"may not write to org/tiny \(403\)"):
        publish(files(), token=hub.stranger_token)
    assert not hub.repos


@pytest.mark.parametrize(
    ("error", "is_local"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EACCES, "Permission denied", "/weights"), True),
        (OSError(errno.ECONNRESET, "Connection reset by peer"), False),
        (OSError(errno.ETIMEDOUT, "Connection timed out"), False),
        (OSError(errno.ENETUNREACH, "Network is unreachable"), False),
        (OSError("the download is too short"), False),
    ],
)
def test_faults_of_this_machine_are_told_from_the_networks(error, is_local, files, hub, waits, monkeypatch):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(publishing_hub.HfApi, "create_commit", fail)
    with pytest.raises(PublishError) as caught:
        publish(files())
    assert ("could not read or write a file" in str(caught.value)) == is_local
    assert ("cannot be reached" in str(caught.value)) == (not is_local)
    assert error.args[-1] in str(caught.value)
    assert len(waits) == (0 if is_local else 3)


def test_a_name_that_is_not_found_is_the_networks_fault():
    error = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert "cannot be reached" in str(publishing_hub._Client(Target(REPO), "token")._failure(error))


# Releases of runs


def test_a_release_tells_every_setting_that_bears_on_its_weights():
    """Whoever adds a setting says here that it is bookkeeping, or a release records it."""
    bookkeeping = """output_dir student init_backbone init_from teacher davis_dirs youtube_vos_dirs dataset_names
        dataset_split dataset_streaming dataset_max_sequences static_dirs video_dirs cache_dir
        on_data_error data_workers max_train_steps max_train_minutes gradient_checkpointing cpu_threads
        channels_last checkpointing_steps checkpoints_total_limit resume_from_checkpoint logging_steps
        with_tracking eval_steps eval_dir push_to_hub hub_model_id""".split()
    settings = {item.name for item in fields(TrainingConfig)}
    assert set(RECORDED_SETTINGS) | set(bookkeeping) == settings
    assert not set(RECORDED_SETTINGS) & set(bookkeeping)


def test_a_run_becomes_a_release(tmp_path, tiny_model, tiny_processor):
    run, sets = tmp_path / "run", tmp_path / "static"
    tiny_model.save_pretrained(run)
    for name in ("ecssd", "penn-fudan"):
        (sets / name / "images").mkdir(parents=True)
    config = {
        **SETTINGS,
        "static_dirs": [str(sets)],
        "davis_dirs": ["/data/davis2016-train:merge"],
        "video_dirs": None,
    }
    assert data_names(config) == ["davis2016-train", "ecssd", "penn-fudan"]
    results = {"steps": 1, "clips": 2, "minutes": 0.123, "parameters": 5, "config": config}
    (run / "all_results.json").write_text(json.dumps(results))
    facts = release_run(run, tmp_path / "out", short_side=96, memory_interval=5)
    assert facts == json.loads((tmp_path / "out" / "training.json").read_text())
    assert facts["weights_sha256"] == sha256_of(tmp_path / "out" / "model.safetensors")
    assert facts["data"][0] == "davis2016-train" and str(tmp_path) not in json.dumps(facts)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["memory_interval"] == 5
    assert len(collect_release(tmp_path / "out")) == 4


def test_a_release_between_a_run_and_what_it_started_from(tmp_path, tiny_model, tiny_processor):
    run, start = tmp_path / "run", tmp_path / "start"
    tiny_model.save_pretrained(start)
    trained = copy.deepcopy(tiny_model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    trained.save_pretrained(run)
    tiny_processor.save_pretrained(run)
    results = {"steps": 1, "clips": 2, "minutes": 0.1, "device": "A GPU", "parameters": 5}
    (run / "all_results.json").write_text(json.dumps({**results, "config": {**SETTINGS, "student": str(start)}}))
    facts = release_run(run, tmp_path / "out", blend=0.25)
    assert (facts["blend"], facts["device"]) == (0.25, "A GPU")
    first, last, out = (load_file(folder / "model.safetensors") for folder in (start, run, tmp_path / "out"))
    for name, value in out.items():
        expected = 0.75 * first[name].double() + 0.25 * last[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=2e-3, atol=1e-3)  # half precision on disk
    card = cards.render_card(tmp_path / "out", {})
    assert "Of the released weights 25% are those of the last run" in card and "| A GPU |" in card
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match=rf"`blend` must be between 0 and 1, .* got {share}"):
            release_run(run, tmp_path / "out", blend=share)
    # A second release into the folder that the run started from would blend with the first one.
    origin = describe_origin(str(tmp_path / "out"))
    trained.save_pretrained(tmp_path / "out")
    config = {**SETTINGS, "student": str(tmp_path / "out")}
    (run / "all_results.json").write_text(json.dumps({**results, "config": config, "initialised_from": origin}))
    with pytest.raises(ValueError, match=rf"\(sha256 {facts['weights_sha256'][:12]}\.\.\.\), but .* holds others"):
        release_run(run, tmp_path / "again", blend=0.5)
    (run / "all_results.json").write_text(json.dumps({**results, "config": {**SETTINGS, "student": "none"}}))
    with pytest.raises(ValueError, match=r"`blend` needs a run that started from a model's folder .* got 'none'"):
        release_run(run, tmp_path / "out", blend=0.5)


def test_a_release_of_several_runs_from_one_start(tmp_path, tiny_model, tiny_processor):
    def write_run(name, clips, start="0" * 64):
        trained = copy.deepcopy(tiny_model)
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(torch.randn_like(parameter))
        trained.save_pretrained(tmp_path / name)
        tiny_processor.save_pretrained(tmp_path / name)
        origin = {
            "name": "start",
            "clips": 7,
            "steps": 3,
            "minutes": 1.0,
            "weights_sha256": start,
            "settings": SETTINGS,
        }
        config = {**SETTINGS, "student": str(tmp_path / "start"), "seed": clips, "davis_dirs": [f"/data/set-{clips}"]}
        results = {"steps": 1, "clips": clips, "minutes": 2.04, "parameters": 5, "device": "CPU", "config": config}
        (tmp_path / name / "all_results.json").write_text(json.dumps({**results, "initialised_from": origin}))
        return tmp_path / name

    tiny_model.save_pretrained(tmp_path / "start")
    start = sha256_of(tmp_path / "start" / "model.safetensors")
    runs = [write_run(name, clips, start) for name, clips in (("one", 10), ("two", 20), ("three", 30))]
    facts = release_run(runs[0], tmp_path / "out", blend=0.6, average=runs[1:])
    assert [run["clips"] for run in facts["averaged_with"]] == [20, 30]
    assert [run["settings"]["seed"] for run in facts["averaged_with"]] == [20, 30]
    assert [facts["data"], *(run["data"] for run in facts["averaged_with"])] == [["set-10"], ["set-20"], ["set-30"]]
    first, *made, out = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "start", *runs, tmp_path / "out")
    )
    for name, value in out.items():
        expected = 0.4 * first[name].double() + 0.2 * sum(weights[name].double() for weights in made)
        torch.testing.assert_close(value.double(), expected, rtol=2e-3, atol=1e-3)
    card = " ".join(cards.render_card(tmp_path / "out", {}).split())
    assert "The last 3 runs started from the same weights" in card and "67 clips in 7 minutes" in card
    assert "60% are those of the last runs, the rest those that they started from" in card
    assert all(f"| set-{clips} | - | not recorded |" in card for clips in (10, 20, 30))
    origin = describe_origin(str(tmp_path / "out"))
    assert total_clips(100, origin) == 167
    other = write_run("other", 40, "1" * 64)
    with pytest.raises(ValueError, match=rf"{other} started from 1{{64}}, the others from {start}"):
        release_run(runs[0], tmp_path / "again", average=[other])
    fresh = [write_run(name, 50, None) for name in ("fresh", "fresher")]
    with pytest.raises(ValueError, match="started from weights that are not recorded"):
        release_run(fresh[0], tmp_path / "again", average=fresh[1:])


# Spaces


APP = """\
import sys
import hf_deformvos
from hf_deformvos.publishing.cards import TEMPLATES
has_templates = (TEMPLATES / "model_card.md.jinja").is_file()
print(hf_deformvos.__file__, has_templates, type(hf_deformvos.DeformVosConfig()).__name__)
"""


@pytest.fixture
def space(tmp_path):
    """A minimal Space."""
    folder = tmp_path / "demo"
    (folder / "assets").mkdir(parents=True)
    (folder / "README.md").write_text("---\ntitle: Demo\nsdk: gradio\napp_file: app.py\n---\n\nA demo.\n")
    (folder / "app.py").write_text(APP)
    (folder / "requirements.txt").write_text("numpy\n-e ..\nhf-deformvos[demo]\n")
    (folder / "assets" / "style.css").write_text("a {}")
    return folder


@pytest.fixture
def any_wheel(monkeypatch):
    """A wheel is there at once, and holds nothing."""

    def build(destination):
        path = destination / "hf_deformvos-0.2.0-py3-none-any.whl"
        path.write_bytes(b"wheel")
        return path

    monkeypatch.setattr(publishing_space, "build_wheel", build)


def test_a_space_runs_outside_the_checkout(space, hub, waits, tmp_path, capsys):
    assert main(["publish-space", str(space), "--repo", "org/demo"]) == 0
    assert "commit" in capsys.readouterr().out
    assert hub.repos["spaces/org/demo"].sdk == "gradio"
    assert main(["publish-space", str(space), "--repo", "org/demo"]) == 0
    assert "nothing changed" in capsys.readouterr().out, "the same sources must give the same wheel"

    clone, venv = tmp_path / "clone", tmp_path / "venv"
    hub.api().snapshot_download("org/demo", repo_type="space", local_dir=clone)
    lines = (clone / "requirements.txt").read_text().splitlines()
    assert lines[0] == "numpy" and len(lines) == 2
    assert lines[1].startswith(f"hf-deformvos @ {hub.url}/spaces/org/demo/resolve/main/hf_deformvos-")
    # The packages of this environment, without the checkout: a .pth below a .pth is not read.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    packages = next((venv / "lib").glob("python*")) / "site-packages"
    (packages / "installed.pth").write_text(os.path.dirname(os.path.dirname(np.__file__)) + "\n")
    python, environment = venv / "bin" / "python", {"PATH": os.environ["PATH"], "HF_HUB_OFFLINE": "1"}
    wheel_only = tmp_path / "wheel.txt"
    wheel_only.write_text(lines[1] + "\n")
    install = [
        "install",
        "-q",
        "--no-deps",
        "--no-index",
        "--no-cache-dir",
        "--ignore-installed",
        "-r",
        str(wheel_only),
    ]
    subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *install],
        check=True,
        env={**environment, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        timeout=120,
    )
    result = subprocess.run(
        [str(python), "app.py"], cwd=clone, env=environment, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    place, has_templates, config = result.stdout.split()
    assert place.startswith(str(venv)) and has_templates == "True" and config == "DeformVosConfig"


def test_an_old_wheel_goes(space, hub, waits, any_wheel):
    publishing_space.publish_space(space, "org/demo")
    hub.api().upload_file(
        path_or_fileobj=b"x",
        path_in_repo="hf_deformvos-0.1.0-py3-none-any.whl",
        repo_id="org/demo",
        repo_type="space",
    )
    result = publishing_space.publish_space(space, "org/demo")
    assert result.plan.removed == ["hf_deformvos-0.1.0-py3-none-any.whl"]
    hub.repos["spaces/org/demo"].private = True
    with pytest.raises(PublishError, match="a private Space cannot fetch the wheel"):
        publishing_space.publish_space(space, "org/demo")


def test_a_wheel_holds_the_package_and_nothing_else(tmp_path):
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        held = set(wheel.namelist())
    assert {"hf_deformvos/__init__.py", "hf_deformvos/publishing/templates/provenance.json"} <= held
    assert all(name.startswith(("hf_deformvos/", "hf_deformvos-")) for name in held)
    assert not [name for name in held if "__pycache__" in name or name.endswith(".jinja~")]


@pytest.mark.parametrize(
    ("readme", "message"),
    [
        ("no front matter", "must begin with front matter"),
        ("---\nsdk: [\n---\n", "no YAML"),
        ("---\ntitle: x\n---\n", "`sdk` in"),
        ("---\nsdk: docker\n---\n", "`sdk` in"),
        ("---\nsdk: gradio\nmodels: org/name\n---\n", "`models` in .* must be a list of repositories"),
        ("---\nsdk: gradio\napp_file: main.py\n---\n", r"names main\.py, which is not in the folder"),
        ("---\nsdk: gradio\napp_file: ../app.py\n---\n", "not in the folder"),
    ],
)
def test_settings_of_a_space(space, readme, message):
    (space / "README.md").write_text(readme)
    (space.parent / "app.py").write_text("")
    with pytest.raises(ValueError, match=message):
        read_settings(space)


def test_what_a_space_refuses(space, tmp_path):
    (space / "model.pt").write_bytes(b"x")
    (space / "archive.rar").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"archive\.rar .*model\.pt .*pickle"):
        collect_space(space)
    (space / "model.pt").unlink()
    (space / "archive.rar").unlink()
    (space / "app.py").write_text("def")
    with pytest.raises(ValueError, match=r"app\.py is no Python program"):
        stage_space(space, tmp_path / "staging", "org/demo")


@pytest.mark.parametrize("name", [".env", ".gradio/flagged/face.png", "assets/.ipynb_checkpoints/app.py"])
def test_a_space_refuses_what_is_hidden(space, name):
    (space / name).parent.mkdir(parents=True, exist_ok=True)
    (space / name).write_text("")
    with pytest.raises(ValueError, match=rf"{re.escape(name)} \(hidden, or in a hidden folder\)\. Move them out"):
        collect_space(space)


def test_leftovers_of_tools_are_no_part_of_a_space(space):
    for name in (".git", ".ruff_cache", "assets/__pycache__"):
        (space / name).mkdir()
        (space / name / "file.json").write_text("{}")
    assert {path.name for path in collect_space(space)} == {"README.md", "app.py", "requirements.txt", "style.css"}


@pytest.mark.parametrize(
    ("options", "models"),
    [
        ([], ["org/deformvos-student", "org/deformvos-teacher"]),
        (["--models", "you/small", "me/large"], ["you/small", "me/large"]),
    ],
)
def test_the_demo_in_a_space_offers_models_that_can_be_published(
    options, models, hub, waits, any_wheel, tmp_path, capsys
):
    command = ["publish-space", str(ROOT / "demo"), "--repo", "org/demo", *options]
    assert main(command) == 0
    assert f"takes its models from {', '.join(models)}" in capsys.readouterr().out
    staged, original = tmp_path / "README.md", ROOT / "demo" / "README.md"
    staged.write_bytes(hub.read("spaces/org/demo", "README.md"))
    assert metadata_load(staged) == {**metadata_load(original), "models": models}
    assert original.read_text().split("\n---\n")[1].strip() in staged.read_text()
    assert main(command) == 0 and "nothing changed" in capsys.readouterr().out


def test_a_space_without_models_names_none(space, any_wheel, tmp_path):
    (tmp_path / "staging").mkdir()
    stage_space(space, tmp_path / "staging", "org/demo")
    assert "models" not in metadata_load(tmp_path / "staging" / "README.md")


def test_a_space_with_a_gpu_gets_pytorch_for_it(any_wheel, tmp_path):
    staged = {}
    for gpu in (False, True):
        folder = tmp_path / str(gpu)
        folder.mkdir()
        stage_space(ROOT / "demo", folder, "org/demo", gpu=gpu)
        staged[gpu] = (folder / "requirements.txt").read_text().splitlines()
    assert [line for line in staged[False] if line not in staged[True]] == [
        "--extra-index-url https://download.pytorch.org/whl/cpu"
    ]
    assert [line for line in staged[False] if line in staged[True]] == staged[True]


# Runs that publish what they made


def test_a_run_publishes_its_release(tmp_path, hub, tiny_config):
    write_static_set(tmp_path / "sets" / "ecssd", count=2)
    tiny_config.save_pretrained(tmp_path / "student")
    flags = {
        "student": tmp_path / "student" / "config.json",
        "static_dirs": tmp_path / "sets",
        "output_dir": tmp_path / "run",
        "max_train_steps": 2,
        "stages": '[{"until": 1, "size": [65, 97], "frames": 2, "batch": 1}]',
        "mixed_precision": "no",
        "checkpointing_steps": 1,
        "hub_model_id": REPO,
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    assert train_distill.main([*arguments, "--push_to_hub"]) == 0
    assert {"README.md", "model.safetensors", "training.json", "modeling_deformvos.py"} <= names(hub)
    assert not [name for name in names(hub) if "checkpoint" in name or "results" in name or "optimizer" in name]
    assert len(hub.repos[REPO].commits) == 2 and json.loads(hub.read(REPO, "training.json"))["data"] == ["ecssd"]
    assert "have not been measured" in hub.read(REPO, "README.md").decode()
