"""Memory by the header alone: what llama.cpp then allocates, who goes to the GPU, and what an error says would fit."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from edge_dlf import FusedLlama, InvalidParameterError, OutOfMemoryError
from edge_dlf.engine.backend import N_CHECKPOINTS, N_ROWS, Run
from edge_dlf.families import members
from edge_dlf.families.files import FamilyFiles, check_files
from edge_dlf.families.footprint import footprint
from edge_dlf.families.plan import Plan, Planner, gpu_of_layer
from edge_dlf.families.spec import FamilySpec
from edge_dlf.gguf.header import CACHE_TYPES, Array
from edge_dlf.gguf.info import GGUFInfo, read_info
from edge_dlf.llama import LlamaBackend, Model, gpus
from edge_dlf.llama.runtime import initialise
from edge_dlf.system.machine import GPU, Machine, cgroup_bytes, this_machine

from .tiny import HYBRIDS, tiny_model

GB = 1_000_000_000


def allocated(path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, float]:
    """Bytes of each kind of buffer that llama.cpp says it allocates on the CPU for a context over a model."""
    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def keep(_level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode())

    monkeypatch.setattr(initialise(), "_listen", keep)
    model = Model(path, 0, [0.0] * len(gpus()))
    LlamaBackend(model, "base", **settings).close()
    model.close()
    found: dict[str, float] = {}
    for line in lines:
        if match := re.search(r"(KV|RS|compute) buffer size = +([\d.]+) MiB", line):
            found[match[1]] = found.get(match[1], 0.0) + float(match[2]) * 2**20
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "mamba", *HYBRIDS])
@pytest.mark.parametrize("n_ubatch", [None, 128, 64])
@pytest.mark.parametrize(("n_ctx", "types"), [(300, (None, None)), (4096, ("f32", "bf16"))])
def test_caches_are_what_llama_cpp_allocates_and_buffers_no_more(
    tmp_path: Path,
    arch: str,
    n_ctx: int,
    types: tuple[str | None, str | None],
    n_ubatch: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tiny_model(tmp_path / "m.gguf", arch=arch, n_embd=64)
    own = footprint(read_info(path), *types)
    type_k, type_v = types
    settings = {"n_ctx": n_ctx, "n_rows": 4, "n_threads": 1, "n_ubatch": n_ubatch, "type_k": type_k, "type_v": type_v}
    found = allocated(path, monkeypatch, **settings)
    digits = 0.006 * 2**20  # two decimals of a MiB
    assert own.cache(n_ctx) == pytest.approx(found.get("KV", 0.0), abs=digits)
    assert own.states(1) == pytest.approx(found.get("RS", 0.0), abs=digits)
    assert 0 < found["compute"] < own.compute(n_ctx, 4, n_ubatch=n_ubatch)


@pytest.mark.parametrize("arch", ["mamba", *HYBRIDS])
def test_states_and_checkpoints_are_planned_for(tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny_model(tmp_path / "m.gguf", arch=arch, n_embd=64)
    own = footprint(read_info(path))
    found = allocated(path, monkeypatch, n_ctx=256, n_seq_max=7, n_threads=1)
    assert own.states(7) == 7 * own.state == pytest.approx(found["RS"], abs=0.006 * 2**20)
    model = Model(path)
    member = LlamaBackend(model, "base", n_ctx=256, n_threads=1)
    member.decode([Run(0, [1, 2, 3], 1)])
    member.checkpoint(0, lasting=True)
    (kept,) = member._states._lasting  # type: ignore[union-attr]
    assert own.state <= kept.state.nbytes < own.state + 1000
    member.close()
    model.close()
    files = check_files(FamilySpec.from_files(path, path, {"expert": path}))
    for n in (1, 7):
        plan = planned(files, Machine(8 * GB), 256, n_seqs=n)
        assert plan.members[0].cache_bytes == own.cache(256) + own.states(n) + (N_CHECKPOINTS + 1) * own.state


def test_weights_are_the_tensors(tiny: Path) -> None:
    info = read_info(tiny / "base.gguf")
    assert footprint(info).weights == info.tensor_bytes
    assert len(footprint(info).layers) == 2


def changed(info: GGUFInfo, changes: Mapping[str, object]) -> GGUFInfo:
    metadata = {**info.metadata, **{f"{info.architecture}.{key}": value for key, value in changes.items()}}
    return dataclasses.replace(info, metadata=metadata)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({}, [32, 32]),
        ({"attention.key_length": 24}, [40, 40]),
        ({"attention.key_length": 24, "attention.value_length": 8}, [32, 32]),
        ({"attention.head_count_kv": Array(4, 2, (2, 0))}, [64, 0]),
        ({"attention.key_length_mla": 16, "attention.value_length_mla": 16}, [16, 16]),
        ({"attention.shared_kv_layers": 1}, [32, 0]),
        ({"full_attention_interval": 2}, [0, 32]),
        (
            {
                "attention.sliding_window_pattern": Array(7, 2, (True, False)),
                "attention.key_length_swa": 8,
                "attention.value_length_swa": 8,
            },
            [16, 32],
        ),
        ({"nextn_predict_layers": 1}, [32]),
    ],
)
def test_values_of_one_cell_in_each_layer(tiny: Path, changes: dict[str, object], values: list[int]) -> None:
    info = changed(read_info(tiny / "base.gguf"), changes)
    assert [kv / 2 for kv in footprint(info).kv] == values
    assert [kv / (34 / 32) for kv in footprint(info, "q8_0", "q8_0").kv] == values


def test_plain_attention_takes_no_more_memory_than_flash_attention(tiny: Path) -> None:
    own = dataclasses.replace(footprint(read_info(tiny / "large.gguf")), n_ff=512)
    chosen = [own.n_ubatch(n_ctx) for n_ctx in range(256, 16384, 256)]
    for n_ctx, n_ubatch in zip(range(256, 16384, 256), chosen, strict=True):
        assert n_ubatch is None or own.compute(n_ctx, N_ROWS, n_ubatch=n_ubatch) <= own.compute(n_ctx, N_ROWS)
    assert set(chosen) == {128, 64, None}
    assert set(chosen[chosen.index(None) :]) == {None}


@pytest.mark.skipif(sys.platform != "linux", reason="its allocator gives memory back at once when told to")
@pytest.mark.parametrize("n_ubatch", [None, 64])
def test_what_a_cpu_computes_with_is_counted(tmp_path: Path, n_ubatch: int | None) -> None:
    path = tiny_model(tmp_path / "heads.gguf", n_embd=1024, n_layer=1, n_ctx=1280)
    program = f"""
