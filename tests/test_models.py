"""The commands around models: list, show, pull, rm, new."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from click.testing import CliRunner, Result
from huggingface_hub import constants

from edge_dlf.cli import main
from edge_dlf.families import catalogue, hub_cache, library
from edge_dlf.families import spec as family
from edge_dlf.families.catalogue import SURENESS, read_catalogue
from edge_dlf.families.describe import memory_bytes
from edge_dlf.families.files import check_files
from edge_dlf.families.spec import FamilySpec

from .hub_server import FakeRepo, HubServer, sha256
from .test_gguf import split
from .tiny import tiny_model

Run = Callable[..., Result]
CATALOGUE = """
[[families]]
name = "tiny"
good_at = "tests"
license = "mit"
sure = "checked"
memory_gb = 0.5
large = { repo = "o/large-GGUF", file = "large-Q4_K_M.gguf", n_bytes = 1000 }
base = { repo = "o/base-GGUF", file = "base-Q4_K_M.gguf", n_bytes = 2000 }
experts = [{ name = "tuned", repo = "o/tuned-GGUF", file = "tuned-Q4_K_M.gguf", n_bytes = 3000 }]
defaults = { temperature = 0.0 }
"""


@pytest.fixture
def hub(hub_here: HubServer, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubServer:
    """A hub with the tiny family's files, and a catalogue that names them."""
    for role in ("large", "base", "tuned"):
        files = {f"{role}-Q8_0.gguf": b"GGUF", f"{role}-Q4_K_M.gguf": (tiny / f"{role}.gguf").read_bytes()}
        hub_here.repos[f"o/{role}-GGUF"] = FakeRepo(files)
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "catalogue.toml").write_text(CATALOGUE)
    for module in (catalogue, family, library):
        monkeypatch.setattr(module, "shipped_dir", lambda: shipped)
    return hub_here


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in [name for name in os.environ if name.startswith("EDGE_DLF_") and name != "EDGE_DLF_MODELS"]:
        monkeypatch.delenv(name)

    def invoke(*args: str | Path, answer: str | None = None) -> Result:
        return CliRunner().invoke(main, [str(arg) for arg in args], input=answer, catch_exceptions=False)

    return invoke


def refused(result: Result, code: int, *texts: str) -> None:
    """It failed with that exit code, nothing on stdout, and one last line with these texts."""
    assert (result.exit_code, result.stdout) == (code, "")
    last = result.stderr.splitlines()[-1]
    assert last.startswith("edge-dlf: ")
    for text in texts:
        assert text in last


