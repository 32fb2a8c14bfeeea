"""The child side: what runs in a worker process. Blocking code; imports nothing of the rest but the wire format."""
