"""Hostfiles: what the deepspeed launcher reads is read alike, and mistakes are named with file and line."""

import pytest

from maskmatch_scale.errors import UserError
from maskmatch_scale.hosts.hostfile import read_hostfile


def test_it_is_read_as_the_launcher_reads_it(tmp_path):
    from deepspeed.launcher.runner import fetch_hostfile

    path = tmp_path / "hostfile"
    path.write_text("# two racks\n\ngpu-a slots=8\n10.0.0.2\tslots=4\n  user@gpu-c   slots=1  # the small one\n")
    assert read_hostfile(path) == {"gpu-a": 8, "10.0.0.2": 4, "user@gpu-c": 1}
    assert list(read_hostfile(path).items()) == list(fetch_hostfile(str(path)).items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu-a\n", "{file}:1: 'gpu-a': each line is `HOST slots=NUMBER`"),
        ("gpu-a slots=8\n\ngpu-b slots=eight\n", "{file}:3: slots=eight of gpu-b: give the number of its GPUs"),
        ("gpu-a slots=0\n", "{file}:1: slots=0 of gpu-a"),
        ("gpu-a slots=-1\n", "{file}:1: slots=-1 of gpu-a"),
        ("gpu-a slots=8 max=9\n", "{file}:1: 'gpu-a slots=8 max=9': each line"),
        ("gpu-a slots=8\n# x\ngpu-a slots=8\n", "{file}:3: gpu-a is in line 1 already"),
        ("-oProxyCommand=x slots=8\n", "{file}:1: '-oProxyCommand=x' is no name of a host"),
        ("# nothing\n", "{file}: it lists no host"),
        (None, "{file}: cannot be read (No such file or directory)"),
        (b"\xff\xfe", "{file}: cannot be read (it is no text)"),
    ],
)
def test_a_mistake_names_file_and_line(tmp_path, text, message):
    path = tmp_path / "hostfile"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_hostfile(path)
    assert message.format(file=path) in str(caught.value)
