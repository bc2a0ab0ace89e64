"""Speed and memory beside the peers, and the pictures."""
