"""Remote caches read through a local folder: what comes back, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

fsspec = pytest.importorskip("fsspec", reason="the remote extra is not installed")

from cache_remote import V, assert_same, fetched, fill, kept, opened, sizes  # noqa: E402

from kdfast import CacheError, cache, soft_targets  # noqa: E402


class TestReading:
    @pytest.mark.parametrize("scheme", ["memory", "file"])
    def test_equals_the_local_cache(self, scheme, source, memory, tmp_path):
        url = memory if scheme == "memory" else f"file://{tmp_path}/remote"
        assert cache.push(source, url).sent == 6
        remote, local = opened(url, tmp_path), cache.Reader(source)
        assert list(remote) == list(local)
        assert remote.metadata == local.metadata
        assert remote.shards() == local.shards()
        for key in local:
            assert_same(remote[key], local[key])
            assert_same(remote[key, 130:200], local[key, 130:200])
        for got, key in zip(remote.read(list(local)), local, strict=True):
            assert_same(got, local[key])
        with pytest.raises(CacheError, match="no sample has this key"):
            remote["another"]

    def test_opening_fetches_no_shard_and_takes_no_space(self, flaky, tmp_path):
        source = fill(tmp_path / "source", tokens=20000, samples=2)
        reader = opened(f"flaky://{source}", tmp_path)
        assert len(reader) == 2
        assert fetched(flaky.log) == []
        mirrored = list((tmp_path / "local" / "catalogues").glob("*/*.shard"))
        assert sum(file.stat().st_size for file in mirrored) == sum(sizes(source))
        assert sum(file.stat().st_blocks * 512 for file in mirrored) < 100_000 < sum(sizes(source))
        reader["sample 1"]
        assert len(fetched(flaky.log)) == 1

    def test_a_second_opening_asks_for_the_manifest_only(self, source, flaky, tmp_path):
        opened(f"flaky://{source}", tmp_path)["sample 0"]
        flaky.log.unlink()
        opened(f"flaky://{source}", tmp_path)["sample 0"]
        assert flaky.log.read_text() == "manifest.json None None\n"

    def test_long_indices(self, flaky, tmp_path):
        """Whose beginning is not in the first range that is asked for."""
        source = tmp_path / "source"
        with cache.Writer(source, vocab_size=V) as writer:
            for i in range(200):
                writer.write(f"{i}" + "x" * 1000, soft_targets(torch.randn(1, V), k=4))
        reader = opened(f"flaky://{source}", tmp_path)
        assert list(reader) == list(cache.Reader(source))
        assert_same(reader["7" + "x" * 1000], cache.Reader(source)["7" + "x" * 1000])

    def test_a_key_in_two_shards_without_token_ids(self, flaky, tmp_path):
        """The engine compares the headers of their frames when it opens the cache."""
        source = tmp_path / "source"
        same, other = soft_targets(torch.randn(400, V), k=32), soft_targets(torch.randn(400, V), k=32)
        with (
            cache.Writer(source, vocab_size=V, temperatures=(1.0,)) as first,
            cache.Writer(source, vocab_size=V, temperatures=(1.0,)) as second,
        ):
            for writer, targets in ((first, same), (second, other)):
                writer.write("same", same)
                writer.write("differs", targets)
        reader = opened(f"flaky://{source}", tmp_path)
        assert_same(reader["same"], cache.Reader(source)["same"])
        with pytest.raises(CacheError, match="written twice") as caught:
            reader["differs"]
        assert caught.value.code == "duplicate"

    def test_a_growing_cache_is_another_state_and_keeps_its_shards(self, source, flaky, tmp_path):
        url = f"flaky://{source}"
        old = opened(url, tmp_path)
        old.read(list(old))
        fill(source, samples=2, first=6)
        new = opened(url, tmp_path)
        assert (len(old), len(new)) == (6, 8)
        new.read(list(new))
        assert len(fetched(flaky.log)) == 8

    def test_a_pickled_one_asks_for_nothing_and_sees_the_same(self, source, flaky, tmp_path):
        reader = opened(f"flaky://{source}", tmp_path)
        fill(source, samples=1, first=6)
        flaky.log.unlink()
        again = pickle.loads(pickle.dumps(reader))
        assert not flaky.log.exists()
        assert list(again) == list(reader)
        assert_same(again["sample 1"], reader["sample 1"])

    def test_options(self, source, memory, tmp_path, monkeypatch):
        cache.push(source, memory)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
        cache.Reader(memory)["sample 0"]
        assert len(list((tmp_path / "home" / "kdfast" / "shards").iterdir())) == 1
        with pytest.raises(ValueError, match="is a URL"):
            cache.Reader(memory, damaged="skip")
        with pytest.raises(ValueError, match="local_bytes must be positive"):
            cache.Reader(memory, local_bytes=0)

    def test_without_fsspec_the_extra_is_named(self, tmp_path):
        code = "import sys; sys.modules['fsspec'] = None; from kdfast import cache; cache.Reader('memory://a')"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path
        )
        assert (
            'memory://a needs the package "fsspec", which is not installed: pip install "kdfast[remote]"' in done.stderr
        )


class TestRefused:
    def test_no_cache(self, memory, tmp_path):
        with pytest.raises(CacheError, match="no cache is there") as caught:
            opened(memory, tmp_path)
        assert caught.value.code == "missing"

    def test_a_truncated_download(self, source, flaky, tmp_path):
        reader = opened(f"flaky://{source}", tmp_path)
        flaky.spoil = lambda name, start, data: data[:-1]
        with pytest.raises(CacheError) as caught:
            reader["sample 0"]
        assert caught.value.code == "truncated"
        assert caught.value.path.startswith("flaky://")
        assert kept(tmp_path) == []
        flaky.spoil = None
        assert_same(reader["sample 0"], cache.Reader(source)["sample 0"])

    @pytest.mark.parametrize("where", [0.1, 0.3, 0.6, 0.9])
    def test_a_damaged_download(self, source, flaky, tmp_path, where):
        def spoil(name, start, data):
            out = bytearray(data)
            out[int(where * len(out))] ^= 4
            return bytes(out)

        reader = opened(f"flaky://{source}", tmp_path)
        flaky.spoil = spoil
        with pytest.raises(CacheError, match="what was fetched is damaged"):
            reader["sample 0"]
        assert kept(tmp_path) == []

    @pytest.mark.parametrize("name", ["manifest.json", "cache.header", "journal", "shard"])
    def test_a_damaged_catalogue(self, source, flaky, tmp_path, name):
        def spoil(file, start, data):
            return data[:-20] + bytes([data[-20] ^ 4]) + data[-19:] if file.endswith(name) else data

        flaky.spoil = spoil
        with pytest.raises(CacheError):
            opened(f"flaky://{source}", tmp_path)
        assert list((tmp_path / "local" / "catalogues").iterdir()) == []
        flaky.spoil = None
        assert len(opened(f"flaky://{source}", tmp_path)) == 6

    def test_damage_in_the_local_folder_is_an_error_once(self, source, flaky, tmp_path):
        reader = opened(f"flaky://{source}", tmp_path)
        reader["sample 0"]
        (file,) = (tmp_path / "local" / "shards").iterdir()
        data = bytearray(file.read_bytes())
        data[2000] ^= 1
        file.write_bytes(data)
        with pytest.raises(CacheError, match="checksum"):
            reader["sample 0"]
        assert_same(reader["sample 0"], cache.Reader(source)["sample 0"])

    def test_an_error_of_the_network_is_raised_as_it_is(self, source, flaky, tmp_path):
        def fail(name, start, data):
            msg = "the line is dead"
            raise ConnectionResetError(msg)

        reader = opened(f"flaky://{source}", tmp_path)
        flaky.spoil = fail
        with pytest.raises(ConnectionResetError, match="the line is dead"):
            reader["sample 0"]

    def test_a_shard_that_is_another_now(self, source, flaky, tmp_path):
        reader = opened(f"flaky://{source}", tmp_path)
        names = [shard.file for shard in reader.shards()]
        data = (source / names[0]).read_bytes()
        (source / names[0]).write_bytes((source / names[1]).read_bytes()[: len(data)].ljust(len(data), b"\0"))
        with pytest.raises(CacheError, match="changed") as caught:
            reader["sample 0"]
        assert caught.value.code == "mismatch"
        with pytest.raises(CacheError):
            cache.Reader(f"flaky://{source}", local_cache=tmp_path / "other")

    def test_a_shard_that_is_gone(self, source, flaky, tmp_path):
        reader = opened(f"flaky://{source}", tmp_path)
        (source / reader.shards()[0].file).unlink()
        with pytest.raises(CacheError, match="not there") as caught:
            reader["sample 0"]
        assert caught.value.code == "missing"

    def test_another_cache_at_the_url_has_a_folder_of_its_own(self, source, flaky, tmp_path):
        url = f"flaky://{source}"
        old = opened(url, tmp_path)
        pickled = pickle.dumps(old)
        shutil.rmtree(source)
        fill(source)
        new = opened(url, tmp_path)
        assert_same(new["sample 0"], cache.Reader(source)["sample 0"])
        with pytest.raises(CacheError):
            old["sample 0"]
        shutil.rmtree(tmp_path / "local")
        with pytest.raises(CacheError, match="has changed since"):
            pickle.loads(pickled)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"file": "../../etc/passwd"}, "names a shard as none is named"),
            ({"bytes": -1}, "impossible size"),
            ({"samples": "many"}, "without its fields"),
            ({"bytes": 4096}, "do not say the same|journal|shard"),
            ({"file": "0123456789abcdef-000000.open"}, "is not finished"),
            ({"bytes": 2**36}, r"\d+ bytes came, \d+ were asked for"),
            ({"bytes": 2**48}, r"the shard has \d+ bytes, the manifest says \d+"),
            ({"bytes": 2**48, "samples": 2**41}, r"the shard has \d+ bytes, the manifest says \d+"),
            ({"bytes": 2**48 + 8}, "impossible size"),
            ({"samples": 2**40}, "impossible size"),
        ],
    )
    def test_a_hostile_manifest(self, source, flaky, tmp_path, change, message):
        content = json.loads((source / "manifest.json").read_text())
        content["shards"][0].update(change)
        for total in {"bytes", "samples"} & change.keys() - {k for k, v in change.items() if isinstance(v, str)}:
            content[total] = sum(shard[total] for shard in content["shards"])
        (source / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(CacheError, match=message):
            opened(f"flaky://{source}", tmp_path)

    @pytest.mark.parametrize("total", ["samples", "tokens", "bytes"])
    def test_a_manifest_whose_list_has_lost_a_shard(self, total, source, flaky, tmp_path):
        """The journals have an older state for every beginning of the list."""
        whole = json.loads((source / "manifest.json").read_text())
        content = whole | {"shards": whole["shards"][:-1]}
        for other in {"samples", "tokens", "bytes"} - {total}:
            content[other] = sum(shard[other] for shard in content["shards"])
        (source / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(CacheError, match=r"the manifest says|do not say the same") as raised:
            opened(f"flaky://{source}", tmp_path)
        assert raised.value.code == "mismatch"


class TestCommands:
    @pytest.fixture
    def call(self, monkeypatch, capsys, tmp_path):
        pytest.importorskip("typer", reason="the cache extra is not installed")
        from kdfast.cli import main

        def call(*arguments):
            monkeypatch.setattr("sys.argv", ["kdfast", "cache", *map(str, arguments)])
            with pytest.raises(SystemExit) as caught:
                main()
            printed = capsys.readouterr()
            return caught.value.code, printed.out, printed.err

        return call

    @pytest.mark.parametrize("samples", [None, 2])
    def test_info(self, samples, source, flaky, call, tmp_path):
        url, asked = f"flaky://{source}", [] if samples is None else ["--samples", samples]
        code, out, err = call("info", url, "--json", "--local-cache", tmp_path / "local", *asked)
        assert code == 0, err
        held = json.loads(out)
        assert (held["path"], held["samples"], held["tokens"]) == (url, 6, 2400)
        assert (held["statistics"] is None) == (samples is None)
        assert len(fetched(flaky.log)) == (samples or 0)

    def test_verify_fetches_everything_and_leaves_nothing(self, source, flaky, call, tmp_path):
        url, local = f"flaky://{source}", tmp_path / "local"
        opened(url, tmp_path)["sample 0"]
        before = kept(tmp_path)
        flaky.log.unlink()
        code, out, err = call("verify", url, "--local-cache", local)
        assert (code, err) == (0, "")
        assert "6 samples, 2,400 tokens" in out
        assert out.rstrip().endswith("all right")
        assert len(set(fetched(flaky.log))) == len(fetched(flaky.log)) == 6
        assert kept(tmp_path) == before
        assert sorted(entry.name for entry in local.iterdir()) == ["catalogues", "shards"]

    def test_verify_names_every_damaged_shard(self, source, flaky, call, tmp_path):
        url = f"flaky://{source}"
        list(map(opened(url, tmp_path).__getitem__, (f"sample {i}" for i in range(6))))
        shards = [source / shard.file for shard in cache.Reader(source).shards()]
        for shard in (shards[1], shards[4]):
            data = bytearray(shard.read_bytes())
            data[len(data) // 2] ^= 1
            shard.write_bytes(data)
        found = cache.verify(url, local_cache=tmp_path / "local")
        assert {(fault.path, fault.code) for fault in found.faults} == {
            (f"{url}/{shard.name}", "checksum") for shard in (shards[1], shards[4])
        }
        code, out, err = call("verify", url, "--local-cache", tmp_path / "local")
        assert code == 1
        assert "2 faults" in out
        assert all(shard.name in err for shard in (shards[1], shards[4]))

    def test_verify_where_the_bound_is_too_small(self, source, memory, tmp_path):
        cache.push(source, memory)
        with pytest.raises(CacheError, match="local_bytes=1000"):
            cache.verify(memory, local_cache=tmp_path, local_bytes=1000)
        room = max(sizes(source))
        assert cache.verify(memory, local_cache=tmp_path, local_bytes=room).faults == []

    def test_verify_of_a_key_with_two_contents(self, memory, tmp_path):
        with cache.Writer(tmp_path / "all", vocab_size=V) as a, cache.Writer(tmp_path / "all", vocab_size=V) as b:
            for writer in (a, b):
                writer.write("twice", soft_targets(torch.randn(9, V), k=32))
        cache.push(tmp_path / "all", memory)
        local, remote = cache.verify(tmp_path / "all"), cache.verify(memory, local_cache=tmp_path / "local")
        assert remote.faults
        assert [(f.code, f.key) for f in remote.faults] == [(f.code, f.key) for f in local.faults]
        assert remote[:3] == local[:3]

    def test_export(self, source, memory, call, tmp_path):
        parquet = pytest.importorskip("pyarrow.parquet", reason="the cache extra is not installed")
        cache.push(source, memory)
        for path, name in ((source, "here"), (memory, "there")):
            code, _, err = call("export", path, tmp_path / name, "--local-cache", tmp_path / "local")
            assert code == 0, err
        assert parquet.read_table(tmp_path / "here").equals(parquet.read_table(tmp_path / "there"))

    @pytest.mark.parametrize("command", ["info", "verify", "export"])
    def test_nothing_there(self, command, memory, call, tmp_path):
        rest = [tmp_path / "file"] if command == "export" else []
        code, _, err = call(command, memory, *rest, "--local-cache", tmp_path / "local")
        assert code == 1
        assert "no cache is there" in err

    def test_what_is_for_directories(self, source, memory, call, tmp_path):
        cache.push(source, memory)
        for arguments, remedy in (
            (("repair", memory), "repair the cache that it was pushed from"),
            (("merge", memory, "--into", tmp_path / "c"), "copy its files to a directory"),
            (("merge", source, "--into", memory), "push the result"),
        ):
            code, _, err = call(*arguments)
            assert code == 2
            assert remedy in err
            assert memory in err
