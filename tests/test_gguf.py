"""GGUF headers: what is read from good ones, and the one clear reason for every bad one."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import random
import struct
from array import array
from pathlib import Path

import gguf
import numpy as np
import pytest

from edge_dlf import ModelFileError
from edge_dlf.families.spec import FamilySpec
from edge_dlf.gguf.header import Array, header_hash, read_header
from edge_dlf.gguf.info import check_lora_fits, read_info
from edge_dlf.gguf.texts import Texts, plain_starts, repeated

from .tiny import CHATML, SPECIAL_TOKENS, tiny_lora, tiny_model


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def texts(name: str, values: list[bytes]) -> bytes:
    return key(name, 9, struct.pack("<IQ", 8, len(values)) + b"".join(map(text, values)))


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def raw(path: Path, keys: list[bytes] = (), tensors: list[bytes] = (), weights: int = 0) -> Path:  # type: ignore[assignment]
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)
    path.write_bytes(header + bytes(-len(header) % 32 + weights))
    return path


def reason(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_info(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value.reason


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("gguf") / "model.gguf", pad_vocab=3)


def test_a_model(model: Path) -> None:
    info = read_info(model)
    assert (info.architecture, info.is_adapter, info.shards) == ("llama", False, (model,))
    assert info.n_vocab == len(list(info.vocabulary.tokens.since(0))) == len(info.vocabulary.types)
    assert list(info.vocabulary.tokens.since(0))[-6:-3] == [token.encode() for token in SPECIAL_TOKENS]
    assert list(info.vocabulary.types[-6:]) == [3, 3, 3, 5, 5, 5]
    assert info.metadata["tokenizer.chat_template"] == CHATML
    assert info.metadata["llama.embedding_length"] == 32
    assert info.metadata["tokenizer.ggml.tokens"] == Array(8, info.n_vocab)
    assert info.tensors["token_embd.weight"].shape == (32, info.n_vocab)
    assert info.file_bytes == model.stat().st_size
    assert info.tensor_bytes == sum(tensor.nbytes for tensor in (t.data for t in gguf.GGUFReader(model).tensors))


@pytest.mark.parametrize(
    "settings", [{"tokenizer": "spm"}, {"arch": "qwen2"}, {"arch": "mamba"}, {"dtype": np.float16}]
)
def test_other_models(tmp_path: Path, settings: dict[str, object]) -> None:
    info = read_info(tiny_model(tmp_path / "model.gguf", **settings))  # type: ignore[arg-type]
    assert info.architecture == settings.get("arch", "llama")


def test_a_lora(tmp_path: Path, model: Path) -> None:
    lora = read_info(tiny_lora(tmp_path / "lora.gguf"))
    assert (lora.architecture, lora.is_adapter, lora.n_vocab) == ("llama", True, None)
    check_lora_fits(lora, read_info(model))


def test_a_lora_for_another_model(tmp_path: Path, model: Path) -> None:
    base = read_info(model)
    for settings, expected in (
        ({"arch": "qwen2"}, r"a LoRA over 'qwen2', model\.gguf is 'llama'"),
        ({"n_embd": 64}, r"'blk\.0\.attn_q\.weight' of shape \(64, 64\); in model\.gguf it has \(32, 32\)"),
        ({"n_layer": 3}, r"the tensor 'blk\.2\.attn_q\.weight', which model\.gguf does not have"),
    ):
        lora = read_info(tiny_lora(tmp_path / "lora.gguf", **settings))  # type: ignore[arg-type]
        with pytest.raises(ModelFileError, match=expected):
            check_lora_fits(lora, base)
    with pytest.raises(ModelFileError, match="is a model, not a LoRA adapter"):
        check_lora_fits(base, base)


@pytest.mark.parametrize(
    ("content", "what", "advice"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid", "a Git LFS pointer in place of the file", "git lfs pull"),
        (b"PK\x03\x04" + bytes(40), "a PyTorch or zip archive", "convert it to GGUF"),
        (b'\x40\0\0\0\0\0\0\0{"__metadata__":{}}', "a safetensors file", "convert_lora_to_gguf.py"),
        (b"\n\0\0\0\0\0\0\0{}        ", "a safetensors file", "convert it to GGUF"),
        (b"algg" + bytes(40), "in a format from before GGUF", "convert it to GGUF"),
        (b"tjgg" + bytes(40), "in a format from before GGUF", "convert it to GGUF"),
        (b"\n<!DOCTYPE html>", "a web page in place of the file", "download the file again"),
        (b"<html>", "a web page in place of the file", "download the file again"),
    ],
)
def test_files_of_other_kinds_are_told_by_their_beginning(
    tmp_path: Path, content: bytes, what: str, advice: str
) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        read_info(tmp_path / "x.gguf")
    assert caught.value.reason == f"is not a GGUF file: it is {what}"
    assert advice in caught.value.advice


def test_what_is_no_model_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    assert reason(path) == "no such file or directory"
    assert reason(tmp_path) == "is a folder"
    path.write_bytes(b"")
    assert reason(path) == "is empty"
    path.write_bytes(b"GG")
    assert reason(path) == "is not a GGUF file: it begins with 'GG'"
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0))
    assert reason(path) == "is a big-endian GGUF; only little-endian ones can be used"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    assert reason(path) == "is a GGUF of version 1; only versions 2 and 3 can be used"
    assert reason(raw(path)) == "does not name its architecture (general.architecture)"
    with pytest.raises(ModelFileError, match="null"):
        read_info("a\0b.gguf")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.gguf")
    assert reason(tmp_path / "fifo.gguf") == "is not a regular file"
    assert reason(Path(os.devnull)) == "is not a regular file"


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "secret.gguf"
    path.write_bytes(model.read_bytes())
    path.chmod(0)
    assert reason(path) == "permission denied"


def test_absurd_counts_and_lengths(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    start = b"GGUF" + struct.pack("<I", 3)
    path.write_bytes((start + struct.pack("<QQ", 1 << 62, 1) + bytes(19))[:43])
    assert reason(path) == f"damaged: it claims {1 << 62:,} tensors and 1 keys"
    path.write_bytes(start + struct.pack("<QQ", 0, (1 << 64) - 1) + bytes(19))
    assert "18,446,744,073,709,551,615 keys" in reason(path)
    path.write_bytes(start + struct.pack("<QQQ", 0, 1, 1 << 40) + bytes(11))
    assert reason(path) == "damaged: key 0 has 1,099,511,627,776 bytes"
    for value, expected in (
        (key("a", 9, struct.pack("<IQ", 8, 1 << 60)), "is an array of 1,152,921,504,606,846,976 texts"),
        (
            key("a", 9, struct.pack("<IQ", 8, 1 << 20)),
            "truncated or damaged: the value of 'a' would end at byte 8,388,6",
        ),
        (
            key("a", 9, struct.pack("<IQ", 5, 1 << 60)),
            "truncated or damaged: the value of 'a' would end at byte 4,611,6",
        ),
        (key("a", 9, struct.pack("<IQ", 9, 1)), "an array of the unknown type 9"),
        (key("a", 8, struct.pack("<Q", 1 << 63)), "has 9,223,372,036,854,775,808 bytes"),
        (key("a", 13, b""), "has the unknown type 13"),
        (key("", 0, b"1"), "key 0 is ''"),
        (key("a\0b", 0, b"1"), r"key 0 is 'a\x00b'"),
        (key("a", 0, b"1") * 2, "the key 'a' comes twice"),
        (key("general.alignment", 4, struct.pack("<I", 48)), "its alignment is 48"),
        (key("general.alignment", 4, struct.pack("<I", 0)), "its alignment is 0"),
    ):
        n_keys = 2 if "twice" in expected else 1
        path.write_bytes(start + struct.pack("<QQ", 0, n_keys) + value + bytes(64))
        assert expected in reason(path)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([tensor("t", ())], "'t' has 0 dimensions"),
        ([tensor("t", (1, 1, 1, 1, 1))], "'t' has 5 dimensions"),
        ([tensor("t", (0,))], "'t' has the shape (0,), impossible for F32"),
        ([tensor("t", (33,), 2)], "'t' has the shape (33,), impossible for Q4_0"),
        ([tensor("t", (32,), 4)], "'t' has the type 4, which this version of llama.cpp does not know"),
        ([tensor("t", (1 << 40, 1 << 40))], "truncated or damaged: tensor 't' alone needs 4,835,703"),
        ([tensor("t", (8,), 0, 32)], "'t' is said to begin at byte 32 of the weights, not at 0"),
        ([tensor("t", (8,)), tensor("t", (8,), 0, 32)], "tensor 't' comes twice"),
        ([tensor("t" * 64, (8,))], "the name of tensor 0 has 64 bytes"),
        ([tensor("t", (8,)), tensor("u", (8,), 0, 32)], "truncated: 32 of 160 bytes are missing at its end"),
    ],
)
def test_impossible_tensors(tmp_path: Path, tensors: list[bytes], expected: str) -> None:
    path = raw(tmp_path / "x.gguf", [], tensors)
    if "missing" in expected:
        path.write_bytes(path.read_bytes()[:96] + bytes(32))
    assert expected in reason(path)


def test_a_header_is_named_by_its_bytes_alone(tmp_path: Path, model: Path) -> None:
    path, data = tmp_path / "x.gguf", model.read_bytes()
    start = gguf.GGUFReader(model).data_offset
    assert header_hash(model) == hashlib.sha256(data[:start]).hexdigest()
    path.write_bytes(data[:start] + bytes(len(data) - start))
    assert header_hash(path) == header_hash(model)
    path.write_bytes(data.replace(b"general.name", b"general.nama", 1))
    assert header_hash(path) != header_hash(model)


VOCABULARY = [b"the", b"a" * 300, "naïve".encode(), b"x" * 256, b"y" * 17, b"y" * 18, b"b" * 9 + b"c" * 9]


@pytest.mark.parametrize("extra", [[], [b""], [b"", b""], [b"a\0b", b"b\0a"], [b"[EMPTY_6]", b"", b"z"]])
def test_distinct_tokens_are_read_as_they_stand(tmp_path: Path, extra: list[bytes]) -> None:
    tokens = VOCABULARY + extra
    header = read_header(raw(tmp_path / "x.gguf", [texts("tokenizer.ggml.tokens", tokens)]))
    assert list(header.vocabulary.tokens.since(0)) == tokens
    assert list(header.vocabulary.types) == [1] * len(tokens)


@pytest.mark.parametrize(
    "extra",
    [[b"the"], [b"y" * 17], [b"a" * 300], [b"the\0m"], [b"[EMPTY_8]", b""], [b"", b"the"], [b"b" * 9 + b"c" * 9]],
)
def test_repeated_tokens_are_refused(tmp_path: Path, extra: list[bytes]) -> None:
    path = raw(tmp_path / "x.gguf", [texts("tokenizer.ggml.tokens", VOCABULARY + extra)])
    assert "are both" in reason(path)


@pytest.mark.parametrize("missing", [1, 200, 299, 301, 307, 308, 320])
def test_a_vocabulary_that_ends_within_a_token(tmp_path: Path, missing: int) -> None:
    path = raw(tmp_path / "x.gguf", [texts("tokenizer.ggml.tokens", [b"a", b"bc", b"d" * 300])])
    header = path.read_bytes().rstrip(b"\0")
    path.write_bytes(header[:-missing])
    assert "truncated or damaged: the value of 'tokenizer.ggml.tokens' would end at" in reason(path)


def test_random_vocabularies_agree_with_plain_python(tmp_path: Path) -> None:
    rng = random.Random(0)
    for _ in range(300):
        letters = rng.choice([b"ab", b"a\0", bytes(range(1, 256))])
        longest = rng.choice([2, 9, 30, 300])
        tokens = [bytes(rng.choices(letters, k=rng.randrange(longest))) for _ in range(rng.randrange(1, 40))]
        path = raw(tmp_path / "x.gguf", [texts("tokenizer.ggml.tokens", tokens)])
        as_c_reads = [token.split(b"\0")[0] or b"[EMPTY_%d]" % n for n, token in enumerate(tokens)]
        if len(set(as_c_reads)) == len(tokens):
            assert list(read_header(path).vocabulary.tokens.since(0)) == tokens
        else:
            assert "are both" in reason(path)


@pytest.mark.parametrize("change", [[], VOCABULARY[:3], [*VOCABULARY, b"more"], [*VOCABULARY, b"the"], [b"other"]])
def test_a_vocabulary_read_beside_a_like_one_is_the_same(tmp_path: Path, change: list[bytes]) -> None:
    like = read_header(raw(tmp_path / "like.gguf", [texts("tokenizer.ggml.tokens", VOCABULARY)])).vocabulary.lists
    path = raw(tmp_path / "x.gguf", [texts("tokenizer.ggml.tokens", change), key("z", 4, b"\7\0\0\0")])
    if len(set(change)) < len(change):
        with pytest.raises(ModelFileError, match="tokens 0 and 7 are both 'the'"):
            read_header(path, like)
        return
    header = read_header(path, like)
    assert list(header.vocabulary.tokens.since(0)) == change
    assert header.vocabulary.tokens.data == read_header(path).vocabulary.tokens.data
    assert header.metadata["z"] == 7


def rewritten(source: Path, path: Path, changes: dict[str, object]) -> Path:
    """`source` with values of its metadata changed; None leaves the key out."""
    reader = gguf.GGUFReader(source)
    new = dict(changes)
    writer = gguf.GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or new.get(name, 0) is None:
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, new.pop(name, field.contents()), field.types[0], sub_type)
    for name, value in new.items():
        if value is None:
            continue
        kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(name, value, gguf.GGUFValueType.UINT32 if type(value) is int else kind)
    for item in reader.tensors:
        writer.add_tensor(item.name, item.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"llama.block_count": 0}, "its block_count is 0"),
        ({"llama.block_count": 513}, "its block_count is 513"),
        ({"llama.nextn_predict_layers": 2}, "its nextn_predict_layers is 2, of 2 layers"),
        ({"llama.attention.head_count_kv": 0x20000001}, "its attention.head_count_kv is 536870913"),
        ({"llama.attention.head_count_kv": 3}, "its 2 attention heads cannot share 3 key heads"),
        ({"llama.rope.dimension_count": 8}, "its rope.dimension_count is 8, its heads have 16"),
        ({"llama.rope.scaling.type": "lineas"}, "its rope.scaling.type is 'lineas'"),
        ({"llama.attention.layer_norm_rms_epsilon": -1e-5}, "its attention.layer_norm_rms_epsilon is -"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "its attention.layer_norm_rms_epsilon is nan"),
        ({"llama.expert_count": 4}, "it has 4 experts and uses 0 of them"),
        ({"llama.expert_count": 2, "llama.expert_used_count": 3}, "it has 2 experts and uses 3 of them"),
        ({"llama.attention.causal": False}, "its attention is not causal"),
        (
            {"tokenizer.ggml.tokens": None, "tokenizer.ggml.token_type": None},
            "its tokenizer, of the kind 'gpt2', has no vocabulary for text",
        ),
        ({"tokenizer.ggml.model": "no_vocab"}, "its tokenizer, of the kind 'no_vocab', has no vocabulary for text"),
        ({"tokenizer.ggml.model": "llama"}, "its vocabulary has no token for the byte 0x00"),
        ({"general.type": "mmproj"}, "holds no language model (general.type 'mmproj', architecture 'llama')"),
    ],
)
def test_headers_on_which_llama_cpp_aborts(
    model: Path, tmp_path: Path, changes: dict[str, object], expected: str
) -> None:
    assert expected in reason(rewritten(model, tmp_path / "x.gguf", changes))


def test_an_unchanged_model_is_accepted(model: Path, tmp_path: Path) -> None:
    assert read_info(rewritten(model, tmp_path / "x.gguf", {})).tensors == read_info(model).tensors


def split(source: Path, folder: Path, n_shards: int = 3) -> list[Path]:
    """`source` in `n_shards` files, named as llama.cpp wants them."""
    reader = gguf.GGUFReader(source)
    paths = [folder / f"m-{number:05d}-of-{n_shards:05d}.gguf" for number in range(1, n_shards + 1)]
    for number, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        for name, field in reader.fields.items():
            if number == 0 and not name.startswith("GGUF.") and name != "general.architecture":
                sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(name, field.contents(), field.types[0], sub_type)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", n_shards)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for item in reader.tensors[number::n_shards]:
            writer.add_tensor(item.name, item.data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_model(model: Path, tmp_path: Path) -> None:
    shards = split(model, tmp_path)
    info, whole = read_info(shards[0]), read_info(model)
    assert info.shards == tuple(shards)
    assert info.tensors == whole.tensors
    assert info.tensor_bytes == whole.tensor_bytes
    assert info.file_bytes == sum(shard.stat().st_size for shard in shards)


def test_a_split_model_that_is_not_complete(model: Path, tmp_path: Path) -> None:
    first, second, third = split(model, tmp_path)
    assert reason(second) == "is file 2 of a model in 3 files; give m-00001-of-00003.gguf"
    content = third.read_bytes()
    third.unlink()
    assert reason(first) == "is the first of 3 files; there is no m-00003-of-00003.gguf"
    third.write_bytes(second.read_bytes())
    with pytest.raises(ModelFileError, match=r"m-00003-of-00003\.gguf: is not file 3 of 3 of m-00001-of-00003\.gguf"):
        read_info(first)
    third.write_bytes(content[:-100])
    with pytest.raises(ModelFileError, match=r"m-00003-of-00003\.gguf: truncated: \d+ of [\d,]+ bytes are missing"):
        read_info(first)
    third.write_bytes(content)
    other = first.rename(tmp_path / "other.gguf")
    assert "must be named …-00001-of-00003.gguf" in reason(other)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter.type": "control_vector"}, "is an adapter of type 'control_vector'; only LoRA adapters can be used"),
        ({"adapter.lora.alpha": float("inf")}, "whose adapter.lora.alpha is inf"),
        ({"adapter.lora.alpha": None}, "whose adapter.lora.alpha is None"),
        ({"a": None}, "without the tensor 't.weight.lora_a'"),
        ({"b": (5, 7)}, "the ranks of its pair for 't.weight' differ: shapes (8, 4) and (5, 7)"),
        ({"b": (4,)}, "its pair for 't.weight' has shapes (8, 4), (4,)"),
        ({"a": None, "b": None}, "changes nothing"),
        ({"other.weight": (4, 4)}, "the tensor 'other.weight', which is not half of a pair"),
    ],
)
def test_damaged_loras(tmp_path: Path, changes: dict[str, object], expected: str) -> None:
    keys: dict[str, object] = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0} | changes
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "llama")
    for name, value in keys.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
    shapes = {"t.weight.lora_a": keys.get("a", (8, 4)), "t.weight.lora_b": keys.get("b", (4, 7))}
    for name, shape in (shapes | {name: keys[name] for name in keys if name == "other.weight"}).items():
        if shape is not None:
            writer.add_tensor(name, np.zeros(shape[::-1], np.float32))  # type: ignore[index]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert expected in reason(tmp_path / "lora.gguf")


@pytest.mark.real
def test_real_files_truncated_and_flipped(real_family: str, tmp_path: Path) -> None:
    rng = random.Random(1)
    spec = FamilySpec.load(real_family)
    for source in (spec.large.local_path(), spec.base.local_path()):
        info = read_info(source)
        header_bytes = info.file_bytes - info.tensor_bytes
        copy = tmp_path / "copy.gguf"
        with source.open("rb") as file:
            header = file.read(header_bytes)
        copy.write_bytes(header)
        os.truncate(copy, info.file_bytes)
        assert read_info(copy).tensors == info.tensors
        for length in [
            *(rng.randrange(info.file_bytes) for _ in range(5)),
            *(rng.randrange(header_bytes) for _ in range(20)),
        ]:
            copy.write_bytes(header[:length])
            os.truncate(copy, length)
            assert reason(copy)
        for _ in range(50):
            flipped = bytearray(header)
            flipped[rng.randrange(header_bytes)] ^= 1 << rng.randrange(8)
            copy.write_bytes(flipped)
            os.truncate(copy, info.file_bytes)
            with contextlib.suppress(ModelFileError):
                read_info(copy)


@pytest.mark.parametrize("seed", range(30))
def test_arrays_of_strings_are_read_as_one_length_after_the_other(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [0, 1, 7, 8, 9, 16, 255, 256, 257, 512, 65535, 65536, 70000] if seed % 2 else range(1, 12)
    strings = [rng.randbytes(rng.choice(lengths)) for _ in range(rng.randrange(1, 200))]
    strings = [string if rng.random() < 0.1 else string.replace(b"\0", b"x") for string in strings]
    content = b"".join(len(string).to_bytes(8, "little") + string for string in strings)
    ends = [0, *itertools.accumulate(8 + len(string) for string in strings)]
    for behind in (b"", b"\1" * 9, bytes(20)):
        for n in {len(strings), len(strings) // 2}:
            found = plain_starts(content + behind, n).tolist()
            assert found == ends[: len(found)]
            assert len(found) <= n + 1
    as_c = [string.split(b"\0", 1)[0] or b"[EMPTY_%d]" % number for number, string in enumerate(strings)]
    assert (repeated(Texts(content, array("q", ends))) is None) == (len(set(as_c)) == len(as_c))
