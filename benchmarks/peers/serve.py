"""A library in a process of its own: run a recipe over all pictures whenever a line asks for it.

Started by benchmarks/harness.py in the library's environment. Input, line by line:
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

# Library -> what is imported, and the module here that holds its recipes.
LIBRARIES = {
    "torchvision": ("torchvision", "transform_recipes"),
    "lightly": ("lightly", "transform_recipes"),
    "dali": ("nvidia.dali", "dali_recipes"),
    "ffcv": ("ffcv", "ffcv_recipes"),
}


def main(library: str, folder: str) -> None:
    """Say hello, then answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")

    def answer(**values: object) -> None:
        print(json.dumps(values), file=answers, flush=True)

    package, module = LIBRARIES[library]
    try:
        version = importlib.import_module(package).__version__
        recipes = importlib.import_module(f"benchmarks.peers.{module}").RECIPES[library]
    except (ImportError, OSError) as error:
        answer(missing=str(error))
        return
    answer(version=version, recipes=list(recipes))
    files = sorted(str(path) for path in Path(folder).glob("*.jpg"))
    made = {}
    for line in sys.stdin:
        question = json.loads(line)
        name = question["recipe"], question["size"]
        if name not in made:
            made[name] = recipes[question["recipe"]](files, question["size"])
        start = time.process_time()
        made[name]()
        answer(seconds=time.process_time() - start, num_pictures=len(files))


if __name__ == "__main__":
    main(*sys.argv[1:])
