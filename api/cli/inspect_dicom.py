"""`vlm-serve inspect-dicom`: what a file becomes on its way to a model, decoded as the server decodes it."""

import argparse
import json

from PIL import Image
from rich.console import Console

from api.cli.files import read_image
from api.cli.receipts import print_receipt
from api.responses import receipt_json
from vlm_serve.config import IngestConfig
from vlm_serve.serving.decode_pool import DecodePool


def inspect_dicom(arguments: argparse.Namespace) -> int:
    part = read_image(arguments.file)
    with DecodePool(IngestConfig(workers=1)) as pool:
        image = pool.decode(part)
    receipt = receipt_json(image.receipt)
    if arguments.json:
        print(json.dumps(receipt, indent=2, ensure_ascii=False))
    else:
        print_receipt(receipt, Console(), str(arguments.file))
    if arguments.png is not None:
        Image.fromarray(image.pixels).save(arguments.png, format="PNG")
    return 0
