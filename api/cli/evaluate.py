"""`vlm-serve evaluate`: drafts for studies whose reports are known, asked of a server as its users ask, and scored.

A study whose request fails stays in every figure, as a draft that is wrong in everything.
"""

import argparse
import asyncio
import contextlib
import hashlib
import io
import json
import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
from PIL import Image
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from api.cli.files import data_url, read_image
from api.cli.own_server import connect, served_models
from vlm_serve import __version__
from vlm_serve.clinical.report import label_report
from vlm_serve.config import IngestConfig
from vlm_serve.errors import InvalidRequestError, ModelNotFoundError, ServiceError, VlmServeError
from vlm_serve.serving.decode_pool import DecodePool
from vlm_serve.training.dataset import Study, read_studies
from vlm_serve.training.scores import Scores, draw_confusion, rouge_l, score
from vlm_serve.types import ImagePart, JsonObject

GREY = 128
"""The level of a blanked picture: the middle, neither air nor bone."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What a server wrote of one study; `about` is its `x_vlm_serve`."""

    text: str
    finish_reason: str
    about: JsonObject


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a study has no draft."""

    message: str


def evaluate(arguments: argparse.Namespace) -> int:
    for name, value in (("--limit", arguments.limit), ("--concurrency", arguments.concurrency)):
        if value is not None and value < 1:
            raise InvalidRequestError(f"{name} must be at least 1.")
    arguments.out = arguments.out.expanduser()
    file = _data_file(arguments.data)
    studies = read_studies(file)[: arguments.limit]
    _check_writable(arguments.out)
    console = Console(highlight=False)
    model, results = asyncio.run(_ask_all(arguments, studies, console))
    drafts = [result.text if isinstance(result, Draft) else None for result in results]
    scores = score(drafts, [study.report for study in studies])
    _write(arguments, file, model, studies, results, scores)
    console.print(Markdown("\n".join(scores.figure_lines())))
    console.print(f"Written to {arguments.out}: scores.json, confusion.png", soft_wrap=True, markup=False)
    return _report_failures(studies, results, console)


def _data_file(path: Path) -> Path:
    """The JSONL file that `--data` means.

    Raises:
        InvalidRequestError: a folder without one, or with several of which none is test.jsonl.
    """
    path = path.expanduser()
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.jsonl"))
    test = path / "test.jsonl"
    if test in found:
        return test
    if len(found) != 1:
        raise InvalidRequestError(f"{path} holds {len(found)} JSONL files and no test.jsonl. Name the one to use.")
    return found[0]


def _check_writable(folder: Path) -> None:
    """Before the minutes of work, not after them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if not usable:
        raise InvalidRequestError(f"Nothing can be written to {folder}. Choose another --out.")


async def _ask_all(
    arguments: argparse.Namespace, studies: list[Study], console: Console
) -> tuple[JsonObject, list[Draft | Failure]]:
    """The entry of `/v1/models` that was asked, and a result for each study, in their order."""
    async with connect(arguments, console) as client, _pictures(arguments.blank) as pictures:
        models = await served_models(client)
        name = models[0]["id"] if arguments.model is None else arguments.model
        model = next((entry for entry in models if entry["id"] == name), None)
        if model is None:
            served = ", ".join(entry["id"] for entry in models)
            raise ModelNotFoundError(f"No model {name} is served; these are: {served}. --adapters adds a folder.")
        asking = _Asking(client, model["id"], arguments.max_tokens, pictures)
        results: dict[int, Draft | Failure] = {}
        waiting = iter(enumerate(studies))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("drafts", total=len(studies))

            async def worker() -> None:
                for index, study in waiting:
                    results[index] = await asking.draft(study)
                    progress.advance(task)

            async with asyncio.TaskGroup() as group:
                for _ in range(arguments.concurrency):
                    group.create_task(worker())
    return model, [results[index] for index in range(len(studies))]


@contextlib.asynccontextmanager
async def _pictures(blank: bool) -> AsyncIterator["_Pictures"]:
    if not blank:
        yield _Pictures(None)
        return
    with DecodePool(IngestConfig(workers=1)) as pool:
        yield _Pictures(pool)


