"""A few hostile forms against a server beside other clients; `benchmarks/form_attack.py` sends a thousand."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn")

from benchmarks.form_attack import run


def test_hostile_forms_harm_neither_the_server_nor_other_clients() -> None:
    report = run(n_forms=8, n_attackers=4, seed=7, n_tokens=2)
    assert report.faults == []
    assert report.exit_code == 143
    assert sum(report.outcomes.values()) == 8
    assert {"stop", "length"} & set(report.outcomes)
    assert report.n_others >= 8
    assert report.n_different == 0
