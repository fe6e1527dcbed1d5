"""The loopback Hub under the real client: what works, and how each fault ends.

The outcomes are the installed client's own, written down here so that publishing can be built on them:

* tried again, up to five times: what goes through its backoff (preupload; LFS batch, parts and verify; tree) on 429,
  5xx and dropped connections; HEAD of a file on 429 and 5xx; a download cut in the middle, which resumes;
* not tried again, a clear error: the commit itself, creating a repository or a tag, repository info, GET of a file on
  5xx (on 429 it is), a download whose connection is *reset*, and 4xx anywhere;
* not noticed: same-sized wrong content, in either direction, and wrong hashes.

Whatever happens, a repository is as before or has the whole commit, and a cache has a file whole or not at all.
"""

import hashlib
import subprocess
import sys
import textwrap
import threading

import pytest
from conftest import ROOT
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard, ModelCardData, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


# The client passes streams to httpx in a way that httpx no longer likes.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "org/tiny"
WEIGHTS = bytes(range(256)) * 400  # large by its suffix
FILES = {"config.json": b'{"model_type": "none"}', "model.safetensors": WEIGHTS}


def commit(hub, files=FILES, repo=REPO, **options):
    """One commit by the real client."""
    operations = [CommitOperationAdd(path, data) for path, data in files.items()]
    return hub.api().create_commit(repo, operations, commit_message="files", **options)


def content(path):
    with open(path, "rb") as file:
        return file.read()


@pytest.fixture
def empty(hub):
    """A Hub with an empty repository."""
    hub.api().create_repo(REPO)
    return hub


@pytest.fixture
def filled(empty):
    """A Hub with a repository of one commit."""
    commit(empty)
    return empty


# What works


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_create_upload_list_download(hub, kind):
    api, options = hub.api(), {"repo_type": kind}
    url = api.create_repo("org/thing", private=True, space_sdk="gradio" if kind == "space" else None, **options)
    assert (url.repo_id, url.repo_type) == ("org/thing", kind)
    assert (
        api.create_repo("org/thing", exist_ok=True, space_sdk="gradio" if kind == "space" else None, **options) == url
    )
    first = commit(hub, {**FILES, "sub/deep/notes.txt": b"notes"}, "org/thing", **options)

    info = api.repo_info("org/thing", files_metadata=True, **options)
    assert info.sha == first.oid and info.private and info.last_modified >= info.created_at
    sizes = {sibling.rfilename: (sibling.size, sibling.lfs and sibling.lfs.sha256) for sibling in info.siblings}
    assert sizes["config.json"] == (len(FILES["config.json"]), None)
    assert sizes["model.safetensors"] == (len(WEIGHTS), hashlib.sha256(WEIGHTS).hexdigest())
    listed = sorted([".gitattributes", "config.json", "model.safetensors", "sub/deep/notes.txt"])
    assert sorted(api.list_repo_files("org/thing", **options)) == listed
    assert api.file_exists("org/thing", "config.json", **options)
    assert not api.file_exists("org/thing", "missing.json", **options)

    assert content(api.hf_hub_download("org/thing", "model.safetensors", **options)) == WEIGHTS
    folder = api.snapshot_download("org/thing", **options)
    assert content(f"{folder}/sub/deep/notes.txt") == b"notes"
    assert not api.verify_repo_checksums("org/thing", **options).mismatches
    assert [repo.id for repo in getattr(api, f"list_{kind}s")(author="org")] == ["org/thing"]
    api.delete_repo("org/thing", **options)
    assert not hub.repos and not api.repo_exists("org/thing", **options)
    assert all("authorization" not in request.headers for request in hub.requests if request.storage)


def test_folders_pages_and_paths(filled):
    api = filled.api()
    commit(filled, {f"shards/part-{n}.txt": b"%d" % n for n in range(5)})
    filled.page_size = 2
    entries = {entry.path: entry for entry in api.list_repo_tree(REPO)}
    assert set(entries) == {".gitattributes", "config.json", "model.safetensors", "shards"}
    assert hasattr(entries["shards"], "tree_id")
    assert len(list(api.list_repo_tree(REPO, recursive=True))) == 9
    below = list(api.list_repo_tree(REPO, "shards", expand=True))
    assert len(below) == 5 and below[0].last_commit.title == "files"
    assert len(api.list_repo_commits(REPO)) == 3 and len(filled.seen("/commits/")) == 2
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nothing"))
    found = api.get_paths_info(REPO, ["shards", "config.json", "nothing"])
    assert [entry.path for entry in found] == ["shards", "config.json"]


