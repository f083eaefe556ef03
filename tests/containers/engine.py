"""A Docker engine of the tests' own: its data, its socket and its rules go with it.

Debian's engine, with BuildKit inside. A missing one is installed; a test that cannot have one
fails, for a skipped test proves nothing.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKER = "/usr/bin/docker"  # another client in front of it in PATH may lack BuildKit
PACKAGES = {
    "docker.io": DOCKER,
    "mmdebstrap": "/usr/bin/mmdebstrap",
    "e2fsprogs": "/usr/sbin/mkfs.ext4",
    "iproute2": "/usr/bin/ip",
}
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
BASE = "amsf-test/base:bookworm"
CONTEXT = ("amsf_dist", "configs", "docker", "launch", "pyproject.toml", "README.md", "LICENSE")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def run(*words: object, seconds: float = 120, code: int | None = 0, **options: object) -> str:
    """Run a command to its end, check its exit code (None: any), return stdout and stderr."""
    done = subprocess.run(
        ["timeout", "--kill-after=10", str(seconds), *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,  # type: ignore[call-overload]
    )
    assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stdout}"
    return str(done.stdout)


def until(what: str, condition: Callable[[], bool], seconds: float = 180) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not in {seconds} s"
        time.sleep(0.2)


@contextmanager
def engine() -> Iterator[Path]:
    """Start an engine that `docker` of this process's environment talks to; yield its folder."""
    assert os.geteuid() == 0, "the container tests start an engine and must run as root"
    os.environ["PATH"] += ":/usr/sbin:/sbin"  # dockerd and others are there, a shell's path is not
    missing = [package for package, path in PACKAGES.items() if not Path(path).exists()]
    if missing:
        quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "-q", seconds=300, env=quiet)
        install = ("apt-get", "install", "-q", "-y", "--no-install-recommends")
        run(*install, *missing, seconds=600, env=quiet)
    assert not Path("/sys/class/net/docker0").exists(), "docker0 exists: another engine runs here"
    directory = Path(tempfile.mkdtemp(prefix="amsf-engine-"))
    rules, forwarding = run("iptables-save"), FORWARDING.read_text()
    socket = f"unix://{directory}/docker.sock"
    pid_file = directory / "pid"
    process = None
    try:
        _make_disk(directory)
        with (directory / "log").open("w") as log:
            words = ["dockerd", "-H", socket, "--pidfile", pid_file]
            words += ["--data-root", directory / "data", "--exec-root", directory / "exec"]
            process = subprocess.Popen(
                list(map(str, words)), stdout=log, stderr=log, start_new_session=True
            )
        os.environ.update(DOCKER_HOST=socket, DOCKER_BUILDKIT="1")

        def ready() -> bool:
            assert process.poll() is None, (directory / "log").read_text()
            return subprocess.run([DOCKER, "info"], capture_output=True).returncode == 0

        until("the engine starts", ready, 60)
        yield directory
    finally:
        if process is not None:
            _end(process)
        for name in ("DOCKER_HOST", "DOCKER_BUILDKIT"):
            os.environ.pop(name, None)
        for bridge in Path("/sys/class/net").glob("*"):
            if bridge.name == "docker0" or bridge.name.startswith("br-amsf"):
                run("ip", "link", "delete", bridge.name, code=None)
        run("iptables-restore", code=None, input=rules + _emptied(rules, run("iptables-save")))
        FORWARDING.write_text(forwarding)
        for mounted in sorted(_mounts(directory), reverse=True):
            run("umount", "-l", mounted, code=None)
        shutil.rmtree(directory, ignore_errors=True)


