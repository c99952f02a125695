"""One of two processes that run commands one after the other: ``python -m tests.training.of_two COMMANDS.json``.

Each command is ``[words]``, in the order of the file; what a process could not run it says and goes on with the next.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_on_two(folder: Path, commands: list[list[str]], timeout: float = 300) -> list[str]:
    """Runs commands of `mmpeft` in two processes of this machine, that are begun once as a cluster would begin them.

    Returns:
        What each process printed.
    """
    (path := folder / "commands.json").write_text(json.dumps(commands))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    known = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.of_two", str(path)],
            env=os.environ | known | {"LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def children(pid: int) -> list[int]:
    """Processes that a process has begun."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _run(path: str) -> None:
    import torch

    from mmpeft.cli import main

    torch.set_num_threads(1)
    for words in json.loads(Path(path).read_text()):
        try:
            main(words)
        except SystemExit as ended:
            print(f"ENDED: {words[0]}: {ended}", flush=True)


if __name__ == "__main__":
    _run(sys.argv[1])
