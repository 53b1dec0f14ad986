"""Files on other machines: their addresses, fetching them, and the cache that keeps them on this one."""
