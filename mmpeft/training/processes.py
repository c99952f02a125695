"""Several processes of one run, a device each: Lightning's strategy of data parallelism (DDP) without its wrapper.

The wrapper broadcasts the frozen base, and hangs where the rows of one process have no image: what trains on images has
no gradient there, which the others wait for. Here a step is reduced by hand (`training/reduction.py`).
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy, StrategyRegistry
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor, nn

from mmpeft.errors import RefusedError
from mmpeft.hashing import hash_json
from mmpeft.options import MMPEFT

PARENT = "MMPEFT_PARENT"
"""Environment variable of a process that another one began: the number of that one."""
PLACE = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
"""Environment variables that say which of several machines this one is, where neither torchrun nor SLURM does."""
BEGUN = {"torchrun": ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), "srun": ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS")}
"""What begins processes -> the variables that tell that it did, and how many."""
STOPPED = (0, 130, 143)
"""Exit codes of a process that ended as it was told to."""
GRACE = 30.0
"""Seconds in which a process ends by itself once another one has; also those of a checkpoint's last bytes."""
LOOKS_EVERY = 0.5
DIGITS = 10
"""Of a hash, hexadecimal, so that the sum of many is still exact."""
SHARDED = "shards the base, which is model_parallel's here (FSDP2, of a base that is not in 4 or 8 bits)"
REFUSED = {
    **dict.fromkeys(("fsdp", "deepspeed", "modelparallel", "xla"), SHARDED),
    **dict.fromkeys(("ddp_", "horovod"), "is another way of what ddp does"),
}
"""Beginnings of names of Lightning's strategies -> why they are not for these runs."""


class Reduced(DDPStrategy):
    """Lightning's processes, ranks and barriers; whatever trains is the first one's when a fit begins.

    Source: Lightning 2.6.6, ``strategies/ddp.py``.
    """

    words: Sequence[str] | None = None
    """Of the command that runs; None where it is no command of `mmpeft`."""
    _on_host: Any = None
    """The processes as they reach each other's main memory; None where their devices are that."""

    def setup_distributed(self) -> None:
        with lost_others():  # also where another program has MASTER_PORT
            super().setup_distributed()
        if self.root_device.type != "cpu":
            self._on_host = dist.new_group(backend="gloo")

    def setup(self, trainer: Any) -> None:
        Strategy.setup(self, trainer)  # DDP's own would broadcast the frozen base

    def _setup_model(self, model: nn.Module) -> Any:
        for parameter in model.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, src=0)
        return model

    def teardown(self) -> None:
        super().teardown()
        if isinstance(self._launcher, Launcher) and self._launcher.procs:
            dist.destroy_process_group()  # another run of this process has others

    def _configure_launcher(self) -> None:
        assert self.cluster_environment is not None, "Lightning has found one"
        self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)
        self._launcher.words = lambda: self.words

    def sum(self, tensor: Tensor) -> None:
        """Over all processes, in place, on their devices."""
        with lost_others():
            dist.all_reduce(tensor)

    def sum_on_host(self, values: Sequence[int]) -> list[int]:
        """Of each number, over all processes."""
        return [round(value) for value in self.sum_of_numbers(values)]

    def sum_of_numbers(self, values: Sequence[float]) -> list[float]:
        """Of each number, over all processes, in main memory."""
        numbers = torch.tensor(values, dtype=torch.float64)
        with lost_others():
            dist.all_reduce(numbers, group=self._on_host)
        return numbers.tolist()

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        with lost_others():
            super().barrier(*args, **kwargs)


