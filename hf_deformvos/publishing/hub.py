"""
Files to a Hub repository in one commit, or not at all.

The commit names the one it builds on, so that nothing that happened meanwhile is lost; when its answer gets lost, the
repository says whether it was made. What was committed is compared with the local files, large ones by fetching them
back: the storage may hold other bytes than were sent, and its listing repeats only what the sender stated. If they
differ and sending them again does not help, a second commit restores what was there before.
"""

from __future__ import annotations

import errno
import hashlib
import re
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # the base of the HTTP library's errors, whichever library this release of huggingface_hub uses
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token, validate_repo_id
from transformers.utils import logging

from .cards import has_scores, is_unedited
from .measurements import sha256_of


logger = logging.get_logger(__name__)

CARD = "README.md"
_WAITS = (1, 4, 16)  # seconds between attempts; the client itself has tried several times in each
_LONGEST_WAIT = 60
_FIRST_ANSWER = 10  # seconds; the client itself waits for as long as the system does, for each address of the Hub
_TRANSIENT = {408, 425, 429, 500, 502, 503, 504}
_CONFLICTS = {409, 412}
# What the network does to a call, where Python has no ConnectionError or TimeoutError for it.
_NETWORK_ERRORS = (HTTPError, ConnectionError, TimeoutError, socket.gaierror, ssl.SSLError)
_NETWORK_NUMBERS = {
    errno.EADDRNOTAVAIL,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETRESET,
    errno.ENETUNREACH,
    errno.ENOBUFS,
    errno.ENOTCONN,
}
_MAX_PLANS = 3
_TOKENS = re.compile(r"\b(?:hf_|api_org_)\w{6,}")
_QUERIES = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
# `git check-ref-format`, the rules of branches included.
_NO_BRANCH = re.compile(
    r"[\x00-\x20\x7f~^:?*\[\\]|\.\.|@\{|//|(?:^|/)\.|\.lock(?:/|$)|[./]$|^[-/]|^(?:@|HEAD)?$|^refs/|^[0-9a-f]{40}$"
)


class PublishError(ValueError):
    """Publishing failed; the message says in one line why, what state the repository is in, and what to do."""


class _Unreachable(PublishError):
    """The Hub did not answer, or could not: nothing is known of the repository; `cause` says why."""

    def __init__(self, message: str, cause: str):
        super().__init__(message)
        self.cause = cause


class _Moved(Exception):
    """Somebody else committed since the plan was made."""


@dataclass(frozen=True)
class Upload:
    """
    A local file and its name in the repository.

    Args:
        name (`str`): path in the repository.
        path (`Path`): the file.
        size (`int`): in bytes.
        sha256 (`str`): of its content; the Hub's name of a large file.
        blob_id (`str`): git's name of its content; the Hub's name of any other file.
    """

    name: str
    path: Path
    size: int
    sha256: str
    blob_id: str

    @classmethod
    def of(cls, name: str, path: Path) -> Upload:
        """Reads a file."""
        size = path.stat().st_size
        blob = hashlib.sha1(f"blob {size}\0".encode())
        with open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                blob.update(chunk)
        return cls(name, path, size, sha256_of(path), blob.hexdigest())

    def is_same(self, remote) -> bool:
        """Whether the Hub's entry of a listing is of this content."""
        if remote is None or remote.size != self.size:
            return False
        return remote.lfs.sha256 == self.sha256 if remote.lfs else remote.blob_id == self.blob_id


@dataclass(frozen=True)
class Target:
    """
    Where to publish.

    Args:
        repo_id (`str`): `org/name`.
        repo_type (`str`, defaults to `"model"`): `"model"`, `"dataset"` or `"space"`.
        revision (`str`, defaults to `"main"`): a branch, made from main where it is missing.
        private (`bool`, defaults to `False`): whether a new repository is private; an existing public one is refused.
        space_sdk (`str`, *optional*): of a new Space.
        must_be_public (`bool`, defaults to `False`): whether a private repository is refused.
    """

    repo_id: str
    repo_type: str = "model"
    revision: str = "main"
    private: bool = False
    space_sdk: str | None = None
    must_be_public: bool = False

    def __post_init__(self):
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise PublishError(f"A repository is named org/name, got {self.repo_id!r}: {error}") from error
        if self.repo_id.count("/") != 1:
            raise PublishError(f"A repository is named org/name, got {self.repo_id!r}.")
        if _NO_BRANCH.search(self.revision):
            raise PublishError(
                f"`revision` must be a branch to publish to, named as git allows (no spaces, no ~^:?*[\\, no part "
                f"that begins with a dot), got {self.revision!r}."
            )

    @property
    def url(self) -> str:
        """Its page."""
        prefix = {"model": "", "dataset": "datasets/", "space": "spaces/"}[self.repo_type]
        branch = "" if self.revision == "main" else f"/tree/{self.revision}"
        return f"{constants.ENDPOINT}/{prefix}{self.repo_id}{branch}"


