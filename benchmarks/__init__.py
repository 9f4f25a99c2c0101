"""Speed and memory beside published implementations; no result is printed unless parity holds."""
