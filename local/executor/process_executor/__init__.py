"""A LocalStack runtime executor that needs no containers.

It runs the ``bootstrap`` of a ``provided.*`` function as a process of this machine, behind the Lambda Runtime API. LocalStack loads it
when ``LAMBDA_RUNTIME_EXECUTOR=process``.

- ``executor``: one execution environment: LocalStack starts, invokes and stops it.
- ``runtime``: one run of ``bootstrap``: the process, and the Runtime API that serves it.
- ``log``: the output of the function and the platform, in Lambda's format.
- ``s3``: an S3 that keeps its objects in this LocalStack's own directory.
- ``speed``: a faster LocalStack.
"""

from localstack.services.lambda_.invocation.plugins import RuntimeExecutorPlugin


class ProcessExecutorPlugin(RuntimeExecutorPlugin):
    name = "process"

    def load(self, *args, **kwargs):
        from process_executor.executor import ProcessExecutor

        return ProcessExecutor