@dataclass
class Plan:
    """
    What publishing would change.

    Args:
        head (`str`, *optional*): the commit to build on; `None` where there is no repository or branch yet.
        new, changed, same (`list[Upload]`): local files by what the repository has of them.
        removed (list of `str`): files of an earlier release that this one has no longer.
        notes (list of `str`): sentences for the user.
        is_known (`bool`, defaults to `True`): whether the Hub told what it has; if not, all files are in `new`.
    """

    head: str | None = None
    new: list[Upload] = field(default_factory=list)
    changed: list[Upload] = field(default_factory=list)
    same: list[Upload] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    is_known: bool = True

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.new or self.changed or self.removed)


@dataclass
class Published:
    """
    What was done.

    Args:
        plan ([`Plan`]): the changes.
        commit (`str`, *optional*): the commit that holds the files; `None` after a dry run.
        url (`str`): the repository's page.
        committed (`bool`): whether a commit was made.
    """

    plan: Plan
    commit: str | None
    url: str
    committed: bool


def redact(text: str, token: str | None = None) -> str:
    """A text in one line, without tokens and without the signatures of addresses."""
    if token:
        text = text.replace(token, "hf_***")
    return " ".join(_QUERIES.sub(r"\1", _TOKENS.sub("hf_***", text)).split())


