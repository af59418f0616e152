"""Where models and families are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import platformdirs

from ..errors import InvalidParameterError, shown

CATALOGUE = "catalogue.toml"


def models_dir() -> Path:
    """Where families are looked up by name: $EDGE_DLF_MODELS, or `models` in the user's data folder."""
    chosen = os.environ.get("EDGE_DLF_MODELS")
    if chosen:
        return expanded(chosen)
    return user_dir("data") / "models"


def user_dir(kind: Literal["data", "cache", "state"]) -> Path:
    """The user's own folder of this kind. Where the user has no home, it is one that cannot be written."""
    try:
        return Path(getattr(platformdirs, f"user_{kind}_dir")("edge-dlf", appauthor=False))
    except RuntimeError:  # in a container, for a user without a name and $HOME
        return Path(os.devnull, "edge-dlf")


def expanded(path: str | Path) -> Path:
    """`path` with a leading ~ as the home it stands for. Raises InvalidParameterError where there is none."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InvalidParameterError(f"{path}: there is no such home folder") from error
    except TypeError:
        raise InvalidParameterError(f"a path must be text, not {shown(path)}") from None


def shipped_dir() -> Path:
    """The folder `models` that ships with edge-dlf: inside the package, or beside it in a source tree."""
    package = Path(__file__).parents[1]
    return next((f for f in (package / "models", package.parent / "models") if (f / CATALOGUE).is_file()), package)
