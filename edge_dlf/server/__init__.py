"""An OpenAI-compatible server over one family: requests in over HTTP, one scheduler for all of them.

`app` routes and answers; `calls` reads bodies and writes results and errors; `decoding` is the thread that decodes;
`openapi` describes it all; `running` binds, serves and stops.
"""

from .app import LOOPBACK, Rules, make_app
from .running import Address, run

__all__ = ["LOOPBACK", "Address", "Rules", "make_app", "run"]
