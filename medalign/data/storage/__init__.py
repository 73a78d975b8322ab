"""Access to shards: byte ranges of local and remote files, with retries and a cache."""
