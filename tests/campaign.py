"""SIGKILL at random moments: `accelerate launch` runs of both scripts, killed repeatedly, resumed and compared.

    python tests/campaign.py --kills 200 --output-dir runs/soak        (make soak; the same command continues)
    python tests/campaign.py --kills 200 --output-dir runs/soak-fsdp2 --only fsdp2

Each run is launched several times with the same command. Every launch but the last is killed at a moment drawn from
U(0, the time of a whole run); the result of the last is compared with a run that was never killed. A kill hits the
whole process tree, one trainer, or the launcher alone.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import launch
import psutil
import torch

from forge_common.run.checkpoint_folder import fault


@dataclass(frozen=True)
class Cell:
    """One kind of run. `slow`: on a slow disk (tests/slow_disk). `fsdp2`: under FSDP2 (tests/engines_on_cpu), not DDP."""

    script: str
    processes: int
    slow: bool
    fsdp2: bool = False

    @property
    def name(self) -> str:
        engine, disk = "-fsdp2" if self.fsdp2 else "", "-slow" if self.slow else ""
        return f"{self.script.removeprefix('train_')}-{self.processes}{engine}{disk}"


CELLS = [
    Cell(script, processes, slow, fsdp2)
    for script in ("train_shared", "train_module")
    for processes, fsdp2 in ((1, False), (2, False), (2, True))
    for slow in (False, True)
]


@dataclass
class Tally:
    """The result of a run. Every field but the first four counts faults and must be 0."""

    kills: int = 0
    in_a_save: int = 0  # kills that left a partial checkpoint under its temporary name
    finals: int = 0
    rows: int = 0
    resumes_failed: int = 0
    no_good_checkpoint: int = 0
    finals_that_differ: int = 0
    rows_lost_or_doubled: int = 0

    def add(self, other: "Tally") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def faults(self) -> int:
        return self.resumes_failed + self.no_good_checkpoint + self.finals_that_differ + self.rows_lost_or_doubled

    def table(self) -> str:
        return "\n".join(
            (
                f"SIGKILLs {self.kills}, of them during a save {self.in_a_save}",
                f"resumes that failed                          {self.resumes_failed} / {self.kills}",
                f"kills that left no good checkpoint           {self.no_good_checkpoint} / {self.kills}",
                f"finals that differ from an unkilled run      {self.finals_that_differ} / {self.finals}",
                f"rows of metrics.jsonl lost or doubled        {self.rows_lost_or_doubled} / {self.rows}",
            )
        )


class Campaign:
    """`home`: the folder for all output. steps: updates of a run. forked: runs are forks, without a launcher."""

    def __init__(self, home: Path, text: Path, domain: Path, steps: int, forked: bool):
        self.home, self.text, self.domain, self.cache, self.steps = home, text, domain, home / "cache", steps
        self.forked = forked
        if forked:
            launch.run_python("-m", "this")  # starts the server, whose imports are not part of a run's time
        self.seconds: dict[str, float] = {}  # of a whole run on a normal disk, by the name of its cell

    def arguments(self, cell: Cell, folder: Path) -> list[object]:
        data = self.text if cell.script == "train_shared" else self.domain
        arguments = ["--data", data, "--output-dir", folder, "--cache-dir", self.cache, *launch.SIZES]
        arguments += ["--steps", self.steps, "--save-every", 1, "--keep", 1, "--val-every", 4]
        if cell.script == "train_shared":
            arguments += launch.SHAPE
        else:
            arguments += ["--trunk", self.trunk, "--name", "cpp", "--general-tokens", 0]
        return arguments

    def command(self, cell: Cell, folder: Path) -> list[str]:
        if cell.processes == 1:
            launcher = launch.LAUNCH
        elif cell.fsdp2:
            launcher = ("accelerate", "launch", "--config_file", str(launch.ROOT / "accelerate_configs" / "fsdp2.yaml"))
            launcher += ("--num_processes", str(cell.processes), "--mixed_precision", "no")
        else:
            launcher = ("accelerate", "launch", "--multi_gpu", "--num_processes", str(cell.processes))
            launcher += ("--main_process_port", str(launch.free_port()), "--mixed_precision", "no")
        return launch.command(f"{cell.script}.py", *self.arguments(cell, folder), launcher=launcher)

    @property
    def trunk(self) -> Path:
        return self.home / "straight-shared-1" / "trunk"

    def start(self, cell: Cell, folder: Path) -> subprocess.Popen | launch.Background:
        extra = {"ACCELERATE_USE_CPU": "true"} | (launch.slow_disk(0.03) if cell.slow else {})
        if cell.fsdp2:
            extra |= launch.fsdp2() if self.forked else launch.ENGINES_ON_CPU
        folder.parent.mkdir(parents=True, exist_ok=True)
        if self.forked:
            line = (launch.ROOT / f"{cell.script}.py", *self.arguments(cell, folder))
            return launch.Background(*line, out=folder.with_suffix(".out"), processes=cell.processes, **extra)
        with open(folder.with_suffix(".out"), "ab") as out:
            return subprocess.Popen(
                self.command(cell, folder),
                env=launch.environment(**extra),
                cwd=launch.ROOT,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def straight(self, cell: Cell) -> Path:
        """The run without a kill, on a normal disk."""
        cell = replace(cell, slow=False)
        folder = self.home / f"straight-{cell.name}"
        started = time.monotonic()
        if not (folder / "done").exists():
            code = self.start(cell, folder).wait(launch.PATIENCE)
            assert code == 0, folder.with_suffix(".out").read_text()
            (folder / "done").write_text(str(time.monotonic() - started))
        self.seconds[cell.name] = float((folder / "done").read_text())
        return folder

    def run(self, cell: Cell, number: int, kills: int) -> Tally:
        """One run of `kills` + 1 launches."""
        draw = random.Random(f"{cell.name} {number}")
        folder, tally, known = self.home / cell.name / f"{number:03d}", Tally(), 0
        longest = self.seconds[replace(cell, slow=False).name] * (1.5 if cell.slow else 1)
        while tally.kills < kills:
            moment = draw.uniform(0, longest)
            whom = draw.choices(("all", "trainer", "launcher"), (4, 1, 1))[0]
            running = self.start(cell, folder)
            try:
                code = running.wait(moment)
            except subprocess.TimeoutExpired:
                tally.kills += 1
                tally.in_a_save += kill(running, folder, whom, draw)
                here = good(folder)
                tally.no_good_checkpoint += here < known
                known = max(here, known)
            else:
                tally.resumes_failed += code != 0
                known = good(folder)
                break  # it ended before the moment
        running = self.start(cell, folder)
        try:
            failed = running.wait(launch.PATIENCE) != 0
        except subprocess.TimeoutExpired:
            failed = True
            kill(running, folder, "all", draw)
        tally.resumes_failed += failed or not resumed_well(folder, known)
        self.compare(cell, folder, tally)
        return tally

    def compare(self, cell: Cell, folder: Path, tally: Tally) -> None:
        straight = self.straight(cell)
        tally.finals += 1
        if good(folder) < self.steps:
            tally.finals_that_differ += 1
            return
        tally.finals_that_differ += final(folder, self.steps) != final(straight, self.steps)
        wanted, found = launch.without_times(straight), launch.without_times(folder)
        tally.rows += len(wanted)
        tally.rows_lost_or_doubled += sum(row not in found for row in wanted) + abs(len(found) - len(wanted))


def kill(running: subprocess.Popen | launch.Background, folder: Path, whom: str, draw: random.Random) -> bool:
    """SIGKILL; waits until no process of the run is left. Returns whether it hit a save."""
    if isinstance(running, launch.Background):  # without a launcher, which would end the other ranks by SIGTERM
        pids = [pid for pid in running.pids if pid not in running.codes]  # one rank may have ended before the other
        for pid in [draw.choice(pids)] if whom == "trainer" else pids:
            os.kill(pid, signal.SIGKILL)
        half = bool(list((folder / "checkpoints").glob(".tmp-step-*")))
        running.terminate()
        running.wait(launch.PATIENCE)
        return half
    launcher, trainers = psutil.Process(running.pid), processes_of(folder)
    victims = {
        "launcher": [launcher],
        "trainer": trainers and [draw.choice(trainers)],
        "all": [launcher, *trainers],
    }[whom] or [launcher]
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            continue
    half = bool(list((folder / "checkpoints").glob(".tmp-step-*")))
    running.wait(launch.PATIENCE)
    deadline = time.monotonic() + launch.PATIENCE
    while left := processes_of(folder):
        if whom == "all":
            for process in left:  # which the launcher had just started
                process.kill()
        assert time.monotonic() < deadline, f"{folder}: after the kill of {whom} these still run: {left}"
        time.sleep(0.05)
    return half


def processes_of(folder: Path) -> list[psutil.Process]:
    """The running trainers and launchers of a run, found by their --output-dir, without the first launcher."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        line = process.info["cmdline"] or []
        if str(folder) in line and process.info["status"] != psutil.STATUS_ZOMBIE and process.ppid() != os.getpid():
            found.append(process)
    return found