def test_delete_files_and_folders(filled):
    api = filled.api()
    commit(filled, {"old/a.txt": b"a", "old/b.txt": b"b"})
    operations = [CommitOperationDelete("old/"), CommitOperationDelete("model.safetensors")]
    api.create_commit(REPO, operations, commit_message="less")
    assert sorted(api.list_repo_files(REPO)) == [".gitattributes", "config.json"]
    head = api.model_info(REPO).sha
    with pytest.raises(EntryNotFoundError):
        api.create_commit(
            REPO, [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("old/a.txt")], commit_message="both"
        )
    assert api.model_info(REPO).sha == head, "half of a refused commit is there"


def test_revisions(filled):
    api = filled.api()
    first = api.model_info(REPO).sha
    api.create_tag(REPO, tag="v1.0", tag_message="first")
    api.create_branch(REPO, branch="feature/x", revision="v1.0")
    second = commit(filled, {"config.json": b"{}"}).oid
    third = commit(filled, {"config.json": b"[]"}, revision="feature/x").oid
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "feature/x": third}
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1.0": first}
    expected = {"v1.0": FILES["config.json"], first: FILES["config.json"], "main": b"{}", "feature/x": b"[]"}
    for revision, data in expected.items():
        assert content(api.hf_hub_download(REPO, "config.json", revision=revision)) == data, revision
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1.0")
    api.create_tag(REPO, tag="v1.0", exist_ok=True)
    api.delete_tag(REPO, tag="v1.0")
    api.delete_branch(REPO, branch="feature/x")
    for name in ("bad branch", "a..b", ".a", "a.lock"):
        for create in (api.create_branch, api.create_tag):
            with pytest.raises(HfHubHTTPError, match="Invalid"):
                create(REPO, **{create.__name__.removeprefix("create_"): name})
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "config.json", revision="v1.0", force_download=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_tag(REPO, tag="v2.0", revision="nowhere")


def test_unchanged_files_make_no_commit(filled):
    head = filled.repos[REPO].branches["main"]
    assert commit(filled).oid == head
    assert len(filled.seen(r"/commit/")) == 1 and len(filled.seen(r"^PUT /uploads/")) == 1


def test_parent_commit_is_a_precondition(filled):
    head = filled.repos[REPO].branches["main"]
    commit(filled, {"a.txt": b"a"}, parent_commit=head)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as caught:
        commit(filled, {"b.txt": b"b"}, parent_commit=head)
    assert caught.value.response.status_code == 412
    assert "b.txt" not in filled.repos[REPO].at("main").files


def test_of_commits_at_once_one_wins(filled):
    head = filled.repos[REPO].branches["main"]
    outcomes = []

    def race(number):
        try:
            outcomes.append(commit(filled, {f"{number}.txt": b"%d" % number}, parent_commit=head).oid)
        except HfHubHTTPError as error:
            outcomes.append(error.response.status_code)

    threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count(412) == 3 and len(filled.repos[REPO].commits) == 3


def test_upload_in_parts(empty):
    empty.multipart_threshold, empty.chunk_size = 100_000, 40_000
    empty.inject("cut_upload", r"^PUT /uploads/.*/2\?", after=100)
    commit(empty)
    assert empty.read(REPO, "model.safetensors") == WEIGHTS
    assert len(empty.seen(r"^PUT /uploads/")) == 4 and len(empty.seen(r"complete-multipart")) == 1


def test_card_metadata_is_checked(empty):
    card = ModelCard("---\nlicense: apache-2.0\npipeline_tag: mask-generation\ntags: [video]\n---\n# Tiny\n")
    card.validate()
    card.push_to_hub(REPO)
    info = empty.api().model_info(REPO)
    assert (info.pipeline_tag, info.tags, info.card_data["license"]) == ("mask-generation", ["video"], "apache-2.0")
    assert isinstance(info.card_data, ModelCardData)
    for text, message in (
        ("---\nlicense: [\n---\n", "cannot be read"),
        ("---\ntags: {a: 1}\n---\n", "tags"),
        ("---\nmodel-index: [{results: 3}]\n---\n", "model-index"),
    ):
        with pytest.raises(ValueError, match=message):
            commit(empty, {"README.md": text.encode()})
    with pytest.warns(UserWarning, match="empty or missing yaml"):
        commit(empty, {"README.md": b"# No metadata"})
    assert len(empty.repos[REPO].commits) == 3


def test_whoami(hub):
    who = hub.api().whoami()
    assert who["name"] == hub.user and [org["name"] for org in who["orgs"]] == [hub.organization]
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub.api("hf_wrong").whoami()


# Who may


