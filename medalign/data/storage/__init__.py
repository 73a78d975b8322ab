"""Where bytes live: byte ranges of local and remote files, with retries and a cache."""
