"""The option for further lines of sbatch, the same in every command that submits jobs."""

import argparse


def add_slurm_option(parser: argparse._ActionsContainer) -> None:
    """Add ``--slurm-option KEY=VALUE``, which may be repeated; parsed to a list of pairs."""
    parser.add_argument(
        "--slurm-option", type=_pair, action="append", default=[], metavar="KEY=VALUE",
        help="further line for sbatch, such as account=vision; may be repeated",
    )  # fmt: skip


def _pair(text: str) -> tuple[str, str]:
    key, _, value = text.partition("=")
    if not (key and value and text.isprintable()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form KEY=VALUE without line breaks, e.g. account=vision"
        )
    return key, value
