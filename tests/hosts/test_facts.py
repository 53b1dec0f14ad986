"""What a host says of itself, and that it can be told as JSON."""

import json
import shutil
import socket
from pathlib import Path

import maskmatch_scale
from maskmatch_scale import __version__
from maskmatch_scale.hosts import facts as facts_module
from maskmatch_scale.hosts.facts import Facts, free_gib, version_of


def test_facts_survive_json():
    facts = Facts.here(("127.0.0.1", 22))
    assert Facts.from_values(json.loads(json.dumps(facts.values()))) == facts
    assert facts.host == socket.gethostname()
    assert facts.versions["maskmatch_scale"] == __version__
    assert facts.versions["timm"] == version_of("timm") != "not installed"
    assert facts.addresses["towards"] == "127.0.0.1"
    assert shutil.which("ip") is None or facts.addresses["interface"] == "lo"


def test_the_digest_is_of_the_code(tmp_path, monkeypatch):
    digest, folder = facts_module._source()
    assert folder == str(Path(maskmatch_scale.__file__).parent)

    def digest_of(change):
        copy = tmp_path / change
        shutil.copytree(folder, copy)
        if change != "copy":
            (copy / "seeds.py").write_text((copy / "seeds.py").read_text() + "# changed\n")
        monkeypatch.setattr(facts_module, "__file__", str(copy / "hosts" / "facts.py"))
        facts_module._source.cache_clear()
        return facts_module._source()[0]

    try:
        assert digest_of("copy") == digest
        assert digest_of("changed") != digest
    finally:
        facts_module._source.cache_clear()


def test_free_space_is_that_of_the_disk_on_which_a_folder_would_be(small_disk):
    disk = small_disk(kib=1024)
    free = free_gib(disk.path / "not" / "there")
    assert 0 < free <= 1024 / 2**20


def test_nvidia_smi_is_read(tmp_path, monkeypatch):
    said = "GPU-1f, 1980, 700.00, 570.86.15\nGPU-2f, [N/A], [N/A], 570.86.15\n"
    fake = tmp_path / "nvidia-smi"
    fake.write_text(f"#!/bin/sh\nprintf '%s' '{said}'\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert facts_module._nvidia_smi() == {"1f": ("1980", "700.00", "570.86.15"), "2f": ("[N/A]", "[N/A]", "570.86.15")}
    assert (facts_module._whole("700.00"), facts_module._whole("[N/A]")) == (700, None)
