"""An S3 that keeps its objects in this LocalStack's own temporary directory, so that two users of one machine do not collide."""

from localstack.services.plugins import Service, aws_provider


@aws_provider(name="private")
def s3():
    from localstack.services.s3.provider import S3Provider
    from localstack.services.s3.storage.ephemeral import EphemeralS3ObjectStore

    # Without an argument, it makes a directory under TMPDIR.
    return Service.for_provider(S3Provider(EphemeralS3ObjectStore()))
