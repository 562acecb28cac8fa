"""Which failures of a remote store may pass, and how long they are waited for.

An operation is attempted again, after a random pause up to an exponentially growing bound ("full jitter"), until two minutes
have passed since its first attempt; each attempt has a time limit of its own. s3fs and botocore would retry some failures by
themselves, each on its own terms, and would multiply the requests; they are told not to: this is the one place that decides.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

GIVE_UP_SECONDS = 120.0
_FIRST_PAUSE_SECONDS = 0.1
_LONGEST_PAUSE_SECONDS = 10.0
# Statuses below 500 that ask for another attempt: timeout, a conflict with a concurrent conditional write, too many requests.
_PASSING_STATUSES = (408, 409, 429)
_REFUSING_STATUSES = (401, 403)
# Not implemented; insufficient storage, which is what MinIO says when it is full.
_FINAL_SERVER_STATUSES = (501, 507)
_FINAL_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_FINAL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.ENOSYS, errno.ENOTSUP, errno.ENAMETOOLONG, errno.EROFS)
# Mistakes in a call are not mended by repeating it.
_PROGRAMMING_ERRORS = (TypeError, ValueError, LookupError, AttributeError, NotImplementedError)

# botocore's errors, by name since it is an optional package: no credentials, or none that can be had.
_NO_CREDENTIALS = {
    "NoCredentialsError",
    "PartialCredentialsError",
    "CredentialRetrievalError",
    "ProfileNotFound",
    "TokenRetrievalError",
    "NoAuthTokenError",
    "SSOError",
    "LoginError",
}
# Codes of credentials that were good once; S3 answers most of them with 400 rather than 403.
_REFUSED_TOKENS = ("ExpiredToken", "InvalidToken", "TokenRefreshRequired")
# Those of botocore's errors that are failures of the network; the others are mistakes in the settings.
_NETWORK_ERRORS = {
    "HTTPClientError",
    "ConnectionError",
    "IncompleteReadError",
    "ChecksumError",
    "FlexibleChecksumError",
}
# The query of an address: a server may redirect to a signed one.
_QUERY = re.compile(r"(?<=://)([^\s?'\"]*)\?[^\s'\"]*")

ResultT = TypeVar("ResultT")


def call_with_retries(function: Callable[[], ResultT], *, where: str) -> ResultT:
    """``function()``, tried again while its failures may pass.

    Raises:
        OSError: it failed for good; a failure of another type that an HTTP library raised is turned into one, a PermissionError
            where the server refused access.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        wait=wait_random_exponential(multiplier=_FIRST_PAUSE_SECONDS, max=_LONGEST_PAUSE_SECONDS),
        stop=stop_after_delay(GIVE_UP_SECONDS),
        reraise=True,
    )
    try:
        return retrying(function)
    except Exception as error:
        reason = _reason(error)
        # aiohttp's errors show the address of a redirect: a traceback must not show them.
        shown = error if _own_status(error) is None else None
        if is_transient(error):
            attempts = retrying.statistics["attempt_number"]
            seconds = retrying.statistics["delay_since_first_attempt"]
            raise OSError(
                f"{where}: gave up after {attempts} attempts in {seconds:.0f} s, the last: {reason}"
            ) from shown
        if isinstance(error, OSError):
            raise
        if _own_status(error) in _REFUSING_STATUSES:
            raise PermissionError(f"{where}: {reason}") from shown
        if "BotoCoreError" in _class_names(error) or _own_status(error) is not None:
            raise OSError(f"{where}: {reason}") from shown
        raise


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    if not isinstance(error, Exception) or isinstance(error, _FINAL_ERRORS + _PROGRAMMING_ERRORS):
        return False
    if is_precondition_failure(error) or is_refusal(error):
        return False
    names = _class_names(error)
    if "BotoCoreError" in names and not names & _NETWORK_ERRORS:
        return False
    status = http_status(error)
    if status is not None:
        return status in _PASSING_STATUSES or (status >= 500 and status not in _FINAL_SERVER_STATUSES)
    return not (isinstance(error, OSError) and error.errno in _FINAL_ERRNOS)


def is_precondition_failure(error: BaseException) -> bool:
    """Whether a server refused a conditional PUT. Ceph's 412 arrives as OSError(22): only its cause tells."""
    return http_status(error) == 412 or error_code(error) == "PreconditionFailed"


def is_refusal(error: BaseException) -> bool:
    """Whether credentials are missing, expired or not enough. A refused HEAD has no body: AWS answers one with an expired token
    with a bare 400, whose code is "400".
    """
    if isinstance(error, PermissionError) or _class_names(error) & _NO_CREDENTIALS:
        return True
    code = error_code(error)
    return code in _REFUSED_TOKENS or (http_status(error) == 400 and code == "400")


def error_code(error: BaseException) -> str:
    """The service's own word for what went wrong, such as ``InvalidAccessKeyId``; empty where there is none."""
    return str(_response(error).get("Error", {}).get("Code", ""))


def http_status(error: BaseException) -> int | None:
    """The status of the HTTP response that the error stems from, if any."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    each: BaseException | None = error
    while status is None and each is not None:
        status = _own_status(each)
        each = each.__cause__ or each.__context__
    return int(status) if isinstance(status, int) else None


def _own_status(error: BaseException) -> int | None:
    """Of aiohttp's own errors, which fsspec's HTTP file system passes on."""
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _reason(error: Exception) -> str:
    """What went wrong, for messages: without what follows the ``?`` of an address, which may sign it."""
    status = _own_status(error)
    if status is not None:
        return f"HTTP status {status}"
    return _QUERY.sub(r"\1", str(error)) or type(error).__name__


def _response(error: BaseException | None) -> dict[str, Any]:
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return response
        error = error.__cause__ or error.__context__
    return {}


def _class_names(error: BaseException) -> set[str]:
    return {each.__name__ for each in type(error).__mro__}
