"""One file from elsewhere: by HTTP, by fsspec or from a command, with time-outs, tries and a comparison of its bytes.

Every failure that may pass is tried again, after a pause. What had come is kept if the rest can be asked for.
"""

from __future__ import annotations

import email.utils
import hashlib
import itertools
import math
import os
import queue
import random
import re
import selectors
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol, TypeVar
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import urllib3

from maskmatch_scale.data.faults import BadSample, DataError
from maskmatch_scale.data.remote.address import PIPE, is_http, shown

_T = TypeVar("_T")

_BLOCK = 1 << 20
_FSSPEC_BLOCK = 4 << 20
"""One request of a store's; it must arrive within the time-out."""
_LEAST_BYTES = 256 << 10
"""Fewer within the time-out, and a transfer counts as stalled."""
_LONGEST_PAUSE_S = 30.0
_LONGEST_RETRY_AFTER_S = 60.0
_REDIRECTS = 5
_CONNECTIONS = 8

# Ranks are seeded alike: drawn from seeded state their pauses would be equal, and they would all come back at once.
# Nor may a pause move the draws of a run.
_jitter = random.SystemRandom()


@dataclass(frozen=True)
class Remote:
    """How to fetch; picklable."""

    cache: Path
    """Folder of the cache."""
    limit_bytes: int
    """Bound on the cache, files on their way included."""
    timeout_s: float
    """Seconds to wait for a connection or a byte; less than 256 KiB in as long is a stall too."""
    attempts: int
    """Tries a file."""
    allow_pipe: bool = False
    """Whether ``pipe:COMMAND`` may run its command."""


