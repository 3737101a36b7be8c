"""A stand-in for Slurm's commands: `python fake_slurm.py sbatch ...`, put on PATH by `install`; standard library only.

FAKE_SLURM names a folder: calls.log has one line per call, jobs/<id>.json one array each with the state of every task
(tests write states into it), faults.json what goes wrong:
  lose_reply: how often sbatch takes the job and then says that it timed out; garble: the same, with a senseless answer
  refuse: what sbatch says instead of taking the job; max_submit: tasks that it takes in all; max_array: of scontrol
  mute: how often sbatch takes the job and ends with an error, without a word; slow: seconds that sbatch takes
  duplicate: every submission gets this id; silent: squeue does not answer; twice: squeue lists every task twice
  no_sacct: no accounting
FAKE_SLURM_RUN=1: sbatch starts the tasks as processes of this machine, all at once.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel", "srun")


def install(folder):
    """Executables in folder/bin and an empty state in folder; what the environment needs."""
    (folder / "bin").mkdir(parents=True)
    (folder / "jobs").mkdir()
    for name in COMMANDS:
        path = folder / "bin" / name
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {name} "$@"\n')
        path.chmod(0o755)
    return {"FAKE_SLURM": str(folder), "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}


def state_folder():
    return Path(os.environ["FAKE_SLURM"])


def faults():
    path = state_folder() / "faults.json"
    return json.loads(path.read_text()) if path.exists() else {}


def jobs():
    paths = sorted((state_folder() / "jobs").glob("*.json"), key=lambda path: int(path.stem))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def save(name, job):
    (state_folder() / "jobs" / f"{name}.json").write_text(json.dumps(job))


def sbatch(script):
    wrong, text = faults(), Path(script).read_text()
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.M))
    n_tasks = 1 + int(re.match(r"0-(\d+)", options["array"])[1]) if "array" in options else 1
    blocked = [int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())]
    (state_folder() / "blocked.json").write_text(json.dumps(blocked))
    time.sleep(wrong.get("slow", 0))
    if wrong.get("refuse"):
        fail(f"sbatch: error: {wrong['refuse']}")
    if n_tasks > wrong.get("max_array", 1001):
        fail("sbatch: error: Batch job submission failed: Invalid job array specification")
    if sum(len(job["tasks"]) for job in jobs().values()) + n_tasks > wrong.get("max_submit", 10**6):
        fail("sbatch: error: QOSMaxSubmitJobPerUserLimit")
    name = str(wrong.get("duplicate") or 1 + max(map(int, jobs()), default=100))
    ids = [f"{name}_{i}" for i in range(n_tasks)] if "array" in options else [name]
    save(name, {"options": options, "script": text, "tasks": dict.fromkeys(ids, "PENDING"), "pids": {}})
    if os.environ.get("FAKE_SLURM_RUN"):
        start(name, ids, script)
    for fault in ("lose_reply", "garble", "mute"):
        if wrong.get(fault, 0) > 0:
            (state_folder() / "faults.json").write_text(json.dumps({**wrong, fault: wrong[fault] - 1}))
            if fault == "mute":
                sys.exit(1)
            if fault == "garble":
                print("Submitted batch jo")
                return
            fail("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation")
    print(f"Submitted batch job {name}")


def start(name, ids, script):
    job = jobs()[name]
    signal.pthread_sigmask(signal.SIG_SETMASK, set())  # jobs are started by the nodes: they inherit nothing of sbatch
    for i, task in enumerate(ids):
        env = {**os.environ, "SLURM_JOB_ID": str(int(name) + i)}
        if "_" in task:
            env |= {"SLURM_ARRAY_JOB_ID": name, "SLURM_ARRAY_TASK_ID": str(i)}
        code = state_folder() / f"{task}.code"
        command = f"bash {shlex.quote(script)}; echo $? > {shlex.quote(str(code))}"
        process = subprocess.Popen(
            ["sh", "-c", command], env=env, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        job["pids"][task], job["tasks"][task] = process.pid, "RUNNING"
    save(name, job)


def srun(*words):
    words = list(words)
    output = None
    while words[0].startswith("-"):
        option = words.pop(0)
        if option in ("--output", "--error"):
            output = words.pop(0)
    for mark, value in (
        ("%A", "SLURM_ARRAY_JOB_ID"),
        ("%a", "SLURM_ARRAY_TASK_ID"),
        ("%j", "SLURM_JOB_ID"),
        ("%t", ""),
    ):
        output = output.replace(mark, os.environ.get(value, "0") if value else "0")
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.execvp(words[0], words)


def squeue(*words):
    wrong = faults()
    if wrong.get("silent"):
        fail("slurm_load_jobs error: Unable to contact slurm controller (connect failure)")
    wanted = next(word[7:] for word in words if word.startswith("--name="))
    for job in jobs().values():
        if job["options"].get("job-name") != wanted:
            continue
        for task, state in job["tasks"].items():
            code = state_folder() / f"{task}.code"
            if state == "RUNNING" and code.exists() and code.read_text().strip():
                state = "COMPLETED" if code.read_text().strip() == "0" else "FAILED"
            if state == "GONE":
                continue
            if wrong.get("twice"):
                print(f"{task}|COMPLETING|n1|None")
            print(f"{task}|{state}|{'n1' if state == 'RUNNING' else ''}|{'Priority' if state == 'PENDING' else 'None'}")


def sacct(*words):
    if faults().get("no_sacct"):
        fail("Slurm accounting storage is disabled")
    for job in jobs().values():
        for task, state in job.get("accounting", {}).items():
            print(f"{task}|{state}")


def scontrol(*words):
    if words[:2] == ("show", "config"):
        print(f"MaxArraySize            = {faults().get('max_array', 1001)}")


def scancel(*words):
    only = [word[8:] for word in words if word.startswith("--state=")]
    for name in words:
        if job := jobs().get(name):
            ended = {task: state if only and state not in only else "CANCELLED" for task, state in job["tasks"].items()}
            save(name, {**job, "tasks": ended})


def fail(text):
    print(text, file=sys.stderr)
    sys.exit(1)


if __name__ == "__main__":
    with open(state_folder() / "calls.log", "a") as log:
        log.write(" ".join(sys.argv[1:]) + "\n")
    globals()[sys.argv[1]](*sys.argv[2:])
