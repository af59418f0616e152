"""Some damaged files of every kind on every run; the programs that make them check as many as one likes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from . import fuzz_family, fuzz_files


def test_ten_thousand_damaged_headers_are_refused_or_accepted() -> None:
    script = Path(__file__).with_name("fuzz_headers.py")
    done = subprocess.run([sys.executable, script, "--cases", "10000"], capture_output=True, text=True)
    said = re.fullmatch(
        r"10,000 files: [\d,]+ refused for (\d+) kinds of reasons, ([\d,]+) accepted; slowest \d+ ms, "
        r"peak memory (\d+) MB\n",
        done.stdout,
    )
    assert said, done.stderr
    n_reasons, n_accepted, peak_mb = (int(number.replace(",", "")) for number in said.groups())
    assert n_reasons >= 20
    assert n_accepted > 100
    assert peak_mb < 200


@pytest.mark.parametrize(
    ("target", "n_cases", "outcomes"),
    [
        ("lora", 400, {"refused by its header", "accepted, then runs"}),
        ("kernels", 500, {"to be compiled", "found again"}),
    ],
)
def test_damaged_files_beside_models(tmp_path: Path, target: str, n_cases: int, outcomes: set[str]) -> None:
    if target == "kernels":
        numba = pytest.importorskip("numba")
        if numba.config.DISABLE_JIT:
            pytest.skip("nothing is compiled")
    counts = fuzz_files.fuzz(target, n_cases, 1, tmp_path)
    assert counts.keys() >= outcomes


def test_every_family_toml_is_a_family_or_refused_and_takes_settings() -> None:
    outcomes = fuzz_family.run(300)
    assert outcomes["refused"] > 50
    assert outcomes["with settings"] > 20
