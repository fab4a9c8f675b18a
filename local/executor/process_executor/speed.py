"""Makes LocalStack faster, without changing what it does."""

import functools
from pathlib import Path

import yaml
from botocore.loaders import JSONFileLoader
from localstack.runtime import hooks
from localstack.utils import functions


@hooks.on_runtime_create()
def faster() -> None:
    """Runs before LocalStack imports what this changes."""
    leave_recursion_to_python()
    read_endpoints_once()
    parse_yaml_in_c()


def leave_recursion_to_python() -> None:
    """LocalStack's own guard inspects the whole stack at each reference in a template, which takes seconds of a deployment. Python raises the
    same `RecursionError`, only later."""
    functions.prevent_stack_overflow = lambda match_parameters=False: lambda function: function


def read_endpoints_once() -> None:
    """LocalStack asks botocore for the regions of each service, and botocore would read its list of all endpoints each time, in a tenth of a
    second."""
    read = JSONFileLoader.load_file
    read_once = functools.cache(lambda path: read(JSONFileLoader(), path))
    JSONFileLoader.load_file = lambda self, path: read_once(path) if Path(path).name == "endpoints" else read(self, path)


def parse_yaml_in_c() -> None:
    """Its loaders derive from PyYAML's in Python, which takes a second for our template."""
    yaml.SafeLoader = yaml.CSafeLoader
