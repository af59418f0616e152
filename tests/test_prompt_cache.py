"""The prompt cache: what is kept is found again, answers are the same with it, and no file of it can do harm."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from edge_dlf import FusionParams, InvalidParameterError, SamplingParams
from edge_dlf.engine import prompt_cache
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.prompt_cache import WORTH_KEEPING, WORTH_READING, PromptCache
from edge_dlf.engine.token_map import TokenMap
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.system.machine import Machine

from .fake_backend import FakeBackend
from .test_decode import N_VOCAB, begin, family, generate, step

KEY, OTHER = b"k" * 64, b"o" * 64
SAMPLINGS = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, seed=4)]
RANDOM = np.random.default_rng(5)
TEXT = RANDOM.integers(N_VOCAB, size=700).tolist()


def ids(*tokens: int) -> Any:
    return np.array(tokens, np.int32)


def kept(cache: PromptCache, *texts: Any, key: bytes = KEY, can_cut: bool = True, n_bytes: int = 100) -> None:
    """Let `cache` keep these texts, each with a state of its own."""
    for tokens in texts:
        cache.keep([(key, tokens, state_of(tokens, n_bytes), can_cut)])
    cache.wait()


def state_of(tokens: Any, n_bytes: int = 100) -> Any:
    return np.random.default_rng(tokens.tolist()).integers(256, size=n_bytes).astype(np.uint8)


def found(cache: PromptCache, text: Any, key: bytes = KEY, can_cut: bool = True, n_most: int = 9999) -> Any:
    """Tokens of the kept text that is found for `text`, those in common, and whether its state is right."""
    best = cache.find(key, text, can_cut=can_cut, n_most=n_most)
    if best is None or (state := cache.read(key, best)) is None:
        return None
    assert np.array_equal(state, state_of(best.tokens, len(state)))
    return best.tokens.tolist(), best.n_common


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.state"))


class TestFiles:
    def test_the_longest_beginning_is_found_by_a_later_process(self, tmp_path: Path) -> None:
        kept(PromptCache(tmp_path / "new" / "folder"), ids(1, 2, 3, 4), ids(1, 2, 9), ids(7))
        cache = PromptCache(tmp_path / "new" / "folder")
        assert found(cache, ids(1, 2, 3, 5)) == ([1, 2, 3, 4], 3)
        assert found(cache, ids(1, 2, 5)) == ([1, 2, 9], 2)
        assert found(cache, ids(1, 2, 3, 4), n_most=3) == ([1, 2, 9], 2)
        assert found(cache, ids(8)) is found(cache, ids()) is None
        assert found(cache, ids(1, 2, 3, 4), key=OTHER) is None
        assert found(cache, ids(1, 2, 9, 4), can_cut=False) == ([1, 2, 9], 3)
        assert found(cache, ids(1, 2, 3, 5), can_cut=False) is None
        assert cache.n_kept(KEY, ids(1, 2, 3, 5), can_cut=True) == cache.parting(KEY, ids(1, 2, 3, 5)) == 3
        assert cache.n_kept(KEY, ids(1, 2, 3, 5), can_cut=False) == 0
        assert (tmp_path / "new" / "folder").stat().st_mode & 0o077 == 0
        assert all(path.stat().st_mode & 0o077 == 0 for path in files(tmp_path / "new" / "folder"))

    def test_a_longer_text_takes_the_place_of_its_beginning(self, tmp_path: Path) -> None:
        cache = PromptCache(tmp_path)
        kept(cache, ids(1, 2), ids(1, 3))
        kept(cache, ids(1, 2, 3), key=OTHER)
        kept(cache, ids(1, 2, 3), ids(1, 2, 3, 4), can_cut=False)
        assert len(files(tmp_path)) == 5
        kept(cache, ids(1, 2, 3, 4, 5))
        assert len(files(tmp_path)) == 3
        assert found(cache, ids(1, 2)) == ([1, 2, 3, 4, 5], 2)

    def test_what_is_being_written_counts_as_kept(self, tmp_path: Path) -> None:
        cache = PromptCache(tmp_path)
        with FileLock(tmp_path / ".lock"):
            cache.keep([(KEY, ids(1, 2, 3), state_of(ids(1, 2, 3)), True)])
            assert cache.n_kept(KEY, ids(1, 2, 4), can_cut=True) == 2
            assert not files(tmp_path)
        cache.close()
        assert len(files(tmp_path)) == 1
        cache.close()

    @pytest.mark.parametrize(
        "part", ["cut", "flipped", "longer", "empty", "foreign", "of another key", "of other tokens"]
    )
    def test_a_damaged_file_is_ignored_with_one_line(
        self, tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        text = ids(*range(50))
        kept(PromptCache(tmp_path), text)
        (path,) = files(tmp_path)
        good = path.read_bytes()
        kept(PromptCache(tmp_path), text, key=OTHER)
        (foreign,) = {*files(tmp_path)} - {path}
        kept(PromptCache(tmp_path), ids(*range(1, 51)))
        (other,) = {*files(tmp_path)} - {path, foreign}
        damaged = {
            "cut": [good[:n] for n in (*range(0, len(good), 17), len(good) - 1)],
            "flipped": [good[:n] + bytes([good[n] ^ 16]) + good[n + 1 :] for n in range(0, len(good), 9)],
            "longer": [good + b"x"],
            "empty": [b""],
            "foreign": [b"GGUF" + good, b"ggsq" + bytes(500), b"\xff" * 400, bytes(1000)],
            "of another key": [foreign.read_bytes()],
            "of other tokens": [other.read_bytes()],
        }[part]
        for content in damaged:
            path.write_bytes(content)
            caplog.clear()
            cache = PromptCache(tmp_path)
            for _ in range(3):
                assert found(cache, ids(*range(49), 8), can_cut=True) != (text.tolist(), 49)
            (line,) = [record.getMessage() for record in caplog.records]
            assert line.startswith(f"{path}: ")
            assert line.endswith("and is ignored")
            kept(cache, text)
            assert path.read_bytes() == good
            assert found(cache, text) == (text.tolist(), 50)

    def test_what_is_no_file_of_it_is_left_alone(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        cache = PromptCache(tmp_path)
        kept(cache, ids(1, 2, 3))
        (path,) = files(tmp_path)
        path.unlink()
        for make in (path.mkdir, lambda: path.symlink_to("/dev/zero"), lambda: os.mkfifo(path)):
            make()
            assert found(PromptCache(tmp_path), ids(1, 2, 3)) is None
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "notes.txt").write_text("mine")
        (tmp_path / "x.state").write_text("mine")
        assert found(PromptCache(tmp_path), ids(1, 2, 3)) is None
        assert not caplog.records

    def test_a_file_that_another_process_removes_is_no_error(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = PromptCache(tmp_path)
        kept(cache, ids(1, 2, 3))
        best = cache.find(KEY, ids(1, 2, 3), can_cut=True, n_most=9)
        assert best
        files(tmp_path)[0].unlink()
        assert cache.read(KEY, best) is None
        assert cache.find(KEY, ids(1, 2, 3), can_cut=True, n_most=9) is None
        assert not caplog.records

    def test_those_used_longest_ago_go_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(prompt_cache, "MAX_BYTES", 3600)
        cache = PromptCache(tmp_path)
        (tmp_path / "mine.bin").write_bytes(bytes(9999))
        for n in range(3):
            kept(cache, ids(n), n_bytes=1000)
            for path in files(tmp_path):  # the next one is younger, however coarse the clock
                os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
        assert found(cache, ids(0)) == ([0], 1)
        kept(cache, ids(3), key=OTHER, n_bytes=1000)
        assert found(cache, ids(1)) is None
        assert found(cache, ids(0)) == ([0], 1)
        assert found(cache, ids(2)) == ([2], 1)
        assert found(cache, ids(3), key=OTHER) == ([3], 1)
        assert (tmp_path / "mine.bin").exists()

    def test_a_text_that_is_too_large_is_not_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(prompt_cache, "MAX_BYTES", 500)
        cache = PromptCache(tmp_path)
        kept(cache, ids(1), ids(2), n_bytes=1000)
        assert not files(tmp_path)
        assert len(caplog.records) == 1
        kept(cache, ids(3))
        assert len(files(tmp_path)) == 1

    def test_a_state_for_which_there_is_no_memory_is_not_read(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = PromptCache(tmp_path)
        kept(cache, ids(1, 2, 3))
        monkeypatch.setattr(prompt_cache, "this_machine", lambda: Machine(100))
        assert found(cache, ids(1, 2, 3)) is found(cache, ids(1, 2, 3)) is None
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.endswith("is too large for the memory and is ignored")

    def test_what_a_killed_process_left_half_written_goes(self, tmp_path: Path) -> None:
        cache = PromptCache(tmp_path)
        torn = tmp_path / f".{'0' * 16}-{'0' * 32}.state.new"
        torn.write_bytes(b"torn")
        kept(cache, ids(1))
        assert not torn.exists()

    def test_a_folder_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for folder in (tmp_path / "file", tmp_path / "file" / "below", "a\0b"):
            with pytest.raises(InvalidParameterError, match="^prompt_cache: "):
                PromptCache(folder)

    @pytest.mark.parametrize("what", ["gone", "full", "locked"])
    def test_a_folder_that_cannot_be_written_to_is_said_once(
        self, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = PromptCache(tmp_path / "cache")
        kept(cache, ids(1))
        lock = FileLock(tmp_path / "cache" / ".lock", thread_local=False)
        if what == "gone":
            (tmp_path / "cache").rename(tmp_path / "moved")
            (tmp_path / "cache").write_text("a file now")
        elif what == "full":
            monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        else:
            monkeypatch.setattr(prompt_cache, "_PATIENCE_S", 0.0)
            lock.acquire()
        kept(cache, ids(2), ids(3))
        lock.release()
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.startswith("prompts are not kept: ")
        assert what == "gone" or found(cache, ids(1)) == ([1], 1)

    def test_two_processes_at_once(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        """Two threads here, each with a cache of its own, as two processes would have."""
        texts = [ids(*range(n % 4), n % 9) for n in range(30)]

        def work(order: Sequence[Any]) -> None:
            cache = PromptCache(tmp_path)
            for text in order:
                kept(cache, text, n_bytes=20_000)
                found(cache, text)
            cache.close()

        threads = [threading.Thread(target=work, args=[order]) for order in (texts, texts[::-1])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not caplog.records
        cache = PromptCache(tmp_path)
        assert all(found(cache, text)[1] == len(text) for text in texts)


class TestDecoding:
    """Scripted members."""

    @pytest.fixture
    def answer(self, tmp_path: Path) -> Callable[..., list[int]]:
        """Answer a prompt with new members, which share one folder, and let the cache keep the text."""

        def answer(prompt: list[int], members: dict[str, FakeBackend], **settings: Any) -> list[int]:
            decoder = self.decoder(tmp_path, members, settings.pop("maps", None))
            prompts = {**dict.fromkeys(members, prompt), **settings.pop("prompts", {})}
            generation = begin(decoder, prompts, settings.pop("fusion", FusionParams()), **settings)
            while generation.n_picked < 9:
                step(decoder, generation)
            decoder.keep(generation)
            decoder.ensemble.close()
            return list(generation.tokens[generation.n_prompt :][:9])

        return answer

    @staticmethod
    def decoder(folder: Path, members: dict[str, FakeBackend], maps: Any = None) -> Decoder:
        keys = {name: f"{name} {member.seed}".encode() for name, member in members.items()}
        ensemble = Ensemble(members, N_VOCAB, prompt_cache=PromptCache(folder), state_keys=keys, maps=maps)
        return Decoder(ensemble, Fuser(N_VOCAB))

    @staticmethod
    def members(**settings: Any) -> dict[str, FakeBackend]:
        return family(**{"n_ctx": 1024, **settings})

    @pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
    @pytest.mark.parametrize("n_draft", [0, 3])
    @pytest.mark.parametrize(
        "settings", [{}, {"n_seq_max": 1}, {"can_cut": False}, {"can_trim": False}, {"has_streams": True}], ids=str
    )
    def test_answers_are_the_same_and_prompts_are_read_once(
        self, answer: Callable[..., list[int]], sampling: SamplingParams, n_draft: int, settings: Any
    ) -> None:
        is_whole = not settings.get("can_trim", True) or not settings.get("can_cut", True)
        prompts = [TEXT[:400], TEXT[:400], [*TEXT[:380], 1, 2], [*TEXT[:380], 3, 4, 5], TEXT[:410]]
        # A state that cannot be cut is kept 16 tokens before the end.
        read = [400, 16, 382, 383 - 366, 410 - 384] if is_whole else [400, 1, 2, 3, 410 - 400]
        for prompt, n_read in zip(prompts, read, strict=True):
            expected = [pick.token for pick in generate(self.members(), prompt, 9, FusionParams(), sampling)]
            members = self.members(**settings)
            assert answer(prompt, members, sampling=sampling, n_draft=n_draft) == expected
            assert members["base"].calls[0][0].tokens[:1] == [prompt[-n_read]]
            assert members["base"].n_evaluated < n_read + 50

    @pytest.mark.parametrize("settings", [{"can_cut": False}, {"can_trim": False}], ids=str)
    def test_a_state_that_cannot_be_cut_is_kept_where_another_text_parted(
        self, answer: Callable[..., list[int]], settings: Any
    ) -> None:
        for n, n_read in enumerate((600, 600, 100, 100)):
            members = self.members(**settings)
            answer([*TEXT[:500], *[n] * 100], members, sampling=SAMPLINGS[0])
            assert members["base"].calls[0][0].tokens[:1] == [TEXT[0] if n_read == 600 else n]

    def test_short_prompts_are_neither_kept_nor_looked_for(
        self, answer: Callable[..., list[int]], tmp_path: Path
    ) -> None:
        answer(TEXT[: WORTH_KEEPING - 10], self.members(), sampling=SAMPLINGS[0])
        assert not files(tmp_path)
        answer(TEXT[:WORTH_KEEPING], self.members(), sampling=SAMPLINGS[0])
        assert len(files(tmp_path)) == 4
        members = self.members()
        answer(TEXT[: WORTH_READING - 10], members, sampling=SAMPLINGS[0])
        assert {member.n_loaded for member in members.values()} == {0}

    def test_each_member_has_its_own_prompt_and_only_those_that_take_part_are_kept(
        self, answer: Callable[..., list[int]], tmp_path: Path
    ) -> None:
        fusion = FusionParams(method="weighted", weights={"large": 0.5, "e1": 0.5})
        own = {"e1": TEXT[300:]}
        expected = [p.token for p in generate(self.members(), TEXT[:300], 9, fusion, SAMPLINGS[0], prompts=own)]
        for n_read in (300, 1):
            members = self.members()
            assert answer(TEXT[:300], members, fusion=fusion, sampling=SAMPLINGS[0], prompts=own) == expected
            assert len(members["large"].calls[0][0].tokens) == min(n_read, 64)
            assert len(files(tmp_path)) == 2

    def test_a_member_with_ids_of_its_own(self, answer: Callable[..., list[int]]) -> None:
        """What is kept are its own ids: another family may have other ones for the same model."""
        moved = np.arange(N_VOCAB)
        moved[[3, 4]] = 4, 3
        plain, swapped = np.array(TEXT[:300]), moved[TEXT[:300]].tolist()
        maps = {"base": TokenMap(N_VOCAB, moved, np.array([], np.int64))}
        answer(TEXT[:300], self.members(), sampling=SAMPLINGS[0])
        members = self.members()
        answer(swapped, members, sampling=SAMPLINGS[0], maps=maps)
        assert len(members["base"].calls[0][0].tokens) == 1
        assert members["base"].cache[0][:299] == plain[:299].tolist()
        assert len(members["large"].calls[0][0].tokens) == 64

    def test_a_state_that_is_refused_is_read_anew(
        self, answer: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
    ) -> None:
        expected = answer(TEXT[:300], self.members(), sampling=SAMPLINGS[0])
        members = self.members()
        members["base"].refuses = True
        assert answer(TEXT[:300], members, sampling=SAMPLINGS[0]) == expected
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.endswith("is nothing that llama.cpp takes for base and is ignored")

    @pytest.mark.parametrize("settings", [{}, {"can_trim": False}, {"can_cut": False}], ids=str)
    def test_an_interrupt_while_a_state_is_loaded(
        self, answer: Callable[..., list[int]], tmp_path: Path, settings: Any
    ) -> None:
        expected = answer(TEXT[:300], self.members(**settings), sampling=SAMPLINGS[0])
        members = self.members(**settings)
        members["base"].load_fails = True
        decoder = self.decoder(tmp_path, members)
        with pytest.raises(KeyboardInterrupt):
            begin(decoder, dict.fromkeys(members, TEXT[:300]), FusionParams(), SAMPLINGS[0])
        generation = begin(decoder, dict.fromkeys(members, TEXT[:300]), FusionParams(), SAMPLINGS[0])
        while generation.n_picked < 9:
            step(decoder, generation)
        assert list(generation.tokens[300:]) == expected
        assert members["base"].n_loaded == 2

    def test_a_state_for_which_there_is_no_room_is_not_loaded(self, answer: Callable[..., list[int]]) -> None:
        answer(TEXT[:600], self.members(), sampling=SAMPLINGS[0])
        members = self.members(n_ctx=500)
        expected = [pick.token for pick in generate(self.members(), TEXT[:300], 9, FusionParams(), SAMPLINGS[0])]
        assert answer(TEXT[:300], members, sampling=SAMPLINGS[0]) == expected
        assert members["base"].n_loaded == 0

    def test_all_that_the_caches_hold_is_kept_when_asked(self, tmp_path: Path) -> None:
        members = self.members()
        decoder = self.decoder(tmp_path, members)
        for seq, prompt in enumerate((TEXT[:100], [*TEXT[:100], 1, 2], TEXT[500:600], TEXT[690:])):
            step(decoder, begin(decoder, dict.fromkeys(members, prompt), FusionParams(), SAMPLINGS[0], seq=seq))
        decoder.ensemble.keep_all()
        decoder.ensemble.close()
        assert len(files(tmp_path)) == 2 * 4
