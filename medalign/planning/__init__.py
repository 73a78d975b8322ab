"""What a run will need: memory per GPU, bytes on the wire, operations and time, derived from shapes. Nothing is run."""
