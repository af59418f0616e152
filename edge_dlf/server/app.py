"""Routes of the server, and the checks before them: keys, hosts, origins and limits."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from ..answers.completion import Completion, Dict
from ..answers.requests import CHAT, COMPLETIONS
from ..answers.token import Token
from ..errors import InvalidParameterError, shown
from ..params import DEFAULTS, profile_of
from . import openapi
from .calls import Call, chunk, encode, total, whole
from .decoding import DecodingThread, Ticket
from .metrics import Metrics
from .page import page
from .refusals import HTTPError

if TYPE_CHECKING:
    from ..api import FusedLlama

MAX_BODY = 8 * 2**20
"""Bytes of the longest body."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
"""Names of this machine for itself."""
_SHORT_BODY = 64 * 2**10
"""Bytes of a body that is read in no time."""
_BODY_S = 30.0
"""Seconds that a client may take to send a body."""
_OPEN = ("/", "/health")
"""Paths that are answered without a key."""


@dataclass(frozen=True)
class Rules:
    """Rules for clients.

    settings: arguments of `FusedLlama.prepare`, for requests that do not set them.
    n_waiting: requests that may wait until others end.
    timeout_s: seconds that an answer may take.
    api_key: the key that clients must send; None for no key.
    hosts: names that clients without a key may call this server by; None for any name.
    Raises InvalidParameterError for a key that no header can carry.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    n_waiting: int = 64
    timeout_s: float = 600.0
    api_key: str | None = None
    hosts: tuple[str, ...] | None = LOOPBACK

    def __post_init__(self) -> None:
        key = self.api_key
        if key is not None and (not key or key.strip() != key or not key.isascii() or not key.isprintable()):
            raise InvalidParameterError(
                "no client could send this API key: it must be visible ASCII characters, without a blank at its ends"
            )


def make_app(llm: FusedLlama, rules: Rules) -> Starlette:
    """The server as an ASGI application. `app.state.thread` is its engine, which runs with the application."""
    service = _Service(llm, rules)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        service.thread.open()
        yield
        await asyncio.to_thread(service.thread.close)
        service.preparing.shutdown(wait=False, cancel_futures=True)
        llm.end_forms()
        service.preparing.shutdown()

    routes = [
        Route("/", service.show_page),
        Route("/health", service.health),
        Route("/metrics", service.show_metrics),
        Route("/openapi.json", service.describe),
        Route("/v1/models", service.list_models),
        Route("/v1/models/{model:path}", service.show_model),
        Route(CHAT, partial(service.answer, is_chat=True), methods=["POST"]),
        Route(COMPLETIONS, partial(service.answer, is_chat=False), methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: _refuse, Exception: _refuse},
    )
    app.add_middleware(_AccessControl, rules=rules, metrics=service.metrics)
    app.router.redirect_slashes = False
    app.state.thread = service.thread
    return app


def models_of(llm: FusedLlama, settings: Mapping[str, Any]) -> dict[str, Dict]:
    """Name of each model on offer, that of the family's own method first, and the fields of a body that it stands for.

    settings: of the server, for requests that do not set them. A profile goes before an expert of the same name.
    """
    spec, methods = llm.files.spec, llm.files.methods
    given = {**DEFAULTS, **spec.settings(), **settings}
    hidden = {"base", *([] if given["weights"] else ["weighted"])}
    hidden |= {methods[0]} if given["method"] == methods[0] else set()
    models: dict[str, Dict] = {name: {"edge_dlf": {"method": name}} for name in methods if name not in hidden}
    models |= {name: {"profile": name} for name in spec.profiles}
    return {llm.name: {}, **{f"{llm.name}:{name}": fields for name, fields in models.items()}}


class _JSON(Response):
    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode(content)


class _Events(StreamingResponse):
    """Server-sent events, after which the ticket is closed: the answers end when their client leaves."""

    def __init__(self, events: AsyncIterator[bytes], ticket: Ticket) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._ticket = ticket

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ticket.close()


class _Service:
    def __init__(self, llm: FusedLlama, rules: Rules) -> None:
        self.llm, self.rules, self.metrics = llm, rules, Metrics()
        self.thread = DecodingThread(llm, llm.driver.n_parallel + rules.n_waiting, self.metrics)
        self.metrics.watch(llm.driver)
        self.models = models_of(llm, rules.settings)
        # A thread for each request, so that one that takes long to prepare keeps no other waiting.
        self.preparing = ThreadPoolExecutor(self.thread.n_most, "edge-dlf prepare")

    async def show_page(self, request: Request) -> Response:
        content, headers = page()
        return Response(content, media_type="text/html", headers=headers)

    async def health(self, request: Request) -> Response:
        return _JSON({"status": "ok"})

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def describe(self, request: Request) -> Response:
        return _JSON(openapi.document(tuple(self.models)))

    async def list_models(self, request: Request) -> Response:
        models, examples = list(map(self._model, self.models)), list(self.llm.files.spec.examples)
        return _JSON({"object": "list", "data": models, "edge_dlf": {"examples": examples}})

    async def show_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.models:
            raise HTTPError(404, f"the model {shown(name)} does not exist", "model_not_found")
        return _JSON(self._model(name))

    def _model(self, name: str) -> Dict:
        """Describe a model. Where its method has fixed numbers, they are told as a request may set them."""
        fields, files = self.models[name], self.llm.files
        profile = profile_of(files.spec.profiles, fields.get("profile"))
        own = {**DEFAULTS, **files.spec.settings(), **self.rules.settings, **profile, **fields.get("edge_dlf", {})}
        method, roles = own["method"], files.roles(own)
        about = {"id": name, "object": "model", "created": 0, "owned_by": "edge-dlf"}
        about |= {"method": method, "experts": list(self.llm.experts)}
        if method == "static":
            alphas = dict(zip(roles.experts, roles.alphas(), strict=True))
            return {**about, "alpha": {expert: alphas.get(expert, 0.0) for expert in self.llm.experts}}
        if method in ("weighted", "blend"):
            weights = dict(zip(roles.members, roles.weights or (), strict=True))
            return {**about, "weights": {member: weights.get(member, 0.0) for member in files.models}}
        return about

    async def answer(self, request: Request, *, is_chat: bool) -> Response:
        try:
            call = await self._parsed(await _read(request), is_chat=is_chat)
            ticket = self.thread.ticket(len(call.requests), is_streamed=call.stream)
            try:
                return await self._respond(request, call, ticket)
            except BaseException:
                ticket.close()
                raise
        except ClientDisconnect:
            raise
        except Exception as error:
            raise HTTPError.of(error) from error

    async def _parsed(self, body: bytes, *, is_chat: bool) -> Call:
        """Read a body, a long one beside other requests."""
        parse = partial(Call.parse, body, self.models, is_chat=is_chat)
        return parse() if len(body) <= _SHORT_BODY else await asyncio.to_thread(parse)

    async def _respond(self, request: Request, call: Call, ticket: Ticket) -> Response:
        loop = asyncio.get_running_loop()
        choices = await loop.run_in_executor(self.preparing, call.prepare, self.llm, self.rules.settings)
        ticket.start([choice.answer for choice in choices], self.rules.timeout_s)
        if call.stream:
            return _Events(_stream(call, choices, ticket), ticket)
        tokens = await self._gather(request, ticket)
        ticket.close()
        return _JSON(whole(call, choices, tokens))

    async def _gather(self, request: Request, ticket: Ticket) -> list[list[Token]]:
        """Return the tokens of every choice. Raises ClientDisconnect when the client has left."""
        tokens: list[list[Token]] = [[] for _ in ticket.answers]

        async def end_with_the_client() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            watched.cancel()

        watched = anyio.CancelScope()
        watcher = asyncio.ensure_future(end_with_the_client())
        try:
            with watched:
                async for events in ticket:
                    for event in events:
                        tokens[event.index] += event.tokens
        finally:
            watcher.cancel()
        if watched.cancelled_caught:
            raise ClientDisconnect
        return tokens


async def _stream(call: Call, choices: list[Completion], ticket: Ticket) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a call. An error is one of them, once the answer has begun."""
    try:
        for choice in choices:
            yield _events([*choice.opening()])
        async for events in ticket:
            made = []
            for event in events:
                choice = choices[event.index]
                made += [chunk(call, choice, token) for token in event.tokens]
                made += [choice.closing()] if event.is_last else []
            yield _events(made)
        if call.include_usage:
            yield _events([total(call, choices)])
        yield b"data: [DONE]\n\n"
    except Exception as error:
        yield _events([HTTPError.of(error).body()])


