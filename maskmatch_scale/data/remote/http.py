"""Files from ``http://`` and ``https://`` addresses, by urllib3."""

from __future__ import annotations

import email.utils
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from urllib.parse import unquote
from urllib.request import getproxies, proxy_bypass

import urllib3

from maskmatch_scale.data.remote.transfer import NoRanges, Transfer, TransferError

_BLOCK = 1 << 20
_LONGEST_RETRY_AFTER_S = 60.0
_REDIRECTS = 5
_CONNECTIONS = 32
_STATUS_ADVICE = {
    401: "it needs a user and a password (https://user:password@…) or a signed address",
    403: "no permission, or a signed address has expired",
    404: "check the address, and that the index belongs to this folder",
    410: "check the address, and that the index belongs to this folder",
}
_NO_HEAD = (400, 401, 403, 405, 501)
"""Statuses by which servers refuse HEAD: an address that is signed for GET is not for HEAD."""
_MAY_PASS = (408, 425, 429)
"""Statuses 4xx after which another try may succeed."""

_pools: dict[tuple[int, str | None], urllib3.PoolManager] = {}
"""Connections by process and proxy. A forked process keeps those of its parent and does not close them: one of their
locks may have been held when it was forked, and would never be released."""


def get(transfer: Transfer) -> None:
    """Fetch a file in one try; only what is missing, if the server can send that.

    Raises:
        TransferError: the try has failed.
    """
    headers = {}
    if transfer.received:
        headers["Range"] = f"bytes={transfer.received}-"
        if transfer.version is not None:
            headers["If-Range"] = transfer.version
    response = _request("GET", transfer.url, headers, transfer.timeout_s)
    whole = False
    try:
        _check_head(transfer, response)
        while block := _read(response, transfer.timeout_s):
            transfer.write(block)
        whole = True
    finally:
        if whole:
            response.release_conn()
        else:
            response.close()  # the next request must not read what is left of this answer


def read_range(url: str, start: int, stop: int, size: int | None, etag: str | None, timeout_s: float) -> bytes:
    """Bytes ``start`` to ``stop`` of a file, without the last one, in one request.

    Args:
        url: its address.
        start: the first byte.
        stop: the one after the last.
        size: bytes of the file, if they are known.
        etag: its strong ETag, if it is known.
        timeout_s: seconds until the last byte must have come.

    Raises:
        TransferError: the request has failed, the server does not send ranges, or the file is another one.
    """
    due = time.monotonic() + timeout_s
    headers = {"Range": f"bytes={start}-{stop - 1}", **({"If-Match": etag} if etag else {})}
    response = _request("GET", url, headers, timeout_s)
    data = bytearray()
    try:
        if response.status != 206:
            raise _refused(response) if response.status != 200 else NoRanges("it does not send ranges")
        first, total = _content_range(response.headers.get("Content-Range", ""))
        if first != start or (size is not None and total not in (None, size)):
            raise TransferError("it answers with another range than was asked for")
        said = _strong_etag(response.headers)
        if None not in (etag, said) and said != etag:
            raise TransferError("it has changed")
        while len(data) < stop - start and (block := _read(response, timeout_s)):
            data += block
            if time.monotonic() > due:
                raise TransferError(f"stalled: {len(data)} of {stop - start} bytes in {timeout_s:g} s")
        if len(data) != stop - start:
            raise TransferError(f"{len(data)} bytes where {stop - start} were asked for")
    except BaseException:
        response.close()
        raise
    if response.length_remaining == 0:
        response.release_conn()
    else:
        response.close()  # there may be more in this answer, which the next request must not read
    return bytes(data)


def head(url: str, timeout_s: float) -> tuple[int | None, str | None]:
    """Size in bytes and strong ETag of a file, as its server says by HEAD; None for what it does not say.

    Raises:
        TransferError: the try has failed, or there is no such file.
    """
    response = _request("HEAD", url, {}, timeout_s)
    response.release_conn()
    status, length = response.status, response.headers.get("Content-Length", "")
    if status == 200:
        return int(length) if length.isdecimal() and int(length) else None, _strong_etag(response.headers)
    if status in _NO_HEAD:
        return None, None
    raise _refused(response)


