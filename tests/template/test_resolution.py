"""Tests how `world.template` resolves a template, and what it refuses."""

import pytest
from world import template

RESOURCES = {
    "Queue": {"Type": "AWS::SQS::Queue", "Properties": {}},
    "Sometimes": {"Type": "AWS::SQS::Queue", "Condition": "IsLarge", "Properties": {}},
}


def resolve(monkeypatch, properties, **parameters):
    """The resolved properties of a queue in a small template."""
    source = {
        "Parameters": {
            "DatabaseSecretArn": {"Type": "String"},
            "Size": {"Type": "Number", "Default": 1},
            "Names": {"Type": "CommaDelimitedList", "Default": "a, b"},
        },
        "Conditions": {"IsLarge": {"Fn::Equals": [{"Ref": "Size"}, "10"]}},
        "Mappings": {"Colours": {"1": {"light": "white"}}},
        "Resources": RESOURCES | {"Other": {"Type": "AWS::SQS::Queue", "Properties": properties}},
    }
    monkeypatch.setattr(template, "source", lambda: source)
    return template.resolve(parameters)["Other"]["Properties"]


def test_functions_are_resolved(monkeypatch):
    properties = {
        "number": {"Ref": "Size"},
        "list": {"Ref": "Names"},
        "resource": {"Ref": "Queue"},
        "attribute": {"Fn::GetAtt": ["Queue", "Arn"]},
        "text": {"Fn::Sub": ["${AWS::StackName} ${Size} ${x} ${Queue.Arn} ${!kept}", {"x": {"Ref": "AWS::Region"}}]},
        "joined": {"Fn::Join": ["-", [{"Ref": "Size"}, {"Fn::Select": [1, {"Fn::Split": [",", "x,y"]}]}]]},
        "found": {"Fn::FindInMap": ["Colours", {"Ref": "Size"}, "light"]},
        "left out": {"Fn::If": ["IsLarge", "large", {"Ref": "AWS::NoValue"}]},
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }
    assert resolve(monkeypatch, properties) == {
        "number": 1,
        "list": ["a", "b"],
        "resource": "Queue",
        "attribute": "Queue.Arn",
        "text": "login-etl 1 us-east-1 Queue.Arn ${kept}",
        "joined": "1-y",
        "found": "white",
        "Condition": {"Bool": {"aws:SecureTransport": "false"}},
    }
    assert resolve(monkeypatch, {"kept": {"Fn::If": ["IsLarge", {"Ref": "Sometimes"}, "small"]}}, Size="10") == {"kept": "Sometimes"}


@pytest.mark.parametrize(
    "unknown",
    [
        {"Fn::ImportValue": "there"},
        {"Fn::Base64": {"Ref": "Size"}},
        {"Ref": "Nowhere"},
        {"Fn::GetAtt": ["Nowhere", "Arn"]},
        {"Fn::Sub": "${Nowhere}"},
        {"Ref": "Sometimes"},
        {"Ref": "Size", "Fn::Sub": "two at once"},
    ],
)
def test_unknown_functions_and_references_are_refused(monkeypatch, unknown):
    with pytest.raises(ValueError):
        resolve(monkeypatch, {"value": unknown})


def test_an_unknown_parameter_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="Colour"):
        resolve(monkeypatch, {}, Colour="red")


def test_values_become_the_defaults_of_the_expanded_template():
    assert template.expand({"BatchSize": 7})["Parameters"]["BatchSize"]["Default"] == 7
