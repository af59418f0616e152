"""Ten thousand damaged headers on every run; `python tests/fuzz_headers.py` checks as many as one likes."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


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
