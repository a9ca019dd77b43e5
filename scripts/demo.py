"""`make demo`: the server with its embedded model and adapter, three studies and a draft of each, a follow-up.

What it sends is what any OpenAI client would send; see README.md for the same in curl and Python.
"""

import base64
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
STUDIES = ("simulated_chest.dcm", "simulated_head_ct.dcm", "simulated_legs.dcm")
QUESTION = "Write a draft report of this study."

START_SECONDS = 600
"""The first start fetches and converts the model."""


def main() -> None:
    began = time.perf_counter()
    with running_server() as url:
        conversation = []
        for name in STUDIES:
            data = (ROOT / "sample_data" / name).read_bytes()
            conversation = [{"role": "user", "content": study(data, QUESTION)}]
            heading(f"{name}, {len(data) / 1e3:.0f} kB of DICOM: {QUESTION}")
            say("the adapter, radiology")
            answer = ask(url, "radiology", conversation)
            say("the base model, demo")
            ask(url, "demo", conversation, about=False)
        heading("A follow-up on the last image: it is in the cache, nothing is encoded again")
        conversation += [
            {"role": "assistant", "content": answer},
            {"role": "user", "content": "Which side is abnormal?"},
        ]
        ask(url, "radiology", conversation, about=False)
        heading("A medical question to the base model: plain chat")
        ask(url, "demo", [{"role": "user", "content": "What is a pneumothorax? Answer in two sentences."}])
    print(f"\nDemo done in {time.perf_counter() - began:.0f} s. A server of your own: make serve")


@contextmanager
def running_server() -> Iterator[str]:
    """`vlm-serve serve` on a free port, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vlm-serve")), "serve", "--port", str(port)]
    print("$ vlm-serve serve --port", port, flush=True)
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:  # the server's log would run into the streamed text
        server = subprocess.Popen(command, cwd=ROOT, stderr=log)
        try:
            if failure := wait_until_healthy(server, url, START_SECONDS):
                log.seek(0)
                sys.exit(f"{failure}\n{log.read()}")
            yield url
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_healthy(server: subprocess.Popen[bytes], url: str, seconds: float) -> str | None:
    """Waits for the server; says what went wrong if it ended instead, or was not up in time."""
    deadline = time.monotonic() + seconds
    with httpx.Client(trust_env=False) as client:  # a proxy is not for this machine
        while (left := deadline - time.monotonic()) > 0:
            if server.poll() is not None:
                return "The server did not start."
            with suppress(httpx.TransportError):  # not listening yet
                if client.get(f"{url}/health", timeout=left).status_code == 200:
                    return None
            time.sleep(0.2)
    return f"The server was not up after {seconds:.0f} s. `vlm-serve serve` shows where it stays."


def study(dicom: bytes, question: str) -> list[dict[str, Any]]:
    """The content parts of a question about one DICOM file."""
    url = f"data:application/dicom;base64,{base64.b64encode(dicom).decode()}"
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question}]


def ask(url: str, model: str, messages: list[dict[str, Any]], *, about: bool = True) -> str:
    """Streams one answer to the terminal, then what the server says about it; the answer."""
    body = {
        "model": model,
        "messages": messages,
        "max_tokens": 96,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    asked = time.perf_counter()
    first, facts, usage, said = None, None, {}, []
    with (
        httpx.Client(trust_env=False, timeout=300) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body) as response,
    ):
        if response.status_code != 200:
            sys.exit(response.read().decode())
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                sys.exit(f"\n{event['error']['message']}")
            facts = event.get("x_vlm_serve", facts)
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if text := choice["delta"].get("content"):
                    first = first or time.perf_counter() - asked
                    said.append(text)
                    print(text, end="", flush=True)
    seconds = time.perf_counter() - asked
    cached = usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)
    print(
        f"\n[{usage['prompt_tokens']} tokens in, {cached} of them from the cache, {usage['completion_tokens']} out, "
        f"first after {first or seconds:.2f} s, all after {seconds:.2f} s]"
    )
    if about and facts:
        print("x_vlm_serve:", json.dumps(facts, indent=2))
    return "".join(said)


def say(text: str) -> None:
    print(f"\n{text}:", flush=True)


def heading(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 96 - len(text)), flush=True)


if __name__ == "__main__":
    main()