class _Fault(Exception):  # noqa: N818 - tried again unless it is final
    """One try went wrong."""

    def __init__(self, message: str, advice: str = "", *, final: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.advice, self.final, self.wait_s = advice, final, wait_s


class Sink(Protocol):
    """Where bytes go. Both may raise what must end the transfer at once."""

    def resize(self, size: int) -> None:
        """The file will have ``size`` bytes."""

    def write(self, block: bytes, at: int) -> None:
        """Put ``block`` at byte ``at``; what was there is written over."""


class Transfer:
    """One file on its way: what has come is kept over tries where the rest alone can be asked for.

    Args:
        url: its address.
        sink: where its bytes go.
        size: how many they must be, or None.
        sha256: their hex digest, or None.
        options: time-outs and tries.
    """

    def __init__(self, url: str, sink: Sink, size: int | None, sha256: str | None, options: Remote) -> None:
        self.url, self.options = url, options
        self._sink, self._size, self._sha256 = sink, size, sha256
        self.bytes_read = 0
        self.restart()

    def restart(self) -> None:
        """Forget what has come."""
        self.received = 0
        self.version: str | None = None
        """What tells this version of the file from another one (an ETag)."""
        self._total = self._size
        self._digest = hashlib.sha256()

    def run(self, count_retry: Callable[[], None]) -> None:
        """Bring the whole file; ``count_retry`` is called before every try but the first.

        Raises:
            BadSample: ``shard_unreadable``: after all tries, or at once where another one would not help.
            DataError: a library is missing, or the sink raised it.
        """
        get = _get_pipe if self.url.startswith(PIPE) else _get_http if is_http(self.url) else _get_fsspec
        for attempt in itertools.count(1):
            self._mark, self._since = math.inf, 0
            try:
                get(self)
                self._compare()
                return
            except _Fault as fault:
                if fault.final or attempt >= self.options.attempts:
                    tries = "once" if attempt == 1 else f"{attempt} times"
                    raise BadSample(
                        "shard_unreadable",
                        f"{shown(self.url)}: tried {tries} and failed: {_scrubbed(str(fault), self.url)}; "
                        f"{fault.advice or 'check the network and the server, or try later'}",
                    ) from None
                # Two halves may be put together only if they are known to be of one file.
                if self._sha256 is None and self.version is None:
                    self.restart()
                pause = max(_backoff(attempt, self.options.timeout_s), fault.wait_s)
            count_retry()
            time.sleep(pause)

    def expect(self, total: int) -> None:
        """The source says how long the file is."""
        if self._total is not None and total != self._total:
            expected = self._total
            self.restart()
            raise _Fault(f"{total} bytes where {expected} are expected", _OTHER_BYTES)
        self._total = total
        self._sink.resize(total)

    def write(self, block: bytes) -> None:
        """The next bytes; a fault if they are too many or come too slowly."""
        self.bytes_read += len(block)
        if self._total is not None and self.received + len(block) > self._total:
            expected = self._total
            self.restart()
            raise _Fault(f"more than the {expected} bytes that are expected", _OTHER_BYTES)
        self._sink.write(block, self.received)
        self._digest.update(block)
        self.received += len(block)
        self._since += len(block)
        now = time.monotonic()
        if self._since >= _LEAST_BYTES or self._mark == math.inf:
            self._mark, self._since = now, 0
        elif now - self._mark > self.options.timeout_s and self.received != self._total:
            raise _Fault(f"stalled: {self._since} bytes in {now - self._mark:.3g} s")

    def _compare(self) -> None:
        if self._total is not None and self.received < self._total:
            raise _Fault(f"cut after {self.received} of {self._total} bytes")
        if self._sha256 is not None and self._digest.hexdigest() != self._sha256.lower():
            self.restart()
            raise _Fault("its bytes are not those the index has the checksum of", _OTHER_BYTES)


_OTHER_BYTES = "if it is so again, upload the shard again or write the index anew"


def _backoff(attempt: int, timeout_s: float) -> float:
    """Seconds before the next try: at random up to a bound that doubles ("full jitter")."""
    return _jitter.uniform(0, min(_LONGEST_PAUSE_S, min(1.0, timeout_s / 10) * 2.0 ** (min(attempt, 16) - 1)))


# http, https

_STATUS_ADVICE = {
    401: "it needs a user and a password (https://user:password@…) or a signed address",
    403: "no permission, or a signed address has expired",
    404: "check the address, and that the index belongs to this folder",
    410: "check the address, and that the index belongs to this folder",
}
_MAY_PASS = (408, 425, 429)
_pools: dict[tuple[int, str | None], urllib3.PoolManager] = {}
"""By process and proxy. Those of a parent are kept, not closed: their locks may be held for ever."""


def _get_http(transfer: Transfer) -> None:
    # Compressed on the way, neither lengths nor ranges would be those of the file.
    headers = {"Accept-Encoding": "identity", "User-Agent": "maskmatch_scale"}
    if transfer.received:
        headers["Range"] = f"bytes={transfer.received}-"
        if transfer.version is not None:
            headers["If-Range"] = transfer.version
    try:
        address = urllib3.util.parse_url(transfer.url)
        if address.auth:
            headers |= urllib3.util.make_headers(basic_auth=unquote(address.auth))
        response = _pool(address).request(
            "GET",
            address._replace(auth=None, fragment=None).url,
            headers=headers,
            preload_content=False,
            timeout=urllib3.Timeout(connect=transfer.options.timeout_s, read=transfer.options.timeout_s),
            # Redirects alone are left to urllib3; Transfer.run tries again, and knows what has come.
            retries=urllib3.Retry(
                _REDIRECTS, connect=0, read=0, status=0, other=0, redirect=_REDIRECTS, respect_retry_after_header=False
            ),
        )
    except urllib3.exceptions.HTTPError as error:
        raise _http_fault(error, transfer.options.timeout_s) from None
    whole = False
    try:
        _accept(transfer, response)
        while block := _read(response, transfer.options.timeout_s):
            transfer.write(block)
        whole = True
    finally:
        if whole:
            response.release_conn()
        else:
            response.close()  # what is left of it must not meet the next request


def _pool(address: urllib3.util.Url) -> urllib3.PoolManager:
    proxy = None if proxy_bypass(address.host or "") else getproxies().get(address.scheme or "")
    key = os.getpid(), proxy
    if key not in _pools:
        if proxy is None:
            _pools[key] = urllib3.PoolManager(maxsize=_CONNECTIONS)
        else:
            auth = urllib3.util.parse_url(proxy).auth
            headers = urllib3.util.make_headers(proxy_basic_auth=unquote(auth)) if auth else None
            _pools[key] = urllib3.ProxyManager(proxy, maxsize=_CONNECTIONS, proxy_headers=headers)
    return _pools[key]


def _accept(transfer: Transfer, response: urllib3.BaseHTTPResponse) -> None:
    """Compare an answer's head with what was asked for."""
    headers, status = response.headers, response.status
    if status == 206 and transfer.received:
        start, total = _content_range(headers.get("Content-Range", ""))
        if start != transfer.received:
            transfer.restart()
            raise _Fault("it answers with another range than was asked for")
        if total is not None:
            transfer.expect(total)
    elif status == 200:
        if transfer.received:
            transfer.restart()
        with suppress(KeyError, ValueError):
            total = int(headers["Content-Length"])
            transfer.expect(total)
        version = headers.get("ETag", "")
        transfer.version = version if version.startswith('"') else None  # W/"…" does not tell bytes apart
    else:
        if status in (206, 416):
            transfer.restart()
        raise _Fault(
            f"HTTP {status} {response.reason or ''}".strip(),
            _STATUS_ADVICE.get(status, ""),
            final=300 <= status < 500 and status not in (*_MAY_PASS, 416),
            wait_s=_retry_after(headers.get("Retry-After", "")),
        )


def _content_range(value: str) -> tuple[int | None, int | None]:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", value.strip())
    if match is None:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _retry_after(value: str) -> float:
    """Seconds that a server asks for, up to a bound."""
    if value.strip().isdecimal():
        seconds = float(value)
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S)


