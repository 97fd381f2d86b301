"""blobpipe finds, measures and follows blobs in infrared-detector monitor images."""

__version__ = "0.1.0"
