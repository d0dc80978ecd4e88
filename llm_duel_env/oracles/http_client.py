"""JSON over HTTP for oracles: bounded in time, in tries and in size, and checked before it is believed."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
import anyio.from_thread
import httpx2

from llm_duel_env.oracles.base import OracleError

T = TypeVar("T")

_TRANSIENT = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
"""Statuses that another try may mend; every other one but 200 is final."""


class BadAnswer(ValueError):  # noqa: N818 (an answer, not a failure of ours)
    """An answer that came whole and is not what was asked for; another try may mend it."""


@dataclass(frozen=True)
class Patience:
    """How long and how often a server is asked. All times are seconds."""

    connect_timeout: float = 5.0
    """For a connection."""
    read_timeout: float = 60.0
    """Without a single byte, once connected."""
    deadline: float = 300.0
    """For one request in all: every try, every wait between tries, every byte."""
    attempts: int = 6
    """Tries of one request."""
    backoff: float = 0.5
    """Wait after the first failed try; doubled after each, at most `longest_wait`, less up to a half at random."""
    longest_wait: float = 30.0
    """The longest wait between tries."""
    in_flight: int = 8
    """Requests under way at once."""
    max_response_bytes: int = 16 * 2**20
    """A longer answer is refused."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout", "read_timeout", "deadline", "longest_wait"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}: expected seconds > 0, got {getattr(self, name)!r}")
        if not 0 <= self.backoff < float("inf"):
            raise ValueError(f"backoff: expected seconds >= 0, got {self.backoff!r}")
        for name in ("attempts", "in_flight", "max_response_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r}")


class JsonClient:
    """Posts JSON to one server, many requests at once, from ordinary (not async) code.

    The token is read from the environment when the first request is made, and stands in no error and no file.
    """

    def __init__(self, url: str, *, token_env: str | None = None, patience: Patience | None = None) -> None:
        """A client; nothing is sent yet.

        Args:
            url: ``http://`` or ``https://``, without user and password. ``$NAME`` takes it from the environment, so
                that a run can be resumed where the server has moved.
            token_env: Name of the environment variable that holds the bearer token; None sends none.
            patience: Limits.

        Raises:
            ValueError: a malformed address, or an environment variable that is not set.
        """
        self.url = resolve(url)
        self.patience = patience or Patience()
        self._token_env = token_env
        if token_env is not None:
            self._headers()
        self.requests = 0
        """Requests sent so far, repeated ones included."""
        self._connections: weakref.finalize | None = None
        """Ends the connections and their thread: when `close` is called, when the client is gone, or before the
        interpreter ends, which else waits for the thread for ever."""

    def _headers(self) -> dict[str, str]:
        if self._token_env is None:
            return {}
        token = os.environ.get(self._token_env, "")
        if not token or not token.isascii() or not token.isprintable():
            raise ValueError(f"expected a token in the environment variable {self._token_env}, which holds none")
        return {"Authorization": f"Bearer {token}"}

    def post_all(self, path: str, bodies: Sequence[Any], read: Callable[[Any, int], T]) -> list[T]:
        """The answers to some requests, in their order.

        Args:
            path: Path below the server's address.
            bodies: What to send, as JSON has it.
            read: Makes of a decoded answer, and the number of its request, what is wanted; raises `BadAnswer` where
                the answer is not usable, and the request is tried again. It is called as soon as an answer is there,
                so what it stores is kept even where another request fails.

        Raises:
            OracleError: a request that got no usable answer within the limits, or was refused. The others are ended.
        """
        if not bodies:
            return []
        if self._connections is None:
            self._start()
        results: list[T | None] = [None] * len(bodies)

        async def everything() -> None:
            limit = anyio.CapacityLimiter(self.patience.in_flight)

            async def one(number: int) -> None:
                async with limit:
                    results[number] = await self._post(path, bodies[number], lambda answer: read(answer, number))

            async with anyio.create_task_group() as group:
                for number in range(len(bodies)):
                    group.start_soon(one, number)

        work = self._portal.start_task_soon(everything)
        try:
            work.result()
        except BaseException as error:  # a KeyboardInterrupt too: nothing goes on in the background
            work.cancel()
            raise _first(error) from None
        return results  # type: ignore[return-value]

    def _start(self) -> None:
        patience, stack = self.patience, ExitStack()
        # A thread with an event loop of its own: the caller may be in a notebook, which has one already.
        self._portal = stack.enter_context(anyio.from_thread.start_blocking_portal())
        timeout = httpx2.Timeout(patience.read_timeout, connect=patience.connect_timeout)
        limits = httpx2.Limits(max_connections=patience.in_flight)
        client = httpx2.AsyncClient(
            base_url=self.url,
            headers=self._headers(),
            timeout=timeout,
            limits=limits,
            verify=self.url.startswith("https:"),  # certificates are read for nothing otherwise
            trust_env=not is_loopback(urlsplit(self.url).hostname or ""),  # no proxy leads to this machine
        )
        self._client = stack.enter_context(self._portal.wrap_async_context_manager(client))
        self._connections = weakref.finalize(self, stack.close)

    def close(self) -> None:
        """Lets connections go; the next request opens them again."""
        if self._connections is not None:
            self._connections()
            self._connections = None

    async def _post(self, path: str, body: Any, read: Callable[[Any], T]) -> T:
        patience, begun, said = self.patience, time.monotonic(), "no answer"
        where = f"{self.url}{path}"
        with anyio.move_on_after(patience.deadline):
            for attempt in range(patience.attempts):
                wait = 0.0
                try:
                    self.requests += 1
                    return read(await self._try(path, body))
                except _Refused as refused:
                    raise OracleError(f"{where}: refused: {refused}") from None
                except _Again as again:
                    said, wait = str(again), again.wait
                except BadAnswer as bad:
                    said = f"expected another answer: {bad}"
                except httpx2.HTTPError as error:
                    said = _explain(error, patience)
                if attempt + 1 < patience.attempts:
                    pause = min(patience.backoff * 2**attempt, patience.longest_wait)
                    # Jitter so that many runs do not come back at one moment; it bears on no result.
                    await anyio.sleep(max(pause * random.uniform(0.5, 1.0), min(wait, patience.longest_wait)))
            spent = f"{patience.attempts} tries in {time.monotonic() - begun:.1f} s"
            raise OracleError(f"{where}: no usable answer in {spent}; the last: {said}")
        raise OracleError(f"{where}: no usable answer within the deadline of {patience.deadline:g} s; the last: {said}")

    async def _try(self, path: str, body: Any) -> Any:
        async with self._client.stream("POST", path, json=body) as response:
            parts, size = [], 0
            async for part in response.aiter_bytes():
                size += len(part)
                if size > self.patience.max_response_bytes:
                    raise _Refused(f"an answer of more than {self.patience.max_response_bytes} bytes")
                parts.append(part)
        text = b"".join(parts)
        if response.status_code in _TRANSIENT:
            raise _Again(f"status {response.status_code}{_quoted(text)}", _retry_after(response))
        if response.status_code != 200:
            hint = f" (is the token in {self._token_env or 'the variable of token_env'} right?)"
            raise _Refused(
                f"status {response.status_code}{_quoted(text)}{hint if response.status_code in (401, 403) else ''}"
            )
        try:
            return json.loads(text)
        except (ValueError, RecursionError):  # the latter where it is nested without end
            raise BadAnswer(f"no JSON{_quoted(text)}") from None