def test_private_repositories_do_not_exist_for_others(filled):
    filled.api().update_repo_settings(REPO, private=True)
    for token in (False, filled.stranger_token):
        api = filled.api(token)
        for call in (api.model_info, api.list_repo_files, api.snapshot_download, api.list_repo_refs):
            with pytest.raises(RepositoryNotFoundError):
                call(REPO)
        with pytest.raises(RepositoryNotFoundError):
            api.hf_hub_download(REPO, "config.json")
        assert not list(api.list_models(author="org"))
    with pytest.raises(HfHubHTTPError, match="401"):
        filled.api("hf_wrong").hf_hub_download(REPO, "config.json")
    assert content(filled.api().hf_hub_download(REPO, "config.json")) == FILES["config.json"]


def test_gated_repositories(filled):
    filled.api().update_repo_settings(REPO, gated="manual")
    for token in (False, filled.stranger_token):
        assert filled.api(token).model_info(REPO).gated
        with pytest.raises(GatedRepoError):
            filled.api(token).hf_hub_download(REPO, "config.json")
    filled.api().auth_check(REPO, write=True)


def test_writing_needs_the_right(filled):
    stranger, nobody = filled.api(filled.stranger_token), filled.api(False)
    assert content(nobody.hf_hub_download(REPO, "config.json")) == FILES["config.json"]
    for api, status in ((stranger, 403), (nobody, 401)):
        for call in (
            lambda api=api: api.create_repo("org/other"),
            lambda api=api: api.upload_file(path_or_fileobj=b"x", path_in_repo="x.txt", repo_id=REPO),
            lambda api=api: api.create_tag(REPO, tag="mine"),
            lambda api=api: api.delete_repo(REPO),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                call()
            assert caught.value.response.status_code == status
    assert len(filled.repos) == 1 and len(filled.repos[REPO].commits) == 2 and not filled.repos[REPO].tags


def test_missing_things(filled):
    api = filled.api()
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/nothing")
    with pytest.raises(RepositoryNotFoundError):
        commit(filled, repo="org/nothing")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "nothing.json")
    with pytest.raises(RevisionNotFoundError):
        commit(filled, {"a.txt": b"a"}, revision="nothing")


# Faults of uploads: the client tries again, or says why not, and no commit is half there


BACKOFF = (r"^POST .*/preupload/", r"^POST .*/objects/batch", r"^PUT /uploads/", r"^POST .*/objects/verify")
RETRIED = [("status", match, {"status": status}) for match in BACKOFF for status in (429, 500, 503)]
RETRIED += [("cut_upload", match, {"after": 20}) for match in BACKOFF]
RETRIED += [("drop_response", match, {}) for match in BACKOFF]


@pytest.mark.parametrize(("fault", "match", "options"), RETRIED)
def test_upload_succeeds_at_the_second_attempt(empty, fault, match, options):
    empty.inject(fault, match, **options)
    commit(empty)
    assert {path: empty.read(REPO, path) for path in FILES} == FILES
    assert empty.waits == [1] and len(empty.repos[REPO].commits) == 2


REFUSED = [("status", match, {"status": status}) for match in BACKOFF for status in (401, 403, 404, 409)]
REFUSED += [("status", r"/commit/", {"status": status}) for status in (401, 403, 404, 409, 412, 429, 500, 503)]
REFUSED += [("cut_upload", r"/commit/", {"after": 20}), ("truncate", r"^PUT /uploads/", {"after": 1000})]


@pytest.mark.parametrize(("fault", "match", "options"), REFUSED)
def test_upload_fails_as_a_whole_and_can_be_repeated(empty, fault, match, options):
    head = empty.repos[REPO].branches["main"]
    empty.inject(fault, match, **options)
    with pytest.raises(Exception, match=r".") as caught:
        commit(empty)
    chain = [
        caught.value,
        caught.value.__cause__,
    ]  # an upload's error is the cause of a RuntimeError that names the file
    statuses = [error.response.status_code for error in chain if isinstance(error, HfHubHTTPError)]
    if fault == "cut_upload":
        assert type(caught.value).__name__ == "RemoteProtocolError"
    else:
        assert statuses == [options.get("status", 422)]
    assert not empty.waits and empty.repos[REPO].branches == {"main": head}
    assert empty.token not in "".join(map(str, chain))
    commit(empty)
    assert {path: empty.read(REPO, path) for path in FILES} == FILES


def test_upload_gives_up_in_the_end(empty):
    empty.inject("cut_upload", r"^PUT /uploads/", times=None, after=1000)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model.safetensors'"):
        commit(empty)
    assert empty.waits == [1, 2, 4, 8, 8] and len(empty.repos[REPO].commits) == 1 and not empty.objects


