"""A server of a reward model's scores: LitServe batches what comes from many runs, one worker per device.

    POST /score  {"texts": [{"prompt": "...", "response": "..."}, ...]}
    ->           {"model": "name", "scores": [0.25, ...]}     null where the model gives no finite score

LitServe's own processes speak to each other in pickles; what comes over the network is read as JSON and nothing else.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llm_duel_env.extras import require
from llm_duel_env.oracles.http_client import is_loopback

HOSTS = ("127.0.0.1", "0.0.0.0", "::")
"""What the server can listen on: this machine alone, or every address of it (IPv4, IPv6)."""
SHORTEST_TOKEN = 16
BODY_SECONDS = 30.0
"""A request whose body has not come whole by then is dropped."""


@dataclass(frozen=True)
class ServerSettings:
    """What is served, where, and within which limits."""

    model: str
    """Folder or hub name of the reward model."""
    host: str = "127.0.0.1"
    """Address to listen on; beyond loopback only together with a token."""
    port: int = 8765
    """Port to listen on, 1024 to 65535."""
    name: str = ""
    """Name of the model in answers; by default the folder's, or the hub's name."""
    token_env: str | None = None
    """Environment variable with the token that every request must bring."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """What the model runs on."""
    devices: int | Literal["auto"] = "auto"
    """Devices, each with a copy of the model; auto takes all GPUs."""
    workers_per_device: int = 1
    """Copies of the model per device."""
    max_batch: int = 16
    """Requests that go through the model together."""
    batch_wait: float = 0.01
    """Seconds that a request waits for others to go with."""
    timeout: float = 120.0
    """Seconds after which a request that still waits is sent away, to be tried again."""
    max_request_bytes: int = 8 * 2**20
    """A longer request is refused."""
    max_texts: int = 256
    """A request of more texts is refused."""
    max_connections: int = 256
    """Beyond this many, requests are sent away with status 503."""
    dtype: str = "auto"
    """As in `RewardModelOracle`."""
    batch_tokens: int = 16384
    """As in `RewardModelOracle`."""
    text_template: str | None = None
    """As in `RewardModelOracle`."""

    def __post_init__(self) -> None:
        if self.host not in HOSTS:
            raise ValueError(f"host: expected one of {', '.join(HOSTS)}, got {self.host!r}")
        if not is_loopback(self.host) and self.token_env is None:
            raise ValueError(f"host {self.host} is open to others: expected a token (token_env), got none")
        if not _whole(self.port) or not 1024 <= self.port <= 65535:
            raise ValueError(f"port: expected 1024 to 65535, got {self.port!r}")
        for name in ("workers_per_device", "max_batch", "max_request_bytes", "max_texts", "max_connections"):
            if not _whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {getattr(self, name)!r}")
        for name in ("batch_wait", "timeout"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected seconds > 0, got {getattr(self, name)!r}")
        if self.devices != "auto" and (not _whole(self.devices) or int(self.devices) < 1):
            raise ValueError(f"devices: expected auto or a whole number of at least 1, got {self.devices!r}")
        if self.model.startswith((".", "/", "~")) and not Path(self.model).expanduser().is_dir():
            raise ValueError(f"cannot load reward model {self.model!r}: expected a folder with one; there is none")

    @property
    def served_name(self) -> str:
        """What answers call the model."""
        return self.name or (Path(self.model).name if Path(self.model).is_dir() else self.model)

    def token(self) -> str | None:
        """The token, from the environment. ValueError where it should be there and is not, or is too short."""
        if self.token_env is None:
            return None
        token = os.environ.get(self.token_env, "")
        if len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable():
            wanted = f"a token of at least {SHORTEST_TOKEN} printable ASCII characters"
            raise ValueError(f"expected {wanted} in the environment variable {self.token_env}, got {len(token)}")
        return token


def serve(settings: ServerSettings) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        MissingExtraError: LitServe is not installed.
        ValueError: no token where one is needed, or the model cannot be loaded.
    """
    litserve = require("litserve", "serving an oracle")
    token = settings.token()
    from llm_duel_env.oracles.serve_worker import ScoreAPI

    api = ScoreAPI(settings)
    gate = {"token": token, "max_bytes": settings.max_request_bytes, "max_texts": settings.max_texts}
    server = litserve.LitServer(
        api,
        accelerator=settings.accelerator,
        devices=settings.devices,
        workers_per_device=settings.workers_per_device,
        timeout=settings.timeout,
        middlewares=[(Gate, gate)],
        disable_openapi_url=True,
        restart_workers=True,
        model_metadata={"name": settings.served_name},
    )
    owner = os.getpid()

    def stop(_number: int, _frame: Any) -> None:
        if os.getpid() == owner:  # the forked process that answers requests ends by itself
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):  # LitServe ends its workers on a KeyboardInterrupt alone
        signal.signal(number, stop)
    print(f"serving {settings.served_name} at http://{settings.host}:{settings.port}/score", flush=True)
    try:
        server.run(
            host=settings.host,
            port=settings.port,
            num_api_servers=1,
            log_level="warning",
            generate_client_file=False,
            limit_concurrency=settings.max_connections,
        )
    except RuntimeError as error:  # a worker that does not start; it has said why
        raise ValueError(f"cannot serve {settings.model!r}: {error}") from error


