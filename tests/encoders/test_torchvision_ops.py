"""A torchvision that is built for another torch does not keep timm and transformers from being imported."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize("module", ["timm", "torchvision", "transformers.models.llava.modeling_llava"])
def test_libraries_that_import_torchvision_can_be_imported(module: str) -> None:
    code = f"import vlm_serve.encoders, {module}; from vlm_serve.encoders import torchvision_ops as ops; "
    code += "ops.declare_torchvision_ops()"  # a second time changes nothing
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
