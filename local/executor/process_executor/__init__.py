"""A LocalStack runtime executor that needs no containers.

It runs the ``bootstrap`` of a ``provided.*`` function as a process of this machine, behind the Lambda Runtime API. LocalStack loads it
when ``LAMBDA_RUNTIME_EXECUTOR=process``.

- ``executor``: one execution environment, as LocalStack sees it: starts, invokes, stops.
- ``runtime``: one run of ``bootstrap``: the process and the Runtime API it talks to.
- ``log``: what the function and the platform wrote, in the form Lambda gives it.
- ``s3``: an S3 with its objects in a directory of this LocalStack's own.
"""

from localstack.services.lambda_.invocation.plugins import RuntimeExecutorPlugin


class ProcessExecutorPlugin(RuntimeExecutorPlugin):
    name = "process"

    def load(self, *args, **kwargs):
        from process_executor.executor import ProcessExecutor

        return ProcessExecutor
