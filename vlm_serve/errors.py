"""The exceptions of vlm-serve: one tree, each raised where its cause is known.

    VlmServeError
    ├── InputError                    what the caller sent; the caller can mend it
    │   ├── InvalidRequestError       a field or a combination of fields
    │   │   └── ContextLengthError    longer than the model can hold
    │   ├── AuthenticationError       no key, or one that the server does not know
    │   ├── PermissionDeniedError     the key does not allow it
    │   ├── ModelNotFoundError        no base model or adapter of that name
    │   ├── PayloadTooLargeError      past a limit of size
    │   └── ImageError                an image or DICOM file
    │       ├── MediaMismatchError    the bytes are not what the part says they are
    │       ├── UnsupportedImageError sound, but of a kind that is not decoded here
    │       ├── CorruptImageError     cannot be decoded
    │       └── ImageLimitError       past a limit of the decoder (memory, time, dimensions)
    ├── ConfigurationError            settings of the server; raised at start-up
    │   ├── CheckpointError           a model folder
    │   └── AdapterError              an adapter folder
    └── ServiceError                  the server could not do its part
        ├── OverloadedError           a queue is full; try again later
        ├── EngineDeadError           the engine process is gone
        ├── PoisonedRequestError      this request ends the engine process each time it runs
        └── RequestFailedError        a fault inside the engine ended this request

A message says what is wrong and what to do. It never carries patient data: no attribute values of a
file, no prompt, no URL, no text of a foreign exception that may echo its input.
`api/errors.py` maps the tree to HTTP.
"""


class VlmServeError(Exception):
    """Base of every error that vlm-serve raises on purpose."""


class InputError(VlmServeError):
    """The caller's input cannot be served; `param` names the field of the request, where there is one."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidRequestError(InputError):
    """A field, or a combination of fields, has no meaning."""


class ContextLengthError(InvalidRequestError):
    """The prompt, with the answer asked for, is longer than the model or its cache can hold."""


class AuthenticationError(InputError):
    """The request names no key, or one that is in no entry of the server's file of keys."""


class PermissionDeniedError(InputError):
    """The request's key is good, but what it asks for needs a permission that the key has not."""


class ModelNotFoundError(InputError):
    """`model` names neither the base model nor an adapter."""


class PayloadTooLargeError(InputError):
    """A body or a file is past its limit of size."""


class RequestTimeoutError(InputError):
    """A request takes too long to arrive."""


class ImageError(InputError):
    """An image part cannot be used."""


class MediaMismatchError(ImageError):
    """The bytes are not of the media type that the part declares."""


class UnsupportedImageError(ImageError):
    """A sound file of a kind that is not decoded here (a video transfer syntax, an object without pixels)."""


class CorruptImageError(ImageError):
    """The file breaks off, contradicts itself or cannot be decoded."""


class ImageLimitError(ImageError):
    """Decoding the file would pass a limit of dimensions, memory or time."""


class ConfigurationError(VlmServeError):
    """The server's own settings or files are wrong; raised before it serves."""


class CheckpointError(ConfigurationError):
    """A model folder is incomplete, inconsistent or of an unknown architecture."""


class AdapterError(ConfigurationError):
    """An adapter folder does not fit: its format, its base model, its modules or its rank."""


class ServiceError(VlmServeError):
    """The server could not do its part; the request may be good."""


class OverloadedError(ServiceError):
    """A bounded queue is full."""


class EngineDeadError(ServiceError):
    """The engine process has ended."""


class PoisonedRequestError(ServiceError):
    """This request has ended the engine process twice when it ran alone; it is not run again."""


class RequestFailedError(ServiceError):
    """A fault inside the engine ended this request; other requests go on."""
