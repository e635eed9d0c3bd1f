"""What lies in a checkpoint's files: tensors, record, digest; read, written and described."""