import psutil
from edge_dlf.engine.backend import Run
from edge_dlf.llama import LlamaBackend, Model, gpus

rss, model = psutil.Process().memory_info, Model({str(path)!r}, 0, [0.0] * len(gpus()))
for n_ctx in 256, 1280:  # the first also pays for what a process pays once
    before = rss().rss
    member = LlamaBackend(model, "base", n_ctx=n_ctx, n_ubatch={n_ubatch}, n_threads=1)
    for _ in range(n_ctx // 256):
        member.decode([Run(0, [5] * 256, 1)])
    grown = rss().rss - before
    member.close()
print(grown)
"""
    at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    ended = subprocess.run([sys.executable, "-c", program], env=at_once, capture_output=True, check=True, text=True)
    own = footprint(read_info(path))
    assert int(ended.stdout) < own.cache(1280) + own.compute(1280, N_ROWS, n_ubatch=n_ubatch) + 2**20  # the graph


@pytest.mark.parametrize("types", [("q8_0", None), (None, "q8_0"), ("q4_0", "q4_0")])
def test_quantized_caches_need_flash_attention(tiny: Path, types: tuple[str | None, str | None]) -> None:
    assert footprint(read_info(tiny / "large.gguf"), *types).n_ubatch(256) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"attention.head_count_kv": Array(4, 2, (2, 0))},
        {
            "attention.sliding_window_pattern": Array(7, 2, (True, False)),
            "attention.value_length_swa": 8,
        },
        {"attention.key_length_mla": 16, "attention.value_length_mla": 16},
        {"attention.indexer.head_count": 4},
    ],
)
def test_what_plain_attention_computes_otherwise_keeps_flash_attention(tiny: Path, changes: dict[str, object]) -> None:
    info = read_info(tiny / "base.gguf")
    assert footprint(info).n_ubatch(256) is not None
    assert footprint(changed(info, changes)).n_ubatch(256) is None


def test_a_step_of_all_sequences_is_one_batch(tiny: Path) -> None:
    own = dataclasses.replace(footprint(read_info(tiny / "base.gguf")), n_ff=512)
    assert own.n_ubatch(256, 128) == 128
    assert own.n_ubatch(256, 129) is None


def test_cache_types_are_the_engines() -> None:
    named = {name: getattr(llama_cpp, f"GGML_TYPE_{name.upper()}", CACHE_TYPES[name]) for name in CACHE_TYPES}
    assert named == CACHE_TYPES


@pytest.fixture(scope="module")
def files(tiny: Path) -> FamilyFiles:
    return check_files(FamilySpec.load(tiny))


def planned(files: FamilyFiles, machine: Machine, n_cells: int = 512, **settings: object) -> Plan:
    return Planner(files, machine, **settings).plan(n_cells)  # type: ignore[arg-type]


def test_a_family_shares_the_weights_of_the_base(files: FamilyFiles) -> None:
    plan = planned(files, Machine(8 * GB))
    by_name = {member.name: member for member in plan.members}
    assert list(by_name) == ["large", "base", "lora", "tuned"]
    assert by_name["lora"].shares_with == "base"
    assert by_name["lora"].weights_bytes == files.loras["lora"][0][0].stat().st_size
    assert by_name["lora"].cache_bytes == by_name["base"].cache_bytes > 0
    assert plan.n_bytes < plan.host_bytes
    assert sum(plan.each_gpu_bytes) == 0
    assert plan.layers == dict.fromkeys(by_name, -1)
    assert None not in {member.n_ubatch for member in plan.members}


def test_beside_a_gpu_all_attend_by_flash_attention(files: FamilyFiles) -> None:
    plan = planned(files, Machine(8 * GB, gpus=(gpu(8 * GB),)), n_gpu_layers={"large": 1, "base": 0})
    assert {member.n_ubatch for member in plan.members} == {None}


def gpu(free: int, **settings: object) -> GPU:
    return GPU("GPU0", "a GPU", free, 2 * free, **settings)  # type: ignore[arg-type]


def test_all_layers_go_to_a_gpu_that_holds_them(files: FamilyFiles) -> None:
    plan = planned(files, Machine(8 * GB, gpus=(gpu(8 * GB),)))
    assert plan.layers == dict.fromkeys(("large", "base", "lora", "tuned"), -1)
    assert (
        sum(plan.each_gpu_bytes)
        > sum(info.tensor_bytes for info in {id(i): i for i in files.models.values()}.values()) / 2
    )


def test_the_small_models_go_to_the_gpu_first(tiny: Path, tmp_path: Path) -> None:
    large = tiny_model(tmp_path / "large.gguf", n_embd=512, n_layer=6)
    files = check_files(FamilySpec.from_files(large, tiny / "base.gguf", {"lora": tiny / "lora.gguf"}))
    whole = planned(files, Machine(8 * GB, gpus=(gpu(8 * GB),)))
    rows = []
    for percent in range(0, 101, 5):
        plan = planned(files, Machine(8 * GB, gpus=(gpu(400_000_000 + sum(whole.each_gpu_bytes) * percent // 100),)))
        assert sum(plan.each_gpu_bytes) <= sum(whole.each_gpu_bytes) * percent / 100
        by_name = {member.name: member.n_gpu_layers for member in plan.members}
        assert by_name["base"] == by_name["lora"]
        rows.append((by_name["base"], by_name["large"]))
    assert rows[0] == (0, 0)
    assert rows[-1] == (3, 7)
    assert all(base == 3 for base, large in rows if large)
    assert {large for _, large in rows} > {0, 3, 7}
    assert rows == sorted(rows)


def test_a_gpu_computes_for_models_on_the_host_where_it_has_room(files: FamilyFiles) -> None:
    names, on_host = ("large", "base", "lora", "tuned"), {"n_gpu_layers": 0}
    roomy = planned(files, Machine(8 * GB, gpus=(gpu(8 * GB),)), **on_host)
    assert roomy.splits == dict.fromkeys(names, (1.0,))
    own = {name: footprint(info) for name, info in files.models.items()}
    lent = {name: max(each.widest, *(int(512 * kv) for kv in each.kv)) for name, each in own.items()}
    needed = [each.compute(512, N_ROWS) + lent[name] for name, each in own.items()]
    assert roomy.each_gpu_bytes == (sum(needed),)
    with_heads = [each.compute(512, 32) + max(lent[name], each.output) for name, each in own.items()]
    many = planned(files, Machine(8 * GB, gpus=(gpu(8 * GB),)), n_seqs=32, **on_host)
    assert many.each_gpu_bytes == (sum(with_heads),)
    full = planned(files, Machine(8 * GB, gpus=(gpu(400_000_000),)), **on_host)
    assert full.splits == dict.fromkeys(names, (0.0,))
    assert full.each_gpu_bytes == (0,)


def test_part_of_a_model_leaves_larger_ones_room_for_their_prompts(tiny: Path, tmp_path: Path) -> None:
    large, base = (tiny_model(tmp_path / f"{n}.gguf", n_embd=n, n_layer=6) for n in (1024, 512))
    files = check_files(FamilySpec.from_files(large, base, {"tuned": base}))
    whole = planned(files, Machine(8 * GB, gpus=(gpu(8 * GB),)), names=["base", "tuned"])
    plan = planned(files, Machine(8 * GB, gpus=(gpu(400_000_000 + sum(whole.each_gpu_bytes) - 1),)))
    assert 0 < plan.layers["base"] < 7
    assert plan.layers["large"] < 7
    assert plan.splits["large"] == (1.0,)
    small = planned(files, Machine(8 * GB, gpus=(gpu(400_000_000 + sum(whole.each_gpu_bytes)),)))
    assert small.on_gpu == {"base", "tuned"}  # a whole model comes first
    assert small.splits["large"] == (0.0,)


def test_a_gpu_that_uses_the_hosts_memory_counts_there_too(files: FamilyFiles) -> None:
    apart = planned(files, Machine(8 * GB, gpus=(gpu(8 * GB),)))
    shared = planned(files, Machine(8 * GB, gpus=(gpu(8 * GB, shares_host=True),)))
    assert shared.host_bytes == apart.host_bytes + sum(apart.each_gpu_bytes)


def test_layers_asked_for_that_the_gpu_cannot_hold(files: FamilyFiles) -> None:
    machine = Machine(8 * GB, gpus=(gpu(401_000_000),))
    with pytest.raises(OutOfMemoryError, match=r"with these layers, 401 MB are free there; n_gpu_layers of large=\d,"):
        planned(files, machine, n_gpu_layers=99)
    with pytest.raises(OutOfMemoryError) as caught:
        planned(files, machine, n_gpu_layers={"large": 3})
    said = re.search(r"n_gpu_layers of (\S+) would fit", str(caught.value))
    assert said
    fits = {name: int(number) for name, number in (pair.split("=") for pair in said[1].split(","))}
    assert planned(files, machine, n_gpu_layers=fits).layers["large"] == fits["large"]


def of_sizes(tiny: Path, folder: Path, n_layer: int = 6) -> FamilyFiles:
    large = tiny_model(folder / "large.gguf", n_embd=512, n_layer=n_layer)
    return check_files(FamilySpec.from_files(large, tiny / "base.gguf", {"lora": tiny / "lora.gguf"}))


def test_room_for_many_sequences_pushes_no_layer_off_the_gpu(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = of_sizes(tiny, tmp_path)
    one = planned(files, several(8 * GB), 512, n_seqs=32)
    many = planned(files, several(8 * GB), 32 * 512, n_seqs=32)
    assert sum(many.each_gpu_bytes) > sum(one.each_gpu_bytes) + 10**6
    machine = several(400_000_000 + (sum(one.each_gpu_bytes) + sum(many.each_gpu_bytes)) // 2)
    assert planned(files, machine, 32 * 512, n_seqs=32).layers["large"] < 7
    monkeypatch.setattr(members, "this_machine", lambda _: machine)
    asked: dict[str, Any] = dict.fromkeys(("main_gpu", "tensor_split", "type_k", "type_v"))
    plan = members.plan_memory(files, n_ctx=512, n_parallel=32, n_gpu_layers=-1, **asked)
    assert set(plan.layers.values()) == {-1}
    assert plan.on_gpu == {"large", "base", "lora"}
    assert 512 < plan.n_cells < 32 * 512
    longer = members.plan_memory(files, n_ctx=32 * 512, n_parallel=32, n_gpu_layers=-1, **asked)
    assert longer.n_cells >= 32 * 512
    assert longer.layers["large"] < 7


def several(*free: int) -> Machine:
    return Machine(8 * GB, gpus=tuple(GPU(f"CUDA{n}", "a GPU", each, 2 * each) for n, each in enumerate(free)))


def test_of_several_gpus_a_model_gets_one_that_holds_it(tiny: Path, tmp_path: Path) -> None:
    files = of_sizes(tiny, tmp_path)
    one = planned(files, several(8 * GB))
    large, base = (Planner(files, several(8 * GB), names=names) for names in (["large"], ["base", "lora"]))
    large_bytes, base_bytes = (sum(planner.plan(512).each_gpu_bytes) for planner in (large, base))
    assert sum(one.each_gpu_bytes) == large_bytes + base_bytes
    two = planned(files, several(400_000_000 + large_bytes, 400_000_000 + base_bytes))
    assert two.splits == {"large": (1.0, 0.0), "base": (0.0, 1.0), "lora": (0.0, 1.0)}
    assert two.each_gpu_bytes == (large_bytes, base_bytes)
    assert set(two.layers.values()) == {-1}


def test_a_model_that_no_gpu_holds_alone_is_spread_over_them(tiny: Path, tmp_path: Path) -> None:
    files = of_sizes(tiny, tmp_path)
    large_bytes = sum(planned(files, several(8 * GB), names=["large"]).each_gpu_bytes)
    plan = planned(files, several(*[400_000_000 + large_bytes - 1] * 2), names=["large"])
    assert all(plan.splits["large"])
    assert plan.layers["large"] == -1
    assert 0 < min(plan.each_gpu_bytes) < max(plan.each_gpu_bytes) < large_bytes
    assert sum(plan.each_gpu_bytes) > large_bytes


def test_gpus_and_shares_that_are_asked_for(tiny: Path, tmp_path: Path) -> None:
    files = of_sizes(tiny, tmp_path)
    machine = several(*[8 * GB] * 3)
    assert set(planned(files, machine, main_gpu=2).splits.values()) == {(0.0, 0.0, 1.0)}
    each = planned(files, machine, main_gpu={"large": 1}, tensor_split=[3, 1])
    assert each.splits == {"large": (0.0, 1.0, 0.0), "base": (3.0, 1.0, 0.0), "lora": (3.0, 1.0, 0.0)}
    assert each.each_gpu_bytes[2] == 0 < each.each_gpu_bytes[0] < each.each_gpu_bytes[1]
    assert planned(files, Machine(8 * GB), main_gpu=5, tensor_split=None).splits == dict.fromkeys(each.splits, ())


def test_a_split_that_one_gpu_cannot_hold_names_it(tiny: Path, tmp_path: Path) -> None:
    files = of_sizes(tiny, tmp_path)
    machine = several(8 * GB, 401_000_000)
    with pytest.raises(OutOfMemoryError, match=r" on CUDA1 with these layers, 401 MB are free there; .* would fit"):
        planned(files, machine, main_gpu=1, n_gpu_layers=7)
    fitting = planned(files, machine, main_gpu=1)
    assert fitting.layers["large"] < 7
    assert fitting.each_gpu_bytes[0] == 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"main_gpu": 2}, "main_gpu is 2, but the GPUs are 0 to 1"),
        ({"main_gpu": -1}, "counts GPUs from 0"),
        ({"main_gpu": {"poetry": 1}}, "main_gpu names 'poetry'"),
        ({"main_gpu": {"lora": 1}}, "main_gpu names 'lora', a LoRA"),
        ({"main_gpu": 0, "tensor_split": [1, 1]}, "exclude each other"),
        ({"tensor_split": [1, 1, 1]}, "3 shares for 2 GPUs"),
        ({"tensor_split": [0, 0]}, "must be shares"),
        ({"tensor_split": []}, "must be shares"),
        ({"tensor_split": [1, -1]}, "must be shares"),
        ({"tensor_split": [float("nan")]}, "must be shares"),
        ({"tensor_split": [float("inf")]}, "must be shares"),
    ],
)
def test_gpus_and_shares_that_cannot_be(files: FamilyFiles, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        Planner(files, several(8 * GB, 8 * GB), **settings)


@pytest.mark.parametrize(
    ("split", "n_gpu", "counts"),
    [((1.0, 1.0), 8, (4, 4)), ((3.0, 1.0), 8, (6, 2)), ((1.0, 0.0, 1.0), 5, (3, 0, 2)), ((0.0, 2.0), 3, (0, 3))],
)
def test_layers_are_shared_out_as_llama_cpp_does(split: tuple[float, ...], n_gpu: int, counts: tuple[int, ...]) -> None:
    gpus = [gpu_of_layer(number, n_gpu, split) for number in range(n_gpu)]
    assert tuple(gpus.count(gpu) for gpu in range(len(split))) == counts
    assert gpus == sorted(gpus)


def test_a_context_that_does_not_fit_names_one_that_does(files: FamilyFiles) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        planned(files, Machine(GB, "a limit of its control group"), n_cells=10_000_000)
    said = re.fullmatch(
        r"large, base, lora and tuned need [\d.]+ GB, [\d.]+ GB of it for a context of 10000000; 1.0 GB are free "
        r"\(by a limit of its control group\); a context of (\d+) would fit",
        str(caught.value),
    )
    assert said
    largest = Planner(files, Machine(GB)).largest_n_cells(10_000_000)
    planned(files, Machine(GB), n_cells=largest)
    with pytest.raises(OutOfMemoryError):
        planned(files, Machine(GB), n_cells=largest + 1)
    # What is named fits where a little less is free when it is tried.
    planned(files, Machine(GB - GB // 200), n_cells=int(said[1]))
    assert 0.98 * largest < int(said[1]) < largest


def test_members_can_be_planned_beside_others(files: FamilyFiles) -> None:
    machine = Machine(8 * GB)
    every = planned(files, machine)
    first = planned(files, machine, names=["large", "lora"])
    assert [member.name for member in first.members] == ["large", "lora"]
    assert first.members[1].shares_with is None
    base, lora = every.members[1:3]
    assert first.members[1].weights_bytes == base.weights_bytes + lora.weights_bytes
    more = planned(files, machine, names=["base", "tuned"], beside=first)
    assert [member.name for member in more.members] == ["base", "tuned"]
    assert more.members[0].weights_bytes == 0  # the adapter has brought them
    assert more.members[1] == every.members[3]
    assert first.n_bytes + more.n_bytes == pytest.approx(every.n_bytes, abs=base.buffer_bytes)
    with pytest.raises(OutOfMemoryError, match=r"^base needs [\d.]+ MB, .* for a context of 512; 0 MB are free"):
        planned(files, Machine(0), names=["base"], beside=first)


def test_contexts_beside_others_are_where_their_weights_are(files: FamilyFiles) -> None:
    machine = several(8 * GB, 8 * GB)
    first = planned(files, machine, names=["large", "lora"], n_gpu_layers={"base": 2}, main_gpu={"base": 1})
    (base,) = planned(files, machine, names=["base"], beside=first, n_gpu_layers=0).members
    assert (base.n_gpu_layers, base.split) == (2, (0.0, 1.0))


def test_weights_that_do_not_fit(files: FamilyFiles) -> None:
    with pytest.raises(OutOfMemoryError, match="not even the smallest context would fit: take smaller files"):
        planned(files, Machine(100_000_000))


def test_unknown_cache_types_and_members_are_refused(files: FamilyFiles) -> None:
    with pytest.raises(InvalidParameterError, match="not 'q9_9'"):
        Planner(files, Machine(GB), type_k="q9_9")
    with pytest.raises(InvalidParameterError, match="'smal'"):
        Planner(files, Machine(GB), n_gpu_layers={"smal": 3})


def test_a_context_that_memory_cannot_hold_is_refused_before_anything_is_loaded(tiny: Path) -> None:
    with pytest.raises(OutOfMemoryError, match=r"2000000000; .* GB are free; a context of \d+ would fit"):
        FusedLlama.from_family(tiny, n_ctx=2 * 10**9)


def group(folder: Path, limit: str, usage: int, cache: int, version: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    prefix = "" if version == 2 else "total_"
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    stat = f"anon 7\n{prefix}inactive_file {cache}\n{prefix}active_file 5\nfile 1000000\n"
    (folder / "memory.stat").write_text(stat)


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_every_control_group_above(tmp_path: Path, version: int) -> None:
    own = tmp_path / "own"
    own.write_text("0::/user/session\n" if version == 2 else "7:cpu:/\n4:hugetlb,memory:/user/session\n0::/\n")
    root = tmp_path / "cgroup"
    top = root if version == 2 else root / "memory"
    group(top / "user", "9000", 5000, 100, version)
    group(top / "user" / "session", "max" if version == 2 else "9223372036854771712", 2000, 10, version)
    group(tmp_path, "1", 0, 0, version)
    left = sorted(cgroup_bytes(root, own))
    assert left[0] == 9000 - 5000 + 100 + 5
    assert len(left) == (1 if version == 2 else 2)


def test_a_container_that_does_not_see_its_own_group(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("0::/docker/0123\n")
    group(tmp_path / "cgroup", "4000", 1000, 0, 2)
    assert list(cgroup_bytes(tmp_path / "cgroup", tmp_path / "own")) == [3005]
    assert list(cgroup_bytes(tmp_path / "cgroup", tmp_path / "missing")) == []


def test_this_machine_has_memory_and_its_gpus_say_what_they_have() -> None:
    machine = this_machine(gpus())
    assert machine.free_bytes > 0
    assert all(0 < gpu.free_bytes <= gpu.total_bytes and gpu.name for gpu in machine.gpus)


LIMITED = """
import resource, sys
from edge_dlf.cli import main
import edge_dlf.api, edge_dlf.system.machine as machine
in_use = machine.psutil.Process().memory_info().vms
resource.setrlimit(resource.RLIMIT_AS, (in_use + int(sys.argv.pop(1)), resource.RLIM_INFINITY))
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited so on Linux only")
@pytest.mark.skipif(bool(gpus()), reason="a GPU's driver takes address space of its own")
def test_under_ulimit_the_context_that_the_error_names_runs(tiny: Path) -> None:
    def generate(n_ctx: int) -> subprocess.CompletedProcess[str]:
        arguments = ["generate", "--family", str(tiny), "--ctx-size", str(n_ctx), "--threads", "1", "--max-tokens", "4"]
        command = [sys.executable, "-c", LIMITED, "700000000", *arguments, "--raw", "hello"]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])

    refused = generate(1_000_000)
    assert refused.returncode == 4
    last = refused.stderr.splitlines()[-1]
    said = re.fullmatch(r"edge-dlf: .* are free \(by ulimit -v\); a context of (\d+) would fit", last)
    assert said, refused.stderr
    assert generate(int(said[1])).returncode == 0
