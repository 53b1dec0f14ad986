"""What a million shards cost the processes of a node: opening their index, and holding it and their orders."""
