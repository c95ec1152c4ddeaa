"""Everything that goes wrong between here and the Hub, each in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import HubError, PopupError
from .address import Address

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"


@contextmanager
def explained(address: Address, shown: object = None, *, doing: str = "read") -> Iterator[None]:
    """Context manager: turn whatever huggingface_hub raises into a `HubError` of one sentence.

    Only calls of huggingface_hub belong inside. No token and no address of a request is ever repeated.

    Args:
        address: what is read or written.
        shown: what the sentence calls it. Default: the address.
        doing: `read` or `write`.
    """
    try:
        yield
    except PopupError:
        raise
    except Exception as error:  # huggingface_hub, its HTTP library and hf_xet each raise classes of their own
        raise HubError(f"{shown or address}: {sentence(error, address, doing)}") from error


def sentence(error: BaseException, address: Address, doing: str = "read") -> str:
    """Return what an error of huggingface_hub means for `address`, and what to do."""
    from huggingface_hub import constants, errors, get_token

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__  # why the Hub was not asked
    repo, revision = address.repo, address.revision or "main"
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return "this is not in the cache, and HF_HUB_OFFLINE forbids to download it; unset it, and try again"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"this needs a token; {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; choose a branch, a tag or a commit of it"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} has no file {address.path!r} in the revision {revision!r}; look at its files on the Hub"
    if isinstance(error, errors.HFValidationError):
        return f"{repo!r} is no name of a repository; expected user/name"
    if isinstance(error, errors.HfHubHTTPError):
        return _answer(error, repo, doing, get_token() is not None)
    kinds = {cls.__name__ for cls in type(error).__mro__ if cls.__module__.startswith("httpx")}
    if "TimeoutException" in kinds:
        return f"{constants.ENDPOINT} did not answer in time; try again"
    if "ConnectError" in kinds:
        return f"{constants.ENDPOINT} cannot be reached; check the connection, and HF_ENDPOINT if it is set"
    if kinds:
        return f"the connection to {constants.ENDPOINT} broke ({type(error).__name__}); try again"
    if isinstance(error, errors.FileMetadataError):
        return f"{constants.ENDPOINT} does not answer as the Hub does; check HF_ENDPOINT"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or constants.HF_HUB_CACHE} cannot be written or read: {error.strerror}"
    if isinstance(error, OSError) and "onsistency check" in str(error):
        return "the download ended early or is of another size than the Hub states; try again"
    if isinstance(error, RuntimeError) and "client has been closed" in str(error):  # up to huggingface_hub 1.25
        return f"{constants.ENDPOINT} cannot be reached; check the connection, and HF_ENDPOINT if it is set"
    by_xet = isinstance(error, RuntimeError) and not constants.HF_HUB_DISABLE_XET
    if by_xet or type(error).__module__.startswith("hf_xet"):
        return "the transfer by Xet failed; try again, or set HF_HUB_DISABLE_XET=1 to do without it"
    return f"the transfer failed ({type(error).__name__}); try again"


def _answer(error: Exception, repo: str, doing: str, has_token: bool) -> str:
    """Return what an answer of the Hub that is an error means."""
    from huggingface_hub import errors

    response = error.response  # type: ignore[attr-defined]
    status, told = response.status_code, response.headers.get("X-Error-Message", "")
    if isinstance(error, errors.GatedRepoError):
        first = f"access to {repo} is restricted; ask for it on the repository's page"
        return first if has_token else f"{first}, and {LOG_IN}"
    if isinstance(error, errors.DisabledRepoError):
        return f"{repo} is disabled on the Hub"
    if status == 401 and "Invalid credentials" in told:
        return f"the Hub does not know the token; {LOG_IN}"
    if status == 401 or isinstance(error, errors.RepositoryNotFoundError):
        rights = "the token may not see it; check the name and the token" if has_token else f"it is private; {LOG_IN}"
        return f"there is no repository {repo}, or {rights}"
    if status == 403:
        return f"the token may not {doing} {repo}; use one that may"
    if status == 429:
        after = response.headers.get("Retry-After", "")
        return (
            f"the Hub takes no more requests for now (429); try again {f'in {after} s' if after.isdigit() else 'later'}"
        )
    if status >= 500:
        return f"the Hub has an error of its own ({status}); try again later"
    return f"the Hub refused the request ({status})"
