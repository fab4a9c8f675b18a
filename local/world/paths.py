"""The local world's directories and files; all of them are disposable."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Ignores CARGO_TARGET_DIR, as setup.sh does.
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
# Checks that run in parallel have their own servers.
FUNCTION_WORLD = LOCAL / "test-function"
DEPLOYMENTS_WORLD = LOCAL / "test-deployments"
ETLCTL_WORLD = LOCAL / "test-etlctl"
KEYS_WORLD = LOCAL / "test-keys"
REMASK_WORLD = LOCAL / "test-remask"
FRESH_WORLD = LOCAL / "test-fresh"
WORLDS = (WORLD, TEST_WORLD, SOAK_WORLD, ROTATION_WORLD, INCIDENTS_WORLD, BENCH_WORLD, FUNCTION_WORLD, DEPLOYMENTS_WORLD, ETLCTL_WORLD, KEYS_WORLD, REMASK_WORLD, FRESH_WORLD)
# For the Python contenders and the plots.
BENCH_VENV = LOCAL / "bench-venv"
# The function built for deployment, and for the demo.
SAM_BUILD = LOCAL / "sam"
SAM_DEMO = LOCAL / "sam-demo"
LOGS = LOCAL / "logs"
# How to reach a kept world, in dotenv form.
ENV = LOCAL / "env"