class TestPull:
    def test_a_family_of_the_catalogue(self, hub: HubServer, run: Run, tmp_path: Path) -> None:
        result = run("pull", "tiny")
        assert result.exit_code == 0, result.stderr
        path = tmp_path / "models" / "tiny" / "family.toml"
        assert result.stdout == f"{path}\n"
        assert "downloading large-Q4_K_M.gguf of o/large-GGUF" in result.stderr
        assert result.stderr.splitlines()[-1] == "tiny is complete: its files share one tokenizer"
        spec = FamilySpec.load("tiny")
        content = hub.repos["o/large-GGUF"].files["large-Q4_K_M.gguf"]
        assert (spec.large.revision, spec.large.sha256) == ("c" * 40, (sha256(content),))
        assert spec.defaults == {"temperature": 0.0}
        assert check_files(spec).models.keys() == {"large", "base", "tuned"}
        assert len(hub.downloads) == 3

    def test_from_nothing_to_an_answer(self, hub: HubServer, run: Run) -> None:
        assert run("pull", "tiny").exit_code == 0
        sizes = ["--max-tokens", "2", "--ctx-size", "64", "--threads", "1"]
        result = run("generate", "-f", "tiny", "--raw", "--json", *sizes, "one two")
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["usage"]["prompt_tokens"] > 0

    def test_again_brings_what_is_missing(self, hub: HubServer, run: Run) -> None:
        run("pull", "tiny")
        hub_cache.remove("o/base-GGUF", "base-Q4_K_M.gguf", "c" * 40)
        hub.log.clear()
        assert run("generate", "-f", "tiny", "Hi").exit_code == 3
        assert run("pull", "tiny").exit_code == 0
        assert len(hub.downloads) == 1
        check_files(FamilySpec.load("tiny"))

    def test_a_family_that_is_not_pulled_says_how(self, hub: HubServer, run: Run, tmp_path: Path) -> None:
        refused(run("generate", "-f", "tiny", "Hi"), 3, "tiny is in the catalogue", "`edge-dlf pull tiny`")
        run("pull", "tiny")
        hub_cache.remove("o/large-GGUF", "large-Q4_K_M.gguf", "c" * 40)
        result = run("generate", "-f", "tiny", "Hi")
        refused(
            result, 3, "tiny: large-Q4_K_M.gguf is not on this machine; `edge-dlf pull tiny` downloads what is missing"
        )

    def test_a_family_toml_of_ones_own(self, hub: HubServer, run: Run, tiny: Path, tmp_path: Path) -> None:
        path = tmp_path / "mine.toml"
        lines = (f'[{role}]\nrepo = "o/{role}-GGUF"\nfile = "{role}-Q4_K_M.gguf"\n' for role in ("large", "base"))
        path.write_text(f'name = "mine"\n{"".join(lines)}[[experts]]\nname = "e"\npath = "{tiny / "lora.gguf"}"\n')
        refused(run("generate", "-f", path, "Hi"), 3, f"`edge-dlf pull {path}`")
        assert run("pull", path).stdout == f"{path}\n"
        assert check_files(FamilySpec.load(path)).loras.keys() == {"e"}

    def test_one_model(self, hub: HubServer, run: Run, tiny: Path) -> None:
        result = run("pull", "o/base-GGUF")
        assert Path(result.stdout.rstrip("\n")).read_bytes() == (tiny / "base.gguf").read_bytes()
        refused(run("pull", "o/base-GGUF:Q2_K"), 1, "o/base-GGUF has no Q2_K; it has base-Q8_0.gguf, base-Q4_K_M.gguf")
        refused(run("pull", "o/base-GGUF:q8_0"), 3, "base-Q8_0.gguf: truncated")

    def test_a_model_in_several_files(self, hub: HubServer, run: Run, tiny: Path, tmp_path: Path) -> None:
        shards = split(tiny / "base.gguf", tmp_path)
        hub.repos["o/split-GGUF"] = FakeRepo({shard.name: shard.read_bytes() for shard in shards})
        path = Path(run("pull", "o/split-GGUF").stdout.rstrip("\n"))
        assert path.name == shards[0].name
        assert [path.with_name(shard.name).read_bytes() for shard in shards] == [s.read_bytes() for s in shards]
        files = ["--large", path, "--base", tiny / "base.gguf", "--expert", f"e={tiny / 'lora.gguf'}"]
        assert run("new", "mine", *files).exit_code == 0
        source = FamilySpec.load("mine").large
        assert (source.repo, source.sha256) == ("o/split-GGUF", tuple(sha256(s.read_bytes()) for s in shards))
        path.with_name(shards[2].name).unlink()
        refused(run("generate", "-f", "mine", "Hi"), 3, f"mine: {shards[0].name} is not on this machine")

    def test_members_that_do_not_fit_make_no_family(self, hub: HubServer, run: Run, tmp_path: Path) -> None:
        other = tiny_model(tmp_path / "other.gguf", tokens={5: "other"})
        hub.repos["o/base-GGUF"] = FakeRepo({"base-Q4_K_M.gguf": other.read_bytes()})
        refused(run("pull", "tiny"), 3, "do not share one tokenizer", "token 5")
        assert not (tmp_path / "models" / "tiny" / "family.toml").exists()

    def test_a_file_that_is_not_the_pinned_one(self, hub: HubServer, run: Run, tmp_path: Path) -> None:
        run("pull", "tiny")
        hub_cache.remove("o/base-GGUF", "base-Q4_K_M.gguf", "c" * 40)
        path = tmp_path / "models" / "tiny" / "family.toml"
        pin = FamilySpec.load("tiny").base.sha256[0]
        path.write_text(path.read_text().replace(pin, "0" * 64))
        hub.log.clear()
        refused(
            run("pull", "tiny"),
            1,
            "base-Q4_K_M.gguf of o/base-GGUF is not the file that tiny names",
            "not 000000000000",
        )
        assert hub.downloads == []

    @pytest.mark.parametrize("target", ["tiny", "o/base-GGUF"])
    def test_offline(self, hub: HubServer, run: Run, target: str) -> None:
        refused(run("pull", target, "--offline"), 3, "not on this machine", "the network may")
        assert hub.log == []
        first = run("pull", target)
        hub.log.clear()
        again = run("pull", target, "--offline")
        assert (again.exit_code, again.stdout) == (0, first.stdout)
        assert hub.log == []

    def test_no_such_family(self, hub: HubServer, run: Run) -> None:
        refused(run("pull", "nowhere"), 3, "nowhere: no such family; `edge-dlf list` names them")
        refused(run("pull", "../x"), 3, "no such family")
        refused(run("pull", "o/nothing"), 1, "o/nothing does not exist, or it is private and needs a token")

    def test_no_room(self, hub: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr("edge_dlf.families.hub.shutil.disk_usage", lambda _: SimpleNamespace(free=0))
        refused(run("pull", "tiny"), 1, "GB are to be downloaded", "0.00 GB free: make room")
        assert hub.downloads == []

    def test_killed_and_taken_up(self, hub: HubServer, tmp_path: Path) -> None:
        # A process of its own, with nothing but the environment that a user sets.
        content = hub.repos["o/base-GGUF"].files["base-Q4_K_M.gguf"]
        hub.cuts, hub.stall = [len(content) // 2], threading.Event()
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
        program = "import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 10000\nimport edge_dlf.__main__"
        command = [sys.executable, "-c", f"{program}\nedge_dlf.__main__.main()", "pull", "o/base-GGUF"]
        env = {**os.environ, **home}
        env.pop("HF_HUB_CACHE", None)
        pull = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        assert hub.stalled.wait(60)
        partial = tmp_path / "hf" / "hub" / "models--o--base-GGUF" / "blobs" / f"{sha256(content)}.incomplete"
        while not partial.exists() or not partial.stat().st_size:
            assert pull.poll() is None
        pull.send_signal(signal.SIGKILL)
        pull.communicate()
        hub.stall.set()
        hub.stall = None
        had = partial.stat().st_size
        hub.log.clear()
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        assert Path(done.stdout.rstrip("\n")).read_bytes() == content
        assert hub.downloads == [f"bytes={had}-"]


class TestListAndShow:
    def test_list(self, hub: HubServer, run: Run, tmp_path: Path) -> None:
        lines = [line.split() for line in run("list").stdout.splitlines()]
        assert lines == [["FAMILY", "SIZE", "MEMORY"], ["tiny", "0.0", "MB", "0.5", "GB", "tests"]]
        assert json.loads(run("list", "--json").stdout) == {
            "families": [],
            "catalogue": [
                {
                    "name": "tiny",
                    "good_at": "tests",
                    "license": "mit",
                    "sure": "checked",
                    "bytes": 6000,
                    "memory_bytes": 500_000_000,
                }
            ],
            "models": [],
        }
        run("pull", "tiny")
        run("pull", "o/base-GGUF")
        hub.repos["o/other-GGUF"] = hub.repos["o/base-GGUF"]
        run("pull", "o/other-GGUF")
        listed = json.loads(run("list", "--json").stdout)
        (tiny,), (other,) = listed["families"], listed["models"]
        assert (tiny["name"], tiny["complete"], tiny["problem"]) == ("tiny", True, None)
        assert tiny["bytes"] == sum(len(repo.files[f"{role}-Q4_K_M.gguf"]) for role, repo in members(hub))
        assert (other["repo"], other["file"], listed["catalogue"]) == ("o/other-GGUF", "base-Q4_K_M.gguf", [])

    def test_list_with_a_family_that_cannot_be_read_or_is_not_complete(
        self, hub: HubServer, run: Run, tmp_path: Path
    ) -> None:
        run("pull", "tiny")
        hub_cache.remove("o/base-GGUF", "base-Q4_K_M.gguf", "c" * 40)
        broken = tmp_path / "models" / "broken" / "family.toml"
        broken.parent.mkdir()
        broken.write_text("name = \x1b[31m")
        text = run("list").stdout
        assert "not complete; `edge-dlf pull tiny`" in text
        assert "cannot be read: " in text
        assert "\x1b" not in text

    def test_show_what_is_not_here(self, hub: HubServer, run: Run) -> None:
        about = json.loads(run("show", "tiny", "--json").stdout)
        assert (about["complete"], about["license"], about["sure"]) == (False, "mit", "checked")
        assert [member["bytes"] for member in about["members"]] == [1000, 2000, 3000]
        assert about["memory"]["total"] == 500_000_000
        result = run("show", "tiny")
        assert "o/large-GGUF large-Q4_K_M.gguf" in result.stdout
        assert "`edge-dlf pull tiny` downloads what is missing" in result.stderr

    def test_show(self, run: Run, tiny: Path) -> None:
        about = json.loads(run("show", tiny, "--json", "--ctx-size", "100").stdout)
        files = check_files(FamilySpec.load(tiny))
        assert about["complete"] is True
        assert about["tokenizer"]["n_vocab"] == files.n_vocab
        assert about["n_ctx_train"] == 512
        assert about["template"].startswith("{% for message")
        assert [m["kind"] for m in about["members"]] == ["llama", "llama", "LoRA over llama", "llama"]
        assert [m["quantization"] for m in about["members"]] == ["F32"] * 4
        assert [m["scale"] for m in about["members"]] == [None, None, 1.0, None]
        # two layers, one key head of 16, keys and values in f16, four contexts, rounded up as llama.cpp does
        assert about["memory"]["kv"] == 2 * 1 * 32 * 2 * 256 * 4
        text = run("show", tiny).stdout
        assert "512 tokens" in text
        assert "LoRA over llama F32" in text

    def test_one_tokenizer_has_one_hash(self, run: Run, tiny: Path, tmp_path: Path) -> None:
        other = ["--large", tiny / "base.gguf", "--base", tiny / "base.gguf", "--expert", f"e={tiny / 'tuned.gguf'}"]
        os.environ["EDGE_DLF_MODELS"] = str(tmp_path)
        try:
            run("new", "unpadded", *other)
            hashes = {
                json.loads(run("show", name, "--json").stdout)["tokenizer"]["sha256"] for name in (tiny, "unpadded")
            }
        finally:
            del os.environ["EDGE_DLF_MODELS"]
        assert len(hashes) == 1

    def test_whether_it_fits(self, run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        total = memory_bytes(check_files(FamilySpec.load(tiny)), 4096)["total"]

        class Memory:
            available = total - 1

        monkeypatch.setattr(psutil, "virtual_memory", Memory)
        assert "does not fit" in run("show", tiny).stdout
        Memory.available = total
        assert "; fits," in run("show", tiny).stdout

    def test_show_nothing(self, hub: HubServer, run: Run) -> None:
        refused(run("show", "nowhere"), 3, "nowhere: no such family")


def members(hub: HubServer) -> list[tuple[str, FakeRepo]]:
    return [(role, hub.repos[f"o/{role}-GGUF"]) for role in ("large", "base", "tuned")]


class TestRemove:
    def test_a_family(self, hub: HubServer, run: Run, tmp_path: Path) -> None:
        run("pull", "tiny")
        result = run("rm", "tiny", answer="y\n")
        assert result.exit_code == 0, result.stderr
        assert "large-Q4_K_M.gguf of o/large-GGUF" in result.stderr
        assert not (tmp_path / "models" / "tiny").exists()
        assert not list(Path(constants.HF_HUB_CACHE).glob("models--*"))
        refused(run("rm", "tiny", "--yes"), 3, "tiny: is in the catalogue, and not on this machine")

    @pytest.mark.parametrize("target", ["tiny", "o/base-GGUF"])
    def test_what_a_download_that_broke_off_has_left(self, hub: HubServer, run: Run, target: str) -> None:
        hub.cuts = [20_000, *[0] * 20]
        assert run("pull", "o/base-GGUF").exit_code == 1
        (partial,) = hub_cache.partial_downloads("o/base-GGUF")
        result = run("rm", target, "--yes")
        assert str(partial) in result.stderr
        assert not partial.exists()
        refused(run("rm", target, "--yes"), 3, "not on this machine")

    @pytest.mark.parametrize(("answer", "code"), [("n\n", 1), ("", 2)])
    def test_only_after_a_yes(self, hub: HubServer, run: Run, answer: str, code: int) -> None:
        run("pull", "tiny")
        assert run("rm", "tiny", answer=answer).exit_code == code
        check_files(FamilySpec.load("tiny"))

    def test_what_another_family_names_stays(self, hub: HubServer, run: Run, tiny: Path) -> None:
        run("pull", "tiny")
        base = FamilySpec.load("tiny").base.local_path()
        run("new", "mine", "--large", base, "--base", base, "--expert", f"e={tiny / 'lora.gguf'}")
        result = run("rm", "tiny", "--yes")
        assert "kept: base-Q4_K_M.gguf, which another family names" in result.stderr
        check_files(FamilySpec.load("mine"))
        refused(run("rm", "o/base-GGUF", "--yes"), 3, "o/base-GGUF belongs to mine")
        assert run("rm", "mine", "--yes").exit_code == 0
        assert not base.exists()
        assert (tiny / "lora.gguf").exists()

    def test_one_model(self, hub: HubServer, run: Run) -> None:
        path = Path(run("pull", "o/base-GGUF").stdout.rstrip("\n"))
        refused(run("rm", "o/base-GGUF:Q8_0", "--yes"), 3, "o/base-GGUF:Q8_0 is not on this machine")
        assert run("rm", "o/base-GGUF:Q4_K_M", "--yes").exit_code == 0
        assert not path.exists()

    def test_files_beside_the_family_go_and_others_stay(
        self, hub: HubServer, run: Run, tiny: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "models" / "own"
        folder.mkdir(parents=True)
        for name in ("family.toml", "large.gguf", "base.gguf", "tuned.gguf", "lora.gguf"):
            (folder / name).write_bytes((tiny / name).read_bytes())
        (folder / "notes.txt").write_text("mine")
        assert run("rm", "own", "--yes").exit_code == 0
        assert [path.name for path in folder.iterdir()] == ["notes.txt"]

    def test_a_link_is_only_unlinked(self, hub: HubServer, run: Run, tiny: Path, tmp_path: Path) -> None:
        (tmp_path / "models").mkdir()
        (tmp_path / "models" / "link").symlink_to(tiny)
        assert run("rm", "link", "--yes").exit_code == 0
        assert (tiny / "family.toml").exists()
        assert not (tmp_path / "models" / "link").is_symlink()

    def test_a_broken_family_can_go(self, hub: HubServer, run: Run, tmp_path: Path) -> None:
        broken = tmp_path / "models" / "broken" / "family.toml"
        broken.parent.mkdir(parents=True)
        broken.write_text("?")
        assert run("rm", "broken", "--yes").exit_code == 0
        assert not broken.parent.exists()

    def test_names_never_leave_the_models_folder(self, hub: HubServer, run: Run, tmp_path: Path) -> None:
        outside = tmp_path / "outside" / "family.toml"
        outside.parent.mkdir()
        outside.write_text("?")
        for name in ("../outside", str(outside.parent), ".", "..", ""):
            refused(run("rm", name, "--yes"), 3, "no such family")
        assert outside.exists()


class TestNew:
    def test_files_by_their_path(self, hub: HubServer, run: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tiny)
        files = ["--large", "large.gguf", "--base", "base.gguf", "--expert", "a=lora.gguf", "--expert", "b=tuned.gguf"]
        result = run("new", "mine", *files)
        path = result.stdout.rstrip("\n")
        assert result.stderr == "`edge-dlf chat mine` talks with it\n"
        monkeypatch.chdir("/")
        spec = FamilySpec.load("mine")
        assert (spec.name, spec.large.path) == ("mine", tiny / "large.gguf")
        assert check_files(FamilySpec.load(path)).loras.keys() == {"a"}
        monkeypatch.chdir(tiny)
        refused(run("new", "mine", *files), 3, "mine is there already", "`edge-dlf rm mine` removes it")

    def test_files_of_the_hub_by_their_repository(self, hub: HubServer, run: Run) -> None:
        paths = {role: run("pull", f"o/{role}-GGUF").stdout.rstrip("\n") for role in ("large", "base", "tuned")}
        run("new", "mine", "--large", paths["large"], "--base", paths["base"], "--expert", f"e={paths['tuned']}")
        source = FamilySpec.load("mine").large
        assert (source.repo, source.file, source.revision) == ("o/large-GGUF", "large-Q4_K_M.gguf", "c" * 40)
        assert source.sha256 == (sha256(hub.repos["o/large-GGUF"].files["large-Q4_K_M.gguf"]),)

    def test_files_that_do_not_fit(self, hub: HubServer, run: Run, tiny: Path, tmp_path: Path) -> None:
        other = tiny_model(tmp_path / "other.gguf", tokens={5: "other"})
        files = ["--large", tiny / "large.gguf", "--base", other, "--expert", f"e={tiny / 'tuned.gguf'}"]
        refused(run("new", "mine", *files), 3, "do not share one tokenizer")
        assert not (tmp_path / "models").exists()

    @pytest.mark.parametrize("name", ["../x", "/x", "", "a/b", ".x", "x\n"])
    def test_names_never_leave_the_models_folder(
        self, hub: HubServer, run: Run, tiny: Path, tmp_path: Path, name: str
    ) -> None:
        files = ["--large", tiny / "large.gguf", "--base", tiny / "base.gguf", "--expert", f"e={tiny / 'lora.gguf'}"]
        refused(run("new", name, *files), 2, "a family's name must have letters")
        assert not (tmp_path / "models").exists()

    def test_a_link_in_its_place_is_not_followed(self, hub: HubServer, run: Run, tiny: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (tmp_path / "models" / "in").mkdir(parents=True)
        (tmp_path / "models" / "mine").symlink_to(outside)
        (tmp_path / "models" / "in" / "family.toml").symlink_to(outside / "family.toml")
        files = ["--large", tiny / "large.gguf", "--base", tiny / "base.gguf", "--expert", f"e={tiny / 'lora.gguf'}"]
        for name in ("mine", "in"):
            refused(run("new", name, *files), 3, f"{name} is there already")
        assert list(outside.iterdir()) == []

    def test_files_are_needed(self, run: Run) -> None:
        refused(run("new", "mine"), 2, "give the files: --large FILE --base FILE --expert NAME=FILE")


class TestCatalogue:
    def test_what_ships(self) -> None:
        entries = read_catalogue()
        assert len(entries) >= 8
        for name, entry in entries.items():
            assert entry.spec.name == name
            assert family.is_name(name)
            assert entry.good_at
            assert entry.license
            assert entry.sure in SURENESS
            assert all(source.repo for source in entry.spec.sources)
            assert entry.memory_bytes > (entry.download_bytes or 0)
            is_pinned = all(source.revision and source.sha256 for source in entry.spec.sources)
            assert entry.sure == "card" or (is_pinned and entry.download_bytes)

    def test_a_damaged_one(self, tmp_path: Path) -> None:
        for change in (
            ('sure = "checked"', 'sure = "quite"'),
            ('license = "mit"', ""),
            ("[[families]]", "["),
            ("o/large", ".."),
        ):
            path = tmp_path / "catalogue.toml"
            path.write_text(CATALOGUE.replace(*change))
            with pytest.raises(family.FamilyError, match="catalogue.toml"):
                read_catalogue(path)
