"""Pretrain a ResNet on WebDataset shards: contrastive learning with feature augmentation.

tools/pretrain.sh starts it as ``python -m pretrain``.

Example:
  tools/pretrain.sh demo out=runs/first data.shards=data/shards optim.epochs=9
  tools/pretrain.sh demo out=runs/first data.shards=data/shards --resume

Several processes: NPROC=8 tools/pretrain.sh ... starts them with torchrun.
--print-config shows every key, with its value after all overrides.
"""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from common import errors
from common.memory import keep_freed_memory

OUT_OF_MEMORY = (
    "lower optim.micro_batch_size, data.num_workers, data.batch_size or data.image_size, or set "
    "engine.precision=bf16, engine.activation_checkpointing=true; the last checkpoint is whole: "
    "the same command with --resume goes on from it"
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = errors.command_parser(__doc__, prog="tools/pretrain.sh")
    parser.add_argument("config", help="YAML file, or a preset of configs/pretrain/, as demo")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. optim.epochs=20")
    parser.add_argument(
        "--resume", action="store_true", help="continue out/checkpoint.pth if there is one"
    )
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="with --resume: go on with another config or other shards where the weights fit",
    )
    parser.add_argument(
        "--profile", metavar="N", nargs="?", const=20, type=int,
        help="time the parts of N steps (20) after a few to warm up: out/profile/ gets a summary "
        "and a trace for ui.perfetto.dev; nothing is trained",
    )  # fmt: skip
    parser.add_argument("--print-config", action="store_true", help="show the config and stop")
    errors.add_check_options(parser)
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0; 1 it went wrong; 2 wrong arguments or input; 128 + signal."""
    if arguments is None or errors.EACH in sys.argv:  # a process of its own
        keep_freed_memory()
    options = parse(arguments)
    # After --help, which should not wait.
    import yaml

    from common.config import to_plain
    from common.files import check_out_folder
    from common.startup import begin_program
    from pretrain import collectives as dist
    from pretrain.config import load_config

    def work() -> int:
        config = load_config(options.config, options.overrides)
        if options.print_config:
            print(yaml.safe_dump(to_plain(config), sort_keys=False), end="")
            return 0
        if config.out is not None:
            check_out_folder(Path(config.out))
        from pretrain.engine.profiling import profile
        from pretrain.run import check, make_trainer

        begin_program()
        with dist.in_group(), errors.memory_remedy(OUT_OF_MEMORY):
            if options.check:
                facts = check(config, has_data=options.check == "all")
                errors.print_check(facts, as_json=options.json)
                return 0
            is_profile = options.profile is not None
            errors.require(
                not (is_profile and options.resume), "--profile runs by itself: leave out --resume"
            )
            trainer = make_trainer(
                config, resume=options.resume, allow_changes=options.allow_changes
            )
            with contextlib.closing(trainer.batches):
                if is_profile:
                    profile(trainer, options.profile)
                else:
                    trainer.train()
        return 0

    interrupted = "stopped; with --resume the same command goes on from the checkpoint"
    return dist.end_process(errors.run_command(work, when_interrupted=interrupted))


if __name__ == "__main__":
    sys.exit(errors.run_or_check_each(main))
