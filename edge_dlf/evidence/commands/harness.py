"""`python -m edge_dlf.harness`: lm-evaluation-harness's own command, which knows families of edge-dlf as models."""

from __future__ import annotations

from lm_eval.__main__ import cli_evaluate

import edge_dlf.evidence.harness  # noqa: F401  registers the model

if __name__ == "__main__":
    cli_evaluate()
