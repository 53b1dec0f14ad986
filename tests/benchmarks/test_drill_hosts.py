"""Hosts of namespaces on one machine, and the drill that trains over them."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.drill_hosts import __main__
from benchmarks.drill_hosts.hosts import Hosts, why_no_hosts
from benchmarks.drill_hosts.report import Collective, Cut, Results, Steps, earlier, write_report

WITHOUT = why_no_hosts(*__main__.TOOLS)

needs_hosts = pytest.mark.skipif(why_no_hosts() is not None, reason=str(why_no_hosts()))
needs_traffic_control = pytest.mark.skipif(
    why_no_hosts("tc", "nft", "ping") is not None, reason=str(why_no_hosts("tc", "nft", "ping"))
)


@needs_hosts
def test_hosts_reach_each_other_by_name_and_by_ssh():
    with Hosts(2) as hosts:
        assert [host.run(["hostname"]).stdout.strip() for host in hosts] == ["host-1", "host-2"]
        asked = hosts[0].run(["ssh", "host-2", "hostname; hostname -I; echo $$"])
        name, address, number = asked.stdout.split()
        assert (name, address) == ("host-2", hosts[1].address), asked.stderr
        assert int(number) < 1000  # processes are numbered by each host


@needs_hosts
def test_settings_of_the_machine_are_untouched(tmp_path):
    def settings():
        places = [*map(Path, ("/etc/hosts", "/etc/ssh", "/run", "/dev/shm")), Path.home()]
        return {place: place.stat().st_ino for place in places}, Path("/proc/self/mounts").read_text()

    before = settings()
    with Hosts(1) as hosts:
        hosts[0].do(
            f"touch /run/mark /dev/shm/mark /etc/ssh/mark\necho 10.0.0.1 mark >>/etc/hosts\ntouch {tmp_path}/mark"
        )
        assert settings() == before
        assert (tmp_path / "mark").exists()  # other files are shared
    assert "mark" not in Path("/etc/hosts").read_text()


@needs_traffic_control
def test_a_host_that_is_cut_off_is_not_reached_until_it_is_back():
    with Hosts(2) as hosts:
        ask = ["ping", "-c1", "-W1", "host-2"]
        assert hosts[0].run(ask).returncode == 0
        hosts[1].cut()
        assert hosts[0].run(ask).returncode != 0
        assert hosts[1].run(["ping", "-c1", "-W1", "host-2"]).returncode == 0  # it reaches itself
        hosts[1].join()
        assert hosts[0].run(["ping", "-c1", "-W5", "host-2"]).returncode == 0


@needs_traffic_control
def test_packets_are_lost_and_counted():
    with Hosts(2) as hosts:
        ask = ["ping", "-q", "-c100", "-i0.002", "-W1", "host-2"]
        before = hosts[0].sent_bytes()
        assert " 0% packet loss" in hosts[0].run(ask).stdout
        assert hosts[0].sent_bytes() - before >= 100 * 84
        hosts[1].lose(0.5)
        lost = hosts[0].run(ask).stdout
        assert " 0% packet loss" not in lost
        assert " 100% packet loss" not in lost
        hosts[1].lose(0)
        assert " 0% packet loss" in hosts[0].run(ask).stdout


@needs_traffic_control
def test_a_limit_is_a_token_bucket_of_that_rate():
    with Hosts(2) as hosts:
        hosts[1].limit(5)
        assert "rate 5Mbit" in hosts[1].do("tc qdisc show dev eth0")
        hosts[1].limit(None)
        assert "tbf" not in hosts[1].do("tc qdisc show dev eth0")


@needs_hosts
def test_an_error_on_a_host_is_raised_and_the_host_goes_on():
    with Hosts(1) as hosts:
        with pytest.raises(RuntimeError, match="no-such-device"):
            hosts[0].do("ip link show no-such-device\necho not reached")
        assert hosts[0].do("echo on") == "on\n"


@needs_hosts
def test_nothing_is_left_if_their_process_is_killed():
    code = (
        "import time\nfrom benchmarks.drill_hosts.hosts import Hosts\n"
        "with Hosts(2) as hosts:\n"
        "    hosts[1].start(['sleep', '1000'])\n"
        "    while 'sleep' not in hosts[1].do('ps ax'): time.sleep(0.05)\n"
        "    print('up', flush=True)\n    time.sleep(1000)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert any(child.name() == "sshd" for child in family)
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while alive := [child for child in family if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def cut(**changes: Any) -> Any:
    where = {"case": "cut", "ranks": "1+1", "launched_from": "host-1", "lost": "host-2", "limit_s": 15, "steps": 18}
    right = {"ended_s": 20.0, "named": True, "went_on": True, "losses": 0.0, "weights": 0.0, "left": 0}
    return Cut(**where | right | changes)


def test_a_cut_is_met_only_if_all_is_as_it_should_be():
    assert cut().met
    assert cut(ended_s=None, named=None, lost=None).met
    for wrong in (
        {"ended_s": 80.0},
        {"named": False},
        {"went_on": False},
        {"losses": 1e-9},
        {"weights": 1e-9},
        {"left": 1},
        {"tolerance": 1e-6, "losses": 1e-5},
    ):
        assert not cut(**wrong).met, wrong
    assert cut(tolerance=1e-6, losses=1e-7, weights=1e-7).met


def test_rows_of_other_phases_are_kept(tmp_path):
    out = tmp_path / "drill_hosts.json"
    steps = Steps(2, 2, 3, 200.0, 0.0, False, 0.5, 0.4, 9, 10_000_000, 3_700_000)
    write_report(out, Results([cut()], [steps], [Collective(None, 0.01, True, 1_000_000, 0.1)]))
    page = out.with_suffix(".md").read_text()
    assert "| 2 | 2 | 3 | 200 | to 64 KiB | 0 % | 0.5 | 0.4 | 9 | 10 |" in page
    assert "| no limit | 9 kB | 1 % | 1 | 0.1 | 80 |" in page
    kept = earlier(out, ["cuts"])
    assert (kept.cuts, kept.steps, len(kept.collectives)) == ([], [steps], 1)
    assert earlier(out, ["steps", "collectives"]).cuts == [cut()]


def test_it_is_skipped_with_the_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(__main__, "why_no_hosts", lambda *tools: "namespaces of the network need root")
    assert __main__.main(["--out", str(tmp_path / "out.json")]) == 0
    assert "skipped: namespaces of the network need root" in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT))
def test_a_short_drill(tmp_path, capsys):
    """Two hosts against one, one that is cut off or killed and comes back, a step and a sum over a link."""
    out = tmp_path / "drill_hosts.json"
    assert __main__.main(["--out", str(out), "--short", "--work", str(tmp_path / "work")]) == 0, capsys.readouterr()
    found = earlier(out, [])
    assert [row.lost for row in found.cuts] == [None, "host-2", "host-2"]
    assert all(row.losses == 0 and row.weights == 0 for row in found.cuts)
    assert all("host host-2" in row.line for row in found.cuts[1:])
    assert [(row.ranks, row.hosts) for row in found.steps] == [(2, 2), (1, 1)]
    assert found.steps[0].bytes > 4 * found.steps[0].parameters
    assert all(row.seconds > 0 for row in found.collectives)
