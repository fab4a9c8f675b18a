"""Tests the deployed binary from `sam build`, and deployment with cargo-lambda."""

import json
import os
import re
import subprocess

from world import paths, stack, template

BINARY = paths.SAM_BUILD / "LoginFunction" / "bootstrap"
# The version in Amazon Linux 2023, on which provided.al2023 is based: https://docs.aws.amazon.com/linux/al2023/ug/compare-with-al2.html
GLIBC = (2, 34)
LIBRARIES = re.compile(r"(libc|libm|libdl|libpthread|librt|ld-linux-[a-z0-9-]+)\.so\.\d+")


def read(*options):
    return subprocess.run(["readelf", "--wide", *options, BINARY], check=True, capture_output=True, text=True).stdout


def test_provided_al2023_has_all_libraries_of_the_binary():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", read("--dynamic"))
    assert needed
    assert [library for library in needed if not LIBRARIES.fullmatch(library)] == []
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_([0-9.]+)", read("--version-info"))}
    assert max(versions) <= GLIBC


def test_every_undefined_symbol_is_from_glibc():
    undefined = [line.split()[-1] for line in read("--dyn-syms").splitlines() if " UND " in line and " GLOBAL " in line]
    assert undefined
    # glibc's symbols have a version; any other would not be found.
    assert [symbol for symbol in undefined if "@GLIBC_" not in symbol and not symbol.startswith("(")] == []


def test_cargo_lambda_deploys_with_the_templates_memory_and_timeout():
    environment = os.environ | {"AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    command = ["cargo", "lambda", "deploy", "login-etl", "--dry", "--output-format", "json", "--binary-path", BINARY]
    shown = subprocess.run(command, cwd=paths.ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    planned = json.loads(shown[shown.index("{") :])
    function = template.resolve({})["LoginFunction"]["Properties"]
    assert (planned["name"], planned["arch"], planned["files"]) == ("login-etl", stack.architecture(), ["bootstrap"])
    config = planned["config"]
    assert (config["runtime"], config["memory"], config["timeout"]) == (function["Runtime"], function["MemorySize"], int(function["Timeout"]))
    assert config["tracing"] == function["TracingConfig"]["Mode"]
