"""Models in several files: all of them are checked as one, and what is missing or out of order is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import pytest

from edge_dlf import FusedLlama, ModelFileError
from edge_dlf.families.footprint import footprint
from edge_dlf.gguf.info import read_info

N_FILES = 3


def shard(folder: Path, number: int, name: str = "split") -> Path:
    return folder / f"{name}-{number:05d}-of-{N_FILES:05d}.gguf"


def split(source: Path, folder: Path) -> Path:
    """Write the model in `source` as N_FILES files and return the first."""
    reader = gguf.GGUFReader(source)
    per_file = -(-len(reader.tensors) // N_FILES)
    writer = gguf.GGUFWriter(folder / "split.gguf", "llama", split_max_tensors=per_file)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type)
    for item in reader.tensors:
        writer.add_tensor(item.name, item.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return shard(folder, 1)


@pytest.fixture
def first(tiny: Path, tmp_path: Path) -> Path:
    return split(tiny / "base.gguf", tmp_path)


def reason(path: Path) -> str:
    with pytest.raises(ModelFileError) as caught:
        read_info(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_all_files_together_are_the_model(first: Path, tiny: Path) -> None:
    whole, parts = read_info(tiny / "base.gguf"), read_info(first)
    assert parts.shards == tuple(shard(first.parent, number) for number in (1, 2, 3))
    assert parts.tensors == whole.tensors
    assert parts.tensor_bytes == whole.tensor_bytes
    assert footprint(parts).weights == footprint(whole).weights


def test_a_family_runs_from_its_shards(first: Path, tiny: Path) -> None:
    texts = []
    for base in (tiny / "base.gguf", first):
        with FusedLlama(tiny / "large.gguf", base, {"e": tiny / "lora.gguf"}, n_ctx=256, n_threads=1) as llm:
            texts.append([token.id for token in llm.stream("the", temperature=0.0, max_tokens=8)])
    assert texts[0] == texts[1]


def test_a_missing_shard_is_named(first: Path) -> None:
    shard(first.parent, 2).unlink()
    assert f"{first}: is the first of 3 files; there is no {shard(first.parent, 2).name}" in reason(first)


def test_another_shard_than_the_first(first: Path) -> None:
    assert f"is file 3 of a model in 3 files; give {first.name}" in reason(shard(first.parent, 3))


def test_shards_that_changed_places(first: Path) -> None:
    second, third, aside = shard(first.parent, 2), shard(first.parent, 3), first.parent / "aside"
    second.rename(aside)
    third.rename(second)
    aside.rename(third)
    assert f"{second}: is not file 2 of 3 of {first.name}" in reason(first)


def test_a_first_shard_under_another_name(first: Path) -> None:
    path = shutil.copy(first, first.parent / "model.gguf")
    assert "is the first of 3 files, and must be named …-00001-of-00003.gguf" in reason(Path(path))


def test_a_truncated_shard(first: Path) -> None:
    second = shard(first.parent, 2)
    second.write_bytes(second.read_bytes()[:-100])
    assert str(second) in reason(first)
    assert "bytes are missing at its end" in reason(first)


def test_a_shard_of_another_model(first: Path, tmp_path: Path, tiny: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    split(tiny / "large.gguf", other)
    shutil.copy(shard(other, 3), shard(first.parent, 2))
    assert "is not file 2 of 3" in reason(first)
