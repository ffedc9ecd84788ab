"""`daemon ensure`, `stop` and `unit`, with real daemons; `alerts test` with a real server."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from opt_ops.cli.daemon.commands import _drop_job_environment, _is_daemon
from opt_ops.runfolder.files import read_json, write_json
from tests.e2e.site import until
from tests.processes import MARK

HOST = os.uname().nodename


def opt_ops(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opt_ops", *arguments]
    surroundings = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        command, cwd=folder, env={**surroundings, **environment}, capture_output=True, text=True, timeout=240
    )


def sign_of(folder: Path) -> dict[str, Any]:
    return read_json(folder / "runs" / "daemon.json") or {}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Path]:
    """A site whose path needs quoting; what runs there at the end is killed."""
    folder = tmp_path / "a site's 100%"
    folder.mkdir()
    (folder / "opt-ops.toml").write_text("tick_seconds = 0.1\n[mlflow]\nenabled = false\n")
    yield folder
    # By the command line, not by the sign: a second daemon that is still starting takes over from one that is killed.
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
        except (FileNotFoundError, ProcessLookupError):
            continue


@pytest.fixture
def inbox() -> Iterator[tuple[str, list[Any]]]:
    """An address that takes alerts, and what it got."""
    taken: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            taken.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(404 if "missing" in self.path else 204)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    yield f"http://127.0.0.1:{server.server_port}", taken
    server.shutdown()
    server.server_close()


def test_ensure_starts_one_daemon_that_outlives_its_caller_and_stop_ends_it(site: Path):
    started = opt_ops(site, "daemon", "ensure")
    assert started.returncode == 0, started.stderr
    pid = sign_of(site)["pid"]
    assert f"pid {pid}" in started.stderr
    assert os.getsid(pid) == pid
    assert _is_daemon(pid)
    again = opt_ops(site, "daemon", "ensure")
    assert (again.returncode, again.stderr) == (0, f"A daemon watches {site}/runs: pid {pid} on {HOST}.\n")
    assert opt_ops(site, "daemon", "ensure", "-q").stderr == ""
    stopped = opt_ops(site, "daemon", "stop")
    assert (stopped.returncode, f"Pid {pid} has ended. Training continues, not watched." in stopped.stderr) == (0, True)
    assert not _is_daemon(pid)
    assert opt_ops(site, "daemon", "stop").stderr == "No daemon is running here.\n"
    assert "watches" in (site / "runs" / "daemon.log").read_text()


def test_two_at_once_end_up_with_one_daemon(site: Path):
    command = [sys.executable, "-m", "opt_ops", "daemon", "ensure"]
    both = [subprocess.Popen(command, cwd=site, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all(f"pid {sign_of(site)['pid']} on" in words for words in said)
    assert (site / "runs" / "daemon.log").read_text().count(" watches ") == 1


def test_a_killed_daemon_is_replaced_at_once_although_its_sign_is_fresh(site: Path):
    opt_ops(site, "daemon", "ensure")
    killed = sign_of(site)["pid"]
    os.kill(killed, signal.SIGKILL)
    while _is_daemon(killed):
        time.sleep(0.01)
    assert opt_ops(site, "daemon", "ensure").returncode == 0
    assert sign_of(site)["pid"] != killed


@pytest.mark.parametrize("lineages", [["12"], []])
def test_people_are_told_of_a_long_gap_in_the_watch(site: Path, inbox: tuple[str, list[Any]], lineages: list[str]):
    address, taken = inbox
    with (site / "opt-ops.toml").open("a") as file:
        file.write(f'[alerts]\nurls = ["{address}/hook"]\n')
    died = time.time() - 3 * 3600
    old = {"ts": died, "host": "head", "pid": 7, "version": "0", "policy": "p", "lineages": lineages}
    write_json(site / "runs" / "daemon.json", old)
    done = opt_ops(site, "daemon", "ensure")
    assert done.returncode == 0, done.stderr
    told = [(a["id"], a["severity"], re.sub("3h0[0-9]m", "3h", a["title"])) for a in taken]
    assert told == [(f"daemon-gone-{died:.0f}", "warning", "no daemon was running for 3h")] * len(lineages)
    assert all("pid 7 on head, with lineages 12" in alert["body"] for alert in taken)


def test_an_alert_that_cannot_be_sent_does_not_keep_the_daemon_from_watching(site: Path):
    with (site / "opt-ops.toml").open("a") as file:
        file.write('[alerts]\nurls = ["http://127.0.0.1:1/s3cret"]\n')
    old = {"ts": 1.0, "host": "head", "pid": 7, "version": "0", "policy": "p", "lineages": ["12"]}
    write_json(site / "runs" / "daemon.json", old)
    done = opt_ops(site, "daemon", "ensure", "-q")
    assert (done.returncode, "was not delivered to http://127.0.0.1:1/…" in done.stderr) == (0, True), done.stderr
    assert "s3cret" not in done.stderr
    assert _is_daemon(sign_of(site)["pid"])


@pytest.mark.parametrize(("silent", "starts"), [(40, False), (120, True)])
def test_a_sign_from_another_host_is_trusted_for_longer(site: Path, silent: float, starts: bool):
    sign = {"ts": time.time() - silent, "host": "login2", "pid": 7, "version": "0", "policy": "p", "lineages": []}
    write_json(site / "runs" / "daemon.json", sign)
    assert opt_ops(site, "daemon", "ensure").returncode == 0
    assert (sign_of(site)["host"] == HOST) is starts


def test_a_daemon_on_another_host_is_stopped_there(site: Path):
    sign = {"ts": time.time(), "host": "login2", "pid": os.getpid(), "version": "0", "policy": "p", "lineages": []}
    write_json(site / "runs" / "daemon.json", sign)
    done = opt_ops(site, "daemon", "stop")
    assert (done.returncode, "the daemon runs on login2" in done.stderr) == (4, True)


def test_what_has_the_daemons_number_now_is_not_killed(site: Path):
    bystander = subprocess.Popen(["sleep", "60"])
    sign = {"ts": time.time(), "host": HOST, "pid": bystander.pid, "version": "0", "policy": "p", "lineages": []}
    write_json(site / "runs" / "daemon.json", sign)
    assert opt_ops(site, "daemon", "stop").stderr == "No daemon is running here.\n"
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_daemon_that_cannot_start_is_told_with_its_log(site: Path):
    (site / "opt-ops.toml").write_text('playbooks = "nowhere"\n')
    done = opt_ops(site, "daemon", "ensure")
    assert done.returncode == 75
    assert "the daemon ended with exit code" in done.stderr
    assert f"next: tail {site}/runs/daemon.log" in done.stderr
    assert "nowhere" in (site / "runs" / "daemon.log").read_text()


def refused(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """A second daemon, once it has ended."""
    process.wait(240)
    return process


def test_a_daemon_that_hangs_is_told_and_not_doubled(site: Path, monkeypatch: pytest.MonkeyPatch):
    from opt_ops.cli.daemon import commands as daemon

    opt_ops(site, "daemon", "ensure")
    sign = until(lambda: "pid" in (found := sign_of(site)) and found)  # the command may not have waited for it
    os.kill(sign["pid"], signal.SIGSTOP)
    write_json(site / "runs" / "daemon.json", sign | {"ts": time.time() - 3600})
    monkeypatch.chdir(site)
    monkeypatch.setattr(daemon, "_START_SECONDS", 0.5)
    monkeypatch.setattr(daemon, "_start", lambda runs, start=daemon._start: refused(start(runs)))
    monkeypatch.setattr(daemon.settings, "config_path", None)
    with pytest.raises(daemon.Unavailable, match=r"has written no liveness file for 1h00m: it hangs") as raised:
        daemon.ensure()
    assert raised.value.hint.startswith(f"on {HOST}: kill -9 {sign['pid']}")


def test_a_surrounding_job_is_forgotten_but_not_the_cluster(monkeypatch: pytest.MonkeyPatch):
    for name in ("SLURM_JOB_ID", "SLURM_CPUS_PER_TASK", "SLURMD_NODENAME", "SRUN_CPUS_PER_TASK", "SLURM_CONF"):
        monkeypatch.setenv(name, "7")
    _drop_job_environment()
    assert {name for name in os.environ if name.startswith(("SLURM", "SRUN"))} == {"SLURM_CONF"}
    monkeypatch.setenv("SLURM_TIME_FORMAT", "%s")
    _drop_job_environment()
    assert os.environ["SLURM_TIME_FORMAT"] == "%s", "outside of a job, the user's own settings stay"


def test_the_crontab_line_starts_a_daemon_from_anywhere(site: Path):
    text = opt_ops(site, "daemon", "unit", "crontab").stdout
    (line,) = [line for line in text.splitlines() if not line.startswith("#")]
    assert line.startswith("* * * * * ")
    command = line.removeprefix("* * * * * ").replace(r"\%", "%")  # what cron does to it
    assert "%" not in line.replace(r"\%", "")
    cron = {"HOME": "/", "PATH": "/usr/bin:/bin", "SHELL": "/bin/sh", MARK: os.environ[MARK]}
    done = subprocess.run(["/bin/sh", "-c", command], cwd="/", env=cron, capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert _is_daemon(sign_of(site)["pid"])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_the_systemd_unit_is_one(site: Path, tmp_path: Path):
    unit = tmp_path / "opt-ops.service"
    unit.write_text(opt_ops(site, "daemon", "unit", "systemd").stdout)
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "SYSTEMD_LOG_LEVEL": "warning"}
    done = subprocess.run(
        ["systemd-analyze", "verify", "--user", "--man=no", str(unit)], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    start = next(line for line in unit.read_text().splitlines() if line.startswith("ExecStart="))
    words = shlex.split(start.removeprefix("ExecStart=").replace("%%", "%").replace("$$", "$"))
    assert words == [sys.executable, "-m", "opt_ops", "-c", f"{site}/opt-ops.toml", "daemon", "run"]


@pytest.mark.parametrize("form", ["slurm", "scrontab"])
def test_a_job_that_would_take_local_training_with_it_is_refused(site: Path, form: str):
    assert "training would end with the daemon's job" in opt_ops(site, "daemon", "unit", form).stderr
    (site / "opt-ops.toml").write_text('scheduler = "slurm"\n[slurm]\npartition = "gpu"\nqos = "high"\n')
    text = opt_ops(site, "daemon", "unit", form, "--partition", "cpu").stdout
    assert "--partition=cpu\n" in text
    assert "--qos=high\n" in text
    command = next(line for line in text.splitlines() if line.endswith("daemon run"))
    assert shlex.quote(f"{site}/opt-ops.toml") in command
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def test_a_test_alert_goes_to_every_url_and_secrets_stay_secret(site: Path, inbox: tuple[str, list[Any]]):
    address, taken = inbox
    urls = json.dumps([f"{address}/s3cret", f"{address}/missing/s3cret", "$OPT_OPS_TEST_UNSET"])
    with (site / "opt-ops.toml").open("a") as file:
        file.write(f'[alerts]\nleast = "page"\nurls = {urls}\n')
    done = opt_ops(site, "alerts", "test", "-o", "json")
    assert done.returncode == 1
    shown = json.loads(done.stdout)
    assert shown["schema"] == "opt-ops/alerts-test/1"
    assert shown["items"] == [
        {"url": f"{address}/…", "ok": True, "why": None},
        {"url": f"{address}/…", "ok": False, "why": "HTTP 404 Not Found"},
        {"url": "$OPT_OPS_TEST_UNSET", "ok": False, "why": "the environment variable OPT_OPS_TEST_UNSET is not set"},
    ]
    assert "s3cret" not in done.stdout + done.stderr
    assert len(taken) == 2
    finding = next(
        row for row in json.loads(opt_ops(site, "doctor", "-o", "json").stdout)["items"] if row["check"] == "alerts"
    )
    assert (finding["ok"], finding["found"]) == (False, "the environment variable OPT_OPS_TEST_UNSET is not set")


def test_a_test_alert_without_urls_is_a_mistake(site: Path):
    done = opt_ops(site, "alerts", "test")
    assert (done.returncode, "the configuration has no URLs in [alerts]" in done.stderr) == (2, True)
