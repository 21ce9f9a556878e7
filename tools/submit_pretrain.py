r"""Submit a pretraining run through submitit: to SLURM, or to processes on this machine.

Each node gets one task, which runs torchrun; a training process that dies is started again from the
last checkpoint. A job that is preempted, or whose time is up, saves, is queued again and goes on.

Examples:
  .venv/bin/python tools/submit_pretrain.py configs/pretrain/imagenet1k/R50_byol_fa_nn_100ep.yaml \
      out=runs/byol data.shards=data/imagenet --cluster slurm --nodes 8 --gpus-per-node 8 \
      --time-minutes 1440 --partition gpu --slurm-option account=vision
  .venv/bin/python tools/submit_pretrain.py configs/pretrain/demo.yaml out=runs/first \
      data.shards=data/shards --cluster local --tasks-per-node 2 --wait

Logs and submitit's files lie in out/submitit. docs/scaling.md says how to stop and go on.
Exit status: 0 submitted (with --wait: finished); 1 it went wrong; 2 wrong arguments or input.
"""

import argparse
import itertools
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from common import errors

ROOT = Path(__file__).resolve().parents[1]
PREEMPTION = signal.SIGUSR1  # a training process saves when it gets it; submitit's own is USR2
_LOCAL_MINUTES = 60 * 24 * 365  # submitit ends local tasks after a time; here nobody asked for it
_MAX_TIMEOUTS = 100  # how often a job whose time is up is queued again
_NUMBERS = {  # option -> default, least value, help
    "nodes": (1, 1, "default: 1"),
    "min_nodes": (None, 1, "go on with so many when others are lost (default: queued again)"),
    "gpus_per_node": (0, 0, "default: 0, train on the CPU"),
    "tasks_per_node": (None, 1, "training processes of a node (default: its GPUs, or 1)"),
    "cpus_per_node": (None, 1, "default: for each process one and its data.num_workers"),
    "time_minutes": (None, 1, "then the job is queued again (default: 240; local: none)"),
    "save_seconds": (120, 1, "time to save and end, before the limit or a kill (default: 120)"),
    "max_restarts": (3, 0, "how often torchrun starts dead processes again (default: 3)"),
}
_FIRST_PORT, _NUM_PORTS = 20000, 10000  # of the rendezvous: below those that Linux gives away


@dataclass
class TorchrunNode:
    """The work of one node; submitit calls it, and ``checkpoint`` before it queues it again.

    Attributes:
        arguments: Of ``python -m pretrain``; ``--resume`` is among them.
        nodes: Nodes of the job.
        min_nodes: With how many of them the run goes on when others are lost.
        num_processes: Training processes of each node.
        max_restarts: How often torchrun starts the processes again.
        save_seconds: That the processes have to save and end before they are killed.
    """

    arguments: tuple[str, ...]
    nodes: int
    min_nodes: int
    num_processes: int
    max_restarts: int
    save_seconds: int
    _pid: int = 0
    _is_stopping: bool = False

    def __call__(self) -> None:
        """Run torchrun to its end.

        Raises:
            RuntimeError: If training failed.
            SystemExit: If the node was told to stop. It leaves no result, so that submitit does not
                take the job for finished while it waits in the queue.
        """
        import submitit

        job = submitit.JobEnvironment()
        command = torchrun_command(self, job.job_id, job.node, job.hostnames[0])
        print(f"node {job.node} of {job.num_nodes}:", *command, flush=True)
        signal.signal(signal.SIGTERM, self._stop)
        if job.global_rank:  # the first task's handler is submitit's, which calls `checkpoint`
            signal.signal(PREEMPTION, self._stop)
        process = subprocess.Popen(command, env=node_environment(self), preexec_fn=_ignore)
        self._pid = process.pid
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        status = process.wait()
        if self._is_stopping:
            raise SystemExit(128 + signal.SIGTERM)
        if status:
            raise RuntimeError(f"training ended with exit status {status}; see the messages above")

    def checkpoint(self) -> Any:
        """Let the processes save and end; what submitit queues then is the same again."""
        import submitit

        self._stop()
        if self._pid:
            # No Popen.wait: this runs in a signal handler, within another wait for the same child.
            os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(replace(self, _pid=0, _is_stopping=False))

    def _stop(self, number: int = 0, frame: FrameType | None = None) -> None:
        if self._pid and not self._is_stopping:
            os.kill(self._pid, signal.SIGINT)  # torchrun passes it on and waits
        self._is_stopping = True


