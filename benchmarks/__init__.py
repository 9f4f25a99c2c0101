"""Speed side by side with published implementations; nothing is printed unless parity holds."""