def _events(chunks: list[Dict]) -> bytes:
    return b"".join(b"data: " + encode(chunk) + b"\n\n" for chunk in chunks)


async def _read(request: Request) -> bytes:
    """Body of a request. Raises HTTPError where it is too long, or does not come in time."""
    body = bytearray()
    try:
        with anyio.fail_after(_BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > MAX_BODY:
                    raise HTTPError(413, f"a body may have {MAX_BODY} bytes", "body_too_large")
    except TimeoutError:
        raise HTTPError(408, f"the body did not come within {_BODY_S:.0f} s", "timeout") from None
    return bytes(body)


async def _refuse(request: Request, error: Exception) -> Response:
    refusal = HTTPError.of(error)
    if type(error) is HTTPException and error.status_code in (404, 405):  # the router's own
        refusal.detail = openapi.whereabouts(request.method, request.url.path)
    return _JSON(refusal.body(), refusal.status_code, refusal.headers)


class _AccessControl:
    """Middleware that admits clients with the key, or calls to a name of this server from no other site's page.

    A page of another site could otherwise have its visitor's browser call the server on their machine, directly or by
    a name that is made to resolve to it. Every request is counted.
    """

    def __init__(self, app: ASGIApp, rules: Rules, metrics: Metrics) -> None:
        self._app, self._rules, self._metrics = app, rules, metrics
        self._key = None if rules.api_key is None else rules.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = _with_own_path(scope)
        status = 499  # the client left

        async def watched(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            request = Request(scope)
            refusal = self._check(request)
            app = await _refuse(request, refusal) if refusal else self._app
            await app(scope, receive, watched)
        except ClientDisconnect:
            pass
        finally:
            self._metrics.request(scope["path"] if scope["path"] in openapi.PATHS else "other", status)

    def _check(self, request: Request) -> HTTPError | None:
        headers = request.headers
        if self._key is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._key)
            if request.url.path in _OPEN or (scheme.lower() == "bearer" and is_right):
                return None
            return HTTPError(401, "the API key is missing or wrong", "invalid_api_key", {"WWW-Authenticate": "Bearer"})
        host, origin = headers.get("host", ""), headers.get("origin")
        # Only programs that speak HTTP/1.0 name no host; browsers always do.
        if host and self._rules.hosts is not None and _name(host) not in self._rules.hosts:
            return HTTPError(403, "this server is not known by that name", "unknown_host")
        if origin is not None and origin.partition("://")[2] != host:
            return HTTPError(403, "a page of another site may not ask this server", "foreign_origin")
        return None


def _with_own_path(scope: Scope) -> Scope:
    """Return the scope with a path and a host where the target of the request is a whole URL, as of a proxy."""
    scheme, _, rest = scope["raw_path"].partition(b"://")
    if scheme.lower() not in (b"http", b"https"):
        return scope
    host, _, path = rest.partition(b"/")
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    own = {
        "raw_path": b"/" + path,
        "path": unquote(f"/{path.decode('latin-1')}"),
        "headers": [*headers, (b"host", host)],
    }
    return {**scope, **own}


def _name(host: str) -> str:
    """A Host header without its port."""
    return (host if host.endswith("]") else host.rpartition(":")[0] or host).lower()
