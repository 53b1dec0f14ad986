"""Hosts of namespaces on one machine: what they are to each other, and that nothing of them is left."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.drill_hosts.hosts import Hosts, why_no_hosts

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