def _read(response: urllib3.BaseHTTPResponse, timeout_s: float) -> bytes:
    try:
        # read1: what has come. read() would wait for a whole block, and a trickle pass for life.
        return response.read1(_BLOCK, decode_content=False)
    except urllib3.exceptions.HTTPError as error:
        raise _http_fault(error, timeout_s) from None


def _http_fault(error: BaseException, timeout_s: float) -> _Fault:
    """In words of our own: urllib3's name the address with its query."""
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        error = error.reason
    if isinstance(error, urllib3.exceptions.ProxyError):
        return _Fault(f"the proxy: {_http_fault(error.original_error, timeout_s)}", "check http_proxy and https_proxy")
    if isinstance(error, urllib3.exceptions.ResponseError):
        return _Fault(f"more than {_REDIRECTS} redirects", "check the address", final=True)
    if isinstance(error, urllib3.exceptions.LocationValueError):
        return _Fault("not a valid address", "check the address", final=True)
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return _Fault("the host's name is not known", "check the address and the network")
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        reason = error.__cause__
        return _Fault(f"no connection ({getattr(reason, 'strerror', None) or 'refused'})")
    if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
        return _Fault(f"no connection in {timeout_s:g} s")
    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return _Fault(f"stalled: no byte in {timeout_s:g} s")
    if isinstance(error, urllib3.exceptions.SSLError):
        return _Fault(f"TLS: {error}", "check the server's certificate (SSL_CERT_FILE names a bundle of your own)")
    if isinstance(error, (urllib3.exceptions.ProtocolError, urllib3.exceptions.IncompleteRead)):
        return _Fault("the connection was cut")
    return _Fault(f"{type(error).__name__}: {error}")


# scheme:// by fsspec

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


def _get_fsspec(transfer: Transfer) -> None:
    try:
        file, total = _ask(transfer, lambda: _open_by_fsspec(transfer.url))
    except ImportError as error:
        scheme = transfer.url.partition("://")[0].rpartition(":")[2]
        extra = _EXTRAS.get(scheme)
        raise DataError(
            f"{shown(transfer.url)}: {scheme}:// needs a library that is not installed; "
            + (f"pip install 'maskmatch_scale[{extra}]'" if extra else _one_line(str(error)))
        ) from None
    with _Closing(file):
        if total is not None:
            transfer.expect(total)
        if transfer.received:
            _ask(transfer, lambda: file.seek(transfer.received))
        while block := _ask(transfer, lambda: file.read(_FSSPEC_BLOCK)):
            transfer.write(block)