def good(folder: Path) -> int:
    """The update of the newest checkpoint, 0 without one; -1 where one has its final name and does not verify."""
    found = {path: fault(path) for path in (folder / "checkpoints").glob("step-*")}
    torn = {path.name: wrong for path, wrong in found.items() if wrong}
    if torn:
        print(f"{folder}: damaged under a final name: {torn}", flush=True)
        return -1
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


def resumed_well(folder: Path, step: int) -> bool:
    """Whether the last launch reports that it resumed from update `step`."""
    printed = folder.with_suffix(".out").read_text(errors="replace")
    if "Traceback" in printed.rpartition("tracking ")[2]:
        return False
    return not step or f"at update {step} of " in printed.rpartition("tracking ")[2]


def final(folder: Path, steps: int) -> str:
    """The digests of a run's result: weights, both moments, and what it published."""
    step = folder / "checkpoints" / f"step-{steps:08d}"
    states = torch.load(step / "optimizer.bin", weights_only=True)["state"]
    tensors = {f"{index} {name}": value for index, state in states.items() for name, value in state.items()}
    published = next(
        path for path in (folder / "trunk" / "forge.json", folder / "module" / "module.json") if path.exists()
    )
    metadata = json.loads(published.read_text())
    from forge_common.files.tensors import digest

    parts = [digest(launch.load_file(step / "model.safetensors")), digest(tensors), metadata["digest"]]
    return " ".join([*parts, metadata["statistics_digest"]])


