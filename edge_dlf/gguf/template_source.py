"""A chat template as a file holds it, and the tokens that it can name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class TemplateSource(NamedTuple):
    """A chat template of one member.

    source: jinja text. bos, eos: texts of these tokens, "" where there is none.
    control: text of each of the member's control tokens -> its id in the family.
    first: the token that every prompt begins with, if there is one.
    """

    source: str
    bos: str
    eos: str
    control: Mapping[str, int]
    first: int | None = None
