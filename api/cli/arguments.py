"""The command line's grammar, with help that shows how: every subcommand ends in examples to copy.

Only the standard library is imported here, so that `--help` answers at once.
"""

import argparse
from pathlib import Path

EXAMPLES = {
    "": """\
examples:
  vlm-serve serve                              the embedded default model on port 8000
  vlm-serve chat --image chest.dcm "Describe this radiograph."
  vlm-serve inspect-dicom chest.dcm            how a file would be shown to a model
  vlm-serve run-batch in.jsonl out.jsonl       a file of requests, answered without a server
  vlm-serve bench                              what this machine can do
  vlm-serve evaluate --data studies --model radiology    drafts scored against reports
  vlm-serve train-adapter --data train.jsonl --out adapters/thorax    from reports of your own
""",
    "serve": """\
examples:
  vlm-serve serve
  vlm-serve serve --model ~/models/llava-1.5-7b --adapters ~/adapters --port 9000
  vlm-serve serve --kv-cache-memory 8GiB --max-model-len 4096 --max-num-seqs 32
  vlm-serve serve --kv-cache-memory 80%        of what the weights leave free on a GPU
  vlm-serve serve --config vlm-serve.yaml      # flags go before VLM_SERVE_* before the file

a file of settings:
  model:  {model: /srv/models/llava, dtype: bfloat16}
  engine: {kv_cache_memory: 8GiB, max_num_seqs: 32}
  server: {host: 0.0.0.0, port: 8000}
""",
    "make-key": """\
examples:
  vlm-serve make-key radiology                 a key, and its line for the file
  vlm-serve make-key emergency --stat          its requests may go before routine ones
  vlm-serve make-key monitoring --metrics      it may read /metrics
  vlm-serve serve --api-keys keys.yaml
""",
    "chat": """\
examples:
  vlm-serve chat "What are the signs of a pneumothorax?"
  vlm-serve chat --image chest.dcm --image prior.dcm "Compare the two."
  vlm-serve chat --url http://localhost:8000 --model radiology "Say hello."    a key: in VLM_SERVE_API_KEY
  vlm-serve chat                               # a conversation; /image FILE adds a file, /quit ends
""",
    "run-batch": """\
examples:
  vlm-serve run-batch in.jsonl out.jsonl       again, if it was cut off: it goes on
  vlm-serve run-batch --model ~/models/llava-1.5-7b --adapters ~/adapters in.jsonl out.jsonl

in.jsonl holds one request a line, in OpenAI's batch format, for chats, responses, completions or embeddings:
  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",
   "body": {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}}
""",
    "inspect-dicom": """\
examples:
  vlm-serve inspect-dicom chest.dcm            what is decoded, how it is windowed, its digests
  vlm-serve inspect-dicom ct.dcm --png ct.png  the pixels as a model's processor gets them
  vlm-serve inspect-dicom chest.dcm --json     the receipt that an answer carries
""",
    "bench": """\
examples:
  vlm-serve bench                              starts a server of its own
  vlm-serve bench --url http://localhost:8000 --out result.json
  vlm-serve bench --concurrency 1,8,32 --requests 32 --max-tokens 64
""",
    "evaluate": """\
examples:
  vlm-serve evaluate --data studies --model radiology    starts a server of its own
  vlm-serve evaluate --data studies --model radiology --url http://localhost:8000
  vlm-serve evaluate --data studies --model radiology --blank --out blanked    the control: no picture to see
  vlm-serve evaluate --data dev.jsonl --base ~/models/llava --limit 50         a base model alone

a folder of --data holds test.jsonl, one study a line, paths relative to it:
  {"id": "0001", "images": ["0001.dcm"], "report": "FINDINGS: … IMPRESSION: …"}
""",
    "train-adapter": """\
examples:
  vlm-serve train-adapter --data studies/train.jsonl --out adapters/thorax
  vlm-serve train-adapter --data train.jsonl --held-out test.jsonl --out adapters/thorax --epochs 5
  vlm-serve train-adapter --data train.jsonl --out ~/adapters/thorax --model ~/models/llava-1.5-7b --device cuda

train.jsonl holds one study a line, DICOM, PNG or JPEG files by paths relative to it:
  {"id": "0001", "images": ["0001.dcm"], "report": "FINDINGS: … IMPRESSION: …"}
  {"id": "0002", "images": ["a.png", "b.png"], "prompt": "Compare.", "report": "…"}
It trains a LoRA on the decoder; the base model, which all departments share, stays as it is. A run that was cut off
goes on when the same command is given again.
""",
}


