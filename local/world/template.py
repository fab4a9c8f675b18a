"""Resolves the product's template as CloudFormation does, for given parameters.

Run as a program, it writes the template as expanded by SAM, for tools that do not understand SAM: OUTPUT [Name=value ...]
"""

import argparse
import copy
import functools
import json
import logging
import re
from pathlib import Path

import boto3
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator
from samtranslator.yaml_helper import yaml_parse

from world import paths

PSEUDO_PARAMETERS = {
    "AWS::AccountId": "123456789012",
    "AWS::Partition": "aws",
    "AWS::Region": "us-east-1",
    "AWS::StackName": "login-etl",
    "AWS::URLSuffix": "amazonaws.com",
}
# Parameters without a default in the template.
DEFAULTS = {"DatabaseSecretArn": "arn:aws:secretsmanager:us-east-1:123456789012:secret:database-AbCdEf"}
NO_VALUE = object()

# The translator warns of features and metrics of SAM's own service.
logging.getLogger("samtranslator").setLevel(logging.ERROR)


def expand(parameters: dict[str, object]) -> dict:
    """Expands template.yaml with SAM to a CloudFormation template; the given values become its parameters' defaults."""
    template = copy.deepcopy(source())
    for name, value in parameters.items():
        if name not in template["Parameters"]:
            raise ValueError(f"the template has no parameter {name}")
        template["Parameters"][name]["Default"] = value
    for resource in template["Resources"].values():
        # `sam deploy` replaces the directory with an S3 URI.
        if resource["Type"] == "AWS::Serverless::Function":
            resource["Properties"]["CodeUri"] = "s3://bucket/key"
    session = boto3.Session(region_name=PSEUDO_PARAMETERS["AWS::Region"])
    return Translator({}, Parser(), boto_session=session).translate(template, {})


@functools.cache
def source() -> dict:
    """template.yaml, parsed."""
    return yaml_parse((paths.ROOT / "template.yaml").read_text())


def resolve(parameters: dict[str, object]) -> dict:
    """The resources of a stack with these values, with conditions and intrinsic functions resolved.

    A reference to a resource becomes its logical id, with the attribute's name after a dot. Raises `ValueError` for an unknown function, and
    for a reference to a resource that the stack does not have.
    """
    return Resolution(parameters).section("Resources")


def outputs(parameters: dict[str, object]) -> dict[str, object]:
    """The values of the stack's outputs."""
    return {name: output["Value"] for name, output in Resolution(parameters).section("Outputs").items()}


def broken_rules(parameters: dict[str, object]) -> list[str]:
    """The messages of the template's rules that these values break; CloudFormation checks them before it creates anything."""
    return Resolution(parameters).broken_rules()


class Resolution:
    """The expanded template with a value for each parameter."""

    def __init__(self, parameters: dict[str, object]):
        self.template = expand(DEFAULTS | parameters)
        declared = self.template["Parameters"]
        self.values = PSEUDO_PARAMETERS | {name: value_of(declaration) for name, declaration in declared.items()}

    def section(self, name: str) -> dict:
        present = {key: item for key, item in self.template[name].items() if self.is_present(item)}
        return {key: self.resolve({field: value for field, value in item.items() if field != "Condition"}) for key, item in present.items()}

    def broken_rules(self) -> list[str]:
        asked = [rule for rule in self.template.get("Rules", {}).values() if self.resolve(rule.get("RuleCondition", True))]
        assertions = [assertion for rule in asked for assertion in rule["Assertions"]]
        return [assertion["AssertDescription"] for assertion in assertions if not self.resolve(assertion["Assert"])]

    def is_present(self, item: dict) -> bool:
        return "Condition" not in item or self.condition(item["Condition"])

    def condition(self, name: str) -> bool:
        return self.resolve(self.template["Conditions"][name])

    def resolve(self, value: object) -> object:
        if isinstance(value, list):
            return [item for item in map(self.resolve, value) if item is not NO_VALUE]
        if not isinstance(value, dict):
            return value
        functions = [key for key in value if key == "Ref" or key.startswith("Fn::")]
        # A policy statement has a Condition too, which is not a name.
        if len(value) == 1 and isinstance(value.get("Condition"), str):
            functions = ["Condition"]
        if functions:
            if len(value) > 1:
                raise ValueError(f"{functions[0]} is not the only key: {value}")
            return self.call(functions[0], value[functions[0]])
        resolved = {key: self.resolve(item) for key, item in value.items()}
        return {key: item for key, item in resolved.items() if item is not NO_VALUE}

    def call(self, function: str, argument: object) -> object:
        match function, argument:
            case "Ref", "AWS::NoValue":
                return NO_VALUE
            case "Ref", str(name):
                return self.values[name] if name in self.values else self.resource(name)
            case "Fn::GetAtt", _:
                return self.resource(argument if isinstance(argument, str) else ".".join(argument))
            case "Condition", str(name):
                return self.condition(name)
            case "Fn::If", [str(condition), yes, no]:
                return self.resolve(yes if self.condition(condition) else no)
            case "Fn::Sub", str(text):
                return self.substitute(text, {})
            case "Fn::Sub", [str(text), dict(values)]:
                return self.substitute(text, self.resolve(values))
        match function, self.resolve(argument):
            case "Fn::Equals", [one, other]:
                return str(one) == str(other)
            case "Fn::Not", [bool(it)]:
                return not it
            case "Fn::And", list(them):
                return all(them)
            case "Fn::Or", list(them):
                return any(them)
            case "Fn::Contains", [list(them), it]:
                return str(it) in map(str, them)
            case "Fn::FindInMap", [name, key, second]:
                return self.template["Mappings"][name][str(key)][str(second)]
            case "Fn::Join", [str(between), list(them)]:
                return between.join(map(str, them))
            case "Fn::Split", [str(between), str(text)]:
                return text.split(between)
            case "Fn::Select", [index, list(them)]:
                return them[int(index)]
        raise ValueError(f"unknown function: {function} of {argument}")

    def substitute(self, text: str, values: dict) -> str:
        known = self.values | values

        def one(match: re.Match) -> str:
            name = match[1]
            if name.startswith("!"):
                return "${" + name[1:] + "}"
            return str(known[name]) if name in known else self.resource(name)

        return re.sub(r"\$\{([^}]+)\}", one, text)

    def resource(self, reference: str) -> str:
        item = self.template["Resources"].get(reference.split(".")[0])
        if item is None or not self.is_present(item):
            raise ValueError(f"{reference} refers to no resource of this stack")
        return reference


def value_of(declaration: dict) -> object:
    """A parameter's default, with the type that a reference to it has."""
    value = declaration["Default"]
    match declaration["Type"]:
        case "Number":
            return float(value) if "." in str(value) else int(value)
        case "CommaDelimitedList":
            return [item.strip() for item in str(value).split(",")]
        case "String":
            return str(value)
    raise ValueError(f"unknown parameter type: {declaration['Type']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m world.template", description=expand.__doc__)
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    parser.add_argument("parameters", nargs="*", metavar="Name=value")
    options = parser.parse_args()
    if not all("=" in parameter for parameter in options.parameters):
        parser.error("write parameters as Name=value")
    try:
        expanded = expand(dict(parameter.split("=", 1) for parameter in options.parameters))
    except ValueError as error:
        parser.error(str(error))
    options.output.write_text(json.dumps(expanded, indent=2))


if __name__ == "__main__":
    main()
