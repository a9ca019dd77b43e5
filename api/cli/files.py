"""What the command line reads and reaches: files as image parts, and servers by their URL."""

import base64
import os
from pathlib import Path

import httpx

from vlm_serve.errors import InvalidRequestError
from vlm_serve.types import ImagePart

_MAGIC = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
_DICOM = "application/dicom"


def read_image(path: Path) -> ImagePart:
    """The file at `path`.

    Raises:
        InvalidRequestError: it cannot be read, or is neither DICOM, PNG nor JPEG.
    """
    try:
        data = path.expanduser().read_bytes()
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}.") from None
    for magic, media_type in _MAGIC.items():
        if data.startswith(magic):
            return ImagePart(data, media_type)
    if data[128:132] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima"):
        return ImagePart(data, _DICOM)
    raise InvalidRequestError(f"{path} is neither DICOM, PNG nor JPEG. A DICOM file without preamble is named *.dcm.")


def data_url(part: ImagePart) -> str:
    return f"data:{part.media_type};base64,{base64.b64encode(part.data).decode('ascii')}"


def key_header() -> dict[str, str]:
    """For a server with keys: the one in `VLM_SERVE_API_KEY`, where there is one; a flag would show in lists of
    processes.
    """
    key = os.environ.get("VLM_SERVE_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def honours_proxy(url: str) -> bool:
    """Whether a request to `url` may go through the proxy of the environment: never one to this machine."""
    return httpx.URL(url).host not in ("localhost", "127.0.0.1", "::1")
