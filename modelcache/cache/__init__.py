"""What is resident: pure, synchronous state. Nothing here awaits, reads or writes."""