def _make_disk(directory: Path) -> None:
    """Put the engine's data in one sparse file: removing 6 GB of small ones takes minutes."""
    disk, data = directory / "disk", directory / "data"
    run("truncate", "--size=60G", disk)
    run("mkfs.ext4", "-q", disk)
    data.mkdir()
    run("mount", "-o", "loop", disk, data)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Remove the containers, then end the engine, and what it started if that takes too long."""
    if process.poll() is None:
        names = subprocess.run([DOCKER, "ps", "-aq"], capture_output=True, text=True).stdout.split()
        if names:
            run(DOCKER, "rm", "-f", *names, code=None)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _emptied(before: str, after: str) -> str:
    """Rules that empty the tables which were not there before; docker leaves its own behind."""
    text = ""
    for table in re.split(r"^\*", after, flags=re.MULTILINE)[1:]:
        name, *lines = table.splitlines()
        if f"*{name}\n" not in before:
            built_in = [line.split()[0] for line in lines if re.match(r":\w+ [A-Z]", line)]
            text += "\n".join([f"*{name}", *(f"{chain} ACCEPT" for chain in built_in), "COMMIT\n"])
    return text


def _mounts(directory: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(str(directory))]


def stand_in_base() -> str:
    """Make the base image that stands in for nvidia/cuda; return its name."""
    if run(DOCKER, "images", "-q", BASE):
        return BASE
    mirror = _mirror()
    plain = f"{BASE}-plain"
    source = f"deb {mirror} bookworm main"
    words = [
        "mmdebstrap",
        "--variant=minbase",
        "--include=ca-certificates",
        "bookworm",
        "-",
        source,
    ]
    pipe = f'"${{@:2}}" 2>"$err" | "$1" import - {plain} || {{ cat "$err"; exit 1; }}'
    script = f"err=$(mktemp); trap 'rm -f $err' EXIT; {pipe}"
    run("bash", "-o", "pipefail", "-c", script, "_", DOCKER, *words, seconds=300)
    file = ROOT / "docker" / "test-base.Dockerfile"
    given = ("--build-arg", f"BASE_IMAGE={plain}")
    run(DOCKER, "build", "-q", "-t", BASE, *given, "-f", file, file.parent, seconds=120)
    return BASE


def _mirror() -> str:
    """The Debian mirror that this machine uses."""
    new = Path("/etc/apt/sources.list.d/debian.sources")
    if new.exists():
        lines = new.read_text().splitlines()
        return next(line.split()[1] for line in lines if line.startswith("URIs:"))
    lines = Path("/etc/apt/sources.list").read_text().splitlines()
    return next(line.split()[1] for line in lines if line.startswith("deb http"))


def compose(directory: Path) -> tuple[str, ...]:
    """Fetch Compose v2, which bookworm lacks, from the release after it; nothing is installed.

    Args:
        directory: gets it, and what apt writes; apt checks the signature and the hash.

    Returns:
        `docker compose` as the first words of a command.
    """
    keys = "[signed-by=/usr/share/keyrings/debian-archive-keyring.gpg]"
    sources, lists, plugins = (directory / name for name in ("sources", "lists", "cli-plugins"))
    for folder in (lists / "partial", plugins):
        folder.mkdir(parents=True)
    sources.write_text(f"deb {keys} {_mirror()} trixie main\n")
    settings = {
        "Dir::Etc::SourceList": sources,
        "Dir::Etc::SourceParts": "-",
        "Dir::State::Lists": lists,
        "Dir::Cache": directory,
        "APT::Sandbox::User": "root",  # whom the tests' folder belongs to
    }
    given = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
    run("apt-get", "-q", *given, "update", "--error-on=any", seconds=120)
    run("apt-get", "-q", *given, "download", "docker-compose", seconds=120, cwd=directory)
    (package,) = directory.glob("docker-compose_*.deb")
    run("dpkg", "--extract", package, directory / "root")
    shutil.copy(directory / "root/usr/libexec/docker/cli-plugins/docker-compose", plugins)
    return (DOCKER, "--config", str(directory), "compose")


def build(name: str, directory: Path, cpu: bool) -> str:
    """Build docker/Dockerfile on the stand-in base; return the image's name.

    Args:
        name: of the image.
        directory: gets a copy of what is built.
        cpu: with a torch wheel for CPUs, where pip finds one, in docker/wheels.
    """
    base = stand_in_base()
    for entry in (*CONTEXT, ".dockerignore"):
        source = ROOT / entry
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "wheels")
            shutil.copytree(source, directory / entry, ignore=ignored)
        else:
            shutil.copy(source, directory / entry)
    if cpu:
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        torch = next(pin for pin in pins if pin.startswith("torch=="))
        platform = ("--python-version", "3.11", "--only-binary", ":all:")
        wheels = ("--no-deps", "-d", directory / "docker" / "wheels")
        run(sys.executable, "-m", "pip", "download", "-q", *platform, *wheels, torch, seconds=300)
    secret = ("--secret", f"id=ca,src={CERTIFICATES}") if CERTIFICATES.exists() else ()
    given = [f"BASE_IMAGE={base}", f"VARIANT={'cpu' if cpu else 'cuda'}", "REVISION=tested"]
    arguments = [word for value in given for word in ("--build-arg", value)]
    file = directory / "docker" / "Dockerfile"
    words = (DOCKER, "build", "--progress=plain", "-t", name, "-f", file, *secret, *arguments)
    run(*words, directory, seconds=900)
    return name