def test_a_commit_whose_answer_is_lost_is_there_and_not_repeated(empty):
    empty.inject("drop_response", r"/commit/")
    with pytest.raises(Exception, match="Server disconnected"):
        commit(empty)
    head = empty.repos[REPO].branches["main"]
    assert {path: empty.read(REPO, path) for path in FILES} == FILES
    assert commit(empty).oid == head and len(empty.repos[REPO].commits) == 2


def test_rate_limits_say_how_long(empty):
    empty.inject("status", r"/preupload/", status=429, retry_after=2)
    commit(empty)
    assert empty.waits == [3.0]  # a second more than asked


@pytest.mark.parametrize("status", [401, 403, 404, 409, 429, 500, 503])
def test_other_writes_are_not_tried_again(filled, status):
    api = filled.api()
    filled.inject("status", r"/repos/create", status=status)
    filled.inject("status", r"/tag/", status=status)
    for call in (lambda: api.create_repo("org/other"), lambda: api.create_tag(REPO, tag="v1")):
        with pytest.raises(HfHubHTTPError) as caught:
            call()
        assert caught.value.response.status_code == status
    assert not filled.waits and set(filled.repos) == {REPO} and not filled.repos[REPO].tags


def test_content_corrupted_on_the_way_up_is_published_unnoticed(empty):
    empty.inject("corrupt", r"^PUT /uploads/")
    head = commit(empty).oid
    published = content(empty.api().hf_hub_download(REPO, "model.safetensors"))
    assert len(published) == len(WEIGHTS) and published != WEIGHTS, "comparing sha256 is left to whoever publishes"
    assert empty.api().verify_repo_checksums(REPO).mismatches[0]["path"] == "model.safetensors"
    assert commit(empty).oid == head, "the same again repairs the storage without another commit"
    assert empty.read(REPO, "model.safetensors") == WEIGHTS


# Faults of downloads: the file is whole, or there is an error and no file


