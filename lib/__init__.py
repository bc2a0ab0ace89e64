"""The machinery under every script: flags, ranks, checkpoints, files. Nothing here is an experiment."""