class _Refused(Exception):  # noqa: N818
    """A final no."""


class _Again(Exception):  # noqa: N818
    """The server asks to be asked later, in `wait` seconds."""

    def __init__(self, said: str, wait: float) -> None:
        super().__init__(said)
        self.wait = wait


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine's own, reached by nobody else.

    >>> is_loopback("127.0.0.1"), is_loopback("::1"), is_loopback("0.0.0.0"), is_loopback("example.org")
    (True, True, False, False)
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def resolve(url: str) -> str:
    """An address without a slash at its end, read from the environment where it is ``$NAME``.

    Raises:
        ValueError: not an address of a server, or one with a password in it, which would end in files and errors.
    """
    address = url
    if url.startswith("$"):
        address = os.environ.get(url[1:], "")
        if not address:
            raise ValueError(f"expected a server's address in the environment variable {url[1:]}, which is not set")
    parts = urlsplit(address)
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"{parts.hostname}: expected an address without user and password; give a token by token_env")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError(f"expected an address like http://127.0.0.1:8000, got {url!r}")
    return address.rstrip("/")


def finite_number(value: Any, what: str) -> float:
    """`value` as a float. BadAnswer where it is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise BadAnswer(f"{what}: expected a number, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:  # an integer of more than 308 digits
        number = float("inf")
    if not abs(number) < float("inf"):  # NaN fails too
        raise BadAnswer(f"{what}: expected a finite number, got {shown(value)}")
    return number


def rows(value: Any, count: int, what: str) -> list[Any]:
    """`value`, surely a list of `count`; BadAnswer else."""
    if not isinstance(value, list):
        raise BadAnswer(f"{what}: expected a list of {count}, got {shown(value)}")
    if len(value) != count:
        raise BadAnswer(f"{what}: expected {count} results, got {len(value)}")
    return value


def field(value: Any, name: str) -> Any:
    """The field of a JSON object; BadAnswer where there is none."""
    if not isinstance(value, dict) or name not in value:
        raise BadAnswer(f"expected an object with {name!r}, got {shown(value)}")
    return value[name]


def _first(error: BaseException) -> BaseException:
    """The error that mattered of a group of concurrent ones."""
    while inner := getattr(error, "exceptions", None):  # Python 3.10 has no built-in name for a group
        error = inner[0]
    return error


def _explain(error: httpx2.HTTPError, patience: Patience) -> str:
    if isinstance(error, httpx2.ConnectTimeout):
        return f"no connection within {patience.connect_timeout:g} s"
    if isinstance(error, httpx2.TimeoutException):
        return f"no answer within {patience.read_timeout:g} s"
    if isinstance(error, httpx2.ConnectError):
        return f"no connection ({error}); is the server running?"
    return f"the connection broke ({type(error).__name__}: {error})"


def _retry_after(response: httpx2.Response) -> float:
    value = response.headers.get("retry-after", "")
    return float(value) if value.isascii() and value.isdigit() else 0.0


def _quoted(text: bytes) -> str:
    said = text.decode("utf-8", "replace").strip()
    return f": {shown(said)}" if said else ", empty"


def shown(value: Any) -> str:
    """What came, for an error's one line: cut where it is long."""
    try:
        text = repr(value)
    except RecursionError:  # nested as deep as can be read
        text = f"a deeply nested {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:197]}..."