class _Pictures:
    """A study's files as they are sent; with a decode pool, each as a grey picture of its size."""

    def __init__(self, pool: DecodePool | None) -> None:
        self._pool = pool

    def urls(self, study: Study) -> list[str]:
        return [data_url(self._part(path)) for path in study.images]

    def _part(self, path: Path) -> ImagePart:
        try:
            part = read_image(path)
        except InvalidRequestError:  # its message has the path, which may name a patient
            raise InvalidRequestError("An image cannot be read, or is neither DICOM, PNG nor JPEG.") from None
        if self._pool is None:
            return part
        rows, columns = self._pool.decode(part).pixels.shape[:2]
        buffer = io.BytesIO()
        Image.new("L", (columns, rows), GREY).save(buffer, format="PNG")
        return ImagePart(buffer.getvalue(), "image/png")


class _Asking:
    """Sends one study at a time to one model of one server, greedily."""

    def __init__(self, client: httpx.AsyncClient, model: str, max_tokens: int, pictures: _Pictures) -> None:
        self._client = client
        self._model = model
        self._max_tokens = max_tokens
        self._pictures = pictures

    async def draft(self, study: Study) -> Draft | Failure:
        try:
            urls = await asyncio.to_thread(self._pictures.urls, study)
            content: list[JsonObject] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
            body = {
                "model": self._model,
                "messages": [{"role": "user", "content": [*content, {"type": "text", "text": study.prompt}]}],
                "max_tokens": self._max_tokens,
                "temperature": 0,
            }
            response = await self._client.post("/v1/chat/completions", json=body)
            answer = response.json()
            if response.status_code != 200:
                return Failure(str(answer["error"]["message"]))
            (choice,) = answer["choices"]
            return Draft(choice["message"]["content"], choice["finish_reason"], answer["x_vlm_serve"])
        except VlmServeError as error:
            return Failure(str(error))
        except (httpx.HTTPError, ValueError, LookupError) as error:
            return Failure(f"The server gave no answer ({type(error).__name__}).")


def _write(
    arguments: argparse.Namespace,
    file: Path,
    model: JsonObject,
    studies: list[Study],
    results: list[Draft | Failure],
    scores: Scores,
) -> None:
    content = {
        "vlm_serve": __version__,
        "settings": {
            "data_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "model": model["id"],
            "limit": arguments.limit,
            "concurrency": arguments.concurrency,
            "max_tokens": arguments.max_tokens,
            "temperature": 0,
            "blank": arguments.blank,
        },
        "weights": _weights(results),
        "scores": scores.to_json(),
        "studies": list(_rows(studies, results, arguments.keep_drafts)),
    }
    (arguments.out / "scores.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", "utf-8")
    draw_confusion(scores, arguments.out / "confusion.png")


def _weights(results: list[Draft | Failure]) -> JsonObject | None:
    """Ids and digests of model and adapter, which every answer must share; None without an answer.

    Raises:
        ServiceError: the server changed them on the way.
    """
    seen = [
        {part: result.about[part] for part in ("model", "adapter")} for result in results if isinstance(result, Draft)
    ]
    if any(weights != seen[0] for weights in seen):
        raise ServiceError("The server changed its weights on the way. Evaluate again while it is left alone.")
    return seen[0] if seen else None


def _rows(studies: list[Study], results: list[Draft | Failure], keep_drafts: bool) -> Iterator[JsonObject]:
    for study, result in zip(studies, results, strict=True):
        row: JsonObject = {"id": study.id, "reference": asdict(label_report(study.report))}
        if isinstance(result, Failure):
            yield row | {"draft": None, "error": result.message}
            continue
        row |= {
            "draft": asdict(label_report(result.text)),
            "rouge_l": rouge_l(result.text, study.report),
            "finish_reason": result.finish_reason,
        }
        yield row | ({"text": result.text} if keep_drafts else {})


def _report_failures(studies: list[Study], results: list[Draft | Failure], console: Console) -> int:
    """Names each by its study's id; the exit status."""
    failed = [
        (study.id, result.message)
        for study, result in zip(studies, results, strict=True)
        if isinstance(result, Failure)
    ]
    if not failed:
        return 0
    console.print(f"{len(failed)} of {len(studies)} studies have no draft and count as wrong:", style="bold red")
    for name, message in failed:
        console.print(f"  {name}: {message}", markup=False, soft_wrap=True)
    return 1
