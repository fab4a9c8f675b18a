//! Compares IAM authentication tokens with those of botocore.

use std::{
    process::Command,
    time::{Duration, SystemTime},
};

use aws_credential_types::Credentials;
use login_etl::sign_in;

use crate::{masks::output, world::variable};

const BOTOCORE: &str = r#"
import datetime, json, os, sys
from unittest import mock
os.environ["BOTO_DISABLE_CRT"] = "true"
import botocore.session
for key, secret, session, region, host, port, user, seconds in json.load(sys.stdin):
    now = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
    client = botocore.session.Session().create_client(
        "rds", region_name=region, aws_access_key_id=key, aws_secret_access_key=secret, aws_session_token=session)
    with mock.patch("botocore.auth.get_current_datetime", lambda: now):
        print(client.generate_db_auth_token(host, port, user))
"#;

#[test]
fn tokens_equal_those_of_botocore() {
    let mut given = Vec::new();
    for session in [None, Some("a/session+token=".repeat(30))] {
        for user in ["login_etl", "Zoë +&=%/ ~.-_"] {
            for (region, host, port) in [
                ("us-east-1", "db.abc123.us-east-1.rds.amazonaws.com", 5432),
                ("cn-north-1", "p.proxy-x.cn-north-1.rds.amazonaws.com.cn", 6432),
            ] {
                given.push(("AKIDEXAMPLE", "secret/key+", session.clone(), region, host, port, user, 1_763_800_000));
            }
        }
    }
    let mut botocore = Command::new(variable("PYTHON"));
    botocore.args(["-c", BOTOCORE]);
    let made = output(botocore, &serde_json::to_string(&given).unwrap());
    let sorted = |token: &str| {
        let (place, parameters) = token.split_once('?').unwrap();
        let mut parameters: Vec<_> = parameters.split('&').map(ToOwned::to_owned).collect();
        parameters.sort();
        (place.to_owned(), parameters)
    };
    for ((key, secret, session, region, host, port, user, seconds), expected) in given.into_iter().zip(made.lines()) {
        let identity = Credentials::new(key, secret, session, None, "test");
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let token = sign_in::signed(&identity, region, host, port, user, time).unwrap();
        assert_eq!(sorted(&token), sorted(expected));
    }
}
