"""What an error of a file system means, in one sentence: absent, refused, no credentials, or a fault that may pass.

Absent is only what a 404 or ENOENT says. Refusals (401, 403, other 4xx) are final too. All else may be gone at the next
try.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Any

from aligncurate.errors import UserError

_TRANSIENT_STATUS = {408, 425, 429}  # and 500 or more
_ABSENT_STATUS = {404, 410}
TRANSIENT = {
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EBUSY", "EREMOTEIO", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
        "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "ENOTCONN", "EPIPE", "EMFILE", "ENFILE",
        "ENOMEM", "ENOBUFS", "ENODEV", "ENXIO", "ENOLINK", "ESHUTDOWN", "EPROTO", "EKEYEXPIRED",
    )
    if hasattr(errno, name)
}  # fmt: skip
_FINAL = (UserError, PermissionError, IsADirectoryError, NotImplementedError, TypeError, ImportError)
"""Numbers of errors that may be gone at the next try."""

_NO_CREDENTIALS = {  # classes of botocore and google.auth
    "CredentialRetrievalError", "DefaultCredentialsError", "NoCredentialsError", "NoAuthTokenError",
    "PartialCredentialsError", "ProfileNotFound", "RefreshError", "SSOTokenLoadError", "TokenRetrievalError",
    "UnauthorizedSSOTokenError",
}  # fmt: skip
_CREDENTIALS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "set GOOGLE_APPLICATION_CREDENTIALS, or run `gcloud auth application-default login`",
    "hf": "set HF_TOKEN",
}
_NO_CONNECTION = {"EndpointConnectionError", "ClientConnectorError", "ClientConnectorDNSError", "ConnectTimeoutError"}


def is_absent(error: BaseException) -> bool:
    """Whether an error says for certain that there is no such file.

    fsspec's HTTP file system raises FileNotFoundError for any failure, caused by what really happened.
    """
    status = _status(error)
    if status is not None:
        return status in _ABSENT_STATUS
    if isinstance(error, (FileNotFoundError, NotADirectoryError)):
        cause = error.__cause__
        return cause is None or isinstance(cause, LookupError) or is_absent(cause)
    return False


def fault_of(uri: str, error: Exception) -> OSError:
    """An error of a remote file system as an OSError that says whether it is final."""
    text = " ".join(str(error).split()).rstrip(".")
    if _code(error) == "NoSuchBucket" or "bucket does not exist" in text:
        return FileNotFoundError(errno.ENOENT, "the bucket does not exist; create it, or check its name", uri)
    if is_absent(error):
        return error if isinstance(error, FileNotFoundError) and error.errno else _absent(uri)
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # not certain: see `is_absent`
        return fault_of(uri, error.__cause__) if isinstance(error.__cause__, Exception) else _failed(uri, "unknown")
    cause_of = error.__cause__ if isinstance(getattr(error.__cause__, "response", None), dict) else None
    status = _status(error) or _status(cause_of)  # s3fs makes OSErrors of botocore's errors
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if type(error).__name__ in _NO_CREDENTIALS:
        return PermissionError(errno.EACCES, f"there are no credentials ({cause}); {_credentials(uri)}", uri)
    if status in (401, 403) or (isinstance(error, PermissionError) and not error.filename):
        advice = "check the credentials, and that they allow to list, read and write there"
        return PermissionError(errno.EACCES, f"access refused ({cause}); {advice}", uri)
    if status is not None and status < 500 and status not in _TRANSIENT_STATUS:
        return OSError(errno.EINVAL, f"{uri}: request refused ({cause})")
    if type(error).__name__ in _NO_CONNECTION:
        fault = _failed(uri, cause)
        return OSError(errno.EHOSTUNREACH, f"{fault}; check the network and the endpoint (AWS_ENDPOINT_URL for s3://)")
    if isinstance(error, _FINAL):
        if isinstance(error, OSError):
            error.errno = error.errno or errno.EACCES
            return error
        fault = _failed(uri, cause)
        fault.errno = errno.EINVAL
        return fault
    if isinstance(error, OSError) and error.errno and text:
        return error if error.filename or uri in text else OSError(error.errno, error.strerror or text, uri)
    return _failed(uri, cause)


def _credentials(uri: str) -> str:
    """How credentials are given for the kind of file system that `uri` names."""
    return _CREDENTIALS.get(uri.partition(":")[0], "see the documentation of its fsspec file system")


def _absent(uri: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri)


def _failed(uri: str, cause: str) -> OSError:
    fault = OSError(f"{uri}: its file system failed ({cause})")
    fault.errno = errno.EIO
    return fault


def _status(error: BaseException | None) -> int | None:
    """The HTTP status that a network library's error carries."""
    response = getattr(error, "response", None)
    found_in: Iterable[Any]
    if isinstance(response, dict):  # botocore
        found_in = [response.get("ResponseMetadata", {}).get("HTTPStatusCode")]
    else:  # one by one: aiohttp warns of `code`, where there is `status`
        found_in = (getattr(error, name, None) for name in ("status", "status_code", "code"))
    return next((int(s) for s in found_in if isinstance(s, int) and 100 <= s < 600), None)


def _code(error: BaseException) -> Any:
    """The code of an error of S3, such as NoSuchBucket."""
    response = getattr(error, "response", None)
    return response.get("Error", {}).get("Code") if isinstance(response, dict) else None
