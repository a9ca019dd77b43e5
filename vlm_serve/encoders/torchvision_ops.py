"""torchvision beside a CPU torch: makes it importable, for timm and transformers import it on their own.

The registry's torchvision is built for CUDA; beside a CPU torch its compiled operators do not load, and its
import fails on the two whose schemas it expects. Nothing here calls those operators.
"""

import contextlib
import importlib
import importlib.util
import warnings

import torch

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_libraries: list[torch.library.Library] = []
"""Kept for the life of the process: a library takes its schemas with it when it is collected."""


def declare_torchvision_ops() -> None:
    """Declares the missing operators, where they are missing. Called before timm or transformers is imported.

    A sound torchvision registers them itself when it is imported, so that is tried first: declaring them
    before it would be a second registration, which torch refuses.
    """
    if _libraries or importlib.util.find_spec("torchvision") is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on its other extensions that do not load: none is used
        with contextlib.suppress(RuntimeError):
            importlib.import_module("torchvision")
            return
        library = torch.library.Library("torchvision", "DEF")
        for name, schema in _SCHEMAS.items():
            if not hasattr(torch.ops.torchvision, name):
                library.define(schema)
        _libraries.append(library)
        importlib.import_module("torchvision")
