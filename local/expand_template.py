"""Writes out the CloudFormation template that SAM makes of a SAM template: expand_template.py TEMPLATE OUTPUT"""

import json
import sys
from pathlib import Path

import boto3
from samcli.yamlhelper import yaml_parse
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator

template = yaml_parse(Path(sys.argv[1]).read_text())
for resource in template["Resources"].values():
    # What `sam deploy` puts in place of the folder.
    if resource["Type"] == "AWS::Serverless::Function":
        resource["Properties"]["CodeUri"] = "s3://bucket/key"
session = boto3.Session(region_name="us-east-1")
translator = Translator({}, Parser(), boto_session=session)
Path(sys.argv[2]).write_text(json.dumps(translator.translate(template, {}), indent=2))