def build_parser(version: str) -> argparse.ArgumentParser:
    """The whole grammar. Settings of the server are left out of the result unless given."""
    parser = _parser(None, "", "Clinical vision-language models: from a DICOM file to a streamed answer.")
    parser.add_argument("--version", action="version", version=f"vlm-serve {version}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    serve = _parser(commands, "serve", "Serve a model over HTTP.")
    _add_model(serve)
    _add_server(serve)

    chat = _parser(commands, "chat", "Ask a model, here or on a running server.")
    chat.add_argument("message", nargs="?", help="what to ask; without it, a conversation")
    chat.add_argument("--url", help="a running server; without it the model is loaded here")
    chat.add_argument("--image", action="append", default=[], type=Path, metavar="FILE", help="DICOM, PNG or JPEG")
    chat.add_argument("--system", help="a system message")
    chat.add_argument("--max-tokens", type=int, default=256, help="length of an answer (default: 256)")
    chat.add_argument("--temperature", type=float, default=0.0, help="0, the default, is greedy")
    chat.add_argument("--seed", type=int, help="makes sampling repeatable")
    _add_model(chat)

    key = _parser(commands, "make-key", "Make a key for a tenant of a server.")
    key.add_argument("tenant", help="whose it is: a word of letters, digits, dots and dashes")
    key.add_argument("--stat", action="store_true", help="allow priority stat")
    key.add_argument("--metrics", action="store_true", help="allow /metrics, the figures of all tenants")

    batch = _parser(commands, "run-batch", "Answer a file of requests, without a server.")
    batch.add_argument("input", type=Path, help="a request a line, as JSON")
    batch.add_argument("output", type=Path, help="for an answer a line; what is in it already is not asked again")
    _add_model(batch)

    inspect = _parser(commands, "inspect-dicom", "Show what a file becomes, without a model.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--png", type=Path, metavar="OUT", help="write the pixels as a PNG file")
    inspect.add_argument("--json", action="store_true", help="print the receipt as JSON")

    bench = _parser(commands, "bench", "Put load on a server and measure it.")
    bench.add_argument("--url", help="a running server; without it one is started")
    bench.add_argument("--concurrency", default="1,8,32", help="requests at once (default: 1,8,32)")
    bench.add_argument("--requests", type=int, help="requests a run (default: four times the concurrency)")
    bench.add_argument("--max-tokens", type=int, default=32, help="length of each answer (default: 32)")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write each request's times as JSON")
    _add_model(bench)

    evaluate = _parser(commands, "evaluate", "Score a model's drafts against the reports of studies.")
    evaluate.add_argument("--data", required=True, type=Path, metavar="PATH", help="a JSONL file, or its folder")
    evaluate.add_argument("--model", metavar="NAME", help="the adapter or base model to ask (default: the base model)")
    evaluate.add_argument("--url", help="a running server; without it one is started")
    evaluate.add_argument("--limit", type=int, metavar="N", help="the first N studies (default: all)")
    evaluate.add_argument("--concurrency", type=int, default=8, metavar="N", help="requests at once (default: 8)")
    evaluate.add_argument("--max-tokens", type=int, default=256, help="length of a draft (default: 256)")
    evaluate.add_argument("--blank", action="store_true", help="send a grey picture in place of each image")
    evaluate.add_argument("--keep-drafts", action="store_true", help="write the drafts' texts into scores.json too")
    evaluate.add_argument(
        "--out", type=Path, default=Path("evaluation"), metavar="DIR", help="for the results (default: evaluation)"
    )
    _add_model(evaluate, checkpoint_flag="base")
    _add_training(_parser(commands, "train-adapter", "Train an adapter on studies and reports of your own."))
    return parser


def _parser(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser] | None", name: str, text: str
) -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    if commands is None:
        return argparse.ArgumentParser("vlm-serve", description=text, epilog=EXAMPLES[name], formatter_class=formatter)
    return commands.add_parser(name, help=text, description=text, epilog=EXAMPLES[name], formatter_class=formatter)


