"""Trains an adapter from a checkout in which `vlm-serve` is not installed as a command.

python adapters/train.py --data studies/train.jsonl --out adapters/thorax

The same as `vlm-serve train-adapter`; `--help` says more.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from api.cli import main

if __name__ == "__main__":
    sys.exit(main(["train-adapter", *sys.argv[1:]]))
