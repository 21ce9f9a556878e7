"""One rival in a process of its own: run a recipe over all pictures whenever a line asks for it.

Started by benchmarks/harness.py with -m in the rival's environment, where this project is not
installed. Input, line by line:
{"recipe": name, "size": pixels}; answer: {"seconds": processor time, "num_pictures": n}.
"""

import importlib
import json
import os
import sys
import time
import warnings
from pathlib import Path

import torch


def main(library: str, folder: str) -> None:
    """Say hello, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        module = importlib.import_module(f"benchmarks.peers.{library}_recipes")
    except (ImportError, OSError) as error:
        answer(missing=str(error))
        return
    answer(version=module.VERSION, recipes=list(module.RECIPES))
    files = sorted(str(path) for path in Path(folder).glob("*.jpg"))
    made = {}
    for line in sys.stdin:
        question = json.loads(line)
        name = question["recipe"], question["size"]
        if name not in made:
            made[name] = module.RECIPES[question["recipe"]](files, question["size"])
        start = time.process_time()
        made[name]()
        answer(seconds=time.process_time() - start, num_pictures=len(files))


if __name__ == "__main__":
    main(*sys.argv[1:])
