"""`vlm-serve make-key`: a key for a tenant, and its line for the file of `--api-keys`."""

import argparse

from api.gateway.keys import make_key


def print_key(arguments: argparse.Namespace) -> int:
    key, line = make_key(arguments.tenant, stat=arguments.stat, metrics=arguments.metrics)
    print(f"The key, shown once, for {arguments.tenant}:\n  {key}\nIts line for the file of --api-keys:\n{line}")
    return 0
