"""Builds the files that people deploy without a compiler: an archive with the function and its template, etlctl, and their checksums."""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from world import arguments, build, command, paths
from world.command import CommandFailed, Interrupted

RELEASE = paths.ROOT / "target" / "release-archive"
# The build section of template.yaml, and its replacement in the archive.
BUILT_HERE = """\
    Metadata:
      BuildMethod: rust-cargolambda
      BuildProperties:
        Binary: login-etl
      checkov:
"""
BUILT = """\
    Metadata:
      checkov:
"""


def main() -> int:
    options = arguments.parse("release")
    command.end_in_order()
    # Both programs show it.
    os.environ["LOGIN_ETL_COMMIT"] = commit()
    function = options.function or build.function() / "LoginFunction" / "bootstrap"
    files = [archive(function)]
    if not options.without_etlctl:
        files.append(etlctl())
    if bom := bill_of_materials():
        files.append(bom)
    sums = RELEASE / "SHA256SUMS"
    sums.write_text("".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files))
    print(f"\n{command.shorten(RELEASE)} has:")
    for file in (*files, sums):
        print(f"  {file.name:40} {file.stat().st_size / 1e6:6.1f} MB")
    if not bom:
        print("Left out: the bill of materials (SBOM): cargo-cyclonedx is not installed (cargo install cargo-cyclonedx); the workflow installs it")
    return 0


def archive(function: Path) -> Path:
    """Packs the function, its template and its schema; the same files make the same archive."""
    name = f"login-etl-{version()}-{build.architecture()}"
    stage = RELEASE / name
    shutil.rmtree(RELEASE, ignore_errors=True)
    (stage / "function").mkdir(parents=True)
    shutil.copy(function, stage / "function" / "bootstrap")
    (stage / "function" / "bootstrap").chmod(0o755)
    shutil.copy(paths.ROOT / "mapping.toml", stage / "function")
    (stage / "template.yaml").write_text(template((paths.ROOT / "template.yaml").read_text()))
    shutil.copy(paths.ROOT / "samconfig.toml", stage)
    shutil.copy(paths.ROOT / "docs" / "archive.md", stage / "README.md")
    for directory in ("schema", "events"):
        shutil.copytree(paths.ROOT / directory, stage / directory)
    file = RELEASE / f"{name}.tar.gz"
    at = committed_at()

    def same_everywhere(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = "root"
        member.mtime = at
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
        return member

    with file.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=at) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for path in sorted(stage.rglob("*")):
            tar.add(path, arcname=str(Path(name) / path.relative_to(stage)), recursive=False, filter=same_everywhere)
    shutil.rmtree(stage)
    return file


def template(text: str) -> str:
    """The template without a build: its code is the archive's directory, and its architecture the archive's."""
    architecture = build.architecture()
    changes = {
        BUILT_HERE: BUILT,
        "      CodeUri: .\n": "      CodeUri: function\n",
        "    Default: arm64\n    AllowedValues: [arm64, x86_64]\n": f"    Default: {architecture}\n    AllowedValues: [{architecture}]\n",
    }
    for before, after in changes.items():
        if text.count(before) != 1:
            raise CommandFailed(f"template.yaml must contain this text exactly once:\n{before}")
        text = text.replace(before, after)
    return text


def etlctl() -> Path:
    """Builds etlctl for any Linux of the last ten years, OpenSSL included."""
    target = f"{os.uname().machine}-unknown-linux-gnu"
    built = paths.ROOT / "target" / "function" / "etlctl"
    command.run(
        *("cargo", "lambda", "build", "--release", "--locked", "--package", "etlctl", "--bin", "etlctl", "--target", f"{target}.2.17"),
        *("--lambda-dir", built),
        what="Building etlctl (some minutes the first time)",
        log=paths.LOGS / "build-release-etlctl.log",
        # etlctl need not be fast: less optimisation halves the build time.
        environment=build.release_environment()
        | {"CARGO_TARGET_DIR": str(paths.ROOT / "target" / "function"), "CARGO_PROFILE_RELEASE_LTO": "thin", "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16"},
    )
    file = RELEASE / f"etlctl-{version()}-{build.architecture()}"
    shutil.copy(built / "etlctl" / "bootstrap", file)
    file.chmod(0o755)
    return file


def bill_of_materials() -> Path | None:
    """The function's bill of materials, as CycloneDX; None if cargo-cyclonedx is not installed."""
    if not shutil.which("cargo-cyclonedx"):
        return None
    name = f"login-etl-{version()}-{build.architecture()}.cdx"
    command.run(
        *("cargo", "cyclonedx", "--format", "json", "--override-filename", name),
        what="Making the bill of materials",
        log=paths.LOGS / "cyclonedx.log",
        # The timestamp in it is the commit's time.
        environment=os.environ | {"SOURCE_DATE_EPOCH": str(committed_at())},
    )
    # cargo-cyclonedx writes one file for each package of the workspace, beside its manifest.
    for other in paths.ROOT.glob(f"*/**/{name}.json"):
        if "target" not in other.relative_to(paths.ROOT).parts:
            other.unlink()
    made, file = paths.ROOT / f"{name}.json", RELEASE / f"{name}.json"
    # The same wherever the checkout is.
    file.write_text(made.read_text().replace(f"path+{paths.ROOT.as_uri()}", "path+file:///login-etl"))
    made.unlink()
    return file


def version() -> str:
    metadata = subprocess.run(("cargo", "metadata", "--no-deps", "--format-version", "1", "--locked"), cwd=paths.ROOT, capture_output=True, text=True, check=True)
    return next(package["version"] for package in json.loads(metadata.stdout)["packages"] if package["name"] == "login-etl")


def commit() -> str:
    """The commit that is built, with a plus if there are uncommitted changes."""
    asked = subprocess.run(("git", "describe", "--always", "--dirty=+", "--exclude=*"), cwd=paths.ROOT, capture_output=True, text=True, check=False)
    return asked.stdout.strip() or "unknown"


def committed_at() -> int:
    """The commit's time, in seconds since the epoch; 0 outside of a repository."""
    asked = subprocess.run(("git", "log", "-1", "--format=%ct"), cwd=paths.ROOT, capture_output=True, text=True, check=False)
    return int(asked.stdout.strip() or 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandFailed as failure:
        sys.exit(str(failure))
    except (KeyboardInterrupt, Interrupted):
        sys.exit("\nInterrupted; everything is stopped.")
