"""Files that lie elsewhere: their addresses, how they are fetched, and the cache that keeps them on this machine."""
