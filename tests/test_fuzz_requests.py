"""A few of the cases of `fuzz_requests.py`, always the same."""

from __future__ import annotations

import pytest

from edge_dlf.answers.origin import Marker

from .fuzz_requests import run


def test_every_body_is_answered_or_refused_with_a_reason() -> None:
    outcomes = run("requests", 300)
    assert outcomes[200] > 30
    assert outcomes[400] > 50


def test_no_text_of_a_message_is_a_control_token_whatever_the_template_does_with_it() -> None:
    assert run("templates", 200)["rendered"] > 150


def test_the_cases_find_texts_that_are_read_as_the_template_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    split = Marker.split
    monkeypatch.setattr(Marker, "split", lambda self, text: split(self, self.mark(self.plain(text))))
    with pytest.raises(AssertionError):
        run("templates", 300)


def test_the_cases_find_an_error_that_nobody_foresaw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edge_dlf.answers.preparer.Preparer.completion", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run("requests", 100)
