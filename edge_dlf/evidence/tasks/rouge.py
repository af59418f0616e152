"""ROUGE-2 of a summary, for `paper_cnn_dm.yaml`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The F measure, from 0 to 1, of stemmed bigrams."""
    return {"rouge2": float(_scorer().score(doc["highlights"], results[0])["rouge2"].fmeasure)}


@lru_cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge2"], use_stemmer=True)
