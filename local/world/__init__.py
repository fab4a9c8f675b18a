"""The local world of the demo and the tests: PostgreSQL and LocalStack, on loopback, without containers."""
