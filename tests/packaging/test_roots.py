"""Checks that the built-in roots are genuine, and that the page lists exactly these."""

import re
from datetime import UTC, datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from world import paths
from world.roots import PAGE, ROOTS, name

FILES = {file: x509.load_pem_x509_certificates((ROOTS / file).read_bytes()) for file in ("amazon.pem", "rds.pem")}


@pytest.mark.parametrize("file", FILES)
def test_each_is_a_valid_self_signed_ca(file):
    for root in FILES[file]:
        root.verify_directly_issued_by(root)
        assert root.not_valid_before_utc < datetime.now(UTC) < root.not_valid_after_utc, name(root)
        assert root.extensions.get_extension_for_class(x509.BasicConstraints).value.ca, name(root)


@pytest.mark.parametrize("file", FILES)
def test_each_is_preceded_by_its_name(file):
    headings = re.findall(r"^(.+)\n-----BEGIN", (ROOTS / file).read_text(), re.MULTILINE)
    assert headings == [name(root) for root in FILES[file]]


def test_the_page_has_the_fingerprint_of_each():
    listed = re.findall(r"^\| (.+) \| (.+) \| `([0-9a-f]{64})` \|$", PAGE.read_text(), re.MULTILINE)
    roots = [root for roots in FILES.values() for root in roots]
    assert listed == [(name(root), f"{root.not_valid_after_utc:%Y-%m-%d}", root.fingerprint(hashes.SHA256()).hex()) for root in roots]