Send = Callable[[dict[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[dict[str, Any]]]


class Gate:
    """ASGI middleware: who may ask, how much, and what. Nothing that it turns away reaches a batch of others'."""

    def __init__(self, app: Any, *, token: str | None, max_bytes: int, max_texts: int) -> None:
        self.app, self.max_bytes, self.max_texts = app, max_bytes, max_texts
        self.token = None if token is None else f"Bearer {token}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Passes a request on, or answers it with 401, 413 or 422."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if self.token is not None and not hmac.compare_digest(headers.get(b"authorization", b""), self.token):
            return await _answer(send, 401, "expected a bearer token, got none or a wrong one")
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        told = headers.get(b"content-length", b"0")
        if not told.isdigit() or int(told) > self.max_bytes:
            return await _answer(send, 413, f"expected at most {self.max_bytes} bytes")
        try:
            body = await asyncio.wait_for(self._body(receive), BODY_SECONDS)
        except asyncio.TimeoutError:
            return await _answer(send, 408, f"expected the whole request within {BODY_SECONDS:g} s")
        if body is None:
            return await _answer(send, 413, f"expected at most {self.max_bytes} bytes")
        if complaint := complaint_about(body, self.max_texts):
            return await _answer(send, 422, complaint)
        once = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> dict[str, Any]:
            return once.pop() if once else await receive()

        # FastAPI reads JSON only where it is called so.
        kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        await self.app({**scope, "headers": [*kept, (b"content-type", b"application/json")]}, replay, send)
        return None

    async def _body(self, receive: Receive) -> bytes | None:
        """The whole body; None where it is too long, whatever its header said."""
        parts, size = [], 0
        while True:
            message = await receive()
            part = message.get("body", b"")
            parts.append(part)
            size += len(part)
            if size > self.max_bytes:
                return None
            if not message.get("more_body", False):
                return b"".join(parts)


def complaint_about(body: bytes, max_texts: int) -> str | None:
    """What is wrong with a request's body; None where nothing is.

    >>> complaint_about(b'{"texts": [{"prompt": "a", "response": "b"}]}', 1)
    >>> complaint_about(b'{"texts": []}', 1)
    'texts: expected 1 to 1, got 0'
    """
    try:
        texts = json.loads(body)["texts"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return 'expected {"texts": [{"prompt": "...", "response": "..."}, ...]}'
    if not isinstance(texts, list) or not 1 <= len(texts) <= max_texts:
        return f"texts: expected 1 to {max_texts}, got {len(texts) if isinstance(texts, list) else 'no list'}"
    for number, text in enumerate(texts):
        good = isinstance(text, dict) and set(text) == {"prompt", "response"}
        if not good or not all(isinstance(value, str) for value in text.values()):
            return f"texts[{number}]: expected an object of two strings, prompt and response"
        if not all(_encodes(value) for value in text.values()):
            return f"texts[{number}]: expected text that UTF-8 can hold, got half of a surrogate pair"
    return None


def _encodes(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON may name a lone surrogate, which tokenizers refuse."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _answer(send: Send, status: int, said: str) -> None:
    body = json.dumps({"error": said}).encode()
    # What is left of a request that was not read whole must not be taken for the next one.
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