def _add_model(parser: argparse.ArgumentParser, checkpoint_flag: str = "model") -> None:
    group = parser.add_argument_group("model and engine")
    _add_setting(group, "model.model", "demo, or the folder of a checkpoint (default: demo)", checkpoint_flag)
    _add_setting(group, "model.adapters", "a folder of PEFT adapter folders, each served under its name")
    _add_setting(group, "model.dtype", "auto, float32, bfloat16 or float16 (default: auto)")
    _add_setting(group, "model.device", "auto, cpu or cuda (default: auto)")
    _add_setting(group, "engine.max_model_len", "tokens of prompt and answer together (default: the model's)")
    _add_setting(
        group,
        "engine.kv_cache_memory",
        "such as 2GiB, or on a GPU a share of what is free, 0.8 or 80%% (default: 1GiB, 0.9)",
    )
    _add_setting(
        group, "ingest.image_processor_device", "where pixels are resized and normalised: cpu or cuda (default: cpu)"
    )
    _add_setting(group, "engine.max_num_seqs", "requests in one batch (default: 64)")
    _add_setting(group, "engine.max_num_batched_tokens", "tokens in one step (default: 512)")
    _add_setting(group, "engine.speculative_tokens", "tokens guessed at once from what is there (default: 0, none)")
    group.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML; flags and VLM_SERVE_* go first")


def _add_training(train: argparse.ArgumentParser) -> None:
    train.add_argument("--data", required=True, type=Path, metavar="FILE", help="the studies, as JSONL")
    train.add_argument("--out", required=True, type=Path, metavar="DIR", help="the adapter's folder, named as it is")
    train.add_argument(
        "--held-out", default="0.1", metavar="SHARE|FILE", help="what it is scored on: a share, or JSONL (default: 0.1)"
    )
    train.add_argument("--epochs", type=int, default=3, metavar="N", help="times through the studies (default: 3)")
    train.add_argument("--max-steps", type=int, metavar="N", help="end after N batches (default: all epochs)")
    train.add_argument("--batch-size", type=int, default=8, metavar="N", help="studies in a batch (default: 8)")
    train.add_argument("--rank", type=int, default=16, metavar="N", help="of the LoRA; alpha is twice it (default: 16)")
    train.add_argument("--learning-rate", type=float, default=5e-4, metavar="RATE", help="the highest (default: 5e-4)")
    train.add_argument("--dropout", type=float, default=0.0, metavar="SHARE", help="of the LoRA (default: 0)")
    train.add_argument("--seed", type=int, default=0, help="of the split, the order and the first weights (default: 0)")
    train.add_argument(
        "--score", type=int, default=50, metavar="N", help="held-out studies to write drafts of (default: 50)"
    )
    train.add_argument(
        "--work", type=Path, metavar="DIR", help="keep features and checkpoint here (default: beside --out, removed)"
    )
    group = train.add_argument_group("model")
    _add_setting(group, "model.model", "demo, or the folder of a checkpoint (default: demo)")
    _add_setting(group, "model.dtype", "auto, float32 or bfloat16 (default: auto)")
    _add_setting(group, "model.device", "auto, cpu or cuda (default: auto)")
    group.add_argument("--config", type=Path, metavar="FILE", help="settings in YAML; flags and VLM_SERVE_* go first")


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    _add_setting(group, "server.host", "address to listen on (default: 127.0.0.1, this machine alone)")
    _add_setting(group, "server.port", "port to listen on; 0 takes a free one (default: 8000)")
    _add_setting(group, "server.api_keys", "a file of keys and their tenants (default: no keys, one tenant)")


def _add_setting(group: "argparse._ArgumentGroup", name: str, text: str, flag: str | None = None) -> None:
    """`engine.max_num_seqs` as `--max-num-seqs`; its value is parsed with those of environment and file."""
    flag = flag or name.rpartition(".")[2].replace("_", "-")
    group.add_argument(f"--{flag}", dest=name, default=argparse.SUPPRESS, metavar=flag.upper(), help=text)


def given_settings(arguments: argparse.Namespace) -> dict[str, str]:
    """The settings that were given as flags, by name."""
    return {name: value for name, value in vars(arguments).items() if "." in name}
