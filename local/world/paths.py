"""Where the local world keeps its things; all of it is disposable."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Whatever CARGO_TARGET_DIR says: ./setup.sh has it here too.
LOCAL = ROOT / "target" / "local"
# LocalStack and this package run in VENV; SAM CLI, cargo-lambda and the linters are in TOOLS.
VENV = LOCAL / "venv"
TOOLS = LOCAL / "tools"
CHECKOV = LOCAL / "checkov-venv"
WORLD = LOCAL / "world"
TEST_WORLD = LOCAL / "test"
SOAK_WORLD = LOCAL / "soak"
ROTATION_WORLD = LOCAL / "rotation"
INCIDENTS_WORLD = LOCAL / "incidents"
BENCH_WORLD = LOCAL / "bench"
# Of the checks that have servers of their own, as they run beside others.
FUNCTION_WORLD = LOCAL / "test-function"
DEPLOYMENTS_WORLD = LOCAL / "test-deployments"
ETLCTL_WORLD = LOCAL / "test-etlctl"
FRESH_WORLD = LOCAL / "test-fresh"
WORLDS = (WORLD, TEST_WORLD, SOAK_WORLD, ROTATION_WORLD, INCIDENTS_WORLD, BENCH_WORLD, FUNCTION_WORLD, DEPLOYMENTS_WORLD, ETLCTL_WORLD, FRESH_WORLD)
# What the other contenders and the plots need.
BENCH_VENV = LOCAL / "bench-venv"
# The function as it is deployed, and as the demo has it.
SAM_BUILD = LOCAL / "sam"
SAM_DEMO = LOCAL / "sam-demo"
LOGS = LOCAL / "logs"
# How to reach a kept world, in dotenv form.
ENV = LOCAL / "env"
