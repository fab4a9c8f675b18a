"""The pages against the code: the names in them exist."""

import re
import subprocess

from world import paths

# Settings of PostgreSQL, and a function that is made from the name of the table.
FOREIGN = {"log_min_duration_statement", "log_parameter_max_length_on_error", "max_standby_streaming_delay", "user_logins_expire"}


def tracked(*patterns):
    files = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=paths.ROOT, check=True, capture_output=True, text=True).stdout
    return [paths.ROOT / name for name in files.split("\0") if name]


def test_every_long_name_in_a_page_is_in_the_code():
    code = FOREIGN | {word for file in tracked("*.rs", "*.py", "*.sql", "*.yaml", "*.toml") for word in re.findall(r"\w+", file.read_text())}
    missing = []
    for page in tracked("*.md"):
        # A test may be named by its beginning: `a_lost_connection_…`.
        for name, rest in re.findall(r"`([a-z0-9]+(?:_[a-z0-9]+){2,}_?)(…?)(?:\(\))?`", page.read_text()):
            if name not in code and not (rest and any(word.startswith(name) for word in code)):
                missing.append(f"{page.name}: {name}{rest}")
    assert missing == []
