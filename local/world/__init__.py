"""The world that the demo and the tests run in: PostgreSQL and LocalStack, on loopback, without containers."""
