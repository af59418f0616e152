"""Files of the hub: how they come into the cache, and every way in which they do not."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from edge_dlf import DownloadError, InvalidParameterError
from edge_dlf.families import hub, hub_cache

from .hub_server import FakeRepo, HubServer, sha256

CONTENT = b"GGUF" + os.urandom(299_996)
REPO, NAME = "o/r-GGUF", "x-Q4_K_M.gguf"


@pytest.fixture
def server(hub_here: HubServer) -> HubServer:
    """A hub with one repository of one file."""
    hub_here.repos[REPO] = FakeRepo({NAME: CONTENT})
    return hub_here


def the_file() -> hub.HubFile:
    return hub.read_repo(REPO).file(NAME)


def on_disk() -> dict[str, int]:
    """Every regular file of the repository's store, and its size."""
    return {path.name: path.stat().st_size for path in (hub_cache.folder(REPO) / "blobs").glob("*")}


def test_a_repository(server: HubServer) -> None:
    repo = hub.read_repo(REPO)
    assert repo.commit == "c" * 40
    assert repo.file(NAME) == hub.HubFile(REPO, NAME, "c" * 40, len(CONTENT), sha256(CONTENT), sha256(CONTENT))
    with pytest.raises(DownloadError, match=rf"o/r-GGUF has no file y\.gguf at cccccccccccc; it has {NAME}$"):
        repo.file("y.gguf")


def test_a_file_comes_once_and_every_program_finds_it(server: HubServer) -> None:
    file = the_file()
    assert hub_cache.cached(REPO, NAME, file.commit) is None
    assert hub.missing_bytes(file) == len(CONTENT)
    path = hub.download(file)
    assert path.read_bytes() == CONTENT
    assert hub_cache.cached(REPO, NAME, file.commit) == path
    assert on_disk() == {sha256(CONTENT): len(CONTENT)}
    found = huggingface_hub.hf_hub_download(
        REPO, NAME, revision=file.commit, cache_dir=constants.HF_HUB_CACHE, local_files_only=True
    )
    assert Path(found) == path
    cache = huggingface_hub.scan_cache_dir(constants.HF_HUB_CACHE)
    assert (cache.size_on_disk, cache.warnings) == (len(CONTENT), [])
    assert (hub.missing_bytes(file), hub.download(file)) == (0, path)
    assert server.downloads == [None]


def test_a_branch_is_found_by_the_commit_it_stood_for(server: HubServer) -> None:
    file = the_file()
    path = hub.download(file)
    assert hub_cache.cached(REPO, NAME) is None
    hub_cache.note_revision(REPO, None, file.commit)
    assert hub_cache.cached(REPO, NAME) == hub_cache.cached(REPO, NAME, "main") == path


def test_a_broken_transfer_goes_on_where_it_stopped(server: HubServer) -> None:
    server.cuts = [100_000, 50_000]
    assert hub.download(the_file()).read_bytes() == CONTENT
    assert server.downloads == [None, "bytes=100000-", "bytes=150000-"]


def test_another_process_goes_on_where_one_stopped(server: HubServer) -> None:
    server.cuts = [100_000, *[0] * 20]
    file = the_file()
    with pytest.raises(DownloadError, match="the same command later goes on where it stopped") as caught:
        hub.download(file)
    assert "\n" not in str(caught.value)
    assert on_disk() == {f"{sha256(CONTENT)}.incomplete": 100_000}
    assert hub.missing_bytes(file) == len(CONTENT) - 100_000
    server.log.clear()
    server.cuts.clear()
    assert hub.download(file).read_bytes() == CONTENT
    assert server.downloads == ["bytes=100000-"]
    assert on_disk() == {sha256(CONTENT): len(CONTENT)}


def test_a_server_that_gives_no_parts_begins_anew(server: HubServer) -> None:
    server.ranges = False
    server.cuts = [100_000]
    assert hub.download(the_file()).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"GGUF as another file began", CONTENT + b"too long"])
def test_a_torn_rest_of_an_earlier_download_is_no_harm(server: HubServer, left: bytes) -> None:
    file = the_file()
    partial = hub_cache.folder(REPO) / "blobs" / f"{file.blob}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    if len(left) < len(CONTENT):
        with pytest.raises(DownloadError, match="came with another content than its sha256"):
            hub.download(file)
        assert on_disk() == {}
    assert hub.download(file).read_bytes() == CONTENT