def publish_files(
    uploads: list[Upload],
    target: Target,
    message: str,
    description: str = "",
    owns: Callable[[str], bool] = lambda name: False,
    token: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Published:
    """
    Bring a repository to hold these files, in one commit.

    Args:
        uploads (`list[Upload]`): the files.
        target ([`Target`]): the repository; made if it is missing.
        message (`str`): the commit's title.
        description (`str`, *optional*): its text.
        owns (`Callable[[str], bool]`, *optional*): which file names are a release's own: those that are there and not
            in `uploads` are removed, since a stale shard or index would be loaded.
        token (`str`, *optional*): by default the one that is logged in. Never printed.
        force (`bool`, defaults to `False`): overwrite a card that was edited on the Hub, or has scores where the new
            one has none.
        dry_run (`bool`, defaults to `False`): only look, which needs no token for a public repository, and is refused
            what would be refused in earnest.

    Returns:
        [`Published`]: with `committed=False` where the repository holds all of it already.

    Raises:
        PublishError: if it did not work; the repository is then as it was before, unless the message says otherwise.
    """
    if dry_run:
        client = _Client(target, token, waits=())
        return Published(client.look(uploads, owns, force), None, target.url, committed=False)
    client = _Client(target, token)
    client.require_token()
    for _ in range(_MAX_PLANS):
        client.prepare()
        plan = client.plan(uploads, owns, force)
        try:
            commit = plan.head if plan.is_empty else client.commit(plan, message, description)
        except _Moved:
            continue
        client.verify(uploads, plan, commit)
        return Published(plan, commit, target.url, committed=not plan.is_empty)
    raise PublishError(
        f"{target.repo_id} was changed by somebody else {_MAX_PLANS} times in the meantime; nothing was published. "
        "Try again when that is done."
    )


def require_token(target: Target, token: str | None = None) -> None:
    """
    Fail early, where much is to be done before [`publish_files`].

    Raises:
        PublishError: if nobody, or nobody known, is logged in.
    """
    _Client(target, token).require_token()


class _Client:
    """The Hub's client for one target: attempts, with `waits` between them, and errors as sentences."""

    def __init__(self, target: Target, token: str | None, waits: tuple[int, ...] = _WAITS):
        self.target = target
        self.waits = waits
        self.token = token or get_token()
        # False: nobody's, rather than whichever token the client finds.
        self.api = HfApi(endpoint=constants.ENDPOINT, token=self.token or False)
        self.names = {"repo_id": target.repo_id, "repo_type": target.repo_type}
        self.state = "nothing was published"

    def require_token(self) -> None:
        """Fails before anything is made when nobody, or nobody known, is logged in."""
        if self.token is None:
            raise PublishError(
                "Publishing needs a token with write access: `hf auth login`, the environment variable HF_TOKEN, or "
                "--token-file FILE."
            )
        self._call(_within, self.api.whoami)

    def _call(self, function: Callable, *args, expected: tuple = (), **kwargs):
        """A call, tried again when the fault may pass; `expected` errors are raised as they are."""
        for wait in (*self.waits, None):
            try:
                return function(*args, **kwargs)
            except expected:
                raise
            except (HTTPError, OSError, RuntimeError) as error:
                failure = _origin(error)
            if wait is None or not _is_transient(failure):
                # The original is not chained: a traceback would show what this message leaves out.
                raise self._failure(failure) from None
            self._sleep(failure, wait)

    def _sleep(self, error: Exception, wait: float) -> None:
        asked = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After", "")
        seconds = min(max(wait, float(asked)), _LONGEST_WAIT) if asked.isdigit() else wait
        logger.warning(f"{redact(str(error), self.token)[:200]}; trying again in {seconds:g} s")
        time.sleep(seconds)

    def _failure(self, error: Exception) -> PublishError:
        """An error of one line: what the Hub said, what that means, what to do."""
        words = redact(getattr(error, "server_message", None) or str(error), self.token)[:300]
        cause = f"{self._reason(error)}. In the Hub client's words: {words}"
        message = f"Publishing to {self.target.repo_id} failed, {self.state}: {cause}"
        if isinstance(error, OfflineModeIsEnabled) or _is_transient(error):
            return _Unreachable(message, cause)
        return PublishError(message)

    def _reason(self, error: Exception) -> str:
        """What an error means, and what to do."""
        repo, status = self.target.repo_id, _status(error)
        if isinstance(error, OfflineModeIsEnabled):
            reason = "the environment variable HF_HUB_OFFLINE forbids it"
        elif isinstance(error, GatedRepoError):
            reason = f"access to {repo} is restricted, and this token has none"
        elif status == 401:
            reason = "the Hub does not accept the token (401): `hf auth login` anew, or give another one"
        elif status == 403:
            reason = (
                f"the token may not write to {repo} (403): it needs the write role, and a place in the organisation"
            )
        elif isinstance(error, RepositoryNotFoundError) or status == 404:
            reason = f"{repo} is not found (404), or hidden from this token"
        elif status in _CONFLICTS:
            reason = f"another change of {repo} is under way ({status}): try again when it is done"
        elif status == 429:
            reason = "the Hub asks to send less (429, too many requests): try again later"
        elif status is not None and status >= 500:
            reason = f"the Hub is in trouble ({status}): try again later"
        elif status is not None:
            reason = f"the Hub refused ({status})"
        elif _is_local(error):
            reason = "this machine could not read or write a file: look at its permissions and at the free space"
        else:
            reason = f"the Hub at {constants.ENDPOINT} cannot be reached, or the connection broke"
        return reason

    def prepare(self) -> None:
        """Makes the repository and the branch where they are missing."""
        missing = (RepositoryNotFoundError, RevisionNotFoundError)
        try:
            info = self._call(self.api.repo_info, **self.names, expected=missing)
        except RepositoryNotFoundError:
            settings = {"space_sdk": self.target.space_sdk} if self.target.repo_type == "space" else {}
            self._call(self.api.create_repo, **self.names, private=self.target.private, exist_ok=True, **settings)
            info = self._call(self.api.repo_info, **self.names)
        self._check_visibility(info)
        try:
            self._call(self.api.repo_info, **self.names, revision=self.target.revision, expected=missing)
        except RevisionNotFoundError:
            self._call(self.api.create_branch, **self.names, branch=self.target.revision, exist_ok=True)

    def _check_visibility(self, info) -> None:
        """Refuses a public repository where a private one is meant, and the other way round."""
        if self.target.private and not info.private:
            raise PublishError(
                f"{self.target.repo_id} is public and --private was asked for; nothing was published. Make it private "
                "in its settings on the Hub first."
            )
        if self.target.must_be_public and info.private:
            raise PublishError(
                f"{self.target.repo_id} is private, and a private Space cannot fetch the wheel that it carries while "
                "it is built; nothing was published. Make it public in its settings on the Hub."
            )

    def look(self, uploads: list[Upload], owns: Callable[[str], bool], force: bool) -> Plan:
        """A plan without making anything; where the Hub cannot be asked, everything counts as new."""
        try:
            info = self._call(_within, self.api.repo_info, **self.names, expected=(RepositoryNotFoundError,))
            self._check_visibility(info)
            try:
                return self.plan(uploads, owns, force)
            except RevisionNotFoundError:
                plan = self.plan(uploads, owns, force, info.sha)
                plan.notes.append(f"the branch {self.target.revision} does not exist yet: it would be made from main")
                return plan
        except RepositoryNotFoundError:
            hidden = "" if self.token else " (or is private: no token was given)"
            note = f"the repository does not exist yet{hidden}: it would be made, and everything is new"
            return Plan(new=list(uploads), notes=[note])
        except _Unreachable as error:
            note = f"the Hub could not be asked what it has, so every file is listed as new: {error.cause}"
            return Plan(new=list(uploads), notes=[note], is_known=False)

    def _list(self, revision: str) -> dict:
        """The files of a revision, by name."""

        def entries() -> list:
            return list(self.api.list_repo_tree(**self.names, revision=revision, recursive=True))

        return {entry.path: entry for entry in self._call(entries) if hasattr(entry, "blob_id")}

    def _head(self) -> str:
        missing = (RepositoryNotFoundError, RevisionNotFoundError)
        return self._call(self.api.repo_info, **self.names, revision=self.target.revision, expected=missing).sha

    def plan(self, uploads: list[Upload], owns: Callable[[str], bool], force: bool, head: str | None = None) -> Plan:
        """What differs from a commit, by default the branch's last, and whether the card may be overwritten."""
        plan = Plan(head=head or self._head())
        remote = self._list(plan.head)
        for upload in uploads:
            there = remote.get(upload.name)
            (plan.new if there is None else plan.same if upload.is_same(there) else plan.changed).append(upload)
        kept = {upload.name for upload in uploads}
        plan.removed = sorted(name for name in remote if owns(name) and name not in kept)
        for upload in plan.changed:
            if upload.name == CARD:
                plan.notes += self._losses(plan.head, upload, force)
        return plan

    def _losses(self, head: str, card: Upload, force: bool) -> list[str]:
        """
        What overwriting the card at a commit would lose.

        Raises:
            PublishError: if it would lose anything, unless `force`.
        """
        with tempfile.TemporaryDirectory() as folder:
            path = self._call(self.api.hf_hub_download, **self.names, filename=CARD, revision=head, local_dir=folder)
            text = Path(path).read_text(encoding="utf-8", errors="replace")
        losses = []
        if self._is_edited(text, head):
            losses.append(("was edited on the Hub, or not published by this command", "Take the edits over"))
        if has_scores(text) and not has_scores(card.path.read_text(encoding="utf-8", errors="replace")):
            losses.append(("has scores, and the new one has none", "Name their measurements with --numbers FILE"))
        if losses and not force:
            reason, remedy = losses[0]
            raise PublishError(
                f"{CARD} of {self.target.repo_id} {reason}; nothing was published. {remedy}, or overwrite it with "
                "--force."
            )
        return [f"{CARD} on the Hub {reason}: it is overwritten" for reason, _ in losses]

    def _is_edited(self, text: str, head: str) -> bool:
        """Whether the card at a commit is another than a publication left there."""
        if is_unedited(text):
            return False
        # The Hub itself puts a card into some new repositories.
        return len(self._call(lambda: list(self.api.list_repo_commits(**self.names, revision=head)))) > 1

    def commit(self, plan: Plan, message: str, description: str) -> str:
        """Makes the commit, whatever happens to its answer; the commit's id."""
        for wait in (*self.waits, None):
            # Operations remember what became of them, so each attempt takes fresh ones.
            operations = [CommitOperationAdd(upload.name, str(upload.path)) for upload in plan.new + plan.changed]
            operations += [CommitOperationDelete(name) for name in plan.removed]
            try:
                return self.api.create_commit(
                    self.target.repo_id,
                    operations,
                    repo_type=self.target.repo_type,
                    revision=self.target.revision,
                    commit_message=message,
                    commit_description=description,
                    parent_commit=plan.head,
                ).oid
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                failure = _origin(error)
            head = self._head()
            if head != plan.head:
                if self._differing(plan, self._list(head)):
                    raise _Moved
                return head
            # 422: the storage has not got what was sent; sending it again may help.
            retried = _is_transient(failure) or _status(failure) in {422, *_CONFLICTS}
            if wait is None or not retried:
                raise self._failure(failure) from None
            self._sleep(failure, wait)

    @staticmethod
    def _differing(plan: Plan, remote: dict) -> list[str]:
        """Names that a listing has otherwise than the plan."""
        uploads = plan.new + plan.changed + plan.same
        return [upload.name for upload in uploads if not upload.is_same(remote.get(upload.name))] + [
            name for name in plan.removed if name in remote
        ]

    def verify(self, uploads: list[Upload], plan: Plan, commit: str) -> None:
        """Compares what the Hub has with the local files; repairs, or restores what was there before."""
        if not plan.is_empty:
            self.state = f"after the commit {commit[:12]}, which was not compared with the local files: publish again"
        wrong = self._wrong(uploads, plan, commit)
        if not wrong:
            return
        logger.warning(f"{', '.join(wrong)} arrived damaged; sending again")
        again = [CommitOperationAdd(upload.name, str(upload.path)) for upload in uploads if upload.name in wrong]
        self._call(self.api.preupload_lfs_files, **self.names, additions=again, revision=self.target.revision)
        wrong = self._wrong(uploads, plan, commit)
        if wrong:
            undone = self._undo(plan, commit)
            raise PublishError(f"The Hub holds other content of {', '.join(wrong)} than was sent; {undone}")

    def _wrong(self, uploads: list[Upload], plan: Plan, commit: str) -> list[str]:
        """Names whose content on the Hub is not that of the local file."""
        remote = self._list(commit)
        wrong = self._differing(plan, remote)
        if wrong:  # a listing, too, may be disturbed
            remote = self._list(commit)
            wrong = self._differing(plan, remote)
        large = [upload for upload in uploads if upload.name not in wrong and remote[upload.name].lfs]
        with tempfile.TemporaryDirectory() as folder:
            return wrong + [upload.name for upload in large if not self._arrived(upload, commit, Path(folder))]

    def _arrived(self, upload: Upload, commit: str, folder: Path) -> bool:
        """Whether a large file comes back as it was sent; a second try, since the way back may be at fault."""
        for attempt in ("first", "second"):
            path = Path(
                self._call(
                    self.api.hf_hub_download,
                    **self.names,
                    filename=upload.name,
                    revision=commit,
                    local_dir=folder / attempt,
                )
            )
            if sha256_of(path) == upload.sha256:
                return True
        return False

    def _undo(self, plan: Plan, commit: str) -> str:
        """Restores the tree before a commit; what to tell."""
        if plan.is_empty:
            return "they have been there since before."
        back = [CommitOperationCopy(name, name, src_revision=plan.head) for name in plan.removed]
        back += [CommitOperationCopy(upload.name, upload.name, src_revision=plan.head) for upload in plan.changed]
        back += [CommitOperationDelete(upload.name) for upload in plan.new]
        try:
            self._call(
                self.api.create_commit,
                self.target.repo_id,
                back,
                repo_type=self.target.repo_type,
                revision=self.target.revision,
                commit_message="Take back a publication that arrived damaged",
                parent_commit=commit,
            )
        except PublishError as error:
            return f"taking the commit {commit[:12]} back failed too, so it must be reverted by hand. {error}"
        return "the publication was taken back, and the repository is as it was before. Try again."


def _within(function: Callable, **kwargs):
    """
    A call that is given up when there is no answer within some seconds.

    Raises:
        TimeoutError: if there is none; the call goes on by itself.
    """
    outcome: list = []

    def work() -> None:
        try:
            outcome.append((function(**kwargs), None))
        except Exception as error:  # raised again below
            outcome.append((None, error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_FIRST_ANSWER)
    if not outcome:
        raise TimeoutError(f"no answer within {_FIRST_ANSWER:g} s")
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


def _origin(error: Exception) -> Exception:
    """What an upload failed by: the client wraps it."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _status(error: Exception) -> int | None:
    """The HTTP status that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_local(error: Exception) -> bool:
    """Whether this machine's files are at fault, not the network: the system numbers the errors of both."""
    if not isinstance(error, OSError) or isinstance(error, _NETWORK_ERRORS):
        return False
    return error.errno is not None and error.errno not in _NETWORK_NUMBERS


def _is_transient(error: Exception) -> bool:
    """Whether the same call may work a little later."""
    if isinstance(error, (LocalTokenNotFoundError, OfflineModeIsEnabled)) or _is_local(error):
        return False
    if isinstance(error, HfHubHTTPError) or _status(error) is not None:
        return _status(error) in _TRANSIENT
    # A download that is too short is an OSError and nothing more particular.
    broken = (HTTPError, ConnectionError, TimeoutError, LocalEntryNotFoundError)
    return isinstance(error, broken) or type(error) is OSError


__all__ = ["CARD", "Plan", "PublishError", "Published", "Target", "Upload", "publish_files", "redact", "require_token"]
