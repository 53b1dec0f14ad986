"""What obstore's errors mean, in our own words: its messages have several lines, and whole answers of servers."""

from __future__ import annotations

import re

from maskmatch_scale.data.remote.address import scrubbed
from maskmatch_scale.data.remote.transfer import TransferError

STORES = {
    **dict.fromkeys(("s3", "s3a"), "s3"),
    **dict.fromkeys(("gs", "gcs"), "gcs"),
    **dict.fromkeys(("az", "azure", "abfs", "abfss", "adl"), "azure"),
}
"""By scheme, the kind of store; also the name of the extra of this package that brings obstore."""
PREFIXES = {"s3": "AWS", "gcs": "GOOGLE", "azure": "AZURE"}
"""By kind of store, how the names of its variables in the environment begin."""

_STATUS = re.compile(r"status code: (\d{3})")
_EMPTY_PART = re.compile(r'Path "([^"]*)" contained empty path segment')
_CODE = re.compile(r"<Code>(\w+)</Code>")
_OWN_CREDENTIALS = re.compile(r"/latest/api/token|/latest/meta-data|/computeMetadata/|/metadata/identity|token request")
"""Where a machine of a cloud asks for its own credentials, which it does if the environment has none."""
_MAY_PASS = (408, 416, 425, 429)
"""Statuses 4xx after which another try may succeed."""
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_SKIP_SIGNATURE=true for a public bucket",
    "gcs": "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "azure": "set AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or AZURE_SKIP_SIGNATURE=true for public files",
}
_FINAL = (
    ("BadScheme", "http:// is not allowed", "PREFIX_ALLOW_HTTP=true allows connections without TLS"),
    ("Account must be specified", "it names no account", "set AZURE_STORAGE_ACCOUNT_NAME"),
    ("Unable to recognise URL", "not a valid address", "write s3://bucket/folder/x.tar"),
    ("redirect without LOCATION", "the bucket is in another region", "set AWS_REGION"),
)
_PASSING = (
    ("InvalidCertificate", "TLS: the certificate is not trusted", "SSL_CERT_FILE names a bundle of your own"),
    ("dns error", "the host's name is not known", "check the address and the network"),
    ("TimedOut", "stalled: no byte in time", ""),
    ("Connect", "no connection", ""),
    ("kind: Request", "the connection was cut", ""),
    ("kind: Body", "the connection was cut", ""),
    ("kind: Decode", "the connection was cut", ""),
)
"""What stands in a message of obstore, what it means, and what to do. The first that is found is taken."""


def transfer_error(error: BaseException, url: str) -> TransferError:
    """Turn an error of obstore into ours. One that is not of obstore is raised again.

    Args:
        error: what was raised while a store was asked.
        url: the address that was asked for.
    """
    from obstore.exceptions import BaseError

    # obstore's PanicException is no Exception, and cannot be imported.
    if not isinstance(error, (BaseError, ValueError, OSError)) and type(error).__name__ != "PanicException":
        raise error
    text, kind = str(error), STORES[url.partition("://")[0].lower()]
    if type(error).__name__ == "PreconditionError":
        return TransferError("it has changed since its first bytes came", restart=True)
    if _OWN_CREDENTIALS.search(text):
        return TransferError("no credentials, neither in the environment nor from the cloud", _CREDENTIALS[kind])
    if status := _STATUS.search(text):
        number, code = int(status[1]), _CODE.search(text)
        advice = {
            401: f"check the credentials; {_CREDENTIALS[kind]}",
            403: f"check the permissions; {_CREDENTIALS[kind]}",
            404: "check the address, and that the index belongs to this folder",
        }.get(number, "")
        return TransferError(
            f"HTTP {number}{f' {code[1]}' if code else ''}",
            advice,
            final=300 <= number < 500 and number not in _MAY_PASS,
            restart=number == 416,
        )
    if name := _EMPTY_PART.search(text):
        return TransferError(
            f"the name {name[1]!r} has an empty part (//), and cannot be read",
            "rename the object, or name a folder that has none of them",
            final=True,
        )
    for texts in (_FINAL, _PASSING):
        for part, message, advice in texts:
            if part in text:
                return TransferError(message, advice.replace("PREFIX", PREFIXES[kind]), final=texts is _FINAL)
    said = scrubbed(text.split("Debug source")[0], url)
    if isinstance(error, ValueError):
        return TransferError(f"not a valid address ({said})", "check bucket and key", final=True)
    return TransferError(f"{type(error).__name__}: {said}")
