"""A few of the batches of `fuzz_batch.py`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from edge_dlf import FusedLlama

from .fuzz_batch import property_of
from .guided import limits


def test_every_line_has_one_row_whatever_it_holds_and_wherever_a_run_is_cut(tiny: Path, tmp_path: Path) -> None:
    kinds: Counter[str] = Counter()
    with FusedLlama.from_family(tiny, n_ctx=64, n_threads=1) as llm:
        limits(max_examples=40, derandomize=True)(property_of(llm, tmp_path, kinds.update))()
    assert kinds["answered"]
    assert {"invalid_request", "invalid_json"} <= set(kinds)