def _ignore() -> None:
    """Torchrun shall hear SIGINT from its node alone, and once.

    SLURM signals the task, or all its processes, or some of them twice: its plugins decide.
    """
    signal.signal(PREEMPTION, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def torchrun_command(node: TorchrunNode, job_id: str, number: int, first_host: str) -> list[str]:
    """How torchrun starts on node `number`; the first node holds the rendezvous."""
    command = [
        sys.executable, "-m", "torch.distributed.run",
        f"--nproc-per-node={node.num_processes}", f"--max-restarts={node.max_restarts}",
        "--monitor-interval=1",
    ]  # fmt: skip
    if node.nodes == 1:
        # Its processes meet at loopback: a node's own name need not resolve.
        command += ["--standalone", "--local-addr=127.0.0.1"]
    else:
        digits = int("".join(c for c in job_id if c.isdigit()))
        command += [
            f"--nnodes={node.min_nodes}:{node.nodes}", "--rdzv-backend=c10d",
            f"--rdzv-endpoint={first_host}:{_FIRST_PORT + digits % _NUM_PORTS}",
            f"--rdzv-id={job_id}", f"--rdzv-conf=is_host={int(number == 0)}",
        ]  # fmt: skip
    return [*command, "-m", "pretrain", *node.arguments]


def node_environment(node: TorchrunNode) -> dict[str, str]:
    """The environment of torchrun."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    torchrun = {  # options that the oldest torch allowed here does not know
        "PET_SIGNALS_TO_HANDLE": "SIGINT",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see pretrain.collectives.start
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(node.save_seconds),
    }
    return os.environ | torchrun | {"PYTHONPATH": path}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = errors.command_parser(__doc__)
    add = parser.add_argument
    add("config", help="YAML file, or a preset of configs/pretrain/, as demo")
    add("overrides", nargs="*", metavar="key=value", help="as for tools/pretrain.sh; out=DIR")
    add("--cluster", choices=("local", "slurm"), required=True, help="where the job runs")
    for name, (default, least, text) in _NUMBERS.items():
        option, kind = "--" + name.replace("_", "-"), errors.whole(least)
        add(option, type=kind, default=default, metavar="N", help=text)
    add("--partition", metavar="P", help="SLURM partition")
    errors.add_slurm_option(parser)
    add("--resume", action="store_true", help="go on with the run in out, if there is one")
    add("--allow-changes", action="append_const", const="--allow-changes", default=[],
        help="with --resume: even with another config")  # fmt: skip
    add("--wait", action="store_true", help="until the run has ended; the exit status is its own")
    options = parser.parse_intermixed_args(arguments)

    def work() -> int:
        job = submit(options)
        print(f"job {job.job_id} submitted; log: {job.paths.stderr}", flush=True)
        return wait(job) if options.wait else 0

    return errors.run_command(work)


def submit(options: argparse.Namespace) -> Any:
    """Check what was asked for and hand the run to submitit; returns its job.

    Raises:
        UserError: Anything in the arguments, the config or the folder that cannot work; no such
            cluster, or it refuses the job.
    """
    from common.files import check_out_folder
    from pretrain.config import load_config

    # The config, the folder of the run, and the numbers.
    config, is_local = load_config(options.config, options.overrides), options.cluster == "local"
    out = Path(config.out or "")
    errors.require(
        bool(config.out), "out is not set: name the folder of this run, e.g. out=runs/first"
    )
    errors.require(not out.is_file(), f"out={out}: a file is in the way; choose another out=DIR")
    check_out_folder(out)
    errors.require(
        options.resume or not (out / "checkpoint.pth").exists(),
        f"{out} holds a run already: continue it with --resume, or choose another out=DIR",
    )
    for text in (str(out), options.partition or ""):
        errors.require(text.isprintable(), f"{text!r}: no line breaks in names for the cluster")
    errors.require(not is_local or options.nodes == 1, "--cluster local has one node: this machine")

    # The processes; any number of nodes that may be left divides the batch.
    num_processes = options.tasks_per_node or options.gpus_per_node or 1
    nodes, min_nodes = options.nodes, options.min_nodes or options.nodes
    errors.require(min_nodes <= nodes, f"--min-nodes {min_nodes} is above --nodes {nodes}")
    sizes = {"data.batch_size": config.data.batch_size}
    if config.optim.micro_batch_size:
        sizes["optim.micro_batch_size"] = config.optim.micro_batch_size
    for count, (key, size) in itertools.product(range(min_nodes, nodes + 1), sizes.items()):
        errors.require(
            size % (count * num_processes) == 0,
            f"{key}={size} cannot be divided among {count} nodes of {num_processes} processes; "
            "choose another size or other numbers",
        )
    words = (options.config, *options.overrides, "--resume", *options.allow_changes)
    seconds = options.save_seconds
    node = TorchrunNode(words, nodes, min_nodes, num_processes, options.max_restarts, seconds)

    os.environ["SUBMITIT_PREEMPT_SIGNAL"] = signal_name = PREEMPTION.name.removeprefix("SIG")
    os.environ["PYTHONPATH"] = node_environment(node)["PYTHONPATH"]  # the job unpickles from here
    import submitit

    extra = {"signal": f"{signal_name}@{seconds}", "requeue": True}
    if min_nodes < nodes:
        extra["no-kill"] = True
    try:
        executor = submitit.AutoExecutor(
            out / "submitit", cluster=options.cluster,
            slurm_max_num_timeout=_MAX_TIMEOUTS, local_max_num_timeout=_MAX_TIMEOUTS,
        )  # fmt: skip
        executor.update_parameters(
            name="pretrain", nodes=nodes, tasks_per_node=1,
            cpus_per_task=options.cpus_per_node or num_processes * (1 + config.data.num_workers),
            gpus_per_node=options.gpus_per_node,
            timeout_min=options.time_minutes or (_LOCAL_MINUTES if is_local else 240),
            slurm_partition=options.partition,
            slurm_additional_parameters=extra | dict(options.slurm_option),
        )  # fmt: skip
        return executor.submit(node)
    except (RuntimeError, OSError) as error:  # no srun, or sbatch refuses
        raise errors.UserError(f"submitit cannot submit the job: {error}") from error


def wait(job: Any) -> int:
    """Until the job has ended; returns the exit status. Ctrl-C leaves the job alone.

    Raises:
        RunFailed: If it did not finish the run.
    """
    logging.getLogger("submitit").setLevel(logging.ERROR)  # without accounting it warns for ever
    try:
        while not job.done():
            time.sleep(1)
    except KeyboardInterrupt:
        print(f"\njob {job.job_id} goes on without this command", file=sys.stderr)
        return 1
    tasks = [job.task(number) for number in range(job.num_tasks)]
    if all(t.paths.result_pickle.exists() and t.exception() is None for t in tasks):
        print(f"job {job.job_id} has finished the run")
        return 0
    raise errors.RunFailed(f"job {job.job_id} did not finish the run; log: {job.paths.stderr}")


if __name__ == "__main__":
    sys.exit(main())