def _open_by_fsspec(url: str) -> tuple[IO[bytes], int | None]:
    import fsspec

    try:
        # Asked for anew each time: fsspec keeps one a process, and none of a parent's.
        system, path = fsspec.core.url_to_fs(url)
    except ValueError as error:
        if "Protocol not known" not in str(error):
            raise
        raise _Fault("no such kind of address", "check what stands before ://", final=True) from None
    system.invalidate_cache()  # listings of the last try
    return system.open(path, "rb", block_size=_FSSPEC_BLOCK), system.size(path)


def _ask(transfer: Transfer, call: Callable[[], _T]) -> _T:
    """A call of a library that knows no time-outs, in a thread that is left alone if it takes too long."""
    answers: queue.SimpleQueue[tuple[_T | None, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=run, name="fsspec", daemon=True).start()
    try:
        answer, error = answers.get(timeout=transfer.options.timeout_s)
    except queue.Empty:
        raise _Fault(f"stalled: no answer in {transfer.options.timeout_s:g} s") from None
    if error is None:
        return answer  # type: ignore[return-value]
    if isinstance(error, (_Fault, ImportError)) or not isinstance(error, Exception):
        raise error
    raise _Fault(
        f"{type(error).__name__}: {error}",
        "check the address and the permissions" if isinstance(error, _FINAL) else "",
        final=isinstance(error, _FINAL),
    ) from None


class _Closing:
    """Closes a file of fsspec's without waiting for it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        threading.Thread(target=self._close, daemon=True).start()

    def _close(self) -> None:
        with suppress(Exception):
            self._file.close()


# pipe:COMMAND


def refuse_pipe(url: str, options: Remote) -> None:
    """DataError if the address is a command and none may run."""
    if url.startswith(PIPE) and not options.allow_pipe:
        raise DataError(
            f"{shown(url)}: pipe: runs a shell command, which is off; data.allow_pipe=true allows it, "
            "if you trust whoever wrote the index"
        )


def _get_pipe(transfer: Transfer) -> None:
    transfer.restart()
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            transfer.url.removeprefix(PIPE),
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=complaints,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            for block in iter(lambda: _read_pipe(process.stdout, transfer.options.timeout_s), b""):  # type: ignore[arg-type]
                transfer.write(block)
            code = process.wait(transfer.options.timeout_s)
        except subprocess.TimeoutExpired:
            raise _Fault("the command does not end") from None
        finally:
            if process.returncode is None:  # not reaped: the number is still its own
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # all that the shell started
            process.wait()
            process.stdout.close()  # type: ignore[union-attr]
        if code:
            complaints.seek(0)
            said = complaints.read()[-2000:].decode(errors="replace").strip().rpartition("\n")[2]
            transfer.restart()
            raise _Fault(f"the command ended with code {code}{f' ({said})' if said else ''}", "try it in a shell")


def _read_pipe(output: IO[bytes], timeout_s: float) -> bytes:
    with selectors.DefaultSelector() as selector:
        selector.register(output, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            raise _Fault(f"stalled: no byte in {timeout_s:g} s")
    return os.read(output.fileno(), _BLOCK)


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]} …"


def _scrubbed(text: str, url: str) -> str:
    """One line of a library's or a command's words, without the address' secrets."""
    text = text.replace(url, shown(url))
    if url.startswith(PIPE):
        text = text.replace(url.removeprefix(PIPE), shown(url))
    text = re.sub(r"(\w://)[^\s/@]*@", r"\1", text)
    return _one_line(re.sub(r"\?[^\s'\"]*=[^\s'\"]*", "", text))
