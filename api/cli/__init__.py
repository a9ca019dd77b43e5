"""`vlm-serve`: the composition root. Each subcommand is a module, imported when it is asked for."""

import os
import sys
from collections.abc import Callable, Sequence

from api.cli.arguments import build_parser
from vlm_serve import __version__
from vlm_serve.errors import VlmServeError

INTERRUPTED = 130

# Before any library that could ask a model hub is imported: nothing leaves the machine.
os.environ["HF_HUB_OFFLINE"] = "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; an error of ours is one line on standard error and exit status 1."""
    arguments = build_parser(__version__).parse_args(argv)
    try:
        return _command(arguments.command)(arguments)
    except VlmServeError as error:
        print(f"vlm-serve: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


def _command(name: str) -> "Callable[..., int]":
    if name == "serve":
        print(f"Starting vlm-serve {__version__} …", flush=True)  # the import of torch takes seconds
        from api.cli.serve import serve

        return serve
    if name == "chat":
        from api.cli.chat import chat

        return chat
    if name == "make-key":
        from api.cli.make_key import print_key

        return print_key
    if name == "run-batch":
        from api.cli.run_batch import run_batch

        return run_batch
    if name == "inspect-dicom":
        from api.cli.inspect_dicom import inspect_dicom

        return inspect_dicom
    if name == "evaluate":
        from api.cli.evaluate import evaluate

        return evaluate
    if name == "train-adapter":
        # Before torch is loaded: beside other work OpenMP's waiting threads would take the cores that they wait for,
        # and training last five times as long.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        from api.cli.train_adapter import train

        return train
    from api.cli.bench import bench

    return bench
