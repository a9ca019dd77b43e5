"""`vlm-serve run-batch`: a file of requests answered by the offline class, in OpenAI's batch format.

A run that was cut off goes on when the same command is given again. No more requests and answers are in memory than
run at once, however long the files are; of the others, their ids.
"""

import argparse
import os
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from api.cli.arguments import given_settings
from api.cli.batch_file import OK, AnswerFile, read_ids, read_lines
from api.cli.batch_request import BatchRequest, read_request
from api.cli.settings import load_settings
from api.errors import error_body, http_error
from vlm_serve.config import ServerConfig, Settings
from vlm_serve.serving.llm import LLM, Job


def run_batch(arguments: argparse.Namespace) -> int:
    settings = load_settings(given_settings(arguments), os.environ, arguments.config)
    source, out = arguments.input.expanduser(), arguments.output.expanduser()
    ids = read_ids(source)
    console = Console(stderr=True, highlight=False)
    with AnswerFile.open(out) as answers:
        done = sum(custom_id in answers.answered for custom_id in ids)
        if done:
            console.print(f"{done} of {len(ids)} requests are answered already.")
        if done < len(ids):
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with _load(settings) as llm, Progress(*columns, console=console) as progress:
                task = progress.add_task("Requests", total=len(ids), completed=done)
                for written in Batch(llm, settings.server, answers).run(source):
                    progress.advance(task, written)
    console.print(f"Written to {out}.", soft_wrap=True, markup=False)
    if answers.num_errors:
        console.print(f"{answers.num_errors} of its lines have an error in place of an answer.", style="bold red")
    return 1 if answers.num_errors else 0


def _load(settings: Settings) -> LLM:
    model = settings.model
    return LLM(
        model.model,
        dtype=model.dtype,
        device=model.device,
        adapters=model.adapters,
        ingest=settings.ingest,
        **asdict(settings.engine),
    )


class Batch:
    """Answers the lines of a file that have no answer yet, each written as it ends."""

    def __init__(self, llm: LLM, config: ServerConfig, answers: AnswerFile) -> None:
        self._llm = llm
        self._config = config
        self._answers = answers
        self._written = 0

    def run(self, source: Path) -> Iterator[int]:
        """How many lines were written, whenever some were."""
        for job, result in self._llm.stream(self._jobs(source)):
            request, place = cast(tuple[BatchRequest, int], job.key)
            if request.take(place, result):
                self._write(request.custom_id, request)
            yield self._told()
        yield self._told()

    def _told(self) -> int:
        written, self._written = self._written, 0
        return written

    def _jobs(self, source: Path) -> Iterator[Job]:
        """The requests of the file as there is room for them; a line that is none is answered at once."""
        for line in read_lines(source):
            if line.custom_id in self._answers.answered:
                continue
            try:
                request = read_request(line, self._llm, self._config)
            except Exception as error:  # noqa: BLE001 – one line's, whatever it is
                self._write(line.custom_id, error)
            else:
                yield from request.jobs

    def _write(self, custom_id: str, outcome: BatchRequest | Exception) -> None:
        """The body, or the error as the API gives it."""
        try:
            if isinstance(outcome, Exception):
                raise outcome
            status, body = OK, outcome.body()
        except Exception as error:  # noqa: BLE001 – one line's, whatever it is
            status, body = http_error(error).status, error_body(error)
        self._answers.add(custom_id, uuid.uuid4().hex, status, body)
        self._written += 1
