"""An S3 whose objects lie in a temporary directory of this LocalStack's own, so that two users of one machine do not meet."""

from localstack.services.plugins import Service, aws_provider


@aws_provider(name="private")
def s3():
    from localstack.services.s3.provider import S3Provider
    from localstack.services.s3.storage.ephemeral import EphemeralS3ObjectStore

    # Without a directory given, it makes one where TMPDIR says.
    return Service.for_provider(S3Provider(EphemeralS3ObjectStore()))
