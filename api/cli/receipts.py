"""What an answer carries about its images, for people: tables of the receipts and the notices below them."""

from rich.console import Console
from rich.table import Table

from vlm_serve.types import JsonObject


def print_receipt(receipt: JsonObject, console: Console, title: str) -> None:
    """One receipt as a table; what a file does not have is left out."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in receipt.items():
        for label, text in _lines(name, value):
            table.add_row(label, text)
    console.print(table)


def _lines(name: str, value: object) -> list[tuple[str, str]]:
    label = name.replace("_", " ")
    match value:  # an empty list or dict gives no line
        case None | False:
            return []
        case dict() if name == "window":
            width = "" if value["width"] is None else f" center {value['center']:g} width {value['width']:g}"
            return [(label, f"{value['source']},{width} {value['function']}")]
        case dict():
            return [(str(key), str(item)) for key, item in value.items()]
        case list() | tuple():
            return [(label, str(item)) for item in value]
        case True:
            return [(label, "yes")]
    return [(label, str(value))]


def print_about_images(about: JsonObject, console: Console) -> None:
    """`x_vlm_serve` below an answer: each image's receipt, the digests, then the notices."""
    for number, receipt in enumerate(about["images"], start=1):
        print_receipt(receipt, console, f"Image {number}")
    for part in ("model", "adapter"):
        if about[part] is not None:
            console.print(f"{part} {about[part]['id']} {about[part]['digest']}", style="dim", markup=False)
    for notice in (about["model_notice"], about["notice"]):
        if notice:
            console.print(notice, style="bold yellow", markup=False)
