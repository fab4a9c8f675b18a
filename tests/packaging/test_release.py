"""Tests the archive that people deploy without a compiler."""

import json
import shutil
import subprocess
import sys
import time

import pytest
from world import build, delivery, paths, stack

BINARY = paths.SAM_BUILD / "LoginFunction" / "bootstrap"
EXAMPLE = paths.ROOT / "examples" / "clicks"


def release():
    """Packs the output of `sam build`, and returns the archive."""
    words = [sys.executable, "-m", "world.release", "--function", BINARY, "--without-etlctl"]
    subprocess.run(words, cwd=paths.ROOT, check=True, capture_output=True)
    [archive] = (paths.ROOT / "target" / "release-archive").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def archive():
    return release()


def test_the_same_files_make_the_same_archive(archive):
    before = archive.read_bytes()
    assert release().read_bytes() == before


def test_its_checksum_is_beside_it(archive):
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=archive.parent, check=True, capture_output=True)


def test_it_deploys_without_a_compiler_and_with_another_mapping(servers, archive, tmp_path, monkeypatch):
    subprocess.run(["tar", "xf", archive, "-C", tmp_path], check=True)
    [directory] = tmp_path.iterdir()
    shutil.copy(EXAMPLE / "mapping.toml", directory / "function")
    etlctl = paths.ROOT / "target" / "debug" / "etlctl"
    with servers.postgres.connect() as database:
        ddl = [etlctl, "mapping", "ddl", "--mapping", directory / "function" / "mapping.toml"]
        database.execute(subprocess.run(ddl, check=True, capture_output=True, text=True).stdout)
        database.execute("truncate web.clicks")
    # Only SAM CLI, and the programs that its script may call; no compiler.
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("sam", "sh", "dirname", "realpath"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    deployed = stack.deploy(servers, name="archive", build=directory, quiet=True, FunctionTimeout=3, Architecture=build.architecture())
    event = json.loads((EXAMPLE / "messages.jsonl").read_text().splitlines()[0])
    delivery.send(deployed, [json.dumps(event)])
    deadline = time.monotonic() + 60
    with servers.postgres.connect(autocommit=True) as database:
        while not (rows := database.execute("select x, y from web.clicks").fetchall()):
            assert time.monotonic() < deadline, "no row within a minute"
            time.sleep(0.2)
    assert rows == [(10, 20)]
