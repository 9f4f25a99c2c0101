"""Judge of anyone's invariant point attention, which names the mistake it finds."""