def test_download_resumes_after_a_cut(filled, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what had been read in full before the cut is kept
    filled.inject("cut_download", r"^GET /objects/", after=50_000)
    filled.inject("cut_download", r"^GET /objects/", after=20_000)
    assert content(filled.api().hf_hub_download(REPO, "model.safetensors")) == WEIGHTS
    ranges = [request.headers.get("range") for request in filled.seen(r"^GET /objects/")]
    assert ranges == [None, "bytes=50000-", "bytes=70000-"]


def test_regular_file_resumes_too(empty, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    commit(empty, {"vocabulary.txt": b"word\n" * 1000})
    empty.inject("cut_download", r"^GET /org/", after=3000)
    assert content(empty.api().hf_hub_download(REPO, "vocabulary.txt")) == b"word\n" * 1000
    assert [request.headers.get("range") for request in empty.seen(r"^GET /org/")] == [None, "bytes=3000-"]
    assert empty.requests[-1].status == 206


@pytest.mark.parametrize(
    ("fault", "match", "options"),
    [
        *[("status", r"^HEAD ", {"status": status}) for status in (429, 500, 503)],
        ("status", r"^GET /objects/", {"status": 429}),
        ("cut_download", r"^GET /objects/", {"after": 0}),
        ("cut_download", r"^GET /objects/", {"after": 50_000}),
        ("drop_response", r"^GET /objects/", {}),
    ],
)
def test_download_succeeds_at_the_second_attempt(filled, fault, match, options):
    filled.inject(fault, match, **options)
    assert content(filled.api().hf_hub_download(REPO, "model.safetensors")) == WEIGHTS


@pytest.mark.parametrize(
    ("fault", "match", "options", "error"),
    [
        ("status", r"^HEAD ", {"status": 401}, HfHubHTTPError),
        *[("status", r"^HEAD ", {"status": status}, LocalEntryNotFoundError) for status in (403, 404, 409)],
        ("status", r"^HEAD ", {"status": 404, "error_code": "EntryNotFound"}, EntryNotFoundError),
        ("status", r"^HEAD ", {"status": 404, "error_code": "RevisionNotFound"}, RevisionNotFoundError),
        ("status", r"^HEAD ", {"status": 401, "error_code": "RepoNotFound"}, RepositoryNotFoundError),
        ("status", r"^HEAD ", {"status": 403, "error_code": "GatedRepo"}, GatedRepoError),
        *[("status", r"^GET /objects/", {"status": s}, HfHubHTTPError) for s in (401, 403, 404, 409, 500, 503)],
        ("cut_download", r"^GET /objects/", {"after": 50_000, "reset": True}, "ReadError"),
        ("drop_response", r"^HEAD ", {}, "RemoteProtocolError"),
        ("truncate", r"^GET /objects/", {"after": 50_000}, OSError),
    ],
)
def test_download_fails_without_a_file(filled, fault, match, options, error):
    filled.inject(fault, match, **options)
    with pytest.raises(Exception, match=r".") as caught:
        filled.api().hf_hub_download(REPO, "model.safetensors")
    # Errors of the connection are httpx's, whose package differs between versions of the client.
    assert type(caught.value).__name__ == error if isinstance(error, str) else isinstance(caught.value, error)
    if fault == "truncate":
        assert "should be of size 102400 but has size 50000" in str(caught.value)
    left = [path for path in (filled.home / "hub").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert not left
    assert content(filled.api().hf_hub_download(REPO, "model.safetensors")) == WEIGHTS


@pytest.mark.parametrize("status", [401, 403, 404, 429, 503])
def test_snapshot_needs_the_repository_info(filled, status):
    filled.inject("status", r"^GET /api/models/org/tiny/revision/", status=status)
    with pytest.raises(HfHubHTTPError if status == 401 else LocalEntryNotFoundError, match=str(status)):
        filled.api().snapshot_download(REPO)
    filled.inject("status", r"^GET /api/models/org/tiny/tree/", status=503)
    filled.inject("cut_download", r"^GET /objects/", after=1000)
    folder = filled.api().snapshot_download(REPO)
    assert {path: content(f"{folder}/{path}") for path in FILES} == FILES


@pytest.mark.parametrize(("fault", "match"), [("corrupt", r"^GET /objects/"), ("wrong_sha", r"^GET .*/tree/")])
def test_wrong_content_passes_but_for_a_check_of_hashes(filled, fault, match):
    filled.inject(fault, match, times=None)
    folder = filled.api().snapshot_download(REPO)
    assert (content(f"{folder}/model.safetensors") == WEIGHTS) == (fault == "wrong_sha")
    assert [bad["path"] for bad in filled.api().verify_repo_checksums(REPO).mismatches] == ["model.safetensors"]


def test_wrong_etag_names_the_cached_file_wrongly(filled):
    filled.inject("wrong_sha", r"^HEAD ")
    path = filled.api().hf_hub_download(REPO, "model.safetensors")
    blobs = list((filled.home / "hub" / "models--org--tiny" / "blobs").iterdir())
    assert content(path) == WEIGHTS and blobs[0].name != hashlib.sha256(WEIGHTS).hexdigest()


def test_faults_are_checked(hub):
    with pytest.raises(ValueError, match="fault must be one of"):
        hub.inject("earthquake")


# The libraries on top


def test_datasets(hub_datasets):
    datasets = pytest.importorskip("datasets")
    rows = {"sequence": ["a", "a", "b"], "frame_index": [0, 1, 0]}
    datasets.Dataset.from_dict(rows).push_to_hub("org/clips", private=True)
    assert datasets.load_dataset("org/clips", split="train").to_dict() == rows
    streamed = datasets.load_dataset("org/clips", split="train", streaming=True)
    assert [row["frame_index"] for row in streamed] == rows["frame_index"]
    assert hub_datasets.seen(r"^GET /objects/")[-1].status == 206


def test_from_pretrained_in_another_process(hub, tiny_model, tiny_processor, tmp_path):
    import torch

    tiny_model.save_pretrained(tmp_path / "model")
    tiny_processor.save_pretrained(tmp_path / "model")
    api = hub.api()
    api.create_repo(REPO, private=True)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "model")
    api.create_tag(REPO, tag="v1.0")
    with torch.no_grad():
        for parameter in tiny_model.parameters():
            parameter.zero_()
    tiny_model.save_pretrained(tmp_path / "zeros")
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / "zeros")
    code = f"""
        import hf_deformvos
        from transformers import AutoModel, AutoProcessor

        model = AutoModel.from_pretrained({REPO!r}, revision="v1.0")
        same = AutoModel.from_pretrained({str(tmp_path / "model")!r}).state_dict()
        assert all(value.equal(same[name]) for name, value in model.state_dict().items())
        assert any(value.any() for value in same.values())
        newest = AutoModel.from_pretrained({REPO!r})
        assert not any(parameter.any() for parameter in newest.parameters())
        print(type(model).__name__, type(AutoProcessor.from_pretrained({REPO!r}, revision="v1.0")).__name__)
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=hub.env(PYTHONPATH=str(ROOT)),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["DeformVosModel", "DeformVosProcessor"]
    assert hub.token not in run.stdout + run.stderr
    assert len({request.target for request in hub.seen(r"^GET /objects/")}) == 2