def campaign(
    home: Path,
    text: Path,
    domain: Path,
    cells: list[Cell],
    *,
    steps: int,
    kills: int,
    a_run: tuple[int, int],
    workers: int,
    forked: bool = False,
) -> Tally:
    """`kills` kills over `cells`, `a_run` (at least, at most) of them in a run. Runs in kills.jsonl are not repeated."""
    home.mkdir(parents=True, exist_ok=True)
    all_of_it, log = Campaign(home.absolute(), text, domain, steps, forked), home / "kills.jsonl"
    all_of_it.straight(Cell("train_shared", 1, slow=False))  # the trunk of every module
    for cell in cells:
        all_of_it.straight(cell)
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    total = Tally()
    for line in done:
        total.add(Tally(**line["tally"]))
    numbers = {cell: sum(line["cell"] == cell.name for line in done) for cell in cells}

    def one(cell: Cell) -> None:
        number = numbers[cell]
        numbers[cell] += 1
        wanted = random.Random(f"{cell.name} {number} lives").randint(*a_run)
        tally = all_of_it.run(cell, number, wanted)
        with open(log, "a") as file:
            file.write(json.dumps({"cell": cell.name, "number": number, "tally": asdict(tally)}) + "\n")
        total.add(tally)
        print(
            f"{cell.name:19} {number:3}  {tally.kills} kills, {tally.faults()} faults; so far {total.kills}", flush=True
        )

    with ThreadPoolExecutor(workers) as pool:
        while total.kills < kills:
            list(pool.map(one, sorted(cells, key=lambda cell: numbers[cell])[:workers]))
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--steps", type=int, default=24, help="updates of a run")
    parser.add_argument("--most", type=int, default=4, help="kills of one run at most")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--forked", action="store_true", help="no launcher and no imports in a run; one run at a time")
    parser.add_argument("--only", default="", help="only the runs whose name has this: fsdp2, module, slow")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/soak"))
    given = parser.parse_args()
    cells = [cell for cell in CELLS if given.only in cell.name]
    if not cells:
        parser.error(f"--only {given.only}: no run's name has this: {', '.join(cell.name for cell in CELLS)}")
    from conftest import excerpts_of_headers, excerpts_of_library

    texts = given.output_dir.absolute() / "text", given.output_dir.absolute() / "domain"
    for folder, excerpts in zip(texts, (excerpts_of_library, excerpts_of_headers), strict=True):
        excerpts(folder)
    began = time.monotonic()
    how = {"steps": given.steps, "kills": given.kills, "a_run": (1, given.most), "forked": given.forked}
    total = campaign(given.output_dir, *texts, cells, workers=1 if given.forked else given.workers, **how)
    print(
        f"{total.table()}\n{(time.monotonic() - began) / 60:.0f} minutes, {os.cpu_count()} cores, {os.uname().machine}"
    )
    raise SystemExit(bool(total.faults()))


if __name__ == "__main__":
    main()