class Launcher(_SubprocessScriptLauncher):
    """Begins the other processes of this machine as the same command, and none outlives another.

    Lightning's own begins ``sys.argv`` again, and kills the first process where another one ended by a signal that all
    of them had, in the middle of its checkpoint.
    """

    words: Callable[[], Sequence[str] | None]

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Raises:
        RefusedError: it is not known what command to begin, which of the machines this one is, or SLURM has not
            begun all of them.
        """
        external = self.cluster_environment.creates_processes_externally
        if (
            self.num_nodes > 1
            and not external
            and (missing := [name for name in PLACE if name not in os.environ])
        ):
            raise RefusedError(
                f"trainer.num_nodes is {self.num_nodes}, but nothing says which machine this is, and it would wait for "
                f"the others for ever: start it with torchrun or srun on each, or set {', '.join(missing)} there"
            )
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        self._require_all_of_slurm()
        if not external:
            self._begin_others()
            threading.Thread(target=end_with_others, args=(self.procs,), daemon=True).start()
        elif parent := os.environ.get(PARENT):
            threading.Thread(target=end_with_parent, args=(int(parent),), daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def _require_all_of_slurm(self) -> None:
        """Lightning takes as many as there are for those that are wanted."""
        wanted, there = self.num_processes * self.num_nodes, self.cluster_environment.world_size()
        if isinstance(self.cluster_environment, SLURMEnvironment) and there != wanted:
            raise RefusedError(
                f"the trainer has {wanted} processes, but SLURM began {there}: give the job --nodes={self.num_nodes} "
                f"--ntasks-per-node={self.num_processes}, and put srun before mmpeft"
            )

    def _begin_others(self) -> None:
        words, environment = self.words(), self.cluster_environment
        if words is None:
            raise RefusedError(
                f"the trainer has {self.num_processes * self.num_nodes} processes, which a command of mmpeft can "
                "begin, but this is none: set trainer.devices to 1, or start it with torchrun"
            )
        known = {
            **{"MASTER_ADDR": environment.main_address, "MASTER_PORT": environment.main_port},
            **{"NODE_RANK": environment.node_rank(), "WORLD_SIZE": self.num_processes * self.num_nodes},
            **{PARENT: os.getpid()},
        }
        for rank in range(1, self.num_processes):
            own = {name: str(value) for name, value in (known | {"LOCAL_RANK": rank}).items()}
            command = [sys.executable, *MMPEFT, *words]
            self.procs.append(subprocess.Popen(command, env=os.environ | own))


def end_with_others(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """In the first process: where one of these ends before its time, all end, by themselves or else by force."""
    while all(process.poll() in (None, 0) for process in processes):
        if all(process.poll() == 0 for process in processes):
            return
        time.sleep(LOOKS_EVERY)
    for number, process in enumerate(processes, start=1):
        if process.poll() not in (None, *STOPPED):
            print(
                f"process {number} of this run ended with code {process.poll()}",
                file=sys.__stderr__,
                flush=True,
            )
    stopped = next((code for process in processes if (code := process.poll()) in STOPPED[1:]), None)
    if stopped is not None:  # by a signal that this one may not have had
        time.sleep(4 * LOOKS_EVERY)
        os.kill(os.getpid(), stopped - 128)
    time.sleep(GRACE)
    for process in processes:
        process.kill()
    os._exit(1)


def end_with_parent(parent: int) -> None:
    """In the others: none goes on without the first."""
    while os.getppid() == parent:
        time.sleep(LOOKS_EVERY)
    os._exit(1)


@contextmanager
def first_alone_tells() -> Iterator[None]:
    """Inside, what other processes than the first print goes nowhere. Their errors are told, but for those that the
    first one has, too, as it then ends them."""
    if rank_zero_only.rank == 0:
        yield
        return
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    except Exception:
        time.sleep(4 * LOOKS_EVERY)
        raise


@contextmanager
def lost_others() -> Iterator[None]:
    """Raises:
    RefusedError: a process has ended that the others wait for.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's and NCCL's, whose words name sockets
        reason = str(error).strip().partition("\n")[0]
        raise RefusedError(
            f"another process of this run has ended, or cannot be reached ({reason}); what it said stands above"
        ) from error


def register(name: str, kind: type[Reduced]) -> None:
    """Takes the place of a strategy of Lightning's, which for several devices takes "ddp" where none is named."""
    StrategyRegistry.register(name, kind, description=(kind.__doc__ or "").strip(), override=True)


def check_strategy(setting: Any) -> None:
    """Before Lightning looks whether the machine is one for it.

    Raises:
        RefusedError: it is none that these runs can have.
    """
    given = setting if isinstance(setting, str) else getattr(setting, "class_path", type(setting).__name__)
    name = str(given).rpartition(".")[2]
    if why := next((why for start, why in REFUSED.items() if name.lower().startswith(start)), None):
        raise RefusedError(
            f"trainer.strategy is {given}, which {why}; leave it at auto, which divides batches among the devices. A "
            "base too large for one of them: model.language.quantization=nf4, or trainer.strategy=model_parallel"
        )


def require_alike(processes: Reduced, belongs_to: Mapping[str, Any]) -> None:
    """Each process plans all steps by itself: of other rows, it would take others' share or wait for nobody.

    Args:
        processes: of the run.
        belongs_to: what this one trains on what, as `checkpoint.belongs_to`.

    Raises:
        RefusedError: another process trains something else.
    """
    own = int(hash_json(belongs_to)[:DIGITS], 16)
    (total,) = processes.sum_on_host([own])
    if total != own * processes.world_size:
        raise RefusedError(
            "the processes of this run do not have the same settings, data and base: each machine must see the same "
            "files, unchanged while they begin, and be given the same command"
        )


def check_processes(trainer: Any) -> None:
    """Raises:
    RefusedError: Lightning's strategy is none of ours, or the processes were begun for a run of one.
    """
    if not isinstance(trainer.strategy, Reduced | SingleDeviceStrategy):
        check_strategy(trainer.strategy)
        raise RefusedError(
            f"trainer.strategy is {type(trainer.strategy).__name__}, by which these runs cannot be divided; leave it "
            "at auto"
        )
    for program, (told, number) in BEGUN.items():
        begun = int(os.environ.get(number, 1)) if told in os.environ else 1
        if begun > 1 and trainer.world_size == 1:
            raise RefusedError(
                f"{program} began {begun} processes, but the trainer has one, so that each would train all of it: set "
                "trainer.devices to the processes of each machine, and trainer.num_nodes to the machines"
            )
