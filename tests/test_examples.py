"""The programs in examples/ run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_dlf import FusedLlama

from .http_server import serving

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.py"))
PRINTED = {
    "openai_client.py": "The answer is 13, 34, 94.",
    "own_logits.py": "the fusion 42",
    "score_a_batch.py": "dynamic  12 of 12 right",
    "stream.py": "' answer'",
    "form.py": "'The answer is 75.'",
}


def printed_by(path: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, path], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_prints_what_it_promises(path: Path) -> None:
    if path.name != "openai_client.py":
        assert PRINTED[path.name] in printed_by(path)
        return
    with FusedLlama.from_family("demo", n_ctx=512, n_threads=1) as llm, serving(llm) as server:
        address = f"{str(server.base_url).rstrip('/')}/v1"
        assert PRINTED[path.name] in printed_by(path, OPENAI_BASE_URL=address)
