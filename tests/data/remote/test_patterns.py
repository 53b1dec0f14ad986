"""What patterns of paths and addresses stand for."""

import pytest

from maskmatch_scale.data.faults import DataError
from maskmatch_scale.data.remote import patterns
from maskmatch_scale.data.remote.fetch import read_bytes
from maskmatch_scale.data.remote.patterns import expand
from maskmatch_scale.errors import is_of_this_rank
from tests.data.faulty_server import Fault, FaultyProxy


def test_expand(folder):
    assert expand("https://h/x-{008..010}.tar") == [f"https://h/x-{number}.tar" for number in ("008", "009", "010")]
    assert expand("s3://b/{a,b}-{0..1}.tar") == [f"s3://b/{name}.tar" for name in ("a-0", "a-1", "b-0", "b-1")]
    assert expand(f"{folder}/{{c,a}}.tar") == [f"{folder}/c.tar", f"{folder}/a.tar"]
    assert expand(f"{folder}/[a-c].*") == [f"{folder}/{name}.tar" for name in "abc"]
    assert expand("https://h/x.tar?a=*") == ["https://h/x.tar?a=*"]
    assert expand("pipe:cat *.tar") == ["pipe:cat *.tar"]
    (folder / "odd[1].tar").touch()
    assert expand(f"{folder}/odd[1].tar") == [f"{folder}/odd[1].tar"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{folder}/{{a..z}}.tar", "i.tar: no such file"),
        ("{folder}/*.zip", "no such file"),
        ("{folder}/{{a", "no such file|braces do not match"),
        ("https://h/*.tar", "web servers do not list"),
        ("https://h/{{0..99999999}}", "more than"),
    ],
)
def test_patterns_that_match_nothing(folder, pattern, message):
    with pytest.raises(DataError, match=message):
        expand(pattern.format(folder=folder))


def test_patterns_on_an_object_store(bucket, either_way):
    for key in ("x/a-0.tar", "x/a-1.tar", "x/a-1.json", "x/deep/a-2.tar", "xy/a-3.tar", "odd [1]/a b.tar"):
        bucket.put(key, b"")
    url = f"s3://{bucket.name}"
    assert expand(f"{url}/x/*.tar") == [f"{url}/x/a-0.tar", f"{url}/x/a-1.tar"]
    assert expand(f"{url}/x/**/*.tar") == [f"{url}/x/a-0.tar", f"{url}/x/a-1.tar", f"{url}/x/deep/a-2.tar"]
    assert expand(f"{url}/x*/a-[1-3].*") == [f"{url}/x/a-1.json", f"{url}/x/a-1.tar", f"{url}/xy/a-3.tar"]
    assert expand(f"{url}/{{xy,x}}/a-?.t*") == [f"{url}/xy/a-3.tar", f"{url}/x/a-0.tar", f"{url}/x/a-1.tar"]
    assert expand(f"{url}/odd [[]1]/*") == [f"{url}/odd [1]/a b.tar"]
    assert expand(f"{url}/shards/*") == [f"{url}/shards/{name}.tar" for name in "abcdefgh"]
    assert expand(f"{url}/x/[1].tar") == [f"{url}/x/[1].tar"]  # without a * it is a name


def test_object_stores_that_list_nothing(bucket, either_way, monkeypatch):
    url = f"s3://{bucket.name}"
    for pattern, message in (
        (f"{url}/shards/*.zip", r"\*\.zip: matches no file; check bucket and folder$"),
        (f"{url}/none/*.tar", "matches no file"),
        ("s3://nobody/*.tar", "cannot be listed: HTTP 404 NoSuchBucket; check the address"),
        ("s3://*/x.tar", "name one bucket"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            expand(pattern)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(patterns, "_MOST_LISTED", 7)
    with pytest.raises(DataError, match=r"more than 7 names lie below s3://.*/shards/; write"):
        expand(f"{url}/shards/*")


def test_a_list_is_asked_for_again(bucket, either_way, monkeypatch):
    monkeypatch.setattr(patterns, "_PAUSE_S", 0)
    with FaultyProxy(bucket.server, {"*": [Fault(times=2, status=503), Fault(times=1, cut_after=50)]}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert len(expand(f"s3://{bucket.name}/shards/*.tar")) == 8
        assert proxy.gets() == 4
        proxy.set_faults({"*": Fault(status=403)})
        with pytest.raises(
            DataError, match="cannot be listed: HTTP 403; check the permissions; set AWS_ACCESS_KEY_ID"
        ) as caught:
            expand(f"s3://{bucket.name}/shards/*.tar")
        assert not is_of_this_rank(caught.value)
        proxy.set_faults({"*": Fault(status=503)})
        with pytest.raises(DataError, match="cannot be listed: HTTP 503; check the network") as caught:
            expand(f"s3://{bucket.name}/shards/*.tar")
        assert is_of_this_rank(caught.value)  # other ranks may have had their list


def test_names_with_empty_parts(bucket, either_way, options):
    url = f"s3://{bucket.name}"
    bucket.put("shards//b.tar", b"x")
    for read in (lambda: expand(f"{url}/shards/*.tar"), lambda: read_bytes(f"{url}/shards//b.tar", options)):
        with pytest.raises(
            DataError, match=r"the name 'shards//b\.tar' has an empty part \(//\), .*; rename the object"
        ) as caught:
            read()
        assert "\n" not in str(caught.value)


def test_patterns_on_file_systems(folder):
    assert expand(f"{folder.as_uri()}/[a-c].*") == [f"{folder.as_uri()}/{name}.tar" for name in "abc"]
    with pytest.raises(DataError, match="matches no file"):
        expand(f"{folder.as_uri()}/*.zip")
    with pytest.raises(DataError, match="cannot be listed: no such kind of address"):
        expand("s4://bucket/*.tar")
