"""Every error that leaves the package, in one tree.

OmniError
├── ConfigError              the program was started wrongly: one line, exit code 2
│   └── NotAvailableError    a flag that parses but whose feature is not built yet
├── RequestError             one request cannot be served (carries the HTTP status)
│   ├── InvalidRequestError  400  a field is wrong; `param` names it
│   │   ├── UnsupportedParameterError  the model has no such parameter
│   │   └── ModerationBlockedError  the model's own safety checker blocked the picture
│   ├── ModelNotFoundError   404
│   ├── JobNotFoundError     404  no such video job, or another key's
│   ├── AdapterChangedError  409  a LoRA adapter's file was written after the request had been accepted
│   ├── QueueFullError       429  `retry_after` seconds
│   ├── TooManyJobsError     429  the key has as many unfinished video jobs as it may have
│   ├── UnavailableError     503  draining, starting, restarting or asleep; `retry_after` seconds
│   ├── StoreFullError       507  no room for another video job
│   ├── GenerationError      500  the device failed on this request
│   └── RequestAbortedError  499  the caller or the client gave up
│       └── RequestGivenBackError  its video job goes back to the store
├── LeaseLostError           another server runs the video job now, or it was deleted
└── WorkerDiedError          a worker process ended or stopped answering
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any, ClassVar, Self


def error_line(error: BaseException) -> str:
    """Class and message of an error that is not ours, in one line of at most 300 characters."""
    line = f"{type(error).__name__}: {to_one_line(str(error))}".removesuffix(": ")
    return line if len(line) <= 300 else f"{line[:297]}..."


def to_one_line(text: str) -> str:
    """`text` in one line, with single spaces."""
    return " ".join(text.split())


class OmniError(Exception):
    """Root of the tree."""


class ConfigError(OmniError, ValueError):
    """A setting is wrong; the message names it, what it got and what it takes."""


class NotAvailableError(ConfigError):
    """A setting is valid, but its feature is not available yet."""


class RequestError(OmniError):
    """A request that cannot be served.

    `status`: HTTP status code; `type` and `code`: the fields of OpenAI's error object; `param`: the
    offending field or None; `retryable`: whether the same request may succeed later. `Omni.generate` sets `index`, the
    number of the failed prompt, from 0, and `outputs`: the outputs of all prompts in order (a failed one has its
    `error`), or none if nothing ran.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.retry_after = retry_after
        self.index: int | None = None
        self.outputs: Sequence[Any] = ()

    def copy(self) -> Self:
        """Copy of this error: same class, attributes and traceback."""
        # Not through the constructor: subclasses take other arguments.
        error = type(self).__new__(type(self))
        error.__dict__.update(self.__dict__)
        error.args = self.args
        return error.with_traceback(self.__traceback__)


class InvalidRequestError(RequestError, ValueError):
    status = 400
    type = "invalid_request_error"
    code = "invalid_value"


class UnsupportedParameterError(InvalidRequestError):
    """The model does not have the parameter `param`. `taken`: names of those that it has."""

    def __init__(self, param: str, value: Any, taken: Sequence[str]) -> None:
        self._refusal = f"{param} {value!r:.60}: this model has no such parameter; it takes "
        self._taken = taken
        super().__init__(self._refusal + ", ".join(taken), param=param)

    def message_among(self, names: Container[str]) -> str:
        """Message that lists only the parameters among `names`: those that the caller is able to give."""
        return self._refusal + ", ".join(name for name in self._taken if name in names)


class ModerationBlockedError(InvalidRequestError):
    """The model's own safety checker blocked the picture."""

    type = "image_generation_user_error"
    code = "moderation_blocked"


class ModelNotFoundError(RequestError):
    status = 404
    type = "invalid_request_error"
    code = "model_not_found"


class JobNotFoundError(RequestError):
    """No video job has the id, or it belongs to another API key."""

    status = 404
    type = "invalid_request_error"
    code = "video_not_found"


class AdapterChangedError(RequestError):
    """The file of a LoRA adapter was written after the request that names it had been accepted."""

    status = 409
    type = "invalid_request_error"
    code = "adapter_changed"
    retryable = True


class QueueFullError(RequestError):
    status = 429
    type = "rate_limit_error"
    code = "queue_full"
    retryable = True


class TooManyJobsError(RequestError):
    """An API key has as many unfinished video jobs as it may have."""

    status = 429
    type = "rate_limit_error"
    code = "too_many_jobs"
    retryable = True


class UnavailableError(RequestError):
    status = 503
    code = "unavailable"
    retryable = True


class StoreFullError(RequestError):
    """The store of video jobs has no room: its number of jobs is reached, or a disk is full."""

    status = 507
    code = "store_full"


class GenerationError(RequestError):
    status = 500
    code = "generation_failed"


class RequestAbortedError(RequestError):
    status = 499
    type = "invalid_request_error"
    code = "aborted"


class RequestGivenBackError(RequestAbortedError):
    """The request of a video job ends on this server, and the job goes back to the store: it is not lost."""


class LeaseLostError(OmniError):
    """A server's claim of a video job has ended: another server claimed the job, or it was deleted or released."""


class WorkerDiedError(OmniError):
    """A worker process ended, closed its channel or missed its deadline."""
