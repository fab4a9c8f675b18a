"""What is deployed: the binary that `sam build` made, and the second road to Lambda."""

import json
import os
import re
import subprocess

from world import paths, stack, template

BINARY = paths.SAM_BUILD / "LoginFunction" / "bootstrap"
# Of Amazon Linux 2023, on which provided.al2023 is built: https://docs.aws.amazon.com/linux/al2023/ug/compare-with-al2.html
GLIBC = (2, 34)
LIBRARIES = re.compile(r"(libc|libm|libdl|libpthread|librt|ld-linux-[a-z0-9-]+)\.so\.\d+")


def read(*options):
    return subprocess.run(["readelf", "--wide", *options, BINARY], check=True, capture_output=True, text=True).stdout


def test_the_binary_needs_nothing_that_provided_al2023_lacks():
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", read("--dynamic"))
    assert needed
    assert [library for library in needed if not LIBRARIES.fullmatch(library)] == []
    versions = {tuple(map(int, version.split("."))) for version in re.findall(r"GLIBC_([0-9.]+)", read("--version-info"))}
    assert max(versions) <= GLIBC


def test_no_symbol_is_left_to_a_library_that_is_not_there():
    undefined = [line.split()[-1] for line in read("--dyn-syms").splitlines() if " UND " in line and " GLOBAL " in line]
    assert undefined
    # What glibc gives has a version; the rest would be looked for in vain.
    assert [symbol for symbol in undefined if "@GLIBC_" not in symbol and not symbol.startswith("(")] == []


def test_cargo_lambda_deploys_with_the_template_s_memory_and_timeout():
    environment = os.environ | {"AWS_REGION": "us-east-1", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    command = ["cargo", "lambda", "deploy", "login-etl", "--dry", "--output-format", "json", "--binary-path", BINARY]
    shown = subprocess.run(command, cwd=paths.ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    planned = json.loads(shown[shown.index("{") :])
    function = template.resolve({})["LoginFunction"]["Properties"]
    assert (planned["name"], planned["arch"], planned["files"]) == ("login-etl", stack.architecture(), ["bootstrap"])
    config = planned["config"]
    assert (config["runtime"], config["memory"], config["timeout"]) == (function["Runtime"], function["MemorySize"], int(function["Timeout"]))
    assert config["tracing"] == function["TracingConfig"]["Mode"]