WRONG = [
    b"<html>please log in</html>\n",
    b"<!doctype html>" + b" " * 400_000,
    b"\x1f\x8b",
    b'{"error": 1}',
    b"\0" * 9,
    b"GGU!",
]
"""What proxies, hotels and broken stores send in place of a file."""


@pytest.mark.parametrize("page", WRONG)
def test_a_page_in_place_of_a_file_leaves_nothing_behind(server: HubServer, page: bytes) -> None:
    file = the_file()
    server.lies[sha256(CONTENT)] = page
    with pytest.raises(DownloadError, match="came as something that is no GGUF and begins with .*; nothing of it was"):
        hub.download(file)
    assert set(on_disk().values()) <= {0}
    server.lies.clear()
    assert hub.download(file).read_bytes() == CONTENT


def test_a_page_in_the_middle_leaves_what_has_come(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page is an answer to a request for the rest, which says that it is the whole."""
    file = the_file()
    partial = hub_cache.folder(REPO) / "blobs" / f"{file.blob}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(CONTENT[:200_000])
    server.lies[sha256(CONTENT)], server.ranges = WRONG[0], False
    with pytest.raises(DownloadError, match="no GGUF"):
        hub.download(file)
    assert partial.read_bytes() == CONTENT[:200_000]
    server.lies.clear()
    server.ranges = True
    assert hub.download(file).read_bytes() == CONTENT
    assert server.downloads[-1] == "bytes=200000-"


@pytest.mark.parametrize("page", WRONG)
def test_a_page_that_an_earlier_version_left_is_no_beginning(server: HubServer, page: bytes) -> None:
    file = the_file()
    partial = hub_cache.folder(REPO) / "blobs" / f"{file.blob}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(page)
    assert hub.download(file).read_bytes() == CONTENT
    assert server.downloads == [None]


def test_a_device_in_place_of_a_download_stays(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "fifo")
    file = the_file()
    monkeypatch.setattr(hub.HubFile, "partial", tmp_path / "fifo")
    with pytest.raises(DownloadError):
        hub.download(file)
    assert (tmp_path / "fifo").is_fifo()


def test_wrong_content_is_refused_and_removed(server: HubServer) -> None:
    server.lies[sha256(CONTENT)] = CONTENT[:-1] + b"!"
    file = the_file()
    with pytest.raises(DownloadError, match="came with another content than its sha256 .* was removed; try again"):
        hub.download(file)
    assert on_disk() == {}
    assert hub_cache.cached(REPO, NAME, file.commit) is None


def test_a_damaged_file_of_the_cache_is_brought_again(server: HubServer) -> None:
    file = the_file()
    hub.download(file).resolve().write_bytes(b"!" + CONTENT[1:])
    assert hub.download(file).read_bytes() == CONTENT
    assert len(server.downloads) == 2


def test_the_token_stays_with_the_hub(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    server.repos[REPO].token = "hf_secret"
    assert hub.download(the_file()).read_bytes() == CONTENT
    assert server.tokens_seen == {"127.0.0.1": {"Bearer hf_secret"}, "localhost": {None}}


@pytest.mark.parametrize(
    ("status", "code", "token", "expected"),
    [
        (401, "RepoNotFound", None, "does not exist, or it is private and needs a token"),
        (401, "", "hf_bad", "needs a token that gives access to it (`hf auth login`, or HF_TOKEN)"),
        (403, "GatedRepo", None, "is gated: accept its terms at http://127.0.0.1:"),
        (403, "GatedRepo", "hf_other", "then log in as who accepted them (`hf auth login`, or HF_TOKEN)"),
        (404, "RepoNotFound", None, "does not exist, or it is private"),
        (404, "RevisionNotFound", None, "has no such revision"),
        (404, "", None, "is refused (HTTP 404): it is not there"),
        (429, "", None, "(HTTP 429): there were too many requests; wait some minutes, or log in"),
        (500, "", None, "(HTTP 500): the hub is out of order"),
        (503, "", None, "(HTTP 503): the hub is out of order"),
    ],
)
@pytest.mark.parametrize("at", ["listing", "download"])
def test_what_the_hub_refuses_is_explained(
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    code: str,
    token: str | None,
    expected: str,
    at: str,
) -> None:
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    file = the_file() if at == "download" else None
    server.repos[REPO].answer = (status, {"X-Error-Code": code} if code else {})
    with pytest.raises(DownloadError) as caught:
        hub.download(file) if file else hub.read_repo(REPO)
    assert expected in str(caught.value)
    assert REPO in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("body", [b"<html>log in to the hotel</html>", b"[]", b"{}", b'{"id": "o/r"}'])
def test_an_answer_that_is_not_the_hubs(server: HubServer, body: bytes) -> None:
    server.nonsense = body
    with pytest.raises(DownloadError, match=r"o/r-GGUF: http://127\.0\.0\.1:\d+ answers with nonsense"):
        hub.read_repo(REPO)


def test_no_connection(server: HubServer) -> None:
    file = the_file()
    server.close()
    close_session()
    for call in (lambda: hub.read_repo(REPO), lambda: hub.download(file)):
        with pytest.raises(DownloadError, match=r"the connection to http://127\.0\.0\.1:\d+ failed \(.*refused"):
            call()


def test_a_token_that_no_header_can_carry(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_☃")
    with pytest.raises(DownloadError, match="o/r-GGUF: the token has letters that no token has; correct HF_TOKEN"):
        hub.read_repo("o/r-GGUF")


@pytest.mark.parametrize(
    "endpoint", ["", "hub", "file:///etc", "http://", "http://[::1", "http://127.0.0.1:99999", "https://a:b/"]
)
def test_an_address_that_is_none(tmp_path: Path, endpoint: str) -> None:
    command = [sys.executable, "-m", "edge_dlf", "pull", "o/r-GGUF"]
    environment = {
        "HF_ENDPOINT": endpoint or " ",
        "HF_HOME": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("edge-dlf: HF_ENDPOINT must be the address of a hub")
    assert result.stderr.count("\n") == 1


def test_offline_asks_nobody(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = the_file()
    server.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: hub.read_repo(REPO), lambda: hub.download(file)):
        with pytest.raises(DownloadError, match="HF_HUB_OFFLINE forbids the network"):
            call()
    assert server.log == []


def test_room_is_checked_before(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = the_file()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT) - 1))
    with pytest.raises(DownloadError, match="GB are to be downloaded, and .* GB free: make room, or set HF_HUB_CACHE"):
        hub.check_space([file])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=len(CONTENT)))
    assert hub.check_space([file]) == len(CONTENT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_up_meanwhile(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = the_file()
    with monkeypatch.context() as patch:
        patch.setattr(hub.HubFile, "partial", Path("/dev/full"))
        with pytest.raises(DownloadError, match="the disk of .* is full; make room, and the same command") as caught:
            hub.download(file)
    assert "\n" not in str(caught.value)
    assert hub.download(file).read_bytes() == CONTENT


def test_what_the_hub_does_not_send_in_one_piece(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    file = the_file()
    monkeypatch.setattr(constants, "MAX_HTTP_DOWNLOAD_SIZE", len(CONTENT) - 1)
    with pytest.raises(DownloadError, match=rf"bring it by `hf download {REPO} {NAME}`, then try again"):
        hub.download(file)


def test_two_at_once(server: HubServer) -> None:
    file = the_file()
    lock = Path(constants.HF_HUB_CACHE) / ".locks" / hub_cache.folder(REPO).name / f"{file.blob}.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock), pytest.raises(DownloadError, match="is being downloaded by another process"):
        hub.download(file)
    assert server.downloads == []


HOSTILE = ["../x.gguf", "a/../../x.gguf", "/etc/x.gguf", "a\\b.gguf", "C:x.gguf", "a\nb.gguf", "./x.gguf", "a//b.gguf"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_never_leave_the_cache(server: HubServer, tmp_path: Path, name: str) -> None:
    server.repos[REPO] = FakeRepo({NAME: CONTENT, name: CONTENT})
    with pytest.raises(DownloadError, match=r"o/r-GGUF: http.* answers with nonsense \(.* is no name of a GGUF"):
        hub.read_repo(REPO)
    with pytest.raises(InvalidParameterError):
        hub_cache.cached(REPO, name)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("repo", ["../r", "o/..", "o", "o/r/x", "/r", "o/r--x", "o/r\n", "o\\r/x", ""])
def test_what_is_no_repository(repo: str) -> None:
    with pytest.raises(InvalidParameterError, match="is no repository of the hub"):
        hub_cache.check_names(repo, "x.gguf", None)


@pytest.mark.parametrize(
    "change",
    [
        {"commit": "../../../x"},
        {"siblings": [{"rfilename": NAME, "size": 3, "blobId": "../../x"}]},
        {"siblings": [{"rfilename": NAME, "size": 3, "lfs": {"sha256": "../x", "size": 3, "pointerSize": 1}}]},
        {"siblings": [{"rfilename": NAME, "blobId": "0" * 40}]},
    ],
)
def test_hashes_never_leave_the_cache(server: HubServer, change: dict[str, object]) -> None:
    server.repos[REPO] = FakeRepo({NAME: CONTENT}, **change)  # type: ignore[arg-type]
    with pytest.raises(DownloadError, match="answers with nonsense"):
        hub.read_repo(REPO)


def test_a_small_file_is_checked_by_gits_own_hash(server: HubServer) -> None:
    content = b"GGUF"
    right = hashlib.sha1(b"blob 4\0GGUF").hexdigest()
    for git in ("0" * 40, right):
        sibling = {"rfilename": NAME, "size": 4, "blobId": git}
        server.repos[REPO] = FakeRepo({NAME: content}, siblings=[sibling])
        if git == right:
            assert hub.download(the_file()).read_bytes() == content
        else:
            with pytest.raises(DownloadError, match="another content"):
                hub.download(the_file())


@pytest.mark.parametrize(
    ("names", "quant", "chosen"),
    [
        (["m-Q2_K.gguf", "m-Q4_K_M.gguf"], None, "m-Q4_K_M.gguf"),
        (["m.q4_k_m.gguf"], "Q4_K_M", "m.q4_k_m.gguf"),
        (["m-Q4_K_M_L.gguf", "m-Q8_0.gguf"], None, "m-Q4_K_M_L.gguf"),
        (["m-IQ4_XS.gguf", "m-Q8_0.gguf"], "q8_0", "m-Q8_0.gguf"),
        (["mmproj-Q4_K_M.gguf", "m-imatrix.gguf", "m-f16.gguf"], None, "m-f16.gguf"),
        (["Q4_K_M/m-Q4_K_M-00002-of-00002.gguf", "Q4_K_M/m-Q4_K_M-00001-of-00002.gguf"], None,
         "Q4_K_M/m-Q4_K_M-00001-of-00002.gguf"),
        (["m-UD-Q4_K_XL.gguf", "m-Q4_K.gguf"], "Q4_K", "m-Q4_K.gguf"),
    ],
)  # fmt: skip
def test_the_quantization(names: list[str], quant: str | None, chosen: str) -> None:
    assert hub.choose(REPO, names, quant) == chosen


@pytest.mark.parametrize(
    ("names", "quant", "expected"),
    [
        (["m-Q8_0.gguf"], "Q4_K_M", "o/r-GGUF has no Q4_K_M; it has m-Q8_0.gguf"),
        (["m-Q4_K_M.gguf"], "Q4_K", "o/r-GGUF has no Q4_K; it has m-Q4_K_M.gguf"),
        ([], None, "o/r-GGUF has no GGUF model; repositories that do are mostly named …-GGUF"),
    ],
)
def test_a_quantization_that_is_not_there(names: list[str], quant: str | None, expected: str) -> None:
    with pytest.raises(DownloadError) as caught:
        hub.choose(REPO, names, quant)
    assert str(caught.value) == expected


class TestRemoving:
    def test_the_last_one_takes_all(self, server: HubServer) -> None:
        file = the_file()
        hub.download(file)
        assert hub_cache.remove(REPO, NAME, file.commit) == len(CONTENT)
        assert not hub_cache.folder(REPO).exists()

    def test_another_file_stays(self, server: HubServer) -> None:
        server.repos[REPO] = FakeRepo({NAME: CONTENT, "y.gguf": b"GGUF other"})
        repo = hub.read_repo(REPO)
        paths = [hub.download(file) for file in repo.files.values()]
        assert hub_cache.remove(REPO, NAME, repo.commit) == len(CONTENT)
        assert [path.exists() for path in paths] == [False, True]

    def test_content_that_another_revision_has_stays(self, server: HubServer) -> None:
        first = the_file()
        hub.download(first)
        server.repos[REPO].commit = "d" * 40
        second = hub.download(the_file())
        assert hub_cache.remove(REPO, NAME, first.commit) == 0
        assert second.read_bytes() == CONTENT
        assert len(server.downloads) == 1

    def test_a_link_that_leads_out_is_only_unlinked(self, server: HubServer, tmp_path: Path) -> None:
        mine = tmp_path / "mine.gguf"
        mine.write_bytes(CONTENT)
        pointer = hub_cache.snapshot(REPO, "c" * 40) / NAME
        pointer.parent.mkdir(parents=True)
        pointer.symlink_to(mine)
        hub_cache.remove(REPO, NAME, "c" * 40)
        assert mine.exists()
        assert not pointer.is_symlink()
