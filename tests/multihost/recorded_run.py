"""``python -m pretrain`` that writes down which samples each step of each process sees.

usage: recorded_run.py FILE ARGUMENTS_OF_PRETRAIN   (torchrun's variables in the environment)
"""

import json
import sys
from collections.abc import Iterator

from pretrain import collectives as dist
from pretrain.__main__ import main
from pretrain.data.input_pipeline import DeviceBatch, InputPipeline

plain_epoch = InputPipeline.epoch


def record(file: str, words: list[str]) -> int:
    """The command line; a line in the file for each batch."""

    def epoch_of(self: InputPipeline, epoch: int, start_step: int = 0) -> Iterator[DeviceBatch]:
        with open(file, "a", encoding="utf-8") as stream:
            for step, batch in enumerate(plain_epoch(self, epoch, start_step), start_step):
                row = {
                    "epoch": epoch,
                    "step": step,
                    "rank": dist.rank(),
                    "world_size": dist.world_size(),
                    "samples": batch.samples.sample_ids.tolist(),
                }
                stream.write(json.dumps(row) + "\n")
                stream.flush()
                yield batch

    InputPipeline.epoch = epoch_of
    return main(words)


if __name__ == "__main__":
    sys.exit(record(sys.argv[1], sys.argv[2:]))