def _request(method: str, url: str, headers: Mapping[str, str], timeout_s: float) -> urllib3.BaseHTTPResponse:
    # No compressed answers: their lengths and ranges would not be those of the file.
    headers = {"Accept-Encoding": "identity", "User-Agent": "maskmatch_scale", **headers}
    try:
        address = urllib3.util.parse_url(url)
        if address.auth:
            headers |= urllib3.util.make_headers(basic_auth=unquote(address.auth))
        return _pool(address).request(
            method,
            address._replace(auth=None, fragment=None).url,
            headers=headers,
            preload_content=False,
            timeout=urllib3.Timeout(connect=timeout_s, read=timeout_s),
            # urllib3 follows redirects but makes no further tries: only our own tries know which bytes have arrived.
            retries=urllib3.Retry(
                _REDIRECTS, connect=0, read=0, status=0, other=0, redirect=_REDIRECTS, respect_retry_after_header=False
            ),
        )
    except urllib3.exceptions.HTTPError as error:
        raise _transfer_error(error, timeout_s) from None


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


def _check_head(transfer: Transfer, response: urllib3.BaseHTTPResponse) -> None:
    """Compare the status and headers of an answer with what was asked for; note length and version of the file."""
    headers, status = response.headers, response.status
    if status == 206 and transfer.received:
        start, total = _content_range(headers.get("Content-Range", ""))
        if start != transfer.received:
            transfer.restart()
            raise TransferError("it answers with another range than was asked for")
        etag = _strong_etag(headers)
        if etag is not None and transfer.version is not None and etag != transfer.version:
            transfer.restart()
            raise TransferError("it has changed since its first bytes came")
        if total is not None:
            transfer.expect(total)
    elif status == 200:
        if transfer.received:
            transfer.restart()
        with suppress(KeyError, ValueError):
            total = int(headers["Content-Length"])
            transfer.expect(total)
        transfer.expect_version(_strong_etag(headers))
    else:
        if status in (206, 416):
            transfer.restart()
        raise _refused(response)


def _refused(response: urllib3.BaseHTTPResponse) -> TransferError:
    status = response.status
    return TransferError(
        f"HTTP {status} {response.reason or ''}".strip(),
        _STATUS_ADVICE.get(status, ""),
        final=300 <= status < 500 and status not in (*_MAY_PASS, 416),
        wait_s=_retry_after(response.headers.get("Retry-After", "")),
    )


def _strong_etag(headers: Mapping[str, str]) -> str | None:
    etag = headers.get("ETag", "")
    return etag if etag.startswith('"') else None  # W/"…" may stand for different bytes


def _content_range(value: str) -> tuple[int | None, int | None]:
    """First byte and length of the file, as a Content-Range header says; None for what it does not say."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", value.strip())
    if match is None:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, up to a bound; 0 if it does not parse."""
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
        # read1 returns what has arrived. read would wait for a whole block, and not notice that bytes trickle.
        return response.read1(_BLOCK, decode_content=False)
    except urllib3.exceptions.HTTPError as error:
        raise _transfer_error(error, timeout_s) from None


def _transfer_error(error: BaseException, timeout_s: float) -> TransferError:
    """Turn an error of urllib3 into ours, in our own words: urllib3's message contains the address and its query."""
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason is not None:
        error = error.reason
    if isinstance(error, urllib3.exceptions.ProxyError):
        return TransferError(
            f"the proxy: {_transfer_error(error.original_error, timeout_s)}", "check http_proxy and https_proxy"
        )
    if isinstance(error, urllib3.exceptions.ResponseError):
        return TransferError(f"more than {_REDIRECTS} redirects", "check the address", final=True)
    if isinstance(error, urllib3.exceptions.LocationValueError):
        return TransferError("not a valid address", "check the address", final=True)
    if isinstance(error, urllib3.exceptions.NameResolutionError):
        return TransferError("the host's name is not known", "check the address and the network")
    if isinstance(error, urllib3.exceptions.NewConnectionError):
        reason = error.__cause__
        return TransferError(f"no connection ({getattr(reason, 'strerror', None) or 'refused'})")
    if isinstance(error, urllib3.exceptions.ConnectTimeoutError):
        return TransferError(f"no connection in {timeout_s:g} s")
    if isinstance(error, urllib3.exceptions.ReadTimeoutError):
        return TransferError(f"stalled: no byte in {timeout_s:g} s")
    if isinstance(error, urllib3.exceptions.SSLError):
        return TransferError(
            f"TLS: {error}", "check the server's certificate (SSL_CERT_FILE names a bundle of your own)"
        )
    if isinstance(error, (urllib3.exceptions.ProtocolError, urllib3.exceptions.IncompleteRead)):
        return TransferError("the connection was cut")
    return TransferError(f"{type(error).__name__}: {error}")
